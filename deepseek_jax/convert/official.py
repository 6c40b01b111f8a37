"""The official inference repository's layout: `model{i}-mp{n}.safetensors`.

Rank i of n holds experts i E/n to (i + 1) E/n and a slice of every other large
matrix (`inference/convert.py` of DeepSeek-V3).  Tensors that the repository's
code has no use for, the MTP layers above all, go to `rest.safetensors`, which
it never opens: the way back loses nothing.
"""

import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from deepseek_jax import config as config_lib
from deepseek_jax.config import ModelConfig
from deepseek_jax.convert import fp8, names, stream
from deepseek_jax.convert.names import SCALE
from deepseek_jax.convert.safetensors_io import Extent, Spec
from deepseek_jax.convert.sources import Files, Source

REST = 'rest.safetensors'
ARGS = 'model_args.json'  # What generate.py takes as --config.
_SHARD = re.compile(r'model(\d+)-mp(\d+)\.safetensors')

# ModelArgs' name -> ours.
_ARGS = {
  'vocab_size': 'vocab_size',
  'dim': 'dim',
  'inter_dim': 'inter_dim',
  'moe_inter_dim': 'moe.moe_inter_dim',
  'n_layers': 'n_layers',
  'n_dense_layers': 'n_dense_layers',
  'n_heads': 'n_heads',
  'n_routed_experts': 'moe.n_routed_experts',
  'n_shared_experts': 'moe.n_shared_experts',
  'n_activated_experts': 'moe.n_activated_experts',
  'n_expert_groups': 'moe.n_expert_groups',
  'n_limited_groups': 'moe.n_limited_groups',
  'score_func': 'moe.score_func',
  'route_scale': 'moe.route_scale',
  'q_lora_rank': 'mla.q_lora_rank',
  'kv_lora_rank': 'mla.kv_lora_rank',
  'qk_nope_head_dim': 'mla.qk_nope_head_dim',
  'qk_rope_head_dim': 'mla.qk_rope_head_dim',
  'v_head_dim': 'mla.v_head_dim',
  'original_seq_len': 'rope.original_seq_len',
  'rope_theta': 'rope.theta',
  'rope_factor': 'rope.factor',
  'beta_fast': 'rope.beta_fast',
  'beta_slow': 'rope.beta_slow',
  'mscale': 'rope.mscale',
}
# ModelArgs' defaults that its config files rely on.
_DEFAULTS = {
  'n_expert_groups': 1,
  'n_limited_groups': 1,
  'score_func': 'softmax',
  'original_seq_len': 4096,
  'rope_theta': 10000.0,
  'rope_factor': 40.0,
  'beta_fast': 32.0,
  'beta_slow': 1.0,
  'mscale': 1.0,
}
# What its code does without asking.
_FIXED = {'norm_eps': 1e-6, 'tie_embeddings': False}
_UE8M0 = 'ue8m0'
_DIM_WITH_BIAS = 7168


def to_args(
  c: ModelConfig, is_fp8: bool, is_power_of_two: bool = False
) -> dict[str, Any]:
  """The `ModelArgs` of an architecture.

  Args:
    c: the architecture.
    is_fp8: whether weights are FP8; its code computes in BF16 otherwise, also
      with weights of float32.
    is_power_of_two: whether activations' FP8 scales are powers of two.

  Raises:
    ValueError: naming the field, if `ModelArgs` has no word for its value.
  """
  flat = config_lib.leaves(c)
  fixed = _FIXED | {'moe.norm_topk': c.moe.score_func == 'sigmoid'}
  for field, value in fixed.items():
    if flat[field] != value:
      raise ValueError(
        f'model.{field}={flat[field]!r}: the official code has '
        f'{value!r} (score_func={c.moe.score_func}) and no key for it; use '
        '--to=hf'
      )
  args = {name: flat[ours] for name, ours in _ARGS.items()}
  args['dtype'] = 'fp8' if is_fp8 else 'bf16'
  return args | ({'scale_fmt': _UE8M0} if is_fp8 and is_power_of_two else {})


