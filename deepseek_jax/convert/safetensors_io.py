"""The safetensors file format: headers read, checked and written.

A file is the length of a JSON header (8 bytes, little-endian), the header with
name -> dtype, shape and offsets, and the tensors' bytes.  `ml_dtypes` names
the number formats that numpy lacks.
"""

import json
import math
import os
import pathlib
import struct
from typing import NamedTuple

import ml_dtypes
import numpy as np

_NAMES = {
  'F64': 'float64',
  'F32': 'float32',
  'F16': 'float16',
  'I64': 'int64',
  'I32': 'int32',
  'I16': 'int16',
  'I8': 'int8',
  'U8': 'uint8',
  'BOOL': 'bool',
}
DTYPES = {name: np.dtype(dtype) for name, dtype in _NAMES.items()} | {
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
  'F8_E5M2': np.dtype(ml_dtypes.float8_e5m2),
}
_CODES = {dtype: name for name, dtype in DTYPES.items()}
_PAGE = 4096  # The tensors begin with one, which makes copies faster.
_COMPARED = 16 << 20
_MAX_HEADER = 100_000_000  # The limit of the reference implementation.


class Spec(NamedTuple):
  """Number format and shape of a tensor."""

  dtype: np.dtype
  shape: tuple[int, ...]

  @property
  def nbytes(self) -> int:
    """Size of the array."""
    return math.prod(self.shape) * self.dtype.itemsize


class Extent(NamedTuple):
  """Where the bytes of an array lie."""

  path: pathlib.Path
  offset: int
  nbytes: int


def read_header(path: pathlib.Path) -> dict[str, tuple[Spec, Extent]]:
  """The tensors of a file, by offset.

  Raises:
    ValueError: naming file and tensor, if the header is none, if offsets do
      not fit shapes or leave holes, or if the file is too short or too long.
  """
  size = path.stat().st_size
  with path.open('rb') as file:
    start = file.read(8)
    length = struct.unpack('<Q', start)[0] if len(start) == 8 else _MAX_HEADER
    if 8 + length > size or length > _MAX_HEADER:
      raise ValueError(f'{path}: truncated, or no safetensors file')
    text = file.read(length)
  try:
    header = json.loads(text)
    header.pop('__metadata__', None)
    rows = sorted(
      (*map(int, row['data_offsets']), name, row['dtype'], tuple(row['shape']))
      for name, row in header.items()
    )
  except (ValueError, KeyError, TypeError, AttributeError):
    raise ValueError(f'{path}: its header is no safetensors header') from None
  found, at = {}, 0
  for begin, end, name, code, shape in rows:
    if code not in DTYPES:
      raise ValueError(f'{path}: {name} has the unknown dtype {code}')
    spec = Spec(DTYPES[code], shape)
    if begin != at or end - begin != spec.nbytes:
      raise ValueError(
        f'{path}: {name} lies at {begin}:{end}, but {code}{list(shape)} begins '
        f'at {at} and has {spec.nbytes} bytes; the header is damaged'
      )
    found[name] = spec, Extent(path, 8 + length + begin, spec.nbytes)
    at = end
  if size != 8 + length + at:
    raise ValueError(
      f'{path}: {size} bytes, but its header says {8 + length + at}; the file '
      'is truncated or damaged, fetch it again'
    )
  return found


def header(specs: dict[str, Spec]) -> bytes:
  """The beginning of a file whose tensors follow in the order of `specs`."""
  rows, at = {'__metadata__': {'format': 'pt'}}, 0
  for name, spec in specs.items():
    rows[name] = {
      'dtype': _CODES[spec.dtype],
      'shape': list(spec.shape),
      'data_offsets': [at, at + spec.nbytes],
    }
    at += spec.nbytes
  text = json.dumps(rows, separators=(',', ':')).encode()
  text += b' ' * (-(8 + len(text)) % _PAGE)
  return struct.pack('<Q', len(text)) + text


def aligned(specs: dict[str, Spec]) -> dict[str, Spec]:
  """The same, widest dtype first, which aligns every tensor to its dtype."""
  order = sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize)
  return dict(order)


def read(spec: Spec, extent: Extent) -> np.ndarray:
  """The array at an extent.

  Raises:
    ValueError: if the file ends before it.
  """
  array = np.empty(spec.shape, spec.dtype)
  view = memoryview(array.reshape(-1).view(np.uint8))
  with open(extent.path, 'rb', buffering=0) as file:
    done = 0
    while done < extent.nbytes:
      got = os.preadv(file.fileno(), [view[done:]], extent.offset + done)
      if not got:
        raise ValueError(f'{extent.path}: became shorter while it was read')
      done += got
  return array


def equal(a: Extent, b: Extent) -> bool:
  """Whether two extents hold the same bytes, compared a few MB at a time."""
  if a.nbytes != b.nbytes:
    return False
  with open(a.path, 'rb') as first, open(b.path, 'rb') as second:
    for at in range(0, a.nbytes, _COMPARED):
      count = min(_COMPARED, a.nbytes - at)
      pieces = (
        os.pread(file.fileno(), count, extent.offset + at)
        for file, extent in ((first, a), (second, b))
      )
      if next(pieces) != next(pieces):
        return False
  return True
