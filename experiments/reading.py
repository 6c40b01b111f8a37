"""What programs share that read a trained model: their flags, and the reading.

`absl_flags.adopt_module_key_flags` of this module lists them under --help.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from absl import flags as absl_flags

from deepseek_jax import flags

_WORKDIR = absl_flags.DEFINE_string(
  'workdir', 'runs/quickstart', 'Directory of the run.'
)
_EMA = absl_flags.DEFINE_bool('ema', False, 'Use the averaged parameters.')
_FP8 = absl_flags.DEFINE_bool(
  'fp8',
  None,
  'Quantise the inputs of linear layers; of FP8 weights, otherwise, only the '
  'weights are (default: as the config says).',
)
flags.define_axes()


def workdir() -> pathlib.Path:
  """The directory of the run.

  Raises:
    ValueError: if there is none.
  """
  path = pathlib.Path(_WORKDIR.value).expanduser()
  if not path.is_dir():
    raise ValueError(f'--workdir={path}: no such directory')
  return path


def use_ema() -> bool:
  """Whether the averaged parameters are asked for."""
  return _EMA.value


def load(parallel: Any, changes: Mapping[str, Any]) -> Any:
  """The `Trained` model on the devices that `trained.start` has found.

  Args:
    parallel: what it returned.
    changes: leaves of the run's config that differ; None: it does not.
  """
  from deepseek_jax.training import trained

  changes = {'precision.fp8.enabled': _FP8.value, **changes}
  changes = {name: v for name, v in changes.items() if v is not None}
  return trained.load(workdir(), _EMA.value, parallel, changes)
