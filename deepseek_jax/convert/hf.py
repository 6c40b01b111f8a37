"""Released checkpoints in memory: `load_hf` and `save_hf` for notebooks."""

import json
import pathlib
import shutil
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from deepseek_jax import config as config_lib
from deepseek_jax.convert import (
  check,
  fp8,
  hf_config,
  names,
  official,
  orbax_io,
  sources,
  stream,
)
from deepseek_jax.convert.safetensors_io import Spec

CONFIG = 'config.json'
KEPT_CONFIG = 'hf_config.json'  # The released one, beside a workdir's own.
RECORD = 'conversion.json'  # What a directory was converted from.
BESIDE = 'beside'  # In it: files of tensors that the layout has no place for.
DTYPES = ('keep', 'bf16', 'f32', 'fp8')
_MAX_FILE = 5_000_000_000  # Bytes of tensors in one file of several.
EMBED = 'model.embed_tokens.weight'
# What else belongs to a model, copied as it is.
_COMPANIONS = (
  '*token*',
  'vocab.json',
  'merges.txt',
  'chat_template*',
  'generation_config.json',
  '*.py',
  'LICENSE*',
)
# DeepSeek's names of the tokens around a document, where no file names others.
_AROUND = {
  'bos_token': '<｜begin▁of▁sentence｜>',
  'eos_token': '<｜end▁of▁sentence｜>',
}
_TOKENIZER, _ABOUT = 'tokenizer.json', 'tokenizer_config.json'


class Checkpoint(NamedTuple):
  """A checkpoint that was opened and checked, but not read.

  Attributes:
    source: its tensors.
    config: its run's; the defaults but for the model if it is a released one.
    hf: its released `config.json`; None if there is none.
    extra: names of tensors that are no part of the model.
  """

  source: sources.Source
  config: config_lib.Config
  hf: dict[str, Any] | None
  extra: list[str]


def open_checkpoint(
  directory: str | pathlib.Path,
  use_ema: bool = False,
  keep_extra: bool = False,
) -> Checkpoint:
  """Opens a checkpoint of any kind, and checks all of it.

  Args:
    directory: of Hugging Face or official files, or a workdir.
    use_ema: the averaged parameters of a workdir.
    keep_extra: accept tensors that are no part of the model.

  Raises:
    ValueError: naming the file, key or tensor, if it is not whole.
  """
  directory = pathlib.Path(directory).expanduser()
  if not directory.is_dir():
    raise ValueError(f'{directory}: no such directory')
  _check_beside(directory)
  if (directory / orbax_io.CHECKPOINTS).is_dir():
    source = orbax_io.Workdir(directory, use_ema)
    kept = directory / KEPT_CONFIG
    hf = hf_config.read(kept) if kept.exists() else None
    extra = check.check(source, source.run.model, keep_extra=True)
    return Checkpoint(source, source.run, hf, extra)
  if use_ema:
    raise ValueError(f'--ema: {directory} is no workdir of a run')
  hf, model = _released_config(directory)
  if official.find(directory):
    source = official.Official(directory, model)
  else:
    source = sources.hugging_face(directory)
  if not source.specs:
    raise ValueError(f'{directory}: neither checkpoints/ nor safetensors files')
  model = check.without_absent_mtp(model, source)
  extra = check.check(source, model, keep_extra)
  if hf:
    hf_config.check_fp8(hf, has_fp8(source))
  return Checkpoint(source, config_lib.Config(model=model), hf, extra)


def _check_beside(directory):
  """Refuses a conversion that has lost what nothing else would miss."""
  record = directory / RECORD
  found = hf_config.read(record).get(BESIDE, []) if record.exists() else []
  for name in found:
    if not (directory / name).is_file():
      raise ValueError(
        f'{directory / name} is missing, though {record} says that tensors '
        f'are in it; to do without them take it out of {BESIDE!r} there'
      )


