"""`experiments.compile`: programs for GPUs that are not here."""

import collections
import os
import re
import subprocess
import sys

import jax
import pytest

from deepseek_jax import config, presets
from deepseek_jax.training import ahead
from tests import deviceless

_TINY = ('--preset=tiny', '--data.seq_len=128', '--model.n_mtp_layers=0')


def _compile(*flags):
  """(memory of arguments and beyond in GB, rows of the table of collectives)"""
  text = deviceless.run('-m', 'experiments.compile', *_TINY, *flags)
  memory = re.search(r'(\S+) GB of arguments, (\S+) GB more', text)
  rows = [line.split(' | ') for line in text.splitlines() if '| ' in line]
  found = {(row[0][2:], row[1], row[2]): row[3] for row in rows[1:]}
  return text, [float(size) for size in memory.groups()], found


@pytest.mark.slow
def test_a_step_and_what_it_communicates():
  flags = ['--parallel.data=2', '--parallel.fsdp=2', '--parallel.zero1']
  text, (arguments, temporary), found = _compile('--model.n_layers=2', *flags)
  assert '\n4 devices; ' in text  # After the choices of kernels.
  planned = re.search(r'planned: (\S+) GB of state', text)
  # Vectors are not divided: a little more than the planner says.
  assert 1 <= arguments / float(planned.group(1)) < 1.05
  assert temporary > 0
  over = {(axes, kind) for axes, kind, _ in found}
  assert {('fsdp', 'all-gather'), ('fsdp', 'reduce-scatter')} <= over
  assert {('data', 'all-gather'), ('data', 'reduce-scatter')} <= over


@pytest.mark.slow
def test_a_moe_layer_over_two_nodes():
  flags = ['--parallel.node=2', '--parallel.expert=2']
  _, (arguments, _), found = _compile('--what=moe_layer', *flags)
  assert arguments > 0
  # Dispatch and combine forwards and backwards, and the gate weights both ways.
  for axis in ('node', 'expert'):
    assert found[axis, 'ragged-all-to-all', 'f32'] == '6'
  assert found['node+expert', 'all-reduce', 'f32']
  assert not any(kind == 'all-gather' for _, kind, of in found if of == 'f32')


def _exchanges(*flags):
  """By the part of the program, for each exchange of rows there: (MB, shares).

  The shares are those of the part's products which may run beside it, and which
  XLA has scheduled so.
  """
  flags = ['--overlap', '--model.n_dense_layers=0', *flags]
  _, _, table = _compile(*flags)[0].partition('| in | over |')
  found = collections.defaultdict(list)
  for row in (line.strip('| ').split(' | ') for line in table.splitlines()[2:]):
    if row[2:4] == ['ragged-all-to-all', 'f32']:
      size, beside, scheduled, whole = map(float, row[4:])
      found[row[0]].append((size, beside / whole, scheduled / whole))
  return list(found.values())


# They are beside every forward exchange, whoever else is.
_NO_SHARED = '--model.moe.n_shared_experts=0'


@pytest.mark.slow
def test_halves_hide_each_others_exchanges():
  """Of two hops, forwards and backwards (V3 section 3.4.1)."""
  nodes = ['--parallel.node=2', '--parallel.expert=2']
  nodes += ['--model.n_layers=2', '--parallel.expert_buffer=0']

  def hidden(part):
    """How much of what is sent has a tenth of the products beside it."""
    total = sum(size for size, *_ in part)
    return sum(size for size, share, _ in part if share > 0.1) / total

  parts = _exchanges(*nodes, '--parallel.interleave')
  assert len(parts) == 2
  for part in parts:
    # The last to come back has only the other half's shared experts.
    assert min(share for _, share, _ in part) > 0.05
    assert _scheduled(part) > 0
    assert hidden(part) > 0.7
  # Without halves nothing else is beside the forward pass's.
  assert min(map(hidden, _exchanges(*nodes, _NO_SHARED))) == 0


@pytest.mark.slow
def test_the_passes_of_a_pair_hide_each_others_exchanges():
  """DualPipe's (V3 figure 4) of two layers; alone, a forward pass has no more
  beside its exchanges than shared experts.
  """
  stages = ['--parallel.stage=2', '--parallel.expert=2', '--model.n_layers=4']
  parts = _exchanges(*stages, '--parallel.microbatches=4')
  # 3 exchanges a layer forwards, 3 backwards, and both.
  *alone, pair = sorted(parts, key=len)
  assert [len(part) for part in (*alone, pair)] == [6, 6, 12]
  assert min(share for _, share, _ in pair) > 0.08
  assert _scheduled(pair) >= len(pair) / 2
  forward = min(alone, key=lambda part: max(share for _, share, _ in part))
  assert max(share for _, share, _ in forward) < 0.07


def _scheduled(part):
  """Exchanges beside which XLA has put a product."""
  return sum(share > 0 for *_, share in part)


@pytest.mark.slow
@pytest.mark.parametrize(
  'flags, kernels',
  [
    (['--what=prefill'], set()),
    (['--what=decode', '--speculative=1'], {'1x2x8x192 1x192x192'}),
  ],
)
def test_generation_on_four_devices(tmp_path, flags, kernels):
  """A text each; the experts, and what is not theirs, stay where they are.

  Attention's kernel takes a device's own rows, and no pass joins matrices, of
  32 rows, the model's width, before it reads them.
  """
  hlo = tmp_path / 'hlo'
  flags += [f'--hlo={hlo}']
  flags += ['--parallel.node=2', '--parallel.expert=2', '--data.batch_size=4']
  flags += ['--precision.compute_dtype=bfloat16', '--model.n_heads=8']
  flags += ['--model.mla.kv_lora_rank=128', '--model.mla.qk_rope_head_dim=64']
  flags += ['--model.n_mtp_layers=1', '--model.n_layers=2']
  text, (arguments, temporary), found = _compile(*flags)
  assert set(re.findall(r'kernels: decode (.*): mosaic', text)) == kernels
  assert arguments > 0 and temporary > 0
  for axis in ('node', 'expert'):
    assert (axis, 'ragged-all-to-all', 'bf16') in found
  assert not any(kind == 'all-gather' for _, kind, of in found if of != 's32')
  if kernels:
    joined = r'= bf16\[(\d+,)?32,\d+\]\S* concatenate\('
    assert not re.search(joined, hlo.read_text())


@pytest.mark.parametrize(
  'flags, message',
  [
    (['--what=decode', '--speculative=1'], 'n_mtp_layers=0: use 0'),
    (['--speculative=1'], '--what=train_step'),
    (['--topology=a100'], 'use one of h100, h200'),
    ([], 'needs jax-cuda13-plugin'),
    (['--what=attention'], 'moe_layer'),
  ],
)
def test_a_mistake_is_one_line(flags, message):
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.compile', *_TINY, *flags],
    env={**os.environ, 'PYTHONPATH': ''},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2, done.stderr
  assert message in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_dense_model_has_no_moe_layer():
  dense = config.replace(presets.tiny(), {'model.moe.n_routed_experts': 0})
  with pytest.raises(ValueError, match='n_routed_experts=0'):
    ahead.moe_layer(dense, jax.devices()[:1])
