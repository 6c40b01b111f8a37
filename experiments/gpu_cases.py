"""What `gpu_check` checks and times: every kernel, at the real models' shapes.

A case names its operands, the kernel, what must come out, and what else can do
the same.  The shapes are DeepSeek-V3's and V2-Lite's, with ragged experts; the
small ones are for a machine without a GPU.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.kernels import (
  experts,
  fp8,
  fp8_experts,
  fp8_matmul,
  grouped,
  mla_attention,
  mla_decode,
  permute,
  quantize,
  turn,
)
from deepseek_jax.ops import attention, fp8_recipe, fused_quantize
from deepseek_jax.ops import grouped as grouped_reference
from deepseek_jax.ops import quantize as reference
from deepseek_jax.ops.quantize import (
  COLUMN_TILE,
  ROW_TILE,
  SQUARE_TILE,
  Quantized,
)

BF16, F32 = jnp.bfloat16, jnp.float32
# Of a sum rounded to bfloat16: half a unit of the last place is at most 2^-8.
_ROUNDED = 2.0**-8 + 3e-4


def relative(actual: jax.Array, expected: jax.Array) -> jax.Array:
  """The largest error, relative to the largest magnitude."""
  a, e = actual.astype(F32), expected.astype(F32)
  return jnp.abs(a - e).max() / jnp.maximum(jnp.abs(e).max(), 1e-30)


def codes_apart(actual: Quantized, expected: Quantized) -> jax.Array:
  """The share of codes that differ, by one step: ties that a scale moves.

  Infinite if one differs by more, or if a scale does by more than a rounding.
  """
  scales = jnp.abs(actual.scales / expected.scales - 1).max()
  a, e = (q.raw.codes.astype(jnp.int32) for q in (actual, expected))
  steps = jnp.abs(a - e)
  same = (scales <= 1e-6) & (steps.max() <= 1)
  return jnp.where(same, (steps > 0).mean(), jnp.inf)


class Case(NamedTuple):
  """One kernel at one shape.

  Attributes:
    name: with the shape.
    make: operands, from no arguments.
    run: `run(*operands, implementation=...)`.
    truth: float32 result of the operands, by another way where there is one.
    error: the largest `distance` allowed.
    flops: of one call; 0: the bytes are what counts.
    bytes: moved at least; 0: they do not count.
    others: name -> function of the operands, for timing beside XLA's.
    torch: a tensor for each array of the operands, codes as bytes -> a call of
      what torch has; what comes before the call is not timed.
    view: what of a result is compared; rows without a token are undefined.
    distance: of a result and the truth, array by array.
  """

  name: str
  make: Callable[[], tuple]
  run: Callable[..., Any]
  truth: Callable[..., Any]
  error: float
  flops: float = 0.0
  bytes: float = 0.0
  others: dict[str, Callable[..., Any]] = {}
  torch: Callable[..., Any] | None = None
  view: Callable[..., Any] = lambda result, *_: result
  distance: Callable[..., jax.Array] = relative


def all_cases(small: bool) -> Iterator[Case]:
  """Every case; `small`: of shapes that a CPU can do."""
  for rows, dim in ((128, 512),) if small else ((16384, 7168), (16384, 2048)):
    yield from _rows(rows, dim)
  shapes = ((128, 256, 256),)
  if not small:  # M, N, K: wo, wq_a with wkv_a, V2-Lite's dense FFN and its
    # gradient, and that of wkv_a.
    shapes = (
      (4096, 7168, 16384), (4096, 2112, 7168), (8192, 10944, 2048),
      (8192, 2048, 10944), (4096, 7168, 576),
    )  # fmt: skip
  for shape in shapes:
    yield from _products(*shape)
  shapes = ((96, 2, 4, 128, 256),)
  if not small:  # T, K, E, D, F: 8 of V3's experts with 8192 rows each.
    shapes = (8192, 8, 8, 7168, 2048), (8192, 6, 64, 2048, 1408)
  for shape in shapes:
    yield from _experts(*shape)
    yield from _compositions(*shape)
  shapes = (1, 256, 2, 64, 64, False), (1, 200, 2, 64, 64, True)
  if not small:  # V3's, then V2-Lite's heads with a ragged length.
    shapes = (1, 4096, 128, 192, 128, False), (2, 4000, 16, 192, 128, True)
  for shape in shapes:
    yield from _attention(*shape)
  # V3's heads are bound by products, V2-Lite's by the cache's bytes.
  shapes = ((2, 8, 256),) if small else ((128, 128, 4096), (128, 16, 4096))
  for shape in shapes:
    yield from _decode(*shape)


def _draw(*shape, seed=0, dtype=BF16):
  return jax.random.normal(jax.random.key(seed), shape, dtype)


def _positive(*shape, seed=0):
  """Rows [..., K] whose tiles differ, and whose sums have no sign to hide in.

  What a tensor core cuts off at every step is then as large as the sum.
  """
  x = jnp.abs(_draw(*shape, seed=seed, dtype=F32))
  row, column = (jnp.arange(n) // 128 for n in shape[-2:])
  x *= jnp.exp2(row[:, None] % 2 + column % 4)
  return x.astype(BF16)


def _values(q):
  return q.dequantize()


def _turning(f, *which):
  """`f`, given operands `which` as they lie, along K; it gets their mT.

  An FP8 kernel reads them so.  Turned outside of what is timed, they would be
  turned back within it.
  """

  def run(*operands, **how):
    turned = (x.mT if i in which else x for i, x in enumerate(operands))
    return f(*turned, **how)

  return run


def _rows(T, D):
  size, shape = T * D, f'{T}x{D}'

  def x(seed=0):  # As activations have them: rows of other magnitudes.
    return _draw(T, D, seed=seed) * jnp.exp2(jnp.arange(T) % 9 - 4)[:, None]

  def rows(seed=0):
    return x(seed).astype(BF16)

  def quantized(name, make, kernel, same, tile_bytes, **how):
    # Powers of two divide exactly.
    error = 0.0 if how.get('scale') == 'ceil' else 1e-2
    return Case(
      f'{name} {shape}', make, functools.partial(kernel, **how),
      functools.partial(same, **how), error, bytes=tile_bytes * size,
      distance=codes_apart,
    )  # fmt: skip

  gradients = {'min_amax': reference.GRADIENT_MIN_AMAX}
  for name, how in (
    ('', {}), (' ceil', {'scale': 'ceil'}), (' floor', {'scale': 'floor'})
  ):  # fmt: skip
    yield quantized(
      f'quantize{name}', lambda: (rows(),), quantize.quantize,
      reference.quantize, 3, tile=ROW_TILE, **how,
    )  # fmt: skip
  yield quantized(
    'quantize gradients', lambda: (rows() * 2.0**-40,), quantize.quantize,
    reference.quantize, 3, tile=ROW_TILE, **gradients,
  )  # fmt: skip
  yield quantized(
    'swiglu', lambda: (rows(), rows(1), jnp.abs(_draw(T, seed=2, dtype=F32))),
    quantize.swiglu, fused_quantize.swiglu, 5,
  )  # fmt: skip
  yield quantized(
    'rms_norm', lambda: (rows(), 1 + _draw(D, seed=2, dtype=F32) / 4),
    quantize.rms_norm, fused_quantize.rms_norm, 3, eps=1e-6,
  )  # fmt: skip
  for name, how in (('', {}), (' ceil', {'scale': 'ceil'})):
    yield quantized(
      f'turn bf16{name}', lambda: (rows(),), turn.quantize,
      reference.quantize, 3, tile=COLUMN_TILE, **how,
    )  # fmt: skip
    yield quantized(
      f'turn e4m3{name}',
      lambda how=how: (reference.quantize(rows(), ROW_TILE, **how),),
      turn.requantize, reference.requantize, 2, tile=COLUMN_TILE, **how,
    )  # fmt: skip


def _highest(a, b):
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _cublas(a, b):
  return jnp.matmul(_values(a).astype(BF16), _values(b).astype(BF16))


def _cublas_fp8(a, b):
  """Without scales: what the tensor cores do if nothing is promoted."""
  return jnp.matmul(a.codes, b.codes, preferred_element_type=BF16)


def _scaled_dot(a, b):
  """Whatever XLA has for scales of 128 along K, here of every column."""
  scales = jnp.repeat(b.scales, b.tile[1], 1)[:, : b.shape[1]]
  return jax.lax.scaled_dot(
    a.codes, b.codes, lhs_scale=a.scales, rhs_scale=scales,
    preferred_element_type=BF16,
  )  # fmt: skip


def _torch_scaled(a, a_scales, b, b_scales):
  """cuBLAS with scales of 128 along K, laid out as torch's checks ask for.

  The first axis lies together, and is padded to four where it is of blocks.
  """
  import torch
  from torch.nn import functional

  a, b = (v.view(torch.float8_e4m3fn) for v in (a, b))
  has_blocks = b_scales.shape[0] < b.shape[0]
  a_scales = a_scales.T.contiguous().T
  if has_blocks:
    missing = -b_scales.shape[1] % 4
    b_scales = functional.pad(b_scales, (0, missing)).contiguous().T
  else:
    b_scales = b_scales.T.contiguous().T

  def call():
    kinds = functional.ScalingType
    return functional.scaled_mm(
      a, b.T, a_scales, kinds.BlockWise1x128, b_scales,
      kinds.BlockWise128x128 if has_blocks else kinds.BlockWise1x128,
    )  # fmt: skip

  return call


def _products(M, N, K):
  """Fprop and Dgrad, then Wgrad, of one matrix."""

  def truth(a, b):
    return _highest(_values(a), _values(b))

  for name, tile, dtype, error in (
    ('fp8_matmul', SQUARE_TILE, BF16, _ROUNDED),
    ('fp8_matmul wgrad', COLUMN_TILE, F32, 1e-3),
  ):

    def make(tile=tile):
      b = reference.quantize(_positive(N, K, seed=1), tile[::-1])
      return reference.quantize(_positive(M, K), ROW_TILE), b

    run = functools.partial(fp8_matmul.dot, dtype=dtype)
    others = {
      'dequantise, cuBLAS bf16': _cublas,
      'cuBLAS fp8, no scales': _cublas_fp8,
      'lax.scaled_dot': _scaled_dot,
    }
    yield Case(
      f'{name} {M}x{N}x{K}', make, _turning(run, 1), _turning(truth, 1), error,
      flops=2.0 * M * N * K,
      bytes=M * K + N * K + M * N * jnp.dtype(dtype).itemsize,
      others={other: _turning(f, 1) for other, f in others.items()},
      torch=_torch_scaled,
    )  # fmt: skip


def _experts(T, K, E, D, F):
  """Products of rows grouped by expert, and what brings the rows there."""

  def layout():
    return grouped_reference.lay_out(_routing(T, K, E), E)

  def make():
    x = grouped_reference.permute(_positive(T, D), layout())
    return x, _positive(E, D, F, seed=1) / D, layout().groups

  rows = T * K
  shape, flops = f'{rows}x{D}x{F} of {E}', 2.0 * rows * D * F
  yield from _bf16_experts(make, shape, flops)
  yield from _fp8_experts(make, shape, flops)
  yield from _both_dgrads(make, shape, 2 * flops)
  yield Case(
    f'permute {T}x{K}x{D}', lambda: (_draw(T, D), layout()), permute.permute,
    grouped_reference.permute, 0.0, bytes=2.0 * (T + rows) * D,
  )  # fmt: skip
  yield Case(
    f'unpermute {T}x{K}x{D}',
    lambda: (make()[0], layout()),
    permute.unpermute,
    lambda x, layout: grouped_reference.unpermute(x.astype(F32), layout),
    _ROUNDED,
    bytes=2.0 * (rows + T) * D,
  )  # fmt: skip


def _routing(T, K, E):
  """Expert ids [T, K], ragged as a router's choices are."""
  weights = np.linspace(0.5, 1.5, E)
  ids = np.random.default_rng(0).choice(E, (T, K), p=weights / weights.sum())
  return jnp.asarray(ids, jnp.int32)


