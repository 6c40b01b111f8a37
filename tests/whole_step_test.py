"""Whole training steps compiled for an H100 that is not there.

One process compiles the steps of a small model with V3's heads and every kind
of layer, and says what is in the programs.
"""

import functools
import json
import re
import subprocess
import sys

import pytest

from tests import deviceless

# 1,024 tokens a step, 2,048 words; 4 heads of 192 and 128.
_SMALL = {
  'model.vocab_size': 2048,
  'model.dim': 256,
  'model.inter_dim': 512,
  'model.n_layers': 3,
  'model.n_heads': 4,
  'model.moe.n_routed_experts': 8,
  'model.moe.n_activated_experts': 2,
  'model.moe.moe_inter_dim': 128,
  'data.seq_len': 512,
  'data.batch_size': 2,
}
_STEPS = {
  'bf16': {},
  'bf16_xla': {'precision.kernels': 'xla'},
  'fp8': {'precision.fp8.enabled': True},
}
_PROGRAM = """
import json, re, sys
from deepseek_jax import config, presets
from deepseek_jax.planner import parameters
from experiments import bench_gpu
small, steps = json.loads(sys.argv[1])
result = {}
for name, updates in steps.items():
  step = config.replace(presets.bench_gpu(), {**small, **updates})
  program = bench_gpu.compiled(step)
  result[name] = {
    'kernels': bench_gpu.mosaic_calls(program.hlo),
    'results': re.findall(
      r'= \\(?(\\w+\\[[\\d,]*\\]).*custom_call_target="mosaic_gpu', program.hlo
    ),
    'shapes': sorted(set(re.findall(r'\\w+\\[[\\d,]*\\]', program.hlo))),
    'arguments': program.arguments,
    'temporary': program.temporary,
    'parameters': parameters.main_model(step.model),
  }
print(json.dumps(result))
"""


@functools.cache
def _compiled():
  steps = json.dumps([_SMALL, _STEPS])
  return json.loads(deviceless.run('-c', _PROGRAM, steps).splitlines()[-1])


@pytest.mark.slow
def test_kernels_are_in_the_step():
  """Forward, dq, and dk with dv, of the dense and of the MoE layers' loop."""
  assert _compiled()['bf16']['kernels'] >= 6
  assert _compiled()['fp8']['kernels'] >= 6
  assert _compiled()['bf16_xla']['kernels'] == 0


@pytest.mark.slow
def test_the_products_of_experts_are_kernels_in_fp8_too():
  """Gradients of each expert's w1 and w3, and w2: of no other array's shape."""
  up, down = 'f32[8,256,128]', 'f32[8,128,256]'
  for name in ('bf16', 'fp8'):
    results = _compiled()[name]['results']
    assert results.count(up) >= 2 and results.count(down) >= 1, results
  assert _compiled()['fp8']['kernels'] > _compiled()['bf16']['kernels']


@pytest.mark.slow
def test_scores_exist_on_the_xla_path_only():
  """Blocks of 256 queries of 4 heads of 2 sequences."""
  scores = 'f32[2,4,256,256]'
  assert scores in _compiled()['bf16_xla']['shapes']
  assert scores not in _compiled()['bf16']['shapes']
  assert scores not in _compiled()['fp8']['shapes']


_ATTENTION = """
import jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from deepseek_jax.ops import attention
from deepseek_jax.parallel import topology
place = SingleDeviceSharding(topology.topology('h100', 1)[0])
def loss(q, k, v):
  return attention.attend(q, k, v, 0.1).astype(jnp.float32).sum()
q, v = (
  jax.ShapeDtypeStruct((1, 2048, 32, n), jnp.bfloat16, sharding=place)
  for n in (192, 128)
)
program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, q, v).compile()
print(program.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.slow
def test_xla_attention_holds_the_scores_of_one_block():
  """All eight blocks' are 302 MB, one's are 67.

  The rest is what every block adds to: dk and dv, 84 MB in float32, and the
  operands in the order of heads.
  """
  assert int(deviceless.run('-c', _ATTENTION).split()[-1]) < 400e6


@pytest.mark.slow
@pytest.mark.parametrize('name', _STEPS)
def test_logits_of_all_tokens_never_exist(name):
  """They are 1,024 x 2,048; chunks of 512 tokens do."""
  shapes = _compiled()[name]['shapes']
  whole = [s for s in shapes if re.search(r'\[(1024,2048|2,512,2048)\]', s)]
  assert not whole
  assert any(re.search(r'\[(512,2048|2,256,2048)\]', s) for s in shapes)


@pytest.mark.slow
@pytest.mark.parametrize('name', _STEPS)
def test_memory(name):
  """A parameter is 4 bytes and its moments 2 each; the rest is bounded by it.

  Besides activations the step needs gradients, 4 bytes a parameter, and the
  weights in the compute dtype, 2; where XLA does the products of FP8, it makes
  both operands float32.
  """
  step = _compiled()[name]
  state = 8 * step['parameters']
  assert state <= step['arguments'] <= 1.01 * state
  assert step['temporary'] < (2.5 if name == 'fp8' else 1.5) * state


@pytest.mark.slow
def test_fp8_codes_are_in_the_fp8_step():
  def has_codes(name):
    return any(s.startswith('f8e4m3fn[') for s in _compiled()[name]['shapes'])

  assert has_codes('fp8')
  assert not has_codes('bf16')


@pytest.mark.slow
def test_dry_run_of_the_benchmark():
  """`bench --suite=gpu --dry_run`, smaller: one dense layer."""
  small = {**_SMALL, 'model.n_layers': 1, 'model.moe.n_routed_experts': 0}
  flags = [f'--{name}={value}' for name, value in small.items()]
  out = deviceless.run(
    '-m', 'experiments.bench', '--suite=gpu', '--dry_run', *flags
  )
  rows = re.findall(
    r'^\| (BF16|FP8) \| ([\d.]+) \| ([\d.]+) \| (\d+) ', out, re.M
  )
  assert [row[0] for row in rows] == ['BF16', 'FP8'], out
  assert all(float(row[2]) > 0 and int(row[3]) >= 3 for row in rows), out


def test_the_benchmark_refuses_a_cpu():
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.bench', '--suite=gpu'],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert 'no GPU; --dry_run' in done.stderr, done.stderr