def warn_of_gate(c: ModelConfig) -> None:
  """Says so where the official code would compute another router.

  Its `Gate` takes the width for the sign of a V3: a bias, and groups scored by
  their best two, if and only if `dim` is 7168.
  """
  is_v3 = c.moe.score_func == 'sigmoid'
  if is_v3 != (c.dim == _DIM_WITH_BIAS):
    logging.warning(
      "model.dim=%d, score_func=%s: the Gate of DeepSeek's inference/model.py "
      'has a bias, and scores groups by their best two, if and only if dim is '
      '%d: put `%s` in place of `self.dim == %d` there first',
      c.dim,
      c.moe.score_func,
      _DIM_WITH_BIAS,
      is_v3,
      _DIM_WITH_BIAS,
    )


def is_power_of_two(args: dict[str, Any]) -> bool:
  """Whether FP8 scales are powers of two, as in config_v3.1.json.

  Raises:
    ValueError: if `scale_fmt` is another.
  """
  found = args.get('scale_fmt')
  if found not in (None, _UE8M0):
    raise ValueError(f'{ARGS}: scale_fmt={found!r}: use {_UE8M0!r} or null')
  return found == _UE8M0 and args.get('dtype') == 'fp8'


def from_args(args: dict[str, Any]) -> ModelConfig:
  """The architecture of `ModelArgs`, without MTP.

  Raises:
    ValueError: if a key is missing or has a bad value.
  """
  missing = sorted(_ARGS.keys() - args.keys() - _DEFAULTS.keys())
  if missing:
    raise ValueError(f'{ARGS} has no {missing[0]!r}')
  args = _DEFAULTS | args
  is_v3 = args['score_func'] == 'sigmoid'
  leaves = {ours: args[name] for name, ours in _ARGS.items()}
  leaves |= {'n_mtp_layers': 0, 'moe.norm_topk': is_v3}
  if not is_v3:
    leaves |= {'moe.group_score': 'max', 'moe.balance': 'aux_loss'}
    leaves |= {'moe.aux_loss': 'expert'}
  return config_lib.replace(ModelConfig(), leaves)


def find(directory: pathlib.Path) -> list[pathlib.Path]:
  """The shards of a directory, rank 0 first; [] if it has none.

  Raises:
    ValueError: if ranks are missing, or there are two sets.
  """
  found = {
    tuple(map(int, match.groups())): path
    for path in directory.glob('model*-mp*.safetensors')
    if (match := _SHARD.fullmatch(path.name))
  }
  counts = sorted({n for _, n in found})
  if len(counts) > 1:
    raise ValueError(f'{directory}: shards of both mp{counts[0]} and others')
  ranks = range(counts[0]) if counts else ()
  for i in ranks:
    if (i, counts[0]) not in found:
      raise ValueError(
        f'{directory}: model{i}-mp{counts[0]}.safetensors is missing'
      )
  return [found[i, counts[0]] for i in ranks]


