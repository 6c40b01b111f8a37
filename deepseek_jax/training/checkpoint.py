"""Checkpoints with orbax, and the lock that keeps two runs out of one workdir.

A checkpoint `workdir/checkpoints/<step>` holds all that the rest of the run
depends on: `model` (parameters and router biases), `opt_state`, `amax` and
`ema` (where there are such) and `meta` (step, position in the data, config).
No RNG state: all seeds derive from (seed, step).  It is written beside the
training step into a temporary directory and renamed when complete, so that a
killed run leaves the previous checkpoint valid.  Arrays are stored with their
global shapes and come back on any sharding.  Nothing is pickled.
"""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging

from deepseek_jax import config as config_lib
from deepseek_jax.ops import quantize
from deepseek_jax.training import process
from deepseek_jax.training import state as state_lib

_ITEMS = ('model', 'opt_state', 'ema', 'amax', 'meta')  # Of a checkpoint.
_ABSENT = '(absent)'
# A change of these leaves changes the shape, the type or the meaning of what is
# stored; every other leaf may change between two starts, and is logged.
_FIXED = (
  'model.',
  'precision.mu_dtype',
  'precision.nu_dtype',
  'precision.fp8.amax_history',
)
# What may differ in a run of which no step is left: no step would have been
# another.
_IDLE = (
  'parallel.',
  'data.cache_dir',
  'train.steps',
  'train.log_every',
  'train.eval_',
  'train.save_every',
  'train.keep',
)
# Of tensorstore's errors, which are all `ValueError`: those of the system (of a
# disk that does not answer), but for a file that is not there.
_PASSING = (
  'RESOURCE_EXHAUSTED',
  'UNAVAILABLE',
  'PERMISSION_DENIED',
  'DEADLINE_EXCEEDED',
  'ABORTED',
  'CANCELLED',
  'os_error_code=',
)
_MISSING = 'NOT_FOUND'


@contextlib.contextmanager
def lock(workdir: str | os.PathLike) -> Iterator[None]:
  """Holds `workdir` for this run; the kernel frees it however the run ends.

  Raises:
    ValueError: if another run holds it, or it cannot be written.
  """
  workdir = pathlib.Path(workdir)
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    opened = (workdir / '.lock').open('a+')
  except OSError as error:
    raise ValueError(
      f'--workdir={workdir}: {error.strerror}: name a directory in which files '
      'can be written'
    ) from error
  with opened as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      raise ValueError(
        f'--workdir={workdir}: {file.read().strip()} is training in it; '
        'wait for it, stop it, or use another workdir'
      ) from None
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    file.flush()
    os.fsync(file.fileno())  # Over NFS other machines see it only then.
    yield


def check_shared(workdir: str | os.PathLike) -> None:
  """Returns when every process has come here, and sees the same `workdir`.

  Args:
    workdir: of the run; the first process holds its `lock`.

  Raises:
    ValueError: in every process, if one sees another disk, or what the first
      has not written.
  """
  workdir = pathlib.Path(workdir)
  seen = {path.name for path in _checkpoints(workdir).glob('*')}
  locks = [path.read_text() for path in workdir.glob('.lock')]
  process.check_same({f'what is in --workdir={workdir}': (locks, sorted(seen))})


class ConfigMismatch(ValueError):
  """The checkpoint is readable, but is not what this run asks for."""


