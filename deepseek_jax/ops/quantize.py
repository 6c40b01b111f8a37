"""Fine-grained quantisation: one scale per tile (V3 section 3.3.2).

A `Quantized` array is codes and scales, a pytree: it goes through `jit`, is
sharded, saved and restored like any other.  Tiles lie in the last two axes:
1 x 128 for activations and gradients, 128 x 128 for weights, 128 x 1 along the
tokens for the operands of a weight gradient.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.config import SCALES
from deepseek_jax.ops import formats

BLOCK = 128
# Tile shapes [rows, columns]; 0 is the whole extent.
ROW_TILE = (1, BLOCK)
COLUMN_TILE = (BLOCK, 1)
SQUARE_TILE = (BLOCK, BLOCK)
WHOLE = (0, 0)

# A tile's amax counts as this at least.  Of weights and activations as in
# DeepSeek's `act_quant`.
MIN_AMAX = 1e-4
# Of output gradients: those of a mean over V3's 62.9M tokens lie far below.
GRADIENT_MIN_AMAX = 0.0
# 2^-126: normal in float32 and in E8M0, and so is its reciprocal.
MIN_SCALE = 2.0**-126
# A tile's amax is stored as this at most, which 6 exponent bits have: more
# would leave float32 no room for products and their sums.
_MAX_CODE = 2.0**33


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('codes', 'scales'),
  meta_fields=('tile', 'fmt'),
)
@dataclasses.dataclass(frozen=True)
class Quantized:
  """An array as `codes * scales`.

  Attributes:
    codes: [..., I, J] in `fmt.dtype`, or integers of the same bits.
    scales: float32 [..., ceil(I / rows), ceil(J / columns)], or E8M0: see
      `narrow`.  Those of a weight with heads are of its matrix: see `matrix`.
    tile: (rows, columns) that share a scale; 0 is the whole extent.
    fmt: of the codes.
  """

  codes: jax.Array
  scales: jax.Array
  tile: tuple[int, int]
  fmt: formats.Format

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the array it stands for."""
    return self.codes.shape

  @property
  def nbytes(self) -> float:
    """Bytes of codes, as many bits as the format has, and of scales."""
    return self.codes.size * self.fmt.bits / 8 + self.scales.nbytes

  @property
  def raw(self) -> 'Quantized':
    """The same codes as integers, which is how they go through loops.

    With float8 in loops and gathers, XLA's CPU backend (jaxlib 0.10.2) takes
    E4M3 numbers above 240 for NaN, even elsewhere in the program.
    """
    if self.fmt.dtype.itemsize > 1 or self.codes.dtype == jnp.uint8:
      return self
    codes = jax.lax.bitcast_convert_type(self.codes, jnp.uint8)
    return dataclasses.replace(self, codes=codes)

  @property
  def narrow(self) -> 'Quantized':
    """The same with a byte a scale, to be sent; they are powers of two."""
    return dataclasses.replace(self, scales=formats.encode_e8m0(self.scales))

  def matrix(self, rows: int) -> 'Quantized':
    """[rows, J], of a weight [*in, *out] whose heads are split."""
    return dataclasses.replace(self, codes=self.codes.reshape(rows, -1))

  @property
  def mT(self) -> 'Quantized':
    """Its transpose in the last two axes; no number changes."""
    return Quantized(self.codes.mT, self.scales.mT, self.tile[::-1], self.fmt)

  def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
    """`codes * scales` in float32, rounded once to `dtype`."""
    values, scales = formats.decode(self.codes, self.fmt), self.scales
    if scales.dtype == jnp.uint8:
      scales = formats.decode_e8m0(scales)
    return (values * expand(scales, self.tile, self.shape)).astype(dtype)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('pairs', 'scales'),
  meta_fields=('tile', 'fmt'),
)
@dataclasses.dataclass(frozen=True)
class Packed:
  """A `Quantized` array of 12-bit codes, two in three bytes.

  Attributes:
    pairs: uint8 [..., I, J / 2, 3].
    scales: as of `Quantized`.
    tile: likewise.
    fmt: likewise.
  """

  pairs: jax.Array
  scales: jax.Array
  tile: tuple[int, int]
  fmt: formats.Format


