"""What a process sets before its first step, and how several run together."""

import contextlib
import hashlib
import os
import pathlib
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax import config as config_lib

# Fields of `ParallelConfig` by which processes find each other.
MEETING = frozenset({'coordinator', 'num_processes', 'process_id'})
# A process that is not heard of for so long is lost, and the others end.
_HEARTBEAT_SECONDS = 20
# After so long it is said for whom a process waits, and then that it ends.
_PATIENCE_SECONDS = 15
_MEETING_SECONDS = 300
# Within it all say what is wrong, where something is wrong for all.
_LAST_WORD_SECONDS = 5
# The first process draws plots while the others wait to leave.
_SHUTDOWN_SECONDS = 3600


def join(config: config_lib.ParallelConfig) -> None:
  """Starts this process's devices and finds the other processes.

  Raises:
    ValueError: JAX has started with other devices, a process cannot be told
      from the others, or the first one's port is not free.
  """
  if config.cpu_devices:
    _use_cpu_devices(config.cpu_devices)
  if config.num_processes == 1 or jax.distributed.is_initialized():
    return
  if config.coordinator and config.process_id == 0:
    _check_port(config.coordinator)
  # Of CPUs alone: a GPU's stream orders what is dispatched.  Here a program
  # ends before the next begins, so that no two programs' collectives can mix.
  jax.config.update('jax_cpu_enable_async_dispatch', False)
  # JAX waits in silence, and would end with a core dump.
  timers = [
    threading.Timer(_PATIENCE_SECONDS, _say_who_is_missed, [config]),
    threading.Timer(_MEETING_SECONDS, _give_up, [config]),
  ]
  for timer in timers:
    timer.daemon = True
    timer.start()
  try:
    jax.distributed.initialize(
      config.coordinator or None,
      config.num_processes or None,
      config.process_id if config.process_id >= 0 else None,
      initialization_timeout=2 * _MEETING_SECONDS,
      heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
      shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
    )
  except (ValueError, TypeError) as error:
    raise ValueError(
      f'parallel.num_processes={config.num_processes}: {error} Give '
      '--parallel.coordinator=host:port and --parallel.process_id, or start '
      'with srun, mpirun or python -m experiments.launch'
    ) from error
  finally:
    for timer in timers:
      timer.cancel()
  if threading.current_thread() is threading.main_thread():
    # Where another process is gone JAX says so and aborts: no stacks after it.
    signal.signal(signal.SIGABRT, signal.SIG_DFL)
  if jax.default_backend() == 'cpu':
    # There JAX finds the first process's kept programs only: it would come to
    # its first collective while the others compile, and gloo waits for 30 s.
    jax.config.update('jax_enable_compilation_cache', False)
    _keep_stdout()


def _keep_stdout():
  """Sends what gloo says in C++, of each connection, to stderr.

  Amid the text of several processes' generation, half a line of it ended there.
  """
  sys.stdout.flush()
  try:
    if sys.stdout.fileno() != 1:  # A notebook's.
      return
  except OSError:
    return
  own = os.dup(1)
  os.dup2(2, 1)
  sys.stdout = open(  # noqa: SIM115  As long-lived as the process.
    own, 'w', 1, encoding=sys.stdout.encoding, errors=sys.stdout.errors
  )


def _check_port(coordinator):
  """Refuses a port at which JAX would end in a segmentation fault."""
  with socket.socket() as s:
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      s.bind(('', int(coordinator.rpartition(':')[2])))
    except OSError as error:
      raise ValueError(
        f'parallel.coordinator={coordinator}: {error.strerror}: use another '
        'port, the same in every process'
      ) from error


def _meeting(config):
  count = config.num_processes or 'all'
  where = config.coordinator or "the cluster's address"
  return (
    f'{count} processes to come to {where}: each needs the same '
    '--parallel.coordinator, and a --parallel.process_id of its own'
  )


def _say_who_is_missed(config):
  print(f'waiting for {_meeting(config)}', file=sys.stderr, flush=True)


def _give_up(config):
  """Ends the process, which waits in a function that nothing interrupts."""
  print(
    f'ERROR: waited {_MEETING_SECONDS} s for {_meeting(config)}',
    file=sys.stderr,
    flush=True,
  )
  os._exit(1)


def _use_cpu_devices(count):
  try:
    jax.config.update('jax_num_cpu_devices', count)
    jax.config.update('jax_platforms', 'cpu')
  except RuntimeError:  # JAX has started.
    present = len(jax.local_devices())
    if present != count:
      raise ValueError(
        f'parallel.cpu_devices={count}: JAX has started with {present} '
        'devices; start a new process'
      ) from None