class Checkpointer:
  """Saves and restores one run; also a context manager that closes itself."""

  def __init__(self, workdir: str | os.PathLike, config: config_lib.Config):
    """Opens `workdir/checkpoints` and removes half-written checkpoints in it.

    Args:
      workdir: of the run; hold its `lock`.
      config: stored in every checkpoint; `train.keep` of them are kept.
    """
    self._workdir = pathlib.Path(workdir).absolute()
    self._config = config
    _checkpoints(self._workdir).mkdir(parents=True, exist_ok=True)
    self._manager = _manager(
      self._workdir, max_to_keep=config.train.keep, cleanup_tmp_directories=True
    )

  def __enter__(self):
    return self

  def __exit__(self, kind, error, *_):
    # A save that waits for a process which has gone is never complete.
    if not process.lost_another(error):
      self.close()

  def latest_step(self) -> int | None:
    """Step of the newest checkpoint, saved or being saved; None without one."""
    return self._manager.latest_step()

  def save(
    self,
    state: state_lib.TrainState,
    data_state: dict[str, Any],
    ema: Any = None,
  ) -> None:
    """Starts an asynchronous save of `state.step`, after any save under way.

    Returns once the arrays have left the device: `state` may then be donated.

    Args:
      state: after the step; its parameters must be finite.
      data_state: of the data iterator, so that its next batch is the one that
        follows `state.step`; plain values, stored as JSON.
      ema: parameter average (numpy pytree), left alone until the save is over.

    Raises:
      Exception: whatever the previous save raised in the background.
    """
    import orbax.checkpoint as ocp

    step = int(state.step)
    meta = {
      'step': step,
      'has_ema': ema is not None,
      'data_state': data_state,
      'config': config_lib.to_dict(self._config),
    }
    items = {
      'model': ocp.args.StandardSave(_model(state)),
      'opt_state': ocp.args.StandardSave(state.opt_state),
      'meta': ocp.args.JsonSave(meta),
    }
    if ema is not None:
      items['ema'] = ocp.args.StandardSave(ema)
    if state.amax:
      items['amax'] = ocp.args.StandardSave(state.amax)
    saved = self._manager.save(step, args=ocp.args.Composite(**items))
    assert saved, f'step {step} is not after {self.latest_step()}'

  def restore(
    self, like: state_lib.TrainState
  ) -> tuple[state_lib.TrainState, dict[str, Any], Any] | None:
    """Reads the newest readable checkpoint.

    A damaged one is skipped with a warning, and moved to `workdir/damaged` once
    an older one has been read: the steps between the two are trained again.
    Histories of amaxes that the run had not begin with zeros.

    Args:
      like: state of arrays or `jax.ShapeDtypeStruct`s: structure, shapes, types
        and shardings (default device where there is none) of the result.

    Returns:
      (state, data_state, ema or None), or None if there is no checkpoint.

    Raises:
      ConfigMismatch: if the saved model is another one, or the saved steps are
        all and were trained with other settings.
      ValueError: if there are checkpoints and none can be read.
      Exception: what shows no damage, such as a lack of memory or a disk that
        does not answer; nothing has been moved.
    """

    def read(step, meta):
      _check_config(meta, self._config, self._workdir)
      return self._read_state(step, meta, like)

    if self.latest_step() is None:
      return None
    step, result = _newest_readable(self._manager, read)
    self._set_aside([s for s in self._manager.all_steps() if s > step])
    return result

  def _read_state(self, step, meta, like):
    import orbax.checkpoint as ocp

    items = {
      'model': ocp.args.StandardRestore(_abstract(_model(like))),
      'opt_state': ocp.args.StandardRestore(_abstract(like.opt_state)),
    }
    if meta['has_ema']:
      saved = self._manager.item_metadata(step)['ema'].tree
      items['ema'] = ocp.args.StandardRestore(_average(like, saved))
    had_amax = _has_amax(meta['config'])
    if like.amax and had_amax:
      items['amax'] = ocp.args.StandardRestore(_abstract(like.amax))
    read = {
      item: _restore(self._manager, step, item, args)
      for item, args in items.items()
    }
    amax = read['amax'] if like.amax and had_amax else _zeros(like.amax)
    state = state_lib.TrainState(
      step=_placed_alone(np.int32(meta['step']), like.step),
      opt_state=read['opt_state'],
      amax=amax,
      **read['model'],
    )
    return state, meta['data_state'], read.get('ema')

  def _set_aside(self, damaged):
    for step in damaged if process.is_first() else ():
      target = self._workdir / 'damaged' / f'{step}_{time.time_ns()}'
      target.parent.mkdir(exist_ok=True)
      (_checkpoints(self._workdir) / str(step)).rename(target)
      logging.warning('moved the damaged checkpoint to %s', target)
    if damaged:
      process.meet()
      self._manager.reload()

  def wait(self) -> None:
    """Returns when the save under way is on disk; raises as `save`."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the save under way and frees the manager's threads."""
    self._manager.close()


