"""Checkpoints on small trees: what comes back, and what is refused."""

import functools
import pathlib
import subprocess
import sys
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

from deepseek_jax import config as config_lib
from deepseek_jax.training import checkpoint
from deepseek_jax.training import state as state_lib


def _config(**updates):
  updates = {k.replace('__', '.'): v for k, v in updates.items()}
  return config_lib.replace(config_lib.Config(), updates)


@functools.cache
def _optimizer():
  mask = {'layer': {'w': True, 'b': False}}
  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(0.1, mu_dtype=jnp.bfloat16, mask=mask),
  )


def _state(seed=0, step=0, router=True):
  w = jax.random.normal(jax.random.key(seed), (64, 48))
  params = {'layer': {'w': w, 'b': jnp.full(3, float(seed))}}
  opt_state = _optimizer().init(params)
  _, opt_state = _optimizer().update(params, opt_state, params)
  router_state = {'bias': jnp.arange(4.0)} if router else {}
  return state_lib.TrainState(
    step=jnp.int32(step),
    params=params,
    router_state=router_state,
    opt_state=opt_state,
  )


def _save(workdir, steps, config=None, ema=False):
  with checkpoint.Checkpointer(workdir, config or _config()) as saver:
    for step in steps:
      state = _state(step, step)
      average = jax.tree.map(lambda x: np.asarray(x) + 1, state.params)
      saver.save(state, {'next': step}, average if ema else None)


def _restore(workdir, config=None, like=None):
  with checkpoint.Checkpointer(workdir, config or _config()) as saver:
    return saver.restore(like or _state())


def _largest_file(directory):
  files = [p for p in pathlib.Path(directory).rglob('*') if p.is_file()]
  return max(files, key=lambda p: p.stat().st_size)


@pytest.fixture(autouse=True)
def _workdir(request, tmp_path):
  request.cls.workdir = tmp_path / 'run'


class RoundTripTest(parameterized.TestCase):
  @parameterized.product(ema=[False, True], router=[False, True])
  def test_everything_comes_back_bitwise(self, ema, router):
    state = _state(3, 7, router)
    average = {'w': np.float32([1, 2])} if ema else None
    data_state = {'parent': {'next_index': 12}, 'rest': [1, 2, 3]}
    with checkpoint.Checkpointer(self.workdir, _config()) as saver:
      assert saver.restore(state) is None
      assert saver.latest_step() is None
      saver.save(state, data_state, average)
      saver.wait()
      assert saver.latest_step() == 7
    restored, restored_data, restored_ema = _restore(
      self.workdir, like=jax.eval_shape(lambda: _state(0, 0, router))
    )
    chex.assert_trees_all_equal_structs(restored, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, state)
    chex.assert_trees_all_equal(restored, state)
    chex.assert_trees_all_equal(restored_data, data_state)
    chex.assert_trees_all_equal(restored_ema, average)

  def test_delayed_scales_begin_with_zeros_and_are_not_missed(self):
    """A run without FP8 goes on with it; histories that it had come back."""
    # The settings are checked where they are set; only two leaves count here.
    tiles = {
      f'precision__fp8__{x}_tile': 'tensor'
      for x in ('activation', 'weight', 'gradient')
    }
    off = _config(precision__fp8__amax_history=2, **tiles)
    on = config_lib.replace(off, {'precision.fp8.enabled': True})
    amax = {'layer': {'w': jnp.ones((1, 2, 3))}}
    like = _state().replace(amax=amax)
    _save(self.workdir, [1], off)
    zeros = jax.tree.map(jnp.zeros_like, amax)
    restored, *_ = _restore(self.workdir, on, like)
    chex.assert_trees_all_equal(restored, _state(1, 1).replace(amax=zeros))
    with checkpoint.Checkpointer(self.workdir, on) as saver:
      saver.save(like.replace(step=jnp.int32(2)), {})
    restored, *_ = _restore(self.workdir, on, like)
    chex.assert_trees_all_equal(restored.amax, amax)
    # It lacks them though its config says that it has them: damage.
    _save(self.workdir, [3], on)
    assert int(_restore(self.workdir, on, like)[0].step) == 2

  def test_saves_what_was_there_though_the_buffers_are_donated(self):
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = _state(1)
    big = {'big': jnp.zeros(1 << 20)}
    state = state.replace(params={**state.params, **big})
    with checkpoint.Checkpointer(self.workdir, _config()) as saver:
      for _ in range(2):
        state = step(state)
        expected = jax.tree.map(np.array, state)
        saver.save(state, {})
        for _ in range(10):
          state = step(state)
      saver.wait()
      like = state
    with checkpoint.Checkpointer(self.workdir, _config()) as saver:
      restored, *_ = saver.restore(like)
    chex.assert_trees_all_equal(restored, expected)

  def test_keeps_the_newest(self):
    _save(self.workdir, [1, 2, 3], _config(train__keep=2))
    kept = sorted(p.name for p in (self.workdir / 'checkpoints').iterdir())
    assert kept == ['2', '3']

  def test_another_sharding_and_another_process(self):
    _save(self.workdir, [5])
    mesh = jax.make_mesh(
      (4, 2), ('a', 'b'), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )

    def sharded(x):
      spec = ('a', 'b') if x.shape == (64, 48) else ()
      spec = jax.sharding.PartitionSpec(*spec)
      sharding = jax.sharding.NamedSharding(mesh, spec)
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    like = jax.tree.map(sharded, _state())
    restored, *_ = _restore(self.workdir, like=like)
    chex.assert_trees_all_equal(restored, _state(5, 5))
    jax.tree.map(
      lambda x, y: self.assertEqual(x.sharding, y.sharding), restored, like
    )

  def test_nothing_is_pickled(self):
    _save(self.workdir, [1], ema=True)
    for path in (self.workdir / 'checkpoints').rglob('*'):
      if path.is_file():
        raw = path.read_bytes()
        assert not (raw[:1] == b'\x80' and raw[-1:] == b'.'), path


