"""Where tensors come from: released files, a tree in memory, another dtype.

A source names tensors as Hugging Face does and gives them in the released
orientation, whatever they are stored as.  `specs` tells dtype and shape of all
of them without reading any, in an order that reads the storage in turn.
"""

import abc
import pathlib
from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np

from deepseek_jax.config import ModelConfig
from deepseek_jax.convert import fp8, hf_config, names
from deepseek_jax.convert import safetensors_io as st
from deepseek_jax.convert.names import SCALE
from deepseek_jax.convert.safetensors_io import Extent, Spec

INDEX = 'model.safetensors.index.json'
_F32, _BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)


class Source(abc.ABC):
  """Tensors by their Hugging Face names.

  Attributes:
    specs: dtype and shape of every tensor.
    stamp: of what is read, so that a restart notices another source; JSON.
  """

  specs: dict[str, Spec]
  stamp: Any = None

  @abc.abstractmethod
  def read(self, name: str) -> np.ndarray:
    """The array; safe to call from several threads."""

  def extent(self, name: str) -> Extent | None:
    """Where the array's bytes lie, if they lie in one piece as released."""
    del name

  def cost(self, name: str) -> int:
    """Bytes that `read` holds at most, its result among them."""
    return self.specs[name].nbytes

  def equal(self, a: str, b: str) -> bool:
    """Whether two tensors are the same, byte for byte."""
    if self.specs[a] != self.specs[b]:
      return False
    places = self.extent(a), self.extent(b)
    if all(places):
      return places[0] == places[1] or st.equal(*places)
    return self.read(a).tobytes() == self.read(b).tobytes()


class Files(Source):
  """The tensors of safetensors files, named as in them."""

  def __init__(self, paths: Iterable[pathlib.Path]):
    """Reads and checks the headers of all files.

    Raises:
      ValueError: if a file is damaged, or a tensor is in two of them.
    """
    self.specs, self._extents, self.stamp = {}, {}, {}
    for path in paths:
      for name, (spec, extent) in st.read_header(path).items():
        if name in self.specs:
          other = self._extents[name].path
          raise ValueError(f'{name} is both in {other} and in {path}')
        self.specs[name], self._extents[name] = spec, extent
      stat = path.stat()
      self.stamp[path.name] = [stat.st_size, stat.st_mtime_ns]

  def read(self, name: str) -> np.ndarray:
    """The array, in the released orientation."""
    return st.read(self.specs[name], self._extents[name])

  def extent(self, name: str) -> Extent:
    """See `Source.extent`."""
    return self._extents[name]


def hugging_face(directory: pathlib.Path) -> Files:
  """A directory of safetensors files, with an index if there are several.

  Raises:
    ValueError: naming file or tensor, if index and files do not agree.
  """
  index = directory / INDEX
  if not index.exists():
    return Files(sorted(directory.glob('*.safetensors')))
  located = hf_config.read(index).get('weight_map')
  if not isinstance(located, dict) or not all(
    isinstance(file, str) for file in located.values()
  ):
    raise ValueError(f'{index} has no weight_map of names to names of files')
  paths = [directory / file for file in sorted(set(located.values()))]
  for path in paths:
    if not path.is_file():
      raise ValueError(f'{path}: the index names it, but it is missing')
  files = Files(paths)
  for name in located.keys() | files.specs.keys():
    found = files.specs.get(name) and files.extent(name).path.name
    if found != located.get(name):
      raise ValueError(
        f'{name} is in {found or "no file"}, but {INDEX} says '
        f'{located.get(name, "nothing of it")}'
      )
  return files