def load_for_inference(
  workdir: str | os.PathLike,
  use_ema: bool = False,
  shardings: Callable[[config_lib.Config], Any] | None = None,
) -> tuple[config_lib.Config, dict[str, Any], int]:
  """Reads the model of a run, also while it is training, without optimizer.

  Args:
    workdir: of the run.
    use_ema: read the averaged parameters (`optim.ema_decay`) instead.
    shardings: (config) -> those of the two collections, and in 'scales', by the
      paths in 'params', those that FP8 weights have; None, also as its result:
      the default device.

  Returns:
    (config, {'params': ..., 'router_state': ...}, step): float32, or what a
    conversion kept, FP8 weights as `Quantized` leaves.  The config's `parallel`
    is that of one device.

  Raises:
    ValueError: if there is no checkpoint, none can be read, or none has an EMA.
  """
  workdir = pathlib.Path(workdir).absolute()
  if not _checkpoints(workdir).is_dir():
    raise ValueError(
      f'--workdir={workdir}: no checkpoints in it; name the workdir of a run'
    )

  def read(step, meta):
    if use_ema and not meta['has_ema']:
      raise ConfigMismatch(
        f'--workdir={workdir}: checkpoint {step} has no EMA, for the run has '
        'optim.ema_decay=0; read its parameters'
      )
    config = config_lib.from_dict(config_lib.Config, meta['config'])
    # However many devices trained it.
    one = config_lib.ParallelConfig()
    config = dataclasses.replace(config, parallel=one)
    where = shardings(config) if shardings else None
    model = _read_as_saved(manager, step, 'model', where)
    if use_ema:
      own = where and where['params']
      model['params'] = _read_as_saved(manager, step, 'ema', own)
    return config, quantize.join_scales(model)

  # Said in full: orbax warns of what `read_only` implies.
  options = {'read_only': True, 'create': False, 'save_interval_steps': 0}
  with _manager(workdir, **options) as manager:
    step, (config, model) = _newest_readable(manager, read)
  return config, model, step


def _checkpoints(workdir):
  return workdir / 'checkpoints'


def _manager(workdir, **options):
  # Imported here: with its dependencies it costs most of a second, which a
  # program that reads no checkpoint need not pay.
  import orbax.checkpoint as ocp

  return ocp.CheckpointManager(
    _checkpoints(workdir),
    item_handlers={item: _handler(item) for item in _ITEMS},
    options=ocp.CheckpointManagerOptions(**options),
  )


def _handler(item):
  import orbax.checkpoint as ocp

  is_json = item == 'meta'
  return (
    ocp.JsonCheckpointHandler() if is_json else ocp.StandardCheckpointHandler()
  )


def _restore(manager, step, item, args):
  """One item, read by this process alone.

  `manager.restore` ends with a collective.  Where one process cannot read, it
  has gone on to another, and gloo ends processes that take them for the same.
  """
  with contextlib.closing(_handler(item)) as handler:
    return handler.restore(manager.directory / str(step) / item, args=args)


def _newest_readable(manager, read):
  """(step, read(step, meta)) of the newest checkpoint on which `read` works."""
  directory, errors = pathlib.Path(manager.directory), []
  for step in sorted(manager.all_steps(), reverse=True):
    result, error = _try_to_read(manager, read, step)
    if process.all_true(error is None):
      return step, result
    error = error or 'another process cannot read it'
    errors.append(f'{directory / str(step)}: {error}')
    logging.warning(
      'cannot read a checkpoint, trying the one before: %s', errors[-1]
    )
  raise ValueError(
    f'no readable checkpoint in {directory}; delete or move what is damaged '
    'to start again:\n  ' + '\n  '.join(errors)
  )


def _try_to_read(manager, read, step):
  """(result, None), or (None, what is wrong)."""
  import orbax.checkpoint as ocp

  try:
    meta = _restore(manager, step, 'meta', ocp.args.JsonRestore())
    return read(step, meta), None
  except ConfigMismatch:
    raise
  # Damage shows as any of a dozen types, from JSON, orbax and tensorstore.
  except Exception as error:
    if not _shows_damage(error):
      error.add_note(
        f'while reading {pathlib.Path(manager.directory) / str(step)}, which '
        'may be whole: nothing has been moved; the same command tries again'
      )
      raise
    line = (str(error).splitlines() or [''])[0][:200]
    return None, f'{type(error).__name__}: {line}'


