"""What layouts and the experts' exchange send, as the benchmarks say."""

import dataclasses
import subprocess
import sys

import pytest

from deepseek_jax import config as config_lib
from deepseek_jax import presets
from deepseek_jax.planner import communication
from experiments import bench_parallel


def test_rows_that_ranks_send_are_what_the_planner_expects():
  """One hop: 8 rows a token; two: one to each node, and 8 within them."""
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.bench_exchange', '--tokens=512'],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  rows = [line.split(' | ') for line in done.stdout.splitlines()[1:]]
  found = {row[0].strip(): list(map(float, row[1:])) for row in rows}
  moe = {'n_routed_experts': 64, 'n_expert_groups': 4, 'n_limited_groups': 2}
  names = {f'model.moe.{name}': n for name, n in moe.items()}
  model = config_lib.replace(presets.deepseek_v3(), names).model
  expected = {}
  for nodes in (2, 4):
    ranks, other = 8 // nodes, (nodes - 1) / nodes
    name = f'{nodes} nodes x {ranks}'
    expected[f'{name}, one hop'] = [8 * other, 8 * (ranks - 1) / 8]
    across = communication.destinations(model, nodes) * other
    expected[f'{name}, two hops'] = [across, 8 * (ranks - 1) / ranks]
  assert found.keys() == expected.keys()
  for name, sizes in expected.items():
    assert found[name] == pytest.approx(sizes, rel=0.02), name


@pytest.mark.slow
def test_a_layout_is_measured():
  """ZeRO-1 over two: half the state, and all gradients and parameters sent."""
  changes = {'n_layers': 1, 'n_dense_layers': 0, 'n_mtp_layers': 0}
  changes = {f'model.{name}': n for name, n in changes.items()}
  config = config_lib.replace(presets.tiny(), changes)
  one, two = (
    bench_parallel.measure(dataclasses.replace(config, parallel=parallel), 1)
    for parallel in (
      config_lib.ParallelConfig(),
      config_lib.ParallelConfig(data=2, zero1=True),
    )
  )
  assert one.sent == {} and two.sent.keys() == {('data',)}
  assert one.state / 2 <= two.state < 1.01 * one.state / 2
  elements = one.state / 8  # Float32, and two moments of two bytes.
  assert two.sent['data',] == pytest.approx(8 * elements / 2, rel=0.02)
  for run in (one, two):
    assert min(run.compile, run.step, run.temporary) > 0