class InferenceTest(parameterized.TestCase):
  def test_reads_the_model_alone(self):
    config = _config(model__n_layers=60)
    _save(self.workdir, [1, 4], config, ema=True)
    loaded, model, step = checkpoint.load_for_inference(self.workdir)
    assert (loaded, step) == (config, 4)
    expected = _state(4, 4)
    chex.assert_trees_all_equal(
      model,
      {'params': expected.params, 'router_state': expected.router_state},
    )
    _, model, _ = checkpoint.load_for_inference(self.workdir, use_ema=True)
    chex.assert_trees_all_equal(
      model['params'], jax.tree.map(lambda x: x + 1, expected.params)
    )
    assert isinstance(model['params']['layer']['w'], jax.Array)

  def test_reads_in_another_process_beside_the_run(self):
    code = (
      'import sys, deepseek_jax.training.checkpoint as c\n'
      'config, model, step = c.load_for_inference(sys.argv[1])\n'
      'print(step, float(model["params"]["layer"]["w"].sum()))\n'
    )
    with (
      checkpoint.lock(self.workdir),
      checkpoint.Checkpointer(self.workdir, _config()) as saver,
    ):
      saver.save(_state(2, 2), {})
      saver.wait()
      half_written = self.workdir / 'checkpoints' / '3.orbax-checkpoint-tmp'
      half_written.mkdir()
      out = subprocess.run(
        [sys.executable, '-c', code, str(self.workdir)],
        check=True,
        capture_output=True,
        text=True,
        cwd=pathlib.Path(__file__).parent.parent,
      ).stdout.split()
      assert half_written.exists()  # A reader must not clean up a live run.
    assert out == ['2', str(float(_state(2).params['layer']['w'].sum()))]

  def test_refusals(self):
    with pytest.raises(ValueError, match='no checkpoints in it'):
      checkpoint.load_for_inference(self.workdir)
    _save(self.workdir, [1])
    with pytest.raises(ValueError, match='has no EMA'):
      checkpoint.load_for_inference(self.workdir, use_ema=True)