def _turned(make):
  """Operands of Dgrad, from Fprop's."""
  x, w, groups = make()
  return grouped_reference.dot(x, w, groups), w, groups


def _transposed(make):
  dy, w, groups = _turned(make)
  return dy, w.mT, groups


def _pair(make):
  """Operands of Wgrad, from Fprop's."""
  x, w, groups = make()
  return x, grouped_reference.dot(x, w, groups), groups


def _real(y, *args):
  """Rows after the last block are undefined."""
  return jnp.where(
    jnp.arange(y.shape[0])[:, None] < args[-1].count[0] * 128, y, 0
  )


def _bf16_experts(make, shape, flops):
  """Fprop, Dgrad and Wgrad."""

  def in_float32(f):
    return lambda a, b, groups: f(
      a.astype(F32), b.astype(F32), groups, implementation='xla'
    )

  dot, back = grouped.dot, functools.partial(grouped.dot, turned=True)
  turned = functools.partial(_turned, make)
  for name, f, operands in (
    ('grouped bf16', dot, make), ('grouped bf16 dgrad', back, turned)
  ):  # fmt: skip
    yield Case(
      f'{name} {shape}', operands, f, in_float32(f), _ROUNDED, flops=flops,
      others=_ragged_dots() if f is dot else {'lax.ragged_dot': _ragged_back},
      view=_real,
    )  # fmt: skip
  yield Case(
    f'grouped bf16 wgrad {shape}',
    functools.partial(_pair, make),
    grouped.outer,
    in_float32(grouped.outer),
    1e-3,
    flops=flops,
    others={'lax.ragged_dot_general': _ragged_outer},
  )


