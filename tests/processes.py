"""Programs in processes of their own, for tests that start and stop them.

Deadlines count the turns of a loop that sleeps, not the clock: a machine that
stops everything for a while stops them too.
"""

import contextlib
import itertools
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

_ROOT = pathlib.Path(__file__).parents[1]
_TURN = 0.02


class Process:
  """`python ARGUMENTS`, what it prints in a file: a full pipe would stop it."""

  def __init__(self, path: pathlib.Path, *arguments: str):
    """`path`: of the file."""
    self._path = path
    with path.open('w') as output:
      self._popen = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=_ROOT,
        stdout=output,
        stderr=subprocess.STDOUT,
      )

  @property
  def text(self) -> str:
    """What it has printed so far."""
    return self._path.read_text()

  @property
  def is_running(self) -> bool:
    """Whether it has not ended."""
    return self._popen.poll() is None

  def send(self, number: int) -> None:
    """Sends it a signal."""
    self._popen.send_signal(number)

  def finish(self, seconds: float = 600) -> tuple[int, str]:
    """Its status and what it printed; it must end within `seconds`."""
    wait_until(lambda: not self.is_running, seconds, self)
    return self._popen.returncode, self.text

  def end(self) -> None:
    """Ends it if it still runs, a launcher with what it has started."""
    self._popen.terminate()
    try:
      self._popen.wait(30)
    except subprocess.TimeoutExpired:
      self._popen.kill()
      self._popen.wait()


def wait_until(
  condition: Callable[[], bool], seconds: float, *processes: Process
) -> None:
  """Returns when the condition holds; fails with what the processes print."""
  for _ in range(int(seconds / _TURN)):
    if condition():
      return
    time.sleep(_TURN)
  texts = '\n'.join(process.text for process in processes)
  raise AssertionError(f'not within {seconds} s:\n{texts}')


@contextlib.contextmanager
def starter() -> Iterator[Callable[..., Process]]:
  """Gives the function that starts processes, and leaves none behind."""
  with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
    names = itertools.count()

    def start(*arguments):
      process = Process(pathlib.Path(folder, str(next(names))), *arguments)
      stack.callback(process.end)
      return process

    yield start
