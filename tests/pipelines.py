"""Three training steps of a pipeline beside those of one device.

By hand, for what a compiled step costs to compile: the gradients are the
pipeline's, the optimizer's part is compiled once, for one device.
"""

import dataclasses
import functools
import pathlib
import pickle
import time
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import serialize_executable
from jax.sharding import NamedSharding

from deepseek_jax import config as config_lib
from deepseek_jax import presets
from deepseek_jax.training import layout as layout_lib
from deepseek_jax.training import optimizer
from deepseek_jax.training import schedules as training_schedules
from deepseek_jax.training import step as step_lib
from tests import tolerances

STEPS = 3
_SMALL = {
  'model.vocab_size': 64,
  'model.dim': 16,
  'model.inter_dim': 24,
  'model.n_layers': 4,
  'model.n_dense_layers': 1,
  'model.n_mtp_layers': 1,
  'model.moe.n_routed_experts': 4,
  'model.moe.n_expert_groups': 2,
  'model.moe.n_limited_groups': 1,
  'model.moe.moe_inter_dim': 8,
  'data.seq_len': 16,
  'data.batch_size': 16,
  'optim.alpha': '0.01',
  'optim.clip_norm': 0.1,
  'train.remat': 'selective',
  'precision.compute_dtype': 'float32',
  'precision.mu_dtype': 'float32',
  'precision.nu_dtype': 'float32',
}

# Updates of cases.
EXPERTS = ('parallel.expert', 2)
SHARED = (EXPERTS, ('parallel.microbatches', 4))  # By two more axes of two.
# A dense layer and two of experts.
THREE_LAYERS = (('model.n_layers', 3),)


@dataclasses.dataclass(frozen=True)
class Case:
  """A small MLA and MoE model with MTP, under a schedule.

  Attributes:
    schedule: by name.
    stage: ranks of the pipeline; 1: there is none.
    updates: of the config.
  """

  schedule: str
  stage: int
  updates: tuple = ()

  @property
  def alone(self) -> tuple:
    """The updates that also hold on one device."""
    return tuple(u for u in self.updates if not u[0].startswith('parallel.'))

  @property
  def config(self) -> config_lib.Config:
    """Raises ValueError if it is none."""
    updates = _SMALL | dict(self.updates)
    pipeline = {
      'parallel.stage': self.stage,
      'parallel.schedule': self.schedule,
      'parallel.microbatches': min(8, updates['data.batch_size'] // 2),
    }
    return config_lib.replace(presets.tiny(), pipeline | updates)


def batch(config: config_lib.Config, step: int) -> dict[str, np.ndarray]:
  """[M, b, T + 1]: two documents a row, and padding at some ends."""
  rng = np.random.default_rng(step)
  shape = config.data.batch_size, config.data.seq_len + 1
  tokens = rng.integers(1, config.model.vocab_size, shape).astype(np.int32)
  segments = (
    1 + (np.arange(shape[1]) > 9).astype(np.int32) + np.zeros_like(tokens)
  )
  segments[::6, -4:] = 0
  whole = {'tokens': tokens * (segments > 0), 'segments': segments}
  cut = config.parallel.microbatches, -1, shape[1]
  return jax.tree.map(lambda x: x.reshape(cut), whole)


def make_layout(model: Any, config: config_lib.Config):
  """On the first devices, as many as are asked for."""
  devices = jax.devices()[: config.parallel.n_devices]
  return layout_lib.make(step_lib.declare(model), config, devices)


def _optimizer(config):
  return optimizer.adamw(config.optim, config.precision)


@functools.cache
def _update(updates):
  """The optimizer's part of a step, compiled once, on one device."""
  config = Case('1f1b', 1, updates).config
  tx = _optimizer(config)

  @jax.jit
  def update(params, opt_state, router_state, grads, stats, hyper):
    changes, opt_state = tx.update(grads, opt_state, params, lr=hyper.lr)
    router_state = step_lib.update_router_state(
      router_state, stats, hyper, config
    )
    return optax.apply_updates(params, changes), opt_state, router_state

  return update


def _place(tree, shardings):
  """Arrays that every process has whole, on the devices of all."""

  def place(x, sharding):
    return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

  return jax.tree.map(place, tree, shardings)


def _compile_once(function, arguments, path):
  """Compiled by the first process; the others read what it has written."""
  if jax.process_index() == 0:
    compiled = function.lower(*arguments).compile()
    new = path.with_suffix('.new')
    new.write_bytes(pickle.dumps(serialize_executable.serialize(compiled)))
    new.rename(path)
    return compiled
  while not path.exists():
    time.sleep(0.05)
  return serialize_executable.deserialize_and_load(
    *pickle.loads(path.read_bytes()), execution_devices=jax.devices()
  )


def train(
  case: Case,
  own: Any,
  before: list | None = None,
  folder: pathlib.Path | None = None,
) -> list:
  """Of every step: (gradients, report) and (params, opt_state, router_state).

  The first begins with `own`, each other where the one before ended, or with
  those of `before`.  Several processes share a `folder` for their programs.
  """
  config = case.config
  model = step_lib.build_model(config)
  layout = make_layout(model, config)
  schedule = training_schedules.Schedule(config)
  gradients = jax.jit(
    step_lib.make_gradients(model, config, step_lib.pretrain_loss, layout),
    # Several processes can look only at what each has whole.
    out_shardings=layout.replicated if folder else None,
  )
  results = []
  for step in range(STEPS):
    if before and step:
      own = before[step - 1][1]
    params, opt_state, router_state = own
    rows, hyper = batch(config, step), schedule.at(step)
    totals = step_lib.batch_totals(rows, config)
    totals = jax.tree.map(np.asarray, totals)
    placed = params
    if layout:
      placed = _place(params, layout.params())
      divided = NamedSharding(layout.mesh, layout.batch_spec)
      rows = _place(rows, dict.fromkeys(rows, divided))
    arguments = placed, router_state, rows, hyper, totals
    if folder and not step:
      path = folder / case.schedule
      gradients = _compile_once(gradients, arguments, path)
    grads, report = jax.tree.map(np.asarray, gradients(*arguments))
    own = _update(case.alone)(*own, grads, report['stats'], hyper)
    own = jax.tree.map(np.asarray, own)
    results.append(((grads, report), own))
  return results


@functools.cache
def one_device(updates: tuple) -> tuple[Any, list]:
  """(what the first step begins with, the results of `train`)."""
  case = Case('1f1b', 1, updates)
  model = step_lib.build_model(case.config)
  state = step_lib.init_state(model, _optimizer(case.config), 0)
  own = state.params, state.opt_state, state.router_state
  own = jax.tree.map(np.asarray, own)
  return own, train(case, own)


def compare(results: list, expected: list, rung: float) -> None:
  """Asserts that the results of `train` are the same."""
  for step, (actual, wanted) in enumerate(zip(results, expected, strict=True)):
    tolerances.assert_close(actual[0], wanted[0], rung, f'step {step}')
    for name, stats in wanted[0][1]['stats'].items():
      counts = actual[0][1]['stats'][name].counts_E
      np.testing.assert_array_equal(counts, stats.counts_E)
    for i in (0, 2):  # Parameters and biases.
      tolerances.assert_close(actual[1][i], wanted[1][i], rung, f'{step}')