def _fp8_experts(make, shape, flops):
  """The same three, of codes and scales."""

  def quantized(tile, source):
    a, b, groups = source(make)
    if tile == ROW_TILE:
      w = reference.quantize(b.mT, SQUARE_TILE)
      return reference.quantize(a, ROW_TILE), w, groups
    return *(reference.quantize(v.mT, ROW_TILE) for v in (a, b)), groups

  def of_values(f):
    return lambda a, b, groups: f(
      _values(a), _values(b), groups, implementation='xla'
    )

  dot = functools.partial(grouped.fp8_dot, dtype=BF16)
  for name, f, plain, tile, source, error, view in (
    ('grouped fp8', dot, grouped.dot, ROW_TILE, lambda f: f(), _ROUNDED, _real),
    ('grouped fp8 dgrad', dot, grouped.dot, ROW_TILE, _transposed, _ROUNDED,
     _real),
    ('grouped fp8 wgrad', grouped.fp8_outer, grouped.outer, COLUMN_TILE, _pair,
     1e-3, lambda y, *_: y),
  ):  # fmt: skip
    lying = (1,) if tile == ROW_TILE else (0, 1)
    yield Case(
      f'{name} {shape}', functools.partial(quantized, tile, source),
      _turning(f, *lying), _turning(of_values(plain), *lying), error,
      flops=flops, view=view,
    )  # fmt: skip