class Official(Source):
  """The shards of a directory, joined and under Hugging Face's names."""

  def __init__(self, directory: pathlib.Path, config: ModelConfig):
    """Reads the headers of all ranks.

    Raises:
      ValueError: naming a tensor whose slices do not fit together.
    """
    self._ranks = [Files([path]) for path in find(directory)]
    rest = directory / REST
    self._rest = Files([rest] if rest.exists() else [])
    self.stamp = [f.stamp for f in (*self._ranks, self._rest)]
    self._tensors, self.specs, used = {}, {}, [set() for _ in self._ranks]
    for tensor in _with_scales(names.tensors(config)):
      slices = _holders(tensor, config, len(self._ranks))
      found = [
        r for r, f in enumerate(self._ranks) if tensor.official in f.specs
      ]
      if not found:
        continue
      if found != list(slices):
        wrong = sorted({*found} ^ {*slices})
        what = 'is missing in rank' if wrong[0] in slices else 'belongs not in'
        raise ValueError(f'{tensor.official} {what} {wrong[0]}')
      self._tensors[tensor.name] = tensor, slices
      self.specs[tensor.name] = self._joined(tensor, slices)
      for r in slices:
        used[r].add(tensor.official)
    for rank, names_used in zip(self._ranks, used):
      # Unknown ones keep their name: `check` refuses what is extra.
      self.specs |= {n: s for n, s in rank.specs.items() if n not in names_used}
    self.specs |= self._rest.specs

  def _joined(self, tensor, slices):
    specs = [self._ranks[r].specs[tensor.official] for r in slices]
    if len(set(specs)) > 1:
      raise ValueError(f'{tensor.official} differs from rank to rank: {specs}')
    dtype, shape = specs[0]
    if tensor.split >= 0:
      shape = list(shape)
      shape[tensor.split] *= len(slices)
    return Spec(dtype, tuple(shape))

  def _is_whole(self, tensor, slices):
    return tensor.split < 0 or len(slices) == 1

  def extent(self, name: str) -> Extent | None:
    """See `Source.extent`."""
    if name not in self._tensors:
      return self._rest.extent(name)
    tensor, slices = self._tensors[name]
    if not self._is_whole(tensor, slices):
      return None
    return self._ranks[slices[0]].extent(tensor.official)

  def cost(self, name: str) -> int:
    """See `Source.cost`."""
    is_whole = self.extent(name) is not None
    return self.specs[name].nbytes * (1 if is_whole else 2)

  def read(self, name: str) -> np.ndarray:
    """The array, in the released orientation."""
    if name not in self._tensors:
      return self._rest.read(name)
    tensor, slices = self._tensors[name]
    if self._is_whole(tensor, slices):
      return self._ranks[slices[0]].read(tensor.official)
    pieces = [self._ranks[r].read(tensor.official) for r in slices]
    return np.concatenate(pieces, tensor.split)


def files(source: Source, config: ModelConfig, n: int) -> list[stream.File]:
  """The files of `n` ranks, and `rest.safetensors` if there is a rest.

  Raises:
    ValueError: naming a tensor that `n` ranks cannot share equally.
  """
  experts = config.moe.n_routed_experts
  if experts % n:
    raise ValueError(f'--mp={n}: must divide n_routed_experts={experts}')
  ranks, rest = [{} for _ in range(n)], dict(source.specs)
  for tensor in _with_scales(names.tensors(config)):
    if not tensor.official or tensor.name not in source.specs:
      continue
    spec = rest.pop(tensor.name)
    for r in _holders(tensor, config, n):
      part = stream.Part(tensor.name, spec)
      ranks[r][tensor.official] = (
        part if tensor.split < 0 else _cut(tensor, spec, r, n)
      )
    _check_blocks(tensor, source, n)
  built = [
    stream.safetensors_file(f'model{r}-mp{n}.safetensors', rank)
    for r, rank in enumerate(ranks)
  ]
  if rest:
    parts = {name: stream.Part(name, spec) for name, spec in rest.items()}
    built.append(stream.safetensors_file(REST, parts))
  return built


def _holders(tensor, config, n) -> Sequence[int]:
  """The ranks of `n` that hold a tensor: an expert's, or all."""
  if len(tensor.index) < 2:
    return range(n)
  return [tensor.index[1] * n // config.moe.n_routed_experts]


def _with_scales(tensors):
  for tensor in tensors:
    if tensor.official:
      yield tensor
      if tensor.is_linear:
        yield tensor.scale


def _cut(tensor, spec, rank, n):
  size = spec.shape[tensor.split]
  if size % n:
    raise ValueError(
      f'--mp={n}: must divide axis {tensor.split} of {tensor.name}, {size}'
    )
  shape = list(spec.shape)
  shape[tensor.split] //= n
  start = rank * shape[tensor.split]
  cut = (tensor.split, start, start + shape[tensor.split])
  return stream.Part(tensor.name, Spec(spec.dtype, tuple(shape)), cut)


def _check_blocks(tensor, source, n):
  """A rank's slice of an FP8 matrix must consist of whole blocks."""
  is_fp8 = source.specs[tensor.name].dtype == fp8.E4M3
  if not is_fp8 or tensor.split < 0 or n == 1:
    return
  size = tensor.shape[tensor.split]
  if size // n % names.BLOCK:
    raise ValueError(
      f'--mp={n}: a rank would get {size / n:g} of axis {tensor.split} of '
      f'{tensor.name}, which cuts blocks of {names.BLOCK} with one '
      f'{SCALE[1:]}; use fewer ranks or --dtype=bf16'
    )