class DamageTest(parameterized.TestCase):
  @parameterized.parameters('model', 'opt_state', 'meta', 'ema')
  def test_falls_back_to_the_one_before(self, item):
    _save(self.workdir, [1, 2], ema=True)
    damaged = self.workdir / 'checkpoints' / '2'
    file = _largest_file(damaged / item)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with (
      self.assertLogs(level='WARNING') as logs,
      checkpoint.Checkpointer(self.workdir, _config()) as saver,
    ):
      state, data_state, _ = saver.restore(_state())
      chex.assert_trees_all_equal(state, _state(1, 1))
      assert data_state == {'next': 1}
      assert saver.latest_step() == 1
      saver.save(_state(2, 2), {'next': 2})  # The step is free again.
    assert str(damaged) in ''.join(logs.output)
    assert len(list((self.workdir / 'damaged').iterdir())) == 1
    assert int(_restore(self.workdir)[0].step) == 2

  def test_nothing_readable_is_an_error_and_moves_nothing(self):
    _save(self.workdir, [1, 2])
    for step in '12':
      file = _largest_file(self.workdir / 'checkpoints' / step / 'model')
      file.unlink()
    with pytest.raises(ValueError, match='(?s)no readable.*/2:.*/1:'):
      _restore(self.workdir)
    with pytest.raises(ValueError, match='no readable'):
      checkpoint.load_for_inference(self.workdir)
    assert (self.workdir / 'checkpoints' / '2').exists()

  @parameterized.parameters(
    (MemoryError(),),
    (OSError(5, 'Input/output error'),),
    (jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: out of memory'),),
    (ValueError('UNAVAILABLE: no answer'),),
    (ValueError("UNKNOWN: Error reading local file: [os_error_code='116']"),),
    (RuntimeError("can't start new thread"),),
  )
  def test_what_shows_no_damage_moves_nothing(self, error):
    _save(self.workdir, [1, 2])
    with (
      checkpoint.Checkpointer(self.workdir, _config()) as saver,
      mock.patch.object(saver, '_read_state', side_effect=error),
      pytest.raises(type(error)) as raised,
    ):
      saver.restore(_state())
    assert 'checkpoints/2, which may be whole' in raised.value.__notes__[0]
    assert not (self.workdir / 'damaged').exists()
    assert int(_restore(self.workdir)[0].step) == 2

  def test_half_written_checkpoints_are_removed(self):
    _save(self.workdir, [1])
    half = self.workdir / 'checkpoints' / '2.orbax-checkpoint-tmp'
    (half / 'model').mkdir(parents=True)
    state, *_ = _restore(self.workdir)
    assert int(state.step) == 1
    assert not half.exists()


class ConfigTest(parameterized.TestCase):
  @parameterized.parameters(
    {'model__moe__route_scale': 1.0},
    {'model__dim': 64, 'model__rope__factor': 40.0},
    {'precision__mu_dtype': 'float32'},
  )
  def test_another_model_is_refused_with_the_diff(self, **updates):
    _save(self.workdir, [1, 2])
    with pytest.raises(checkpoint.ConfigMismatch) as raised:
      _restore(self.workdir, _config(**updates))
    for name, value in updates.items():
      name = name.replace('__', '.')
      old = config_lib.leaves(config_lib.Config())[name]
      assert f'{name}: {old!r} -> {value!r}' in str(raised.value)
    assert str(raised.value).count('->') == len(updates) + 1
    assert int(_restore(self.workdir)[0].step) == 2  # Nothing was moved.

  def test_other_changes_are_logged(self):
    _save(self.workdir, [1])
    with self.assertLogs(level='WARNING') as logs:
      restored = _restore(self.workdir, _config(train__steps=9, optim__lr=1.0))
    assert int(restored[0].step) == 1
    old = config_lib.Config()
    assert f'train.steps: {old.train.steps} -> 9' in ''.join(logs.output)
    assert f'optim.lr: {old.optim.lr} -> 1.0' in ''.join(logs.output)

  def test_fields_come_and_go_after_the_last_step(self):
    config = _config(train__steps=1)
    _save(self.workdir, [1], config)
    optim = config_lib.to_dict(config)['optim']
    saved = {'b3': optim.pop('b2'), **optim}
    to_dict = config_lib.to_dict
    with (
      mock.patch.object(
        config_lib, 'to_dict', lambda c: to_dict(c) | {'optim': saved}
      ),
      self.assertLogs(level='WARNING') as logs,
    ):
      assert int(_restore(self.workdir, config)[0].step) == 1
    for line in ('optim.b2: 0.95 -> (absent)', 'optim.b3: (absent) -> 0.95'):
      assert line in ''.join(logs.output).replace("'", '')


class LockTest(parameterized.TestCase):
  def test_second_run_is_refused_until_the_first_ends(self):
    code = (
      'import sys, time, deepseek_jax.training.checkpoint as c\n'
      'with c.lock(sys.argv[1]):\n'
      '  print("held", flush=True)\n'
      '  time.sleep(600)\n'
    )
    holder = subprocess.Popen(
      [sys.executable, '-c', code, str(self.workdir)],
      stdout=subprocess.PIPE,
      cwd=pathlib.Path(__file__).parent.parent,
    )
    try:
      assert holder.stdout.readline() == b'held\n'
      with pytest.raises(ValueError, match=f'process {holder.pid} on'):
        checkpoint.lock(self.workdir).__enter__()
    finally:
      holder.kill()
      holder.wait()
    with (
      checkpoint.lock(self.workdir),  # SIGKILL freed it.
      pytest.raises(ValueError, match='use another workdir'),
    ):
      checkpoint.lock(self.workdir).__enter__()
    with checkpoint.lock(self.workdir):
      pass

  def test_a_place_that_cannot_be_written_is_refused(self):
    self.workdir.write_text('a file')
    with pytest.raises(ValueError, match='run/a: Not a directory: name a'):
      checkpoint.lock(self.workdir / 'a').__enter__()