def _both_dgrads(make, shape, flops):
  """A row's gradient: Dgrad by w1 and by w3, summed."""

  def operands():
    dy, w, groups = _turned(make)
    return dy, w, dy, w[:, ::-1], groups

  def codes():
    dy, w1, _, w3, groups = operands()
    dy = reference.quantize(dy, ROW_TILE)
    w1, w3 = (reference.quantize(w, SQUARE_TILE) for w in (w1, w3))
    return dy, w1, dy, w3, groups

  def bf16(dgate, w1, dup, w3, groups, implementation=None):
    pairs = (dgate, w1), (dup, w3)
    return grouped.dots(pairs, groups, True, BF16, implementation)

  def fp8(dgate, w1, dup, w3, groups, implementation=None):
    pairs = (dgate, w1.mT), (dup, w3.mT)
    return grouped.fp8_dots(pairs, groups, BF16, implementation)

  for name, make_operands, f, values in (
    ('grouped bf16 both dgrads', operands, bf16, lambda v: v.astype(F32)),
    ('grouped fp8 both dgrads', codes, fp8, _values),
  ):

    def truth(*operands, values=values):
      *pairs, groups = operands
      dgate, w1, dup, w3 = (values(v) for v in pairs)
      dot = functools.partial(grouped_reference.dot, groups=groups)
      return dot(dgate, w1.mT) + dot(dup, w3.mT)

    yield Case(
      f'{name} {shape}', make_operands, f, truth, _ROUNDED, flops=flops,
      view=_real,
    )  # fmt: skip