def _shows_damage(error):
  """Whether it is about what is stored, not about reading it here and now."""
  if isinstance(error, OSError):
    return isinstance(error, (FileNotFoundError, NotADirectoryError))
  if isinstance(error, (MemoryError, RuntimeError, ImportError)):
    return False
  text = str(error)
  return text.startswith(_MISSING) or not any(w in text for w in _PASSING)


def _read_as_saved(manager, step, item, shardings):
  """The tree of an item with its own structure."""
  import orbax.checkpoint as ocp

  like = _abstract(manager.item_metadata(step)[item].tree)
  if shardings:
    like = _placed(like, shardings)
  return _restore(manager, step, item, ocp.args.StandardRestore(like))


def _placed(like, shardings):
  """`like`, each leaf with its sharding; of some, scales, there is none."""
  if isinstance(like, dict):
    return {name: _placed(x, shardings[name]) for name, x in like.items()}
  return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=shardings)


def _model(state):
  return {'params': state.params, 'router_state': state.router_state}


def _has_amax(config):
  """Whether a run with this config, as dictionaries, saves histories."""
  flat = _flat(config)
  names = ('precision.fp8.enabled', 'precision.fp8.amax_history')
  return all(flat.get(name) for name in names)


def _zeros(like):
  return jax.tree.map(
    lambda x: _placed_alone(np.zeros(x.shape, x.dtype), x), like
  )


def _placed_alone(value, like):
  """`value` where `like` lies, without the collective of `jax.device_put`.

  That compares the values of all processes, of which one may not come here.
  """
  value, where = np.asarray(value), _sharding(like)
  return jax.make_array_from_callback(value.shape, where, value.__getitem__)


def _sharding(x):
  sharding = getattr(x, 'sharding', None)
  if isinstance(sharding, jax.sharding.Sharding):
    return sharding
  return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _average(like, saved):
  """What the saved average of `like` is read as: see `HostEMA.value`."""
  if len(_sharding(like.step).device_set) == 1:
    # Views of one number tell orbax that numpy arrays are wanted.
    number = np.float32(0)
    return jax.tree.map(lambda x: np.broadcast_to(number, x.shape), saved)

  def leaf(x):
    sharding = x.sharding.with_memory_kind('pinned_host')
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree.map(leaf, like.params)


def _abstract(tree):
  def leaf(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_sharding(x))

  return jax.tree.map(leaf, tree)


def _check_config(meta, config, workdir):
  """Refuses another model or settings too late; logs other differences."""
  old, new = _flat(meta['config']), _flat(config_lib.to_dict(config))
  changed = [
    f'{name}: {old.get(name, _ABSENT)!r} -> {new.get(name, _ABSENT)!r}'
    for name in sorted(old.keys() | new.keys())
    if old.get(name, _ABSENT) != new.get(name, _ABSENT)
  ]
  fixed = [line for line in changed if line.startswith(_FIXED)]
  if fixed:
    raise ConfigMismatch(
      f'--workdir={workdir} holds a run of another model (saved -> now):\n  '
      + '\n  '.join(fixed)
      + '\nuse the saved values, or another workdir'
    )
  # Where one of the two has no such field, its value cannot be used.
  late = [
    line
    for line in changed
    if not line.startswith(_IDLE) and _ABSENT not in line
  ]
  if late and meta['step'] >= config.train.steps:
    raise ConfigMismatch(
      f'--workdir={workdir} holds all of train.steps={config.train.steps}, '
      'trained with other settings (saved -> now):\n  '
      + '\n  '.join(late)
      + '\nuse another workdir, the saved values, or more steps'
    )
  for line in changed:
    logging.warning('config changed since the checkpoint: %s', line)


def _flat(tree, prefix=''):
  """Nested dictionaries as {'model.dim': 64, ...}."""
  flat = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      flat |= _flat(value, f'{prefix}{name}.')
    else:
      flat[prefix + name] = value
  return flat
