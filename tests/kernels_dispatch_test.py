"""Which implementation is chosen, and what a wrong request answers."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from deepseek_jax import config, presets
from deepseek_jax.kernels import dispatch, mosaic, quantize
from deepseek_jax.ops import quantize as reference
from deepseek_jax.training import step


class ChooseTest(parameterized.TestCase):
  def test_a_cpu_takes_the_reference(self):
    choice = dispatch.choose(None, [], 'op')
    self.assertEqual(choice, ('xla', 'the device is a cpu'))
    x = jnp.ones((64, 128))
    np.testing.assert_array_equal(
      quantize.quantize(x, reference.ROW_TILE).codes,
      reference.quantize(x, reference.ROW_TILE).codes,
    )

  def test_choices_can_be_printed(self):
    with self.assertLogs('absl', 'INFO') as logs:
      dispatch.choose(None, ['too narrow'], 'op')
    [record] = logs.records
    self.assertEqual(
      record.getMessage(), 'op : xla: too narrow; the device is a cpu'
    )

  def test_each_kind_is_told_once(self):
    lines = []
    wide, narrow = jnp.ones((128, 256)), jnp.ones((128, 64))

    @jax.jit
    def run(x):
      return dispatch.choose(None, [], 'inner', x).is_kernel + x

    with mosaic.for_hopper(), dispatch.told(lines.append):
      for x in (wide, narrow, wide):
        dispatch.choose(None, [], 'product', x, x.T)
      dispatch.choose(None, ['too narrow'], 'product', narrow)
      dispatch.choose('xla', [], 'product', narrow)
      run.trace(wide)
    dispatch.choose(None, [], 'later')
    self.assertEqual(lines, [
      'kernels: product 128x256 256x128: mosaic_gpu: made for NVIDIA H100 80GB '
      'HBM3',
      'kernels: product 128x64: xla: too narrow',
      'kernels: product 128x64: xla: asked for',
      'kernels: inner 128x256: mosaic_gpu: made for NVIDIA H100 80GB HBM3',
    ])  # fmt: skip

  def test_a_device_without_kernels_is_told_once(self):
    lines = []
    with dispatch.told(lines.append):
      dispatch.choose(None, [], 'product')
      dispatch.choose(None, ['too narrow'], 'sum')
      dispatch.choose('xla', [], 'product')
    self.assertEqual(lines, [
      'kernels: none of mosaic_gpu: the device is a cpu',
      'kernels: product : xla: asked for',
    ])  # fmt: skip

  def test_what_a_model_is_declared_by_is_not_told(self):
    unseen = config.replace(presets.tiny(), {'model.dim': 72})
    lines = []
    with dispatch.told(lines.append):
      step.declare(step.build_model(unseen))
    self.assertEmpty(lines)

  def test_a_hopper_takes_the_kernel_that_fits(self):
    with mosaic.for_hopper():
      self.assertTrue(dispatch.choose(None, [], 'op').is_kernel)
      choice = dispatch.choose(None, ['too narrow'], 'op')
      self.assertEqual(choice, ('xla', 'too narrow'))
      self.assertFalse(dispatch.choose('xla', [], 'op').is_kernel)

  def test_other_gpus_and_automatic_axes_take_the_reference(self):
    def device(kind):
      return jax.sharding.AbstractDevice(kind, 132, 'gpu')

    auto = jax.sharding.AxisType.Auto
    for mesh, reason in (
      (jax.sharding.AbstractMesh((), (), abstract_device=device('A100')),
       'no Hopper'),
      (jax.sharding.AbstractMesh((2,), ('data',), axis_types=(auto,),
                                 abstract_device=device('H100')), 'data'),
    ):  # fmt: skip
      with jax.sharding.use_abstract_mesh(mesh):
        choice = dispatch.choose(None, [], 'op')
      self.assertFalse(choice.is_kernel)
      self.assertIn(reason, choice.reason)

  def test_what_cannot_run_is_said(self):
    with self.assertRaisesRegex(ValueError, "'triton'.*xla, mosaic_gpu"):
      dispatch.choose('triton', [], 'op')
    with self.assertRaisesRegex(ValueError, r'\(63, 128\) is not in tiles'):
      quantize.quantize(
        jnp.ones((63, 128)), reference.ROW_TILE, implementation='mosaic_gpu'
      )

  def test_the_setting(self):
    self.assertIsNone(dispatch.requested('auto'))
    self.assertEqual(dispatch.requested('xla'), 'xla')


if __name__ == '__main__':
  absltest.main()