def pack(q: Quantized) -> Quantized | Packed:
  """`q` in fewer bytes, if its codes have 12 bits and are even in number."""
  if q.fmt.bits != 12 or q.shape[-1] % 2:
    return q
  a, b = q.codes[..., ::2], q.codes[..., 1::2]
  pairs = jnp.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], -1)
  return Packed(pairs.astype(jnp.uint8), q.scales, q.tile, q.fmt)


def unpack(p: Quantized | Packed) -> Quantized:
  """The inverse of `pack`."""
  if isinstance(p, Quantized):
    return p
  x, y, z = (p.pairs[..., i].astype(jnp.uint16) for i in range(3))
  codes = jnp.stack([x << 4 | y >> 4, (y & 15) << 8 | z], -1)
  codes = codes.reshape(*p.pairs.shape[:-2], -1)
  return Quantized(codes, p.scales, p.tile, p.fmt)


def _extents(tile, shape):
  return tuple(t or n for t, n in zip(tile, shape[-2:]))


def expand(
  scales: jax.Array, tile: tuple[int, int], shape: tuple[int, ...]
) -> jax.Array:
  """Each tile's scale at all its places, broadcast to `shape`."""
  for axis, size in zip((-2, -1), _extents(tile, shape)):
    if scales.shape[axis] > 1:
      scales = jnp.repeat(scales, size, axis)
      scales = jax.lax.slice_in_dim(scales, 0, shape[axis], axis=axis)
  return jnp.broadcast_to(scales, shape)


def tile_amax(x: jax.Array, tile: tuple[int, int]) -> jax.Array:
  """The largest magnitude in each tile: float32, NaN where one is NaN."""
  rows, columns = _extents(tile, x.shape)
  *batch, I, J = x.shape
  counts = math.ceil(I / rows), math.ceil(J / columns)
  widths = [(0, 0)] * len(batch)
  widths += [(0, counts[0] * rows - I), (0, counts[1] * columns - J)]
  # As bits, magnitudes are in order and NaN above them all: the float maximum
  # of XLA's vectorised CPU loops loses a NaN.
  bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
  padded = jnp.pad(bits & 0x7FFFFFFF, widths)
  tiles = padded.reshape(*batch, counts[0], rows, counts[1], columns)
  return jax.lax.bitcast_convert_type(tiles.max((-3, -1)), jnp.float32)


def scale_of(
  amax: jax.Array,
  fmt: formats.Format,
  scale: str = 'float32',
  min_amax: float = MIN_AMAX,
) -> jax.Array:
  """The scale under which a tile with this `amax` is stored.

  Args:
    amax: float32.
    fmt: of the codes.
    scale: 'float32': amax / fmt.max, V3's online scale.  'ceil': the power of
      two above it, so that nothing is clipped; V3.1's, and the dispatch's.
      'floor': the power of two of amax less that of fmt.max, as in the OCP
      microscaling formats; values above fmt.max are clipped.  Instead of
      fmt.max, 2^33 where it is more.
    min_amax: `amax` is taken as at least this; `GRADIENT_MIN_AMAX` for output
      gradients.

  Returns:
    float32, at least 2^-126, so that zeros have a scale too; infinite or NaN
    where `amax` is.

  Raises:
    ValueError: for another `scale`.
  """
  amax = jnp.maximum(amax, min_amax)
  largest = min(fmt.max, _MAX_CODE)
  if scale == 'floor':
    largest = 2.0 ** math.floor(math.log2(largest))
    amax = formats.floor_power_of_two(amax)
  # Else XLA multiplies by the rounded reciprocal of a constant or scalar.
  largest = jax.lax.optimization_barrier(jnp.full_like(amax, largest))
  scales = jnp.maximum(amax / largest, MIN_SCALE)
  if scale in ('float32', 'floor'):
    return scales
  if scale == 'ceil':
    return formats.ceil_power_of_two(scales)
  raise ValueError(f'scale={scale!r}: choose one of {", ".join(SCALES)}')