def _released_config(directory):
  """(config.json or None, ModelConfig)."""
  path, args = directory / CONFIG, directory / official.ARGS
  if path.exists():
    found = hf_config.read(path)
    if 'hidden_size' in found:
      return found, hf_config.to_model(found)
    return _from_args(directory, found)
  if args.exists():
    return _from_args(directory, hf_config.read(args))
  raise ValueError(
    f'{directory}: has no {CONFIG}; put the released one (or the ModelArgs of '
    'the official repository) there'
  )


def _from_args(directory, args):
  """As `_released_config`: with powers of two, which need a `config.json`."""
  model = official.from_args(args)
  if not official.is_power_of_two(args):
    return None, model
  tree = released_config(model, None, directory)
  return hf_config.with_powers_of_two(tree), model


def has_fp8(source: sources.Source) -> bool:
  """Whether any tensor is FP8."""
  return any(spec.dtype == fp8.E4M3 for spec in source.specs.values())


def cast(opened: Checkpoint, dtype: str) -> sources.Cast:
  """The tensors in another number format.

  Raises:
    ValueError: if `dtype` is none of `DTYPES`.
  """
  if dtype not in DTYPES:
    raise ValueError(f'dtype={dtype!r}: use one of {", ".join(DTYPES)}')
  is_power = hf_config.is_power_of_two(opened.hf or {})
  return sources.Cast(opened.source, opened.config.model, dtype, is_power)


def run_config(opened: Checkpoint, source: sources.Source) -> config_lib.Config:
  """The run's config; a released model computes in the dtype of `source`.

  It is evaluated a sequence at a time, not in V3's batches of 15,360.  FP8
  weights meet activations in FP8 ('activation_scheme': 'dynamic'), with the
  scales of the official `act_quant`, experts' inputs too.
  """
  if isinstance(opened.source, orbax_io.Workdir):
    return opened.config
  dtype = source.specs[EMBED].dtype.name
  updates = {'precision.compute_dtype': dtype, 'data.batch_size': 1}
  if has_fp8(source):
    scale = 'ceil' if hf_config.is_power_of_two(opened.hf or {}) else 'float32'
    fp8_updates = {'enabled': True, 'scale': scale, 'turned_scale': scale}
    updates |= {f'precision.fp8.{k}': v for k, v in fp8_updates.items()}
  return config_lib.replace(opened.config, updates)


def load_hf(
  directory: str | pathlib.Path, dtype: str = 'keep'
) -> tuple[config_lib.Config, dict[str, Any]]:
  """Reads a released checkpoint, Hugging Face's or the official layout.

  Args:
    directory: with safetensors files and `config.json`.
    dtype: 'keep', 'bf16', 'f32' or 'fp8'.

  Returns:
    (config, {'params': ..., 'router_state': ...}) as a `Transformer` of
    `config.model` takes them; router biases, which move in small steps, are
    float32 even where the files' are not.  FP8 codes stay codes with 'keep' and
    'fp8': the collection 'scales' then has their block scales at the same
    paths, float32 [in, out] / 128, rounded up; `quantize.join_scales` makes of
    both what a `Transformer` takes.  The collection 'extra' holds an MTP
    layer's own embedding or head where it is not the main one's, and, with a
    warning, tensors that are no part of the model, as numpy arrays.

  Raises:
    ValueError: naming the file, key or tensor, if the checkpoint is not whole.
  """
  import jax.numpy as jnp

  opened = open_checkpoint(directory, keep_extra=True)
  if extra := check.first_of(opened.extra):
    logging.warning('%s: no part of the model: %s', directory, extra)
  source, model = cast(opened, dtype), opened.config.model
  check.one_dtype_a_leaf(source, model)
  leaves, rest = _allocate(source, model), dict(source.specs)
  for tensor in names.with_scales(model, source.specs):
    del rest[tensor.name]
    if not tensor.copy_of:
      array = source.read(tensor.name)
      leaves[tensor.leaf][tensor.index] = tensor.to_jax(array)
    elif not source.equal(tensor.name, tensor.copy_of):
      leaves['extra', tensor.name] = source.read(tensor.name)
  leaves |= {('extra', name): source.read(name) for name in rest}
  variables = {}
  for (*path, last), array in leaves.items():
    node = variables
    for key in path:
      node = node.setdefault(key, {})
    node[last] = array if path == ['extra'] else jnp.asarray(array)
  return run_config(opened, source), variables


