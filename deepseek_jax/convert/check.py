"""Checks a source against its config before anything is written."""

import dataclasses
from collections.abc import Iterable

import ml_dtypes
import numpy as np

from deepseek_jax.config import ModelConfig
from deepseek_jax.convert import fp8, names
from deepseek_jax.convert.names import SCALE
from deepseek_jax.convert.sources import Source

_FLOATS = tuple(map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16)))


def check(
  source: Source, config: ModelConfig, keep_extra: bool = False
) -> list[str]:
  """Compares every tensor with what `config` asks for, and reads the scales.

  Args:
    source: of tensors.
    config: their architecture.
    keep_extra: carry tensors that are no part of the model along.

  Returns:
    Names of the tensors that are no part of the model.

  Raises:
    ValueError: naming tensors that are missing, extra, of a wrong shape or
      dtype, and scales that are not finite and above 0.
  """
  known, specs = {}, source.specs
  for tensor in names.tensors(config):
    known[tensor.name] = tensor.shape
    if tensor.is_linear and _is_fp8(specs, tensor.name):
      known[tensor.scale.name] = tensor.scale.shape
    elif _is_fp8(specs, tensor.name):
      raise ValueError(f'{tensor.name} is FP8, which only linears are')
  _refuse('missing', (name for name in known if name not in specs))
  extra = [name for name in specs if name not in known]
  if not keep_extra:
    _refuse('extra, no part of this architecture', extra)
  for name, shape in known.items():
    spec, is_scale = specs[name], name.endswith(SCALE)
    if tuple(spec.shape) != shape:
      raise ValueError(
        f'{name} has shape {tuple(spec.shape)}; config.json says {shape}'
      )
    allowed = (_FLOATS[0],) if is_scale else (*_FLOATS, fp8.E4M3)
    if spec.dtype not in allowed:
      raise ValueError(
        f'{name} is {spec.dtype}; use {", ".join(map(str, allowed))}'
      )
  for name in known:
    if name.endswith(SCALE):
      fp8.check_scales(name, source.read(name))
  return extra


def without_absent_mtp(config: ModelConfig, source: Source) -> ModelConfig:
  """The config without MTP, if the source has nothing of its MTP layers.

  Conversions by others often leave them out.
  """
  if not config.n_mtp_layers:
    return config
  first = f'model.layers.{config.n_layers}.'
  if any(name.startswith(first) for name in source.specs):
    return config
  return dataclasses.replace(config, n_mtp_layers=0)


def one_dtype_a_leaf(source: Source, config: ModelConfig) -> None:
  """Refuses layers of different dtypes, which cannot be stacked.

  Raises:
    ValueError: naming two tensors.
  """
  first = {}
  for tensor in names.tensors(config):
    if tensor.leaf:
      dtype = source.specs[tensor.name].dtype
      name, other = first.setdefault(tensor.leaf, (tensor.name, dtype))
      if other != dtype:
        raise ValueError(
          f'{name} is {other}, {tensor.name} {dtype}: layers are stacked and '
          'need one dtype; convert with --dtype'
        )


def _is_fp8(specs, name):
  return name in specs and specs[name].dtype == fp8.E4M3


def first_of(found: Iterable[str]) -> str:
  """The first three in words, and how many more; '' if there is none."""
  found = sorted(found)
  more = f' and {len(found) - 3} more' if len(found) > 3 else ''
  return ', '.join(found[:3]) + more


def _refuse(what: str, found: Iterable[str]) -> None:
  if listed := first_of(found):
    raise ValueError(f'{what}: {listed}')