@functools.partial(
  jax.jit, static_argnames=('tile', 'fmt', 'scale', 'min_amax'), inline=True
)
def quantize(
  x: jax.Array,
  tile: tuple[int, int],
  fmt: formats.Format = formats.E4M3,
  scale: str = 'float32',
  amax: jax.Array | None = None,
  min_amax: float = MIN_AMAX,
) -> Quantized:
  """Rounds `x` to `fmt`, tile by tile, to nearest, ties to even.

  A NaN or an infinity makes its whole tile NaN, never a finite number (in
  formats without NaN or infinity there is none to make).  Ragged edges are
  tiles like any other.

  Args:
    x: [..., I, J], float32 or narrower.
    tile: rows and columns that share a scale; 0 is the whole extent.
    fmt: of the codes.
    scale: see `scale_of`.
    amax: magnitudes to scale by instead of the tiles' own, as delayed scaling
      does; what is larger is clipped.
    min_amax: see `scale_of`.
  """
  if amax is None:
    amax = tile_amax(x, tile)
  scales = scale_of(amax, fmt, scale, min_amax)
  divisor = expand(scales, tile, x.shape)
  codes = formats.encode(x.astype(jnp.float32) / divisor, fmt)
  return Quantized(codes, scales, tile, fmt)


def requantize(
  q: Quantized,
  tile: tuple[int, int],
  fmt: formats.Format = formats.E4M3,
  scale: str = 'float32',
  min_amax: float = MIN_AMAX,
) -> Quantized:
  """The same values in other tiles: how a saved activation meets Wgrad.

  With powers of two and the same format, a value is rounded again only where
  its new scale is larger than its old one.
  """
  return quantize(q.dequantize(), tile, fmt, scale, min_amax=min_amax)


def join_scales(variables: dict[str, Any]) -> dict[str, Any]:
  """Variables in which FP8 codes and their scales are one `Quantized` leaf.

  Args:
    variables: collections of a converted checkpoint; 'scales', if it is there,
      has the scales of 128 x 128 blocks at the paths of the codes in 'params',
      as `convert.load_hf` returns them.
  """

  def join(codes, scales):
    if not isinstance(codes, dict):
      return Quantized(codes, scales, SQUARE_TILE, formats.E4M3).raw
    return {
      name: join(inner, scales[name]) if name in scales else inner
      for name, inner in codes.items()
    }

  rest = dict(variables)
  scales = rest.pop('scales', {})
  return {**rest, 'params': join(rest['params'], scales)}


def dense(w: jax.Array | Quantized, dtype: Any, axes: int = 1) -> jax.Array:
  """A weight [*in, *out] in `dtype`, whether quantised or not.

  Args:
    w: the weight.
    dtype: of the result.
    axes: how many axes `in` are.

  Raises:
    ValueError: if it is FP8 without scales.
  """
  if isinstance(w, Quantized):
    matrix = w.matrix(math.prod(w.shape[:axes]))
    return matrix.dequantize(dtype).reshape(w.shape)
  if w.dtype.itemsize == 1:
    raise ValueError(
      f'a weight of {w.dtype.name} has no scales: `quantize.join_scales` the '
      'variables first'
    )
  return w.astype(dtype)


def is_leaf(x: Any) -> bool:
  """Whether `x` is `Quantized`: the argument of that name of `jax.tree`."""
  return isinstance(x, Quantized)


def is_quantized(tree: Any) -> bool:
  """Whether any leaf is `Quantized`."""
  return any(map(is_leaf, jax.tree.leaves(tree, is_leaf=is_leaf)))
