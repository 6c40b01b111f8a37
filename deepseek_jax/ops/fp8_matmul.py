"""Matrix products of quantised operands (V3 section 3.3.2, figure 7b).

`dot` multiplies codes, 128 of the inner axis at a time, and adds each partial
sum times its scales in float32: the promotion to CUDA cores.  With
`accumulate='hopper14'` the partial sums are those of a Hopper tensor core,
which keeps about 14 bits; why promotion is needed shows when there is none.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import ACCUMULATE, HOPPER14_MANTISSA_BITS
from deepseek_jax.ops import formats
from deepseek_jax.ops.quantize import BLOCK, Quantized

# A tensor core adds so many products at once, aligned to the largest of them.
_INSTRUCTION_K = 32
_FRACTION_BITS = 13  # Kept of an aligned product, and of the accumulator.


class Accumulation(NamedTuple):
  """How partial sums are formed.

  Attributes:
    kind: 'exact': float32 products and sums.  'hopper14': emulated, of E4M3,
      E5M2 and narrower formats.
    promote: the inner length after which a partial sum goes into float32;
      V3's N_C = 128.  0: never, which needs scales that are constant along it.
  """

  kind: str = 'exact'
  promote: int = BLOCK


def dot(
  a: Quantized,
  b: Quantized,
  accumulation: Accumulation = Accumulation(),
  dtype: Any = jnp.float32,
) -> jax.Array:
  """`a @ b`: [M, N], summed in float32.

  Args:
    a: [M, K]; its tiles are 128 columns wide, or the whole.
    b: [K, N]; its tiles are 128 rows high, or the whole.
    accumulation: of the partial sums.
    dtype: of the result, rounded once.

  Raises:
    ValueError: if a tile is of another size along K, if the sum is to be
      promoted more rarely than the scales change, or if no tensor core takes
      the formats that one is to be emulated for.
  """
  K = a.shape[1]
  step = accumulation.promote or K
  _check(a.mT, b, accumulation)
  blocks = -(-K // step)
  a_codes = _split(formats.decode(a.codes, a.fmt).T, step)
  b_codes = _split(formats.decode(b.codes, b.fmt), step)
  a_scales = _scales_along(a.mT, blocks, step)
  b_scales = _scales_along(b, blocks, step)
  multiply = _multiply if accumulation.kind == 'exact' else _tensor_core

  def body(total, xs):
    a_KM, b_KN, a_M, b_N = xs
    return total + multiply(a_KM, b_KN) * a_M[:, None] * b_N, None

  zeros = jnp.zeros((a.shape[0], b.shape[1]), jnp.float32)
  blocks = a_codes, b_codes, a_scales, b_scales
  return lax.scan(body, zeros, blocks)[0].astype(dtype)


def _check(a_mT: Quantized, b: Quantized, accumulation: Accumulation) -> None:
  kind, promote = accumulation
  if kind not in ACCUMULATE:
    raise ValueError(
      f'accumulate={kind!r}: choose one of {", ".join(ACCUMULATE)}'
    )
  for name, q in (('a', a_mT), ('b', b)):
    rows = q.tile[0]
    if rows not in (0, BLOCK):
      raise ValueError(
        f'{name} has tiles of {rows} along the inner axis: it must be {BLOCK}, '
        'or the whole; quantise in the other orientation'
      )
    if rows and (not promote or BLOCK % promote):
      raise ValueError(
        f'promote={promote}: the scales of {name} change every {BLOCK}; choose '
        f'a divisor of {BLOCK}, or scales of the whole tensor'
      )
    if kind == 'hopper14' and q.fmt.mantissa_bits > HOPPER14_MANTISSA_BITS:
      raise ValueError(
        f'accumulate={kind!r}: {name} is {q.fmt}, a tensor core takes three '
        'mantissa bits at most; choose e4m3, e5m2, or exact'
      )


def _split(x_KM: jax.Array, step: int) -> jax.Array:
  """[blocks, step, M], with zeros at the end."""
  K, M = x_KM.shape
  return jnp.pad(x_KM, ((0, -K % step), (0, 0))).reshape(-1, step, M)


def _scales_along(q: Quantized, blocks: int, step: int) -> jax.Array:
  """The scales of [K, M] for each block of K and each column: [blocks, M]."""
  M = q.shape[1]
  width = q.tile[1] or M
  scales = jnp.repeat(q.scales, width, 1)[:, :M]
  index = jnp.arange(blocks) * step // BLOCK if q.tile[0] else 0
  return jnp.broadcast_to(scales[index], (blocks, M))


def _multiply(a_KM, b_KN):
  return lax.dot_general(
    a_KM,
    b_KN,
    (((0,), (0,)), ((), ())),
    precision=lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )


def _tensor_core(a_KM: jax.Array, b_KN: jax.Array) -> jax.Array:
  """The product as Hopper's FP8 tensor cores accumulate it (V3 section 3.5.2).

  32 products are shifted to the largest exponent among them, and lose what
  falls below 13 fraction bits: the shift fills in the sign, so that rounding
  goes downwards.  Their sum is added to an accumulator of 13 fraction bits,
  the rest being cut off.
  """

  def body(total, xs):
    a, b = xs  # [32, M], [32, N]
    products = a[:, :, None] * b[:, None, :]  # Exact: 4 + 4 bits at most.
    unit = _last_place(jnp.abs(products).max(0))
    total += (jnp.floor(products / unit) * unit).sum(0)
    unit = _last_place(jnp.abs(total))
    return jnp.trunc(total / unit) * unit, None

  shape = a_KM.shape[1], b_KN.shape[1]
  steps = _split(a_KM, _INSTRUCTION_K), _split(b_KN, _INSTRUCTION_K)
  return lax.scan(body, jnp.zeros(shape, jnp.float32), steps)[0]


def _last_place(x: jax.Array) -> jax.Array:
  """What the last kept fraction bit of positive `x` is worth."""
  exponent = (lax.bitcast_convert_type(x, jnp.int32) >> 23) - 127
  # Of zeros, too, a normal number: it is divided by.
  exponent = jnp.maximum(exponent - _FRACTION_BITS, -100)
  return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