def _allocate(source, model):
  """Path -> an array for every leaf, those that nothing fills being zero."""
  leaves = {
    leaf: np.zeros(shape, np.float32)
    for leaf, shape in names.absent_leaves(model).items()
  }
  for leaf, tensor in names.last_of_leaves(model, source.specs).items():
    is_state = leaf[0] == 'router_state'
    dtype = np.float32 if is_state else source.specs[tensor.name].dtype
    leaves[leaf] = np.empty(tensor.leaf_shape, dtype)
  return leaves


def save_hf(
  directory: str | pathlib.Path,
  config: config_lib.Config,
  variables: dict[str, Any],
  dtype: str = 'keep',
  like: str | pathlib.Path | None = None,
) -> None:
  """Writes variables as Hugging Face files; the inverse of `load_hf`.

  Args:
    directory: is made; must not exist, or be empty.
    config: of the variables.
    variables: collections as `load_hf` returns them.
    dtype: 'keep', 'bf16', 'f32' or 'fp8'.
    like: a directory whose tokenizer and unknown config keys are kept; without
      one, config.json does not say at which token a text ends.

  Raises:
    ValueError: if the directory is not empty, the model has no released form,
      or the variables are not those of `config`.
  """
  directory = pathlib.Path(directory).expanduser()
  if directory.exists() and any(directory.iterdir()):
    raise ValueError(f'{directory} is not empty; name another')
  leaves = _flat(variables)
  extra = {path[1]: a for path, a in leaves.items() if path[0] == 'extra'}
  leaves = {path: a for path, a in leaves.items() if path[0] != 'extra'}
  hf = like and hf_config.read(pathlib.Path(like) / CONFIG)
  released_config(config.model, hf, like)  # Refuses before anything is written.
  tree = sources.Tree(config.model, leaves, _Arrays(extra) if extra else None)
  unknown = check.check(tree, config.model, keep_extra=True)
  source = cast(Checkpoint(tree, config, hf, unknown), dtype)
  stream.write(files(source), source, directory)
  write_companions(directory, source, config.model, hf, like)


class _Arrays(sources.Source):
  """Arrays in memory by their released names."""

  def __init__(self, arrays):
    self._arrays = {name: np.asarray(a) for name, a in arrays.items()}
    self.specs = {n: Spec(a.dtype, a.shape) for n, a in self._arrays.items()}

  def read(self, name):
    """The array, in the released orientation."""
    return self._arrays[name]


def _flat(tree, path=()):
  if not isinstance(tree, dict):
    return {path: np.asarray(tree)}
  flat = {}
  for key, value in tree.items():
    flat |= _flat(value, (*path, key))
  return flat


def files(source: sources.Source) -> list[stream.File]:
  """`model-00001-of-0000N.safetensors`, or one `model.safetensors`."""
  groups, size = [{}], 0
  for name, spec in source.specs.items():
    if size and size + spec.nbytes > _MAX_FILE:
      groups.append({})
      size = 0
    groups[-1][name] = stream.Part(name, spec)
    size += spec.nbytes
  n = len(groups)
  paths = [f'model-{i + 1:05d}-of-{n:05d}.safetensors' for i in range(n)]
  paths = paths if n > 1 else ['model.safetensors']
  return [stream.safetensors_file(p, g) for p, g in zip(paths, groups)]