class Tree(Source):
  """Our variables in memory; also the base of those in a checkpoint.

  The MTP layers' own embedding and head are the main ones, unless `extra` has
  others.
  """

  def __init__(
    self, config: ModelConfig, leaves: dict[tuple, Any], extra: Source | None
  ):
    """Checks that the leaves are those of `config`.

    Args:
      config: the architecture.
      leaves: path -> stacked array, or what has its `shape` and `dtype`.
      extra: tensors without a place in the tree, as released.

    Raises:
      ValueError: naming a leaf that is missing, extra or of a wrong shape.
    """
    self._leaves, self._extra = leaves, extra
    tensors, copies = [], []
    for tensor in names.tensors(config):
      (copies if tensor.copy_of else tensors).append(tensor)
      if tensor.is_linear and tensor.scale.leaf in leaves:
        tensors.append(tensor.scale)
    shapes = {t.leaf: t.leaf_shape for t in tensors}  # The last one's.
    absent = names.absent_leaves(config)
    self._check(shapes, absent)
    for leaf in absent.keys() & leaves.keys():
      if np.any(self._slice(leaf, ())):
        raise ValueError(
          f'{"/".join(leaf)} is not zero: a softmax gate (DeepSeek-V2) has no '
          'bias in the released layout'
        )
    # By leaf: a stored chunk may hold many layers.
    tensors.sort(key=lambda t: (t.leaf[1:], t.leaf, t.index))
    self._tensors = {t.name: t for t in tensors}
    self.specs = {
      t.name: Spec(np.dtype(leaves[t.leaf].dtype), t.shape) for t in tensors
    }
    for copy in copies:
      self.specs[copy.name] = self.specs[copy.copy_of]
      self._tensors[copy.name] = self._tensors[copy.copy_of]
    if extra:
      self.specs |= extra.specs

  def _check(self, shapes, absent):
    for leaf in shapes.keys() - self._leaves.keys():
      raise ValueError(f'{"/".join(leaf)} is missing')
    for leaf in self._leaves.keys() - shapes.keys() - absent.keys():
      raise ValueError(f'{"/".join(leaf)} is no leaf of this architecture')
    for leaf, array in self._leaves.items():
      expected = shapes.get(leaf, absent.get(leaf))
      if tuple(array.shape) != expected:
        raise ValueError(
          f'{"/".join(leaf)} has shape {tuple(array.shape)}; its config says '
          f'{expected}'
        )

  def _slice(self, leaf, index):
    return np.asarray(self._leaves[leaf][index])

  def read(self, name: str) -> np.ndarray:
    """The array, in the released orientation."""
    if self._extra and name in self._extra.specs:
      return self._extra.read(name)
    tensor = self._tensors[name]
    return tensor.from_jax(self._slice(tensor.leaf, tensor.index))

  def equal(self, a: str, b: str) -> bool:
    """See `Source.equal`."""
    is_stored = self._extra and {a, b} & self._extra.specs.keys()
    is_one = not is_stored and self._tensors[a] is self._tensors[b]
    return is_one or super().equal(a, b)


class Cast(Source):
  """Another source in another number format.

  Released tensors are cast; the router's biases stay float32, and what is no
  part of the model stays as it is.  'keep' changes nothing; 'fp8' quantises
  the matrices that are FP8 in DeepSeek-V3 and makes the rest BF16.
  """

  def __init__(
    self,
    source: Source,
    config: ModelConfig,
    dtype: str,
    power_of_two: bool = False,
  ):
    """`power_of_two`: round new FP8 scales up to one, as from V3.1 on."""
    self._source, self._power_of_two = source, power_of_two
    self.stamp, self.specs = [source.stamp, dtype], {}
    kinds = {t.name: _wanted(t, dtype) for t in names.tensors(config)}
    for name, (old, shape) in source.specs.items():
      weight = name.removesuffix(SCALE)
      if weight != name and weight in kinds:
        if kinds[weight] in (None, fp8.E4M3):
          self.specs[name] = Spec(old, shape)
        continue
      new = kinds.get(name) or old
      self.specs[name] = Spec(new, shape)
      if new == fp8.E4M3 != old:
        blocks = tuple(-(-n // names.BLOCK) for n in shape)
        self.specs[name + SCALE] = Spec(_F32, blocks)

  def extent(self, name: str) -> Extent | None:
    """See `Source.extent`."""
    if self._source.specs.get(name) == self.specs[name]:
      return self._source.extent(name)
    return None

  def read(self, name: str) -> np.ndarray:
    """The array, in the released orientation."""
    dtype = self.specs[name].dtype
    if name not in self._source.specs:
      return self._scales(name.removesuffix(SCALE))
    array = self._source.read(name)
    if array.dtype == dtype:
      return array
    if array.dtype == fp8.E4M3:
      return fp8.dequantise(array, self._source.read(name + SCALE), dtype)
    if dtype == fp8.E4M3:
      return fp8.quantise(array, self._scales(name, array))
    return array.astype(dtype)

  def equal(self, a: str, b: str) -> bool:
    """See `Source.equal`."""
    return self._source.equal(a, b)  # Then they also are when they are cast.

  def cost(self, name: str) -> int:
    """See `Source.cost`."""
    size = self.specs[name].nbytes
    old = self._source.specs.get(name)
    if old == self.specs[name]:
      return self._source.cost(name)
    # Scales are made from the whole weight.
    return size + self._source.cost(name if old else name.removesuffix(SCALE))

  def _scales(self, name, array=None):
    array = self._source.read(name) if array is None else array
    try:
      return fp8.block_scales(array, self._power_of_two)
    except ValueError as error:
      raise ValueError(f'{name}: {error}') from None


def _wanted(tensor: names.Tensor, dtype: str) -> np.dtype | None:
  """The number format of a tensor after a cast; None: as it was."""
  if dtype == 'keep':
    return None
  if tensor.leaf[:1] == ('router_state',) or dtype == 'f32':
    return _F32
  return fp8.E4M3 if dtype == 'fp8' and tensor.is_linear else _BF16