def is_first() -> bool:
  """Whether this process is the one that talks and writes."""
  return jax.process_index() == 0


def all_true(value: bool) -> bool:
  """Whether `value` is true in every process; waits for all of them."""
  if jax.process_count() == 1:
    return value
  return bool(multihost_utils.process_allgather(np.bool_(value)).all())


def meet() -> None:
  """Returns when every process has come here."""
  all_true(True)


def check_same(values: Mapping[str, Any]) -> None:
  """Returns when every process has come here, with equal values.

  Args:
    values: what must not differ, by names that are the same everywhere.

  Raises:
    ValueError: in every process, naming what differs, and where.
  """
  if jax.process_count() == 1:
    return
  hashes = [hashlib.sha256(repr(v).encode()).digest() for v in values.values()]
  own = np.frombuffer(b''.join(hashes), np.uint8).reshape(len(hashes), -1)
  differs = multihost_utils.process_allgather(own)
  differs = (differs != differs[0]).any(-1)  # [processes, values]
  problems = [
    f'{name}: process {", ".join(map(str, np.flatnonzero(where)))} has another '
    f'value than process 0 (here {value!r})'
    for (name, value), where in zip(values.items(), differs.T)
    if where.any()
  ]
  if problems:
    raise ValueError('; '.join(problems) + '; start all with the same')


def check_flags(workdir: str, leaves: Mapping[str, Any]) -> None:
  """`check_same` of flags, but for those by which processes meet.

  Args:
    workdir: that of the run.
    leaves: of a config, by their full names, and other flags.
  """
  meeting = {f'parallel.{name}' for name in MEETING}
  common = {k: v for k, v in leaves.items() if k not in meeting}
  check_same({'workdir': workdir, **common})


def lost_another(error: BaseException | None) -> bool:
  """Whether `error` says that another process has gone, by all we know.

  A collective or a barrier fails without it; not so a lack of memory.
  """
  while error and not isinstance(error, jax.errors.JaxRuntimeError):
    error = error.__cause__
  is_full = 'RESOURCE_EXHAUSTED' in str(error)
  return jax.process_count() > 1 and error is not None and not is_full


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Ends this process at once if the body fails, so that no other waits for it.

  The ordinary end of a process waits for all the others, which wait in a
  collective for this one.  Alone, a process just raises.
  """
  try:
    yield
  except (Exception, KeyboardInterrupt) as error:
    if jax.process_count() == 1:
      raise
    who = f'process {jax.process_index()} of {jax.process_count()}'
    notes = ''.join(f'\n{note}' for note in getattr(error, '__notes__', ()))
    if lost_another(error):
      text = (
        f'{who} lost another one, whose own last lines say why.  All end; the '
        f'same command goes on from the newest checkpoint.\n{error}'
      )
    elif isinstance(error, (ValueError, FloatingPointError)):
      text = f'{who}: {error}{notes}'
    else:
      text = f'{who}:\n{traceback.format_exc()}'
    print(f'ERROR: {text}', file=sys.stderr, flush=True)
    sys.stdout.flush()
    if is_first():  # Without it the others abort, with pages of stack traces.
      time.sleep(_LAST_WORD_SECONDS)
    os._exit(1)


class Agreement:
  """A request, such as to stop, that all processes obey at the same step."""

  def __init__(self, mesh: jax.sharding.Mesh | None):
    """`mesh`: of all processes; None: there is only this one."""
    self._asked = None  # The answer to come.
    self._mesh = mesh if jax.process_count() > 1 else None
    if self._mesh is not None:
      whole = NamedSharding(mesh, PartitionSpec())
      self._any = jax.jit(lambda x: x.max(), out_shardings=whole)

  def __call__(self, wish: int) -> int:
    """The greatest wish of any process at the call before; alone, this one.

    Waits for no more than the step before: the answer to this call is computed
    after the step that is under way.
    """
    if self._mesh is None:
      return wish
    answer = 0 if self._asked is None else int(self._asked)
    parts = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
    local = np.full(len(jax.local_devices()), wish, np.int32)
    wishes = jax.make_array_from_process_local_data(parts, local)
    self._asked = self._any(wishes)
    return answer


def use_compilation_cache(config: config_lib.Config) -> None:
  """Keeps compiled programs under `data.cache_dir`, unless JAX has a cache."""
  if jax.config.jax_compilation_cache_dir is None:
    path = pathlib.Path(config.data.cache_dir).expanduser() / 'xla'
    jax.config.update('jax_compilation_cache_dir', str(path))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
