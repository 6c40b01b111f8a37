"""FP8 block quantisation by the official rule, and every --dtype."""

import json

import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

from deepseek_jax import convert
from deepseek_jax.convert import fp8, names, run
from tests import convert_support as support
from tests import tolerances

_SHAPES = ((128, 128), (256, 384), (130, 1), (1, 300), (257, 129))


def _official(weight, power_of_two=False):
  """The rule in float64, one block after the other: (codes, scales)."""
  blocks = [-(-n // 128) for n in weight.shape]
  scales = np.empty(blocks, np.float32)
  codes = np.empty(weight.shape, support.FP8)
  for i, j in np.ndindex(*blocks):
    place = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
    block = weight[place].astype(np.float32)
    amax = np.maximum(np.abs(block).max(), np.float32(1e-4))
    scale = np.float32(amax / np.float32(448))
    if power_of_two:
      scale = np.float32(2.0 ** np.ceil(np.log2(np.float64(scale))))
    scales[i, j] = scale
    codes[place] = (block / scale).astype(support.FP8)
  return codes, scales


def _dequantised(codes, scales, dtype):
  """README_WEIGHTS: block times scale; the product is rounded once."""
  wide = np.kron(scales, np.ones((128, 128), np.float32))
  wide = wide[: codes.shape[0], : codes.shape[1]]
  return (codes.astype(np.float32) * wide).astype(dtype)


class BlockTest(parameterized.TestCase):
  @parameterized.product(shape=_SHAPES, power_of_two=(False, True))
  def test_the_rule_at_ragged_edges(self, shape, power_of_two):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(shape) * np.exp(3 * rng.standard_normal(shape))
    weight = weight.astype(support.BF16)
    codes, scales = _official(weight, power_of_two)
    actual = fp8.block_scales(weight, power_of_two)
    np.testing.assert_array_equal(actual, scales)
    self.assertEqual(fp8.quantise(weight, actual).tobytes(), codes.tobytes())
    for dtype in (np.dtype(support.BF16), np.dtype(np.float32)):
      back = fp8.dequantise(codes, scales, dtype)
      expected = _dequantised(codes, scales, dtype)
      self.assertEqual(back.tobytes(), expected.tobytes())
    # E4M3 has 3 fraction bits; small numbers lose up to half a subnormal.
    wide = np.kron(scales, np.ones((128, 128), np.float32))
    wide = wide[: shape[0], : shape[1]]
    x = weight.astype(np.float32)
    back = fp8.dequantise(codes, scales, np.float32)
    limit = np.maximum(np.abs(x) / 16, wide * 2**-10)
    slack = 1 + tolerances.FLOAT32_MATH  # The division and the product round.
    self.assertLessEqual((np.abs(back - x) / limit).max(), slack)

  def test_powers_of_two_stay_themselves(self):
    weight = np.full((128, 128), 448 * 2.0**-7, np.float32)
    for power_of_two in (False, True):
      scales = fp8.block_scales(weight, power_of_two)
      np.testing.assert_array_equal(scales, [[2.0**-7]])
    np.testing.assert_array_equal(
      fp8.block_scales(weight * np.float32(1.01), True), [[2.0**-6]]
    )

  def test_zeros_have_a_scale(self):
    scales = fp8.block_scales(np.zeros((3, 3), np.float32))
    fp8.check_scales('w', scales)
    codes = fp8.quantise(np.zeros((3, 3), np.float32), scales)
    self.assertFalse(codes.astype(np.float32).any())

  @parameterized.parameters(np.nan, np.inf, -np.inf)
  def test_what_is_not_finite_is_refused(self, value):
    weight = np.zeros((200, 200), np.float32)
    weight[150, 3] = value
    with self.assertRaisesRegex(ValueError, 'not finite'):
      fp8.block_scales(weight)

  @parameterized.parameters(np.nan, np.inf, 0.0, -1.0)
  def test_bad_scales_are_named(self, value):
    scales = np.ones((2, 3), np.float32)
    scales[1, 2] = value
    with self.assertRaisesRegex(ValueError, r'w\[1, 2\] is'):
      fp8.check_scales('w', scales)


class CastTest(support.FolderTestCase):
  def _source(self, fp8, **keys):
    model = support.model('v3', **support.WIDE)
    arrays = support.random_tensors(model, fp8)
    return (
      support.write(self.folder / 'src', model, arrays, **keys),
      model,
      arrays,
    )

  @parameterized.parameters(('bf16', support.BF16), ('f32', np.float32))
  def test_from_fp8(self, dtype, expected):
    src, model, arrays = self._source(fp8=True)
    run.convert(src, self.folder / 'dst', 'hf', dtype)
    actual = support.read(self.folder / 'dst')
    wanted = {}
    for tensor in names.tensors(model):
      x = arrays[tensor.name]
      if tensor.is_linear:
        x = _dequantised(x, arrays[tensor.scale.name], expected)
      if x.dtype != np.float32:
        x = x.astype(expected)
      wanted[tensor.name] = x
    support.assert_same(actual, wanted)
    hf = json.loads((self.folder / 'dst' / 'config.json').read_text())
    self.assertEqual(hf['torch_dtype'], np.dtype(expected).name)
    self.assertNotIn('quantization_config', hf)
    _, variables = convert.load_hf(src, dtype)
    self.assertEqual(set(variables), {'params', 'router_state'})

  @parameterized.parameters(False, True)
  def test_to_fp8(self, power_of_two):
    scale_fmt = {'scale_fmt': 'ue8m0'} if power_of_two else {}
    src, model, arrays = self._source(fp8=False)
    path = src / 'config.json'
    hf = json.loads(path.read_text())
    if power_of_two:
      # As a V3.1 that somebody converted to BF16 by way of our workdir.
      codes = {
        n: x
        for t in names.tensors(model)
        for n, x in (
          zip((t.name, t.scale.name), _official(arrays[t.name], True))
          if t.is_linear
          else [(t.name, arrays[t.name])]
        )
      }
      quantization = {'quant_method': 'fp8', **scale_fmt}
      src = support.write(
        self.folder / 'v31', model, codes, quantization_config=quantization
      )
      run.convert(src, self.folder / 'bf16', 'hf', 'bf16')
      run.convert(self.folder / 'bf16', self.folder / 'jax', 'jax')
      run.convert(self.folder / 'jax', self.folder / 'dst', 'hf', 'fp8')
      dense = support.read(self.folder / 'bf16')
      # A block whose largest code is 224 has half the scale now.
      again = {
        n: x
        for t in names.tensors(model)
        if t.is_linear
        for n, x in zip((t.name, t.scale.name), _official(dense[t.name], True))
      }
      support.assert_same(support.read(self.folder / 'dst'), codes | again)
      for other, has_key in (('bf16', False), ('dst', True)):
        hf = json.loads((self.folder / other / 'config.json').read_text())
        self.assertEqual(
          hf.get('quantization_config'), quantization if has_key else None
        )
      self.assertEqual(hf, json.loads((src / 'config.json').read_text()))
      return
    self.assertNotIn('quantization_config', hf)
    run.convert(src, self.folder / 'jax', 'jax', 'fp8')
    run.convert(self.folder / 'jax', self.folder / 'dst', 'hf')
    actual = support.read(self.folder / 'dst')
    for tensor in names.tensors(model):
      x = arrays[tensor.name]
      if not tensor.is_linear:
        self.assertEqual(actual[tensor.name].tobytes(), x.tobytes())
        continue
      codes, scales = _official(x)
      self.assertEqual(actual[tensor.name].tobytes(), codes.tobytes())
      self.assertEqual(actual[tensor.scale.name].tobytes(), scales.tobytes())
    hf = json.loads((self.folder / 'dst' / 'config.json').read_text())
    self.assertEqual(hf['quantization_config']['weight_block_size'], [128, 128])
    self.assertEqual(hf['torch_dtype'], 'bfloat16')

  def test_scales_lie_at_the_paths_of_their_codes(self):
    src, _, arrays = self._source(fp8=True)
    _, variables = convert.load_hf(src)
    scales = variables['scales']['moe_layers']
    codes = variables['params']['moe_layers']
    name = 'model.layers.2.mlp.experts.5.down_proj.weight'  # The second MoE.
    self.assertEqual(codes['ffn']['w2'].dtype, ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(
      scales['ffn']['w2'][1, 5], arrays[name + names.SCALE].T
    )
    self.assertEqual(scales['ffn']['w2'].shape, (2, 8, 4, 2))
    # [in, out] without heads: 4 x 256 outputs of 64 inputs.
    self.assertEqual(scales['attn']['wq_b'].shape, (2, 1, 8))
    self.assertEqual(scales['attn']['wo'].shape, (2, 4, 2))
    self.assertNotIn('gate', scales['ffn'])

  def test_a_nan_weight_cannot_be_quantised(self):
    model = support.model('v2_lite')
    arrays = support.random_tensors(model)
    name = 'model.layers.1.self_attn.o_proj.weight'
    arrays[name][0, 0] = np.nan
    src = support.write(self.folder / 'src', model, arrays)
    with self.assertRaisesRegex(ValueError, name):
      run.convert(src, self.folder / 'dst', 'hf', 'fp8')
    self.assertFalse((self.folder / 'dst').exists())


if __name__ == '__main__':
  absltest.main()