def _compositions(T, K, E, D, F):
  """All that experts do, forward and backward, beside XLA's loop over blocks.

  In FP8 the loop is the truth, too: nothing else rounds as it does.
  """

  def fp8_ffn(*operands, implementation=None):
    steps = fp8.steps('xla' if implementation == 'xla' else 'auto')
    return fp8_experts.expert_ffn(
      *operands, fp8_recipe.Recipe(steps=steps), implementation
    )

  def in_float32(x, w1, w2, w3, *routing):
    operands = (v.astype(F32) for v in (x, w1, w2, w3))
    return experts.expert_ffn(*operands, *routing, implementation='xla')

  def make(dtype):
    ids, weights = _routing(T, K, E), jnp.abs(_draw(T, K, seed=4, dtype=F32))
    shapes = (E, D, F), (E, F, D), (E, D, F)
    ws = (
      (_draw(*shape, seed=i) * shape[1] ** -0.5).astype(dtype)
      for i, shape in enumerate(shapes, 1)
    )
    return _draw(T, D), *ws, ids, weights

  def backward(f):
    def run(dy, x, w1, w2, w3, ids, weights, **how):
      def forward(x, w1, w2, w3, weights):
        return f(x, w1, w2, w3, ids, weights, **how).astype(F32)

      _, vjp = jax.vjp(forward, x, w1, w2, w3, weights)
      return vjp(dy.astype(F32))

    return run

  loop = functools.partial(fp8_ffn, implementation='xla')
  for name, f, truth, dtype in (
    ('experts', experts.expert_ffn, in_float32, BF16),
    ('fp8_experts', fp8_ffn, loop, F32),
  ):
    operands = functools.partial(make, dtype)
    shape, flops = f'{T * K}x{D}x{F} of {E}', 6.0 * T * K * D * F
    yield Case(f'{name} {shape}', operands, f, truth, 2e-2, flops=flops)
    yield Case(
      f'{name} with backward {shape}',
      lambda operands=operands: (_draw(T, D, seed=5), *operands()),
      backward(f),
      backward(truth),
      2e-2,
      flops=3 * flops,
    )


def _sizes(groups):
  return groups.blocks_E * 128


def _ragged_back(dy, w, groups):
  return jax.lax.ragged_dot(dy, w.mT, _sizes(groups))


def _ragged_outer(x, y, groups):
  dims = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
  return jax.lax.ragged_dot_general(
    x, y, _sizes(groups), dims, preferred_element_type=F32
  )


def _ragged_dots():
  """Grouped products that come with jax, and with tokamax if it is there."""

  def lax_ragged(x, w, groups):
    return jax.lax.ragged_dot(x, w, _sizes(groups))

  def pallas_ragged(x, w, groups):
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

    return ragged_dot_mgpu.ragged_dot(
      x, w, group_sizes=_sizes(groups), block_m=128, block_n=128, block_k=64,
      max_concurrent_steps=4, grid_block_n=8,
    )  # fmt: skip

  found = {'lax.ragged_dot': lax_ragged, 'jax ragged_dot_mgpu': pallas_ragged}
  if importlib.util.find_spec('tokamax'):
    tokamax = importlib.import_module('tokamax')
    found['tokamax'] = lambda x, w, g: tokamax.ragged_dot(x, w, _sizes(g))
  return found


