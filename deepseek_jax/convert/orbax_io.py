"""Checkpoints that orbax restores, read and written a slice at a time.

Orbax keeps every leaf as a zarr array with a metadata file for the tree.  What
is written here has one chunk per layer and expert, uncompressed; a chunk in
Fortran order of an [in, out] slice is, byte for byte, the released [out, in]
matrix.  Reading goes through tensorstore, so that what training saved,
sharded or not, comes back a slice at a time; a chunk of it is read whole.
"""

import itertools
import json
import math
import pathlib
from typing import Any

import numpy as np

from deepseek_jax import config as config_lib
from deepseek_jax.convert import hf_config, names, stream
from deepseek_jax.convert.safetensors_io import Extent
from deepseek_jax.convert.sources import Files, Source, Tree

CHECKPOINTS = 'checkpoints'
EXTRA = 'extra.safetensors'
_STEP = '0'
_DAMAGED = 'the checkpoint is damaged: move it away to read the one before'
# How tensorstore's errors begin that are about what is stored (NOT_FOUND of a
# file, OUT_OF_RANGE of one that was cut), not about reading it here and now.
_LOST = ('NOT_FOUND', 'OUT_OF_RANGE', 'DATA_LOSS')
_CACHE = 64 << 20  # Bytes of decoded chunks kept, if none is larger.
_ZARR = {'float32': '<f4', 'float16': '<f2'}  # The rest by its own name.


class Workdir(Tree):
  """The newest checkpoint of a run, or of an earlier conversion.

  Attributes:
    run: the whole config.
    step: of the checkpoint.
  """

  def __init__(self, directory: pathlib.Path, use_ema: bool = False):
    """Reads the metadata, and looks for every chunk.

    Raises:
      ValueError: if there is no checkpoint or EMA, the newest is damaged, or
        the leaves are not those of the config.
    """
    steps = directory / CHECKPOINTS
    found = [p for p in steps.iterdir() if p.name.isdigit()]
    if not found:
      raise ValueError(f'{steps}: no checkpoint in it')
    newest = max(found, key=lambda p: int(p.name))
    meta = hf_config.read(newest / 'meta' / 'metadata')
    _require(meta, newest, 'config', 'has_ema')
    if use_ema and not meta['has_ema']:
      raise ValueError(
        f'--ema: checkpoint {newest} has none, for the run has '
        'optim.ema_decay=0; leave the flag out'
      )
    self.run = config_lib.from_dict(config_lib.Config, meta['config'])
    self.step = int(newest.name)
    leaves = _open(newest / 'model')
    if use_ema:
      averaged = _open(newest / 'ema', ('params',))
      leaves = {k: v for k, v in leaves.items() if k[0] != 'params'} | averaged
    extra = directory / EXTRA
    files = Files([extra]) if extra.exists() else None
    super().__init__(self.run.model, leaves, files)
    self.stamp = [str(newest), newest.stat().st_mtime_ns, use_ema]
    # One tensor tells of a leaf whether all lie there as released.
    first = {t.leaf: t for t in reversed(self._tensors.values())}
    self._raw = {leaf: self._directory(t) for leaf, t in first.items()}

  def _slice(self, leaf, index):
    return self._leaves[leaf][index].read().result()

  def _directory(self, tensor) -> pathlib.Path | None:
    """Where the chunks of a leaf are its tensors' released bytes."""
    spec = self._leaves[tensor.leaf].spec().to_json()
    metadata, kvstore = spec['metadata'], spec['kvstore']
    ones = [1] * len(tensor.index)
    is_raw = (
      stream.is_verbatim(tensor)
      and metadata['compressor'] is None
      and metadata['chunks'] == [*ones, *tensor.shape_jax]
      and (metadata['order'] == _order(tensor) or len(tensor.shape) == 1)
      and kvstore['driver'] == 'file'
    )
    return pathlib.Path(kvstore['path']) if is_raw else None

  def extent(self, name: str) -> Extent | None:
    """See `Source.extent`."""
    if self._extra and name in self._extra.specs:
      return self._extra.extent(name)
    tensor = self._tensors[name]
    directory = self._raw[tensor.leaf]
    if directory is None:
      return None
    return Extent(directory / _chunk(tensor), 0, self.specs[name].nbytes)