def write_companions(
  directory: pathlib.Path,
  source: sources.Source,
  model: config_lib.ModelConfig,
  hf: dict[str, Any] | None,
  origin: str | pathlib.Path | None,
) -> None:
  """The index, `config.json` and what else a directory of files needs.

  Args:
    directory: with the files.
    source: of them.
    model: the architecture.
    hf: the `config.json` that the model came with.
    origin: where tokenizer and generation settings are copied from.
  """
  written = files(source)
  if len(written) > 1:
    index = {
      'metadata': {'total_size': sum(s.nbytes for s in source.specs.values())},
      'weight_map': {p.name: f.path for f in written for p in f.parts},
    }
    write_json(directory / sources.INDEX, index)
  write_config(directory, source, model, hf, origin)
  if origin:
    copy_companions(pathlib.Path(origin).expanduser(), directory)


def write_config(
  directory: pathlib.Path,
  source: sources.Source,
  model: config_lib.ModelConfig,
  hf: dict[str, Any] | None,
  origin: str | pathlib.Path | None,
) -> None:
  """`config.json` as Hugging Face has it; arguments as `write_companions`."""
  tree = released_config(model, hf, origin)
  dtype = source.specs[EMBED].dtype.name
  tree = hf_config.describe(tree, dtype, has_fp8(source))
  write_json(directory / CONFIG, tree)


def released_config(
  model: config_lib.ModelConfig,
  hf: dict[str, Any] | None,
  origin: str | pathlib.Path | None,
) -> dict[str, Any]:
  """`hf_config.from_model`, with the ids of the tokens around a text.

  They stay as they are in an `hf` of this `model_type`, and are those of
  `origin`'s tokenizer otherwise: `transformers` would take DeepSeek's.

  Raises:
    ValueError: as `from_model`, or if the tokenizer lacks such a token.
  """
  tree = hf_config.from_model(model, hf)
  is_kept = hf and hf.get('model_type') == tree['model_type']
  return tree if is_kept or not origin else tree | _token_ids(origin)


def _token_ids(origin):
  """`bos_token_id` and `eos_token_id`; {} if there is no tokenizer."""
  import tokenizers

  origin = pathlib.Path(origin).expanduser()
  path, about = origin / _TOKENIZER, origin / _ABOUT
  if not path.exists():
    return {}
  try:
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # `tokenizers` raises bare Exception.
    raise ValueError(f'{path} is no tokenizer.json: {error}') from None
  named = _AROUND | (hf_config.read(about) if about.exists() else {})
  added = tokenizer.get_added_tokens_decoder()
  ids = {}
  for key in _AROUND:
    token = named[key]
    token = token['content'] if isinstance(token, dict) else token
    ids[f'{key}_id'] = None if token is None else tokenizer.token_to_id(token)
    if token is not None and ids[f'{key}_id'] is None:
      raise ValueError(
        f'{key}={token!r} is no token of {path}; '
        f'{"put into" if about.exists() else "write"} {about} '
        '{"bos_token": "A", "eos_token": "B"}, where A and B are the tokens '
        'before and after a text, among '
        f'{" ".join([str(added[i].content) for i in sorted(added)[:20]])}'
      )
  return ids


def write_json(path: pathlib.Path, tree: Any) -> None:
  """Indented JSON in UTF-8."""
  text = json.dumps(tree, indent=2, ensure_ascii=False) + '\n'
  path.write_text(text, encoding='utf-8')


def copy_companions(origin: pathlib.Path, directory: pathlib.Path) -> None:
  """Copies the tokenizer and the like.

  A tokenizer alone gets the file that tells `transformers` how to load it.
  """
  for pattern in _COMPANIONS:
    for path in origin.glob(pattern):
      if path.is_file():
        shutil.copyfile(path, directory / path.name)
  tokenizer, about = directory / _TOKENIZER, directory / _ABOUT
  if tokenizer.exists() and not about.exists():
    added = hf_config.read(tokenizer).get('added_tokens', [])
    known = {token['content'] for token in added}
    about_it = {'tokenizer_class': 'PreTrainedTokenizerFast'}
    about_it |= {key: t for key, t in _AROUND.items() if t in known}
    write_json(about, about_it)