def _attention(B, T, N, H, U, has_documents):
  """MLA's training attention, causal, forward and backward."""
  scale = H**-0.5

  def make():
    q, k = (_draw(B, T, N, H, seed=i) for i in range(2))
    operands = q, k, _draw(B, T, N, U, seed=2)
    if not has_documents:
      return operands
    return *operands, jnp.asarray(np.broadcast_to(documents, (B, T)))

  def forward(q, k, v, *segments, implementation=None):
    return mla_attention.attend(
      q, k, v, scale, *segments, implementation=implementation
    )

  def gradient(f):
    def loss(q, k, v, *segments):
      return jnp.sum(f(q, k, v, *segments).astype(F32) ** 2)

    return jax.grad(loss, argnums=(0, 1, 2))

  def backward(*operands, implementation=None):
    f = functools.partial(forward, implementation=implementation)
    return gradient(f)(*operands)

  def plain(q, k, v, *segments):
    f32 = (x.astype(F32) for x in (q, k, v))
    return attention.attend(*f32, scale, *segments)

  documents = np.arange(T) // (T // 4 - 7) + 1
  shape, pairs = f'{B}x{T}x{N}x{H}/{U}', B * N * T * T / 2
  others, in_torch = _causal(scale), _torch_causal
  if has_documents:
    shape, others, in_torch = f'{shape} documents', {}, None
    pairs = B * N * np.sum(np.bincount(documents) ** 2) / 2
  # The aims, 570 TFLOP/s forward and 460 backward, are 486 for both together.
  for name, f, truth, flops, wrap in (
    ('attention', forward, plain, 2 * pairs * (H + U), lambda g: g),
    ('attention with backward', backward, gradient(plain),
     pairs * (2 * (H + U) + 4 * (H + U) + 2 * H), gradient),
  ):  # fmt: skip
    yield Case(
      f'{name} {shape}', make, f, truth, 3e-2, flops=flops,
      others={other: wrap(g) for other, g in others.items()},
      torch=in_torch if f is forward else None,
    )  # fmt: skip


def _causal(scale):
  """Causal attention of other libraries that takes unequal widths."""

  def cudnn(q, k, v):  # `jax.nn` wants values as wide as keys.
    from jax._src.cudnn import fused_attention_stablehlo as fused

    return fused.dot_product_attention(
      q, k, v, scale=scale, mask_type=fused.MaskType.CAUSAL
    )

  found = {'cuDNN': cudnn}
  if importlib.util.find_spec('tokamax'):
    tokamax = importlib.import_module('tokamax')
    found['tokamax'] = lambda q, k, v: tokamax.dot_product_attention(
      q, k, v, scale=scale, is_causal=True, implementation='mosaic'
    )
  return found


def _torch_causal(*operands):
  from torch.nn import functional

  q, k, v = (x.transpose(1, 2) for x in operands)

  def call():
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.transpose(1, 2)

  return call


def _decode(B, N, S):
  """MLA's decoding attention over a cache of latents."""
  C, P = (512, 64) if S > 1024 else (128, 64)
  X, scale = C + P, 192**-0.5

  def make():
    positions = np.random.default_rng(0).integers(S // 2, S, (B, 1))
    positions = jnp.asarray(positions, jnp.int32)
    return _draw(B, 1, N, X), _draw(B, S, X, seed=1), positions

  def run(q, cache, positions, implementation=None):
    return mla_decode.attend_latents(
      q, cache, C, positions, scale, implementation=implementation
    )

  def truth(q, cache, positions):
    f32 = q.astype(F32), cache.astype(F32)
    return run(*f32, positions, implementation='xla')

  yield Case(
    f'decode {B}x{N}x{S}x{X}', make, run, truth, 2e-2,
    flops=2.0 * B * N * S * 0.75 * (X + C), bytes=2.0 * B * S * X * 0.75,
  )  # fmt: skip