def _open(item: pathlib.Path, prefix: tuple[str, ...] = ()) -> dict[tuple, Any]:
  """The arrays of a checkpoint item by their path, not read yet."""
  # Imported here: a conversion from files needs none of it.
  import tensorstore as ts

  tree = hf_config.read(item / '_METADATA')
  _require(tree, item, 'tree_metadata', 'use_ocdbt')
  if tree.get('use_zarr3'):
    raise ValueError(f'{item}: zarr3, which is not read here')
  # As orbax has it: otherwise chunks of zeros need not be there.
  is_whole = tree.get('store_array_data_equal_to_fill_value', False)
  base, futures = item.absolute(), {}
  context = ts.Context({'cache_pool': {'total_bytes_limit': _CACHE}})
  for row in tree['tree_metadata'].values():
    path = tuple(key['key'] for key in row['key_metadata'])
    name = '.'.join(path)
    kvstore = {'driver': 'file', 'path': f'{base}/{name}/'}
    if tree['use_ocdbt']:
      kvstore = {
        'driver': 'ocdbt',
        'base': f'file://{base}/',
        'path': f'{name}/',
      }
    spec = {
      'driver': 'zarr',
      'kvstore': kvstore,
      'fill_missing_data_reads': not is_whole,
    }
    futures[(*prefix, *path)] = ts.open(spec, open=True, context=context)
  opened = {path: future.result() for path, future in futures.items()}
  for path, array in opened.items() if is_whole else ():
    _check_chunks(f'{item}: {".".join(path)}', array)
  largest = max(
    math.prod(a.chunk_layout.read_chunk.shape) * a.dtype.numpy_dtype.itemsize
    for a in opened.values()
  )
  if largest <= _CACHE // 2:
    return {path: _Leaf(array) for path, array in opened.items()}
  # Each chunk holds many slices: without room for it, each would decode it.
  limit = {'cache_pool': {'total_bytes_limit': 2 * largest}}
  context = ts.Context(limit)
  return {
    path: _Leaf(ts.open(array.spec(), open=True, context=context).result())
    for path, array in opened.items()
  }


