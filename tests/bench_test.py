"""The benchmark measures equal work, and prints its table of training."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from deepseek_jax import config as config_lib
from deepseek_jax import presets
from experiments import bench_worker

_SIZE = {'model.n_layers': 2, 'data.batch_size': 2}


def _bench(*flags):
  size = [f'--{name}={value}' for name, value in _SIZE.items()]
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.bench', '--preset=tiny', '--rounds=1']
    + [*size, *flags],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return [row for row in done.stdout.splitlines() if not row.startswith('|--')]


@pytest.mark.slow
def test_training_beside_transformers_is_without_mtp():
  first, *rows = _bench('--against=transformers:eager:sdpa')
  assert first == 'without MTP, which transformers does not train'
  names = [row.split(' ')[1] for row in rows if row.startswith('| ')]
  assert names[1:] == ['deepseek_jax', 'transformers:eager:sdpa']
  assert [row.split(':')[0] for row in rows[-3:]] == [
    'train', 'forward', 'peak memory',
  ]  # fmt: skip


def test_softmax_scores_are_v2s_class():
  """V3's reads the same fields, and would compute sigmoids of them."""
  softmax = {
    'model.moe.score_func': 'softmax',
    'model.moe.group_score': 'max',
    'model.moe.norm_topk': False,
  }
  for changes, name in (softmax, 'DeepseekV2'), ({}, 'DeepseekV3'):
    config = config_lib.replace(presets.tiny(), {**_SIZE, **changes})
    worker = bench_worker.TorchWorker(config, 'eager', 'sdpa')
    assert type(worker._model).__name__ == f'{name}ForCausalLM'
    assert worker._model.dtype == torch.float32
    before = worker._model.lm_head.weight.detach().numpy().copy()
    worker.train()
    after = worker._model.lm_head.weight.detach().numpy()
    assert np.abs(after - before).max() > 0
