"""The host average against float64, and against a step that donates."""

import threading
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from deepseek_jax.training import ema as ema_lib
from tests import tolerances


def _params(seed=0):
  a, b = jax.random.split(jax.random.key(seed))
  big = ema_lib._BLOCK + 17  # Not a multiple of the block.
  return {
    'x': {'w': jax.random.normal(a, (3, big)), 'b': jnp.float32(2.5)},
    'y': jax.random.normal(b, (5,)),
  }


@jax.jit
def _walk(params):
  return jax.tree.map(lambda p: p * 0.9 + jnp.cos(p), params)


_walk_donating = jax.jit(_walk, donate_argnums=0)


class EMATest(parameterized.TestCase):
  @parameterized.parameters(0.0, 0.9, 0.9999)
  def test_equals_the_float64_average(self, decay):
    params = _params()
    ema = ema_lib.HostEMA(params, decay)
    expected = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    for _ in range(20):
      params = _walk(params)
      ema.update(params)
      expected = jax.tree.map(
        lambda e, p: decay * e + (1 - decay) * np.asarray(p, np.float64),
        expected,
        params,
      )
    tolerances.assert_close(ema.value(), expected, tolerances.FLOAT32_MATH)
    for leaf in jax.tree.leaves(ema.value()):
      assert leaf.dtype == np.float32
    ema.close()

  def test_a_skipped_step_does_not_count(self):
    ema = ema_lib.HostEMA(_params(), 0.5)
    ema.update(_params(1), jnp.array(False))
    jax.tree.map(np.testing.assert_array_equal, ema.value(), _params())
    ema.update(_params(1), jnp.array(True))
    self.assertNotEqual(ema.value()['y'][0], _params()['y'][0])
    ema.close()

  def test_starts_at_the_initial_parameters_and_copies_them(self):
    params = jax.tree.map(np.array, _params())
    ema = ema_lib.HostEMA(params, 0.5)
    params['y'][:] = 0
    np.testing.assert_array_equal(ema.value()['y'], _params()['y'])
    first = ema.value()
    first['y'][:] = 0  # A copy: the average itself is untouched.
    np.testing.assert_array_equal(ema.value()['y'], _params()['y'])
    ema.close()

  def test_reads_the_parameters_before_the_next_step_overwrites_them(self):
    plain = donated = _params()
    slow = ema_lib.HostEMA(plain, 0.5)
    fast = ema_lib.HostEMA(plain, 0.5, max_pending=3)
    donated = jax.tree.map(jnp.copy, donated)
    for _ in range(50):
      plain = _walk(plain)
      slow.update(plain)
      slow.wait()
      before = donated
      donated = _walk_donating(donated)
      assert before['x']['w'].is_deleted()  # No view kept the buffer alive.
      fast.update(donated)
    for a, b in zip(
      jax.tree.leaves(slow.value()), jax.tree.leaves(fast.value())
    ):
      np.testing.assert_array_equal(a, b)
    slow.close(), fast.close()

  def test_does_not_wait_for_the_worker_until_the_queue_is_full(self):
    ema = ema_lib.HostEMA(_params(), 0.5, max_pending=2)
    gate = threading.Event()
    ema._worker.submit(gate.wait)
    ema.update(_params(1))
    ema.update(_params(2))  # Returns, although nothing has been folded in.
    done = threading.Event()
    third = threading.Thread(
      target=lambda: (ema.update(_params(3)), done.set())
    )
    third.start()
    assert not done.wait(0.2)  # Full: bounded memory.
    gate.set()
    third.join()
    ema.close()

  def test_an_error_in_the_worker_surfaces_and_stays(self):
    ema = ema_lib.HostEMA(_params(), 0.5)
    ema.update({'x': jnp.zeros(3), 'y': jnp.zeros(2)})  # Wrong shapes.
    with pytest.raises(ValueError, match='broadcast'):
      for _ in range(3):
        ema.update(_params())
    with pytest.raises(ValueError, match='broadcast'):
      ema.value()
    ema.close()

  def test_sharded_parameters(self):
    mesh = jax.make_mesh(
      (4, 2), ('a', 'b'), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    spec = jax.sharding.PartitionSpec('a', 'b')
    x = jax.random.normal(jax.random.key(0), (8, 6))
    ema = ema_lib.HostEMA({'w': jnp.zeros((8, 6))}, 0.5)
    ema.update({'w': jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))})
    np.testing.assert_array_equal(ema.value()['w'], 0.5 * np.asarray(x))
    ema.close()

  def test_parameters_that_devices_share_are_copied_device_by_device(self):
    mesh = jax.make_mesh(
      (4, 2), ('a', 'b'), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('a'))
    start, new = np.ones((8, 6), np.float32), np.arange(48.0).reshape(8, 6)
    ema = ema_lib.HostEMA({'w': jax.device_put(start, place)}, 0.5)
    new = jax.device_put(new.astype(np.float32), place)
    with mock.patch.object(jax, 'device_put', wraps=jax.device_put) as put:
      ema.update({'w': new})
    copied = jax.tree.leaves(put.call_args.args[0])
    assert len(copied) == 4  # Each part once, not on both its devices.
    # Where processes share it, JAX copies the whole by a program, of which a
    # CPU client of four devices takes 32; then it may wait for itself.
    assert all(len(x.sharding.device_set) == 1 for x in copied)
    average = np.asarray(ema.value()['w'])
    np.testing.assert_array_equal(average, (start + np.asarray(new)) / 2)
    ema.close()
