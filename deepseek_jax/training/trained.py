"""A trained model, read back on one device or divided over several."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from deepseek_jax import config as config_lib
from deepseek_jax.models import deepseek
from deepseek_jax.parallel import mesh as mesh_lib
from deepseek_jax.training import checkpoint, process, step
from deepseek_jax.training.layout import Layout


class Trained(NamedTuple):
  """What a run has left.

  Attributes:
    config: of the run, but for what was changed.
    model: as the run trained it.
    variables: `params` and `router_state`, float32 or as a conversion kept
      them.
    step: after which they were saved.
    layout: where they lie; None: on the default device.
  """

  config: config_lib.Config
  model: deepseek.Transformer
  variables: dict[str, Any]
  step: int
  layout: Layout | None


def start(given: Mapping[str, Any]) -> config_lib.ParallelConfig:
  """Starts the devices; where some axes are given, all devices are used.

  Args:
    given: fields of `ParallelConfig`.  `data`, if it is not among them, is what
      the other axes leave.

  Raises:
    ValueError: they ask for another number of devices than there are.
  """
  parallel = config_lib.ParallelConfig(**given)
  process.join(parallel)
  if jax.process_count() == 1 and not given.keys() - process.MEETING:
    return parallel
  rest, count = parallel.n_devices, jax.device_count()
  if 'data' not in given and count % rest == 0:
    parallel = dataclasses.replace(parallel, data=count // rest)
  mesh_lib.build(parallel)
  return parallel


def load(
  workdir: str | os.PathLike,
  use_ema: bool = False,
  parallel: config_lib.ParallelConfig = config_lib.ParallelConfig(),
  changes: Mapping[str, Any] | None = None,
) -> Trained:
  """Reads the newest checkpoint of a run; no device gets more than its part.

  Args:
    workdir: of the run, which may be going on.
    use_ema: read the averaged parameters (`optim.ema_decay`) instead.
    parallel: of `start`.
    changes: leaves of the run's config that shall differ, by their full names.

  Raises:
    ValueError: as `checkpoint.load_for_inference`, or the model and `parallel`
      do not fit one another, or other processes have other flags.
  """
  axes = dataclasses.asdict(parallel).items()
  changes = dict(changes or {}) | {f'parallel.{k}': v for k, v in axes}
  process.check_flags(str(workdir), {'ema': use_ema, **changes})

  def made(config):
    config = config_lib.replace(config, changes)
    model = step.build_model(config)
    return config, model, step.make_layout(model, config)

  def shardings(config):
    try:
      _, model, layout = made(config)
    except ValueError as error:  # The checkpoint is not damaged.
      raise checkpoint.ConfigMismatch(str(error)) from error
    return layout and _shardings(model, layout)

  config, variables, saved = checkpoint.load_for_inference(
    workdir, use_ema, shardings
  )
  config, model, layout = made(config)
  process.use_compilation_cache(config)
  return Trained(config, model, variables, saved, layout)


def _shardings(model, layout):
  state = nn.meta.unbox(step.declare(model))['router_state']
  replicated = jax.tree.map(lambda _: layout.replicated, state)
  return {
    'params': layout.params(),
    'router_state': replicated,
    'scales': layout.scales(),
  }