def _check_chunks(name: str, array: Any) -> None:
  """Refuses an array that lacks a chunk, or of which a chunk was cut off."""
  spec = array.spec().to_json()
  metadata, kvstore = spec['metadata'], spec['kvstore']
  counts = (-(-n // c) for n, c in zip(metadata['shape'], metadata['chunks']))
  chunks = [
    metadata['dimension_separator'].join(map(str, index)) or '0'
    for index in itertools.product(*map(range, counts))
  ]
  if kvstore['driver'] == 'file' and metadata['compressor'] is None:
    size = math.prod(metadata['chunks']) * array.dtype.numpy_dtype.itemsize
    paths = (pathlib.Path(kvstore['path'], chunk) for chunk in chunks)
    wrong = (not p.is_file() or p.stat().st_size != size for p in paths)
  else:
    # The last byte stands for those before it, of which nobody knows how many.
    ends = [array.kvstore.read(c, byte_range=slice(-1, None)) for c in chunks]
    wrong = (not _is_there(end) for end in ends)
  for chunk in itertools.compress(chunks, wrong):
    raise ValueError(f'{name}: chunk {chunk} is missing or cut; {_DAMAGED}')


def _is_there(end: Any) -> bool:
  try:
    return bool(end.result().value)
  except ValueError as error:  # What tensorstore raises for any fault.
    if str(error).startswith(_LOST):
      return False
    raise ValueError(f'{error}; the checkpoint may be whole') from error


def _require(tree: dict[str, Any], where: pathlib.Path, *keys: str) -> None:
  for key in keys:
    if key not in tree:
      raise ValueError(f'{where}: its metadata has no {key!r}; {_DAMAGED}')


class _Leaf:
  """A tensorstore with numpy's names for shape and dtype."""

  def __init__(self, array):
    self._array, self.spec = array, array.spec
    self.shape, self.dtype = tuple(array.shape), array.dtype.numpy_dtype

  def __getitem__(self, index):
    return self._array[index]


def files(source: Source, model: config_lib.ModelConfig) -> list[stream.File]:
  """A file for every chunk, below `checkpoints/`, but no metadata.

  A layer's copy of embedding or head is left out where it is the main one's,
  byte for byte; other tensors without a place go to `extra.safetensors`.
  """
  built, rest = [], dict(source.specs)
  for tensor in names.with_scales(model, source.specs):
    if tensor.copy_of:
      if source.equal(tensor.name, tensor.copy_of):
        del rest[tensor.name]
      continue
    spec = rest.pop(tensor.name)
    path = f'{_item(tensor.leaf)}/{_chunk(tensor)}'
    part = stream.Part(tensor.name, spec, place=tensor)
    built.append(stream.File(path, (part,)))
  # A leaf's chunks one after the other: a disk likes to fill one directory.
  built.sort(key=lambda file: file.path.rpartition('/')[0])
  if rest:
    parts = {name: stream.Part(name, spec) for name, spec in rest.items()}
    built.append(stream.safetensors_file(EXTRA, parts))
  return built


def write_metadata(
  directory: pathlib.Path, source: Source, config: config_lib.Config
) -> None:
  """What makes the chunks of `files` a checkpoint of `config`."""
  leaves = {}
  last = names.last_of_leaves(config.model, source.specs)
  for leaf, tensor in last.items():
    leaves[leaf] = (
      tensor.leaf_shape,
      [*[1] * len(tensor.index), *tensor.shape_jax],
      _order(tensor),
      source.specs[tensor.name].dtype,
    )
  absent = names.absent_leaves(config.model)
  for leaf, shape in absent.items():
    leaves[leaf] = shape, list(shape), 'C', np.dtype(np.float32)
    _write(
      directory / _item(leaf) / '.'.join('0' for _ in shape),
      bytes(4 * math.prod(shape)),
    )
  for leaf, (shape, chunks, order, dtype) in leaves.items():
    zarr = {
      'zarr_format': 2,
      'shape': shape,
      'chunks': chunks,
      'dtype': _ZARR.get(dtype.name, dtype.name),
      'order': order,
      'compressor': None,
      'dimension_separator': '.',
      'fill_value': None,
      'filters': None,
    }
    _write(directory / _item(leaf) / '.zarray', json.dumps(zarr).encode())
  step = directory / CHECKPOINTS / _STEP
  tree = {
    'tree_metadata': {str(leaf): _tree_row(leaf) for leaf in leaves},
    'use_ocdbt': False,
    'use_zarr3': False,
    'store_array_data_equal_to_fill_value': True,
    'custom_metadata': None,
  }
  _write(step / 'model' / '_METADATA', json.dumps(tree).encode())
  meta = {
    'step': int(_STEP),
    'has_ema': False,
    'data_state': {},
    'config': config_lib.to_dict(config),
  }
  _write(step / 'meta' / 'metadata', json.dumps(meta).encode())


def _write(path, data):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(data)


def _tree_row(leaf):
  value = {'value_type': 'jax.Array', 'skip_deserialize': False}
  return {
    'key_metadata': [{'key': key, 'key_type': 2} for key in leaf],
    'value_metadata': value,
  }


def _item(leaf):
  return f'{CHECKPOINTS}/{_STEP}/model/{".".join(leaf)}'


def _chunk(tensor):
  """The file of a slice in a leaf's directory."""
  zeros = [0] * len(tensor.shape_jax)
  return '.'.join(map(str, [*tensor.index, *zeros]))


def _order(tensor):
  is_fortran = tensor.is_transposed and stream.is_verbatim(tensor)
  return 'F' if is_fortran else 'C'
