"""MLA's kernels, interpreted on a CPU and lowered for CUDA, beside `ops/`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import config as config_lib
from deepseek_jax import presets
from deepseek_jax.kernels import mla_attention, mla_decode, mosaic
from deepseek_jax.layers import mla
from deepseek_jax.ops import attention, cached_attention
from deepseek_jax.ops.fp8_recipe import Kept
from tests import deviceless, tolerances

_SCALE = 0.1


def _inputs(B, T, N, H, U, dtype=np.float32):
  rng = np.random.default_rng(T)
  shapes = ((B, T, N, width) for width in (H, H, U, U))
  return [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]


def _segments(length, *starts):
  """A row for each list of the positions where documents start."""
  marks = np.zeros((len(starts), length), np.int32)
  for row, places in zip(marks, starts):
    row[list(places)] = 1
  return jnp.asarray(1 + marks.cumsum(1))


def _value_and_gradients(attend, q, k, v, dout):
  out, vjp = jax.vjp(attend, q, k, v)
  return out, *vjp(dout)


def _compare(inputs, segments, rung):
  """The kernels as they are, whatever the dtype, beside the reference."""

  def kernel(q, k, v):
    return mla_attention._attend(q, k, v, _SCALE, segments, None)[0]

  def reference(q, k, v):
    return attention.attend_reference(q, k, v, _SCALE, segments)

  with mosaic.interpreted(pads=True):
    actual = _value_and_gradients(kernel, *inputs)
  expected = _value_and_gradients(reference, *inputs)
  tolerances.assert_close(actual, expected, rung)


@pytest.mark.slow
def test_attention_is_causal():
  """Two blocks, the second with two rows; two pieces of a key."""
  _compare(_inputs(1, 130, 1, 128, 64), None, tolerances.COMPONENT_PARITY)


@pytest.mark.slow
def test_attention_stays_in_documents():
  """Three blocks: in one sequence the middle one is seen whole by the last,
  in the other the last does not see the first."""
  segments = _segments(300, (20,), (140, 290))
  _, extents = mla_attention._masks(
    mla_attention._shape(
      jnp.zeros((2, 300, 1, 128)), jnp.zeros((2, 300, 1, 64)), 1.0, segments
    ),
    segments,
  )
  assert extents[:, 2, :2].tolist() == [[0, 1], [1, 2]]
  _compare(_inputs(2, 300, 1, 128, 64), segments, tolerances.COMPONENT_PARITY)


def test_extents_leave_out_nothing_that_is_seen():
  """Against every pair of positions, for documents in any order."""
  rng = np.random.default_rng(0)
  T, tile = 1000, mla_attention._TILE
  for cuts in (0.0, 0.001, 0.01, 0.1):
    steps = (rng.uniform(size=(3, T)) < cuts).cumsum(1)
    segments = np.stack([steps[0], steps[1] % 3, -steps[2]]).astype(np.int32)
    zeros = jnp.zeros((3, T, 1, 64))
    shape = mla_attention._shape(zeros, zeros, 1.0, segments)
    padded, extents = mla_attention._masks(shape, jnp.asarray(segments))
    assert padded.shape == (3, shape.tiles * tile)
    seen = np.tril(np.ones((T, T), bool))
    seen = seen & (segments[:, :, None] == segments[:, None, :])
    for b in range(3):
      for i in range(shape.tiles):
        for j in range(i + 1):
          rows, columns = (
            slice(tile * i, tile * (i + 1)),
            slice(tile * j, tile * (j + 1)),
          )
          block = seen[b, rows, columns]
          first, whole = extents[b, i, :2]
          same_until, end = extents[b, j, 2:]
          if block.any():
            assert first <= j and i < end
          if j < i and (whole <= j or i < same_until):
            assert block.all()


@pytest.mark.slow
def test_attention_in_bfloat16_keeps_codes():
  """Two heads, by the public function; the backward reads FP8 codes."""
  q, k, v, dout = _inputs(1, 20, 2, 64, 64, jnp.bfloat16)
  keep = Kept()
  actual, expected = [], []
  for results, implementation in ((actual, 'mosaic_gpu'), (expected, 'xla')):

    def run(q, k, v, implementation=implementation):
      return mla_attention.attend(
        q, k, v, _SCALE, None, keep, implementation=implementation
      )

    with mosaic.interpreted(pads=True):
      (out, kept), vjp = jax.vjp(run, q, k, v)
      zeros = jax.tree.map(
        lambda x: (
          np.zeros(x.shape, jax.dtypes.float0)
          if not jnp.issubdtype(x.dtype, jnp.inexact)
          else jnp.zeros_like(x)
        ),
        kept,
      )
      results.extend((out, *vjp((dout, zeros))))
  tolerances.assert_close(actual, expected, tolerances.BFLOAT16)


@pytest.mark.parametrize('heads', [16, 128], ids=['V2-Lite', 'V3'])
@pytest.mark.parametrize('documents', [False, True])
def test_attention_lowers_at_real_shapes(heads, documents):
  """Shared memory, layouts and TMA descriptors are checked on the way."""
  arrays = [
    jax.ShapeDtypeStruct((1, 4095, heads, width), jnp.bfloat16)
    for width in (192, 192, 128, 128)
  ]
  segments = jax.ShapeDtypeStruct((1, 4095), jnp.int32) if documents else None

  def run(q, k, v, dout, segments):
    def attend(*operands):
      return mla_attention.attend(
        *operands, _SCALE, segments, implementation='mosaic_gpu'
      )

    return _value_and_gradients(attend, q, k, v, dout)

  text = mosaic.lower(run, *arrays, segments)
  assert text.count('stablehlo.custom_call @mosaic_gpu') == 3
  assert '4096x4096' not in text and '4095x4095' not in text


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'H': 96}, 'widths 96 and 64'),
    ({'H': 256}, 'widths 256 and 64'),
    ({'U': 192, 'H': 192}, 'widths 192 and 192'),
    ({'dtype': jnp.float32}, 'float32'),
  ],
)
def test_attention_refuses(change, message):
  sizes = {'B': 1, 'T': 64, 'N': 1, 'H': 128, 'U': 64, 'dtype': jnp.bfloat16}
  q, k, v, _ = _inputs(**{**sizes, **change})
  with pytest.raises(ValueError, match=message):
    mla_attention.attend(q, k, v, _SCALE, implementation='mosaic_gpu')
  out = mla_attention.attend(q, k, v, _SCALE)  # Falls back.
  assert out.shape == v.shape


def _decode_inputs(tokens):
  """Two sequences at their start and at the end of the cache."""
  rng = np.random.default_rng(0)
  q = jnp.asarray(rng.standard_normal((2, tokens, 40, 192)), jnp.float32)
  cache = jnp.asarray(rng.standard_normal((2, 200, 192)), jnp.float32)
  last = jnp.asarray([[6], [199]], jnp.int32)
  return q, cache, last - jnp.arange(tokens)[::-1]


def _assert_decodes(q, cache, positions, splits, pads):
  rows = q.reshape(2, -1, 192)
  with mosaic.interpreted(pads):
    out, lse = mla_decode._splits(rows, cache, 128, positions, _SCALE, splits)
  out = mla_decode._combine(out, lse) if splits > 1 else out[:, 0]
  expected = cached_attention.attend_latents(q, cache, 128, positions, _SCALE)
  tolerances.assert_close(
    out[:, : rows.shape[1]].reshape(expected.shape),
    expected,
    tolerances.COMPONENT_PARITY,
  )


@pytest.mark.slow
@pytest.mark.parametrize(('tokens', 'splits'), [(1, 1), (2, 2)])
def test_decode(tokens, splits):
  """Ragged lengths, rows that end within a tile; most splits have no key."""
  _assert_decodes(*_decode_inputs(tokens), splits, pads=True)


def test_decode_before_the_first_key():
  """In no split; what is not written is NaN, and whole tiles read nothing else.

  A token of the other sequence sees none either, beside one that does.
  """
  rng = np.random.default_rng(0)
  q = jnp.asarray(rng.standard_normal((2, 2, 32, 192)), jnp.float32)
  cache = jnp.asarray(rng.standard_normal((2, 64, 192)), jnp.float32)
  positions = jnp.asarray([[-2, -1], [-1, 0]], jnp.int32)
  _assert_decodes(q, cache, positions, 2, pads=False)


def test_splits_combine_to_the_whole():
  """The second split had no key and wrote nothing."""
  rng = np.random.default_rng(0)
  scores = rng.standard_normal((1, 5, 12))
  values = rng.standard_normal((12, 4))
  outs, lses = [], []
  for part in (slice(0, 7), slice(7, 12)):
    weights = np.exp(scores[..., part])
    lses.append(np.log(weights.sum(-1)))
    outs.append(weights / weights.sum(-1, keepdims=True) @ values[part])
  outs.insert(1, np.full_like(outs[0], np.nan))
  lses.insert(1, np.full_like(lses[0], -1e30))
  combined = mla_decode._combine(
    jnp.asarray(np.stack(outs, 1), jnp.float32),
    jnp.asarray(np.stack(lses, 1), jnp.float32),
  )
  weights = np.exp(scores)
  expected = weights / weights.sum(-1, keepdims=True) @ values
  tolerances.assert_close(combined, expected, tolerances.FLOAT32_MATH)


@pytest.mark.parametrize(
  ('batch', 'tokens', 'heads'), [(128, 1, 16), (16, 2, 128), (4, 4, 128)]
)
def test_decode_lowers_at_real_shapes(batch, tokens, heads):
  q = jax.ShapeDtypeStruct((batch, tokens, heads, 576), jnp.bfloat16)
  cache = jax.ShapeDtypeStruct((batch, 4096, 576), jnp.bfloat16)
  positions = jax.ShapeDtypeStruct((batch, tokens), jnp.int32)

  def run(q, cache, positions):
    return mla_decode.attend_latents(
      q, cache, 512, positions, _SCALE, implementation='mosaic_gpu'
    )

  text = mosaic.lower(run, q, cache, positions)
  assert text.count('stablehlo.custom_call @mosaic_gpu') == 1


def test_decode_refuses():
  q, cache, positions = _decode_inputs(1)
  with pytest.raises(ValueError, match='float32'):
    mla_decode.attend_latents(
      q, cache, 128, positions, _SCALE, implementation='mosaic_gpu'
    )
  with pytest.raises(ValueError, match='values of 100'):
    mla_decode.attend_latents(
      *(x.astype(jnp.bfloat16) for x in (q, cache)), 100, positions, _SCALE,
      implementation='mosaic_gpu',
    )  # fmt: skip


@pytest.mark.parametrize(('setting', 'kernels'), [('auto', 1), ('xla', 0)])
@pytest.mark.parametrize('cached', [False, True])
def test_the_layer_takes_the_kernel_on_a_hopper(setting, kernels, cached):
  """In training and in decoding, and by the flag not."""
  model = presets.deepseek_v2_lite().model
  precision = config_lib.PrecisionConfig(kernels=setting)
  layer = mla.MLA(model, precision)
  x = jax.ShapeDtypeStruct((2, 64, model.dim), jnp.bfloat16)
  positions = jax.ShapeDtypeStruct((2, 64), jnp.int32)
  cache = jax.ShapeDtypeStruct((2, 64, 576), jnp.bfloat16) if cached else None

  def run(variables, x, positions, cache):
    return layer.apply(variables, x, positions, None, cache)

  variables = jax.eval_shape(layer.init, jax.random.key(0), x, positions)
  text = mosaic.lower(run, variables, x, positions, cache)
  assert text.count('stablehlo.custom_call @mosaic_gpu') == kernels


_ASSEMBLE = """
import jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from deepseek_jax.kernels import mla_attention, mla_decode, mosaic
from deepseek_jax.parallel import topology
place = SingleDeviceSharding(topology.topology('h100', 1)[0])
def shape(*sizes, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)
def attend(q, k, v, dout, segments):
  def run(*operands):
    return mla_attention.attend(*operands, 0.1, segments)
  out, vjp = jax.vjp(run, q, k, v)
  return out, vjp(dout)
def decode(q, cache, positions):
  return mla_decode.attend_latents(q, cache, 512, positions, 0.1)
q, v = shape(1, 4096, 16, 192), shape(1, 4096, 16, 128)
ints = shape(1, 4096, dtype=jnp.int32), shape(8, 2, dtype=jnp.int32)
with mosaic.for_hopper():
  jax.jit(attend).lower(q, q, v, v, None).compile()
  jax.jit(attend).lower(q, q, v, v, ints[0]).compile()
  latents = shape(8, 2, 16, 576), shape(8, 4096, 576)
  jax.jit(decode).lower(*latents, ints[1]).compile()
"""


@pytest.mark.slow
def test_kernels_are_assembled_without_spills():
  """By ptxas for sm_90a: nothing of a tile leaves the registers.

  A tile's row is 4 bytes of each thread for every two columns, so that a
  handful of spilled bytes are loop invariants.
  """
  reports = deviceless.assembled('-c', _ASSEMBLE)
  assert len(reports) == 7
  for report in reports:
    assert 'sm_90a' in report
    assert 'serialized' not in report  # Of wgmma: one waits for the other.
    spilled = re.findall(r'(\d+) bytes spill stores', report)
    assert spilled and max(map(int, spilled)) <= 64, report
