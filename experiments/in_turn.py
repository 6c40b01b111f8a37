"""Cases one after the other, and on with the next when one takes the process.

A kernel that reads beyond its memory leaves a CUDA context in which nothing
runs any more, and one that waits for ever takes its process along.  So cases
run in a child, which a new one follows after such a case.
"""

import contextlib
import os
import signal
import subprocess
import threading

_TOTAL, _PASSED, _FAILED = '@total', '@passed', '@failed'
LOST = 3  # Exit status of a child that told its case, and can do no other.
_START_S = 600.0  # So long may a child take to say its first word.


def announce(count: int) -> None:
  """Called by the child first: how many cases there are."""
  print(_TOTAL, count, flush=True)


def tell(passed: bool) -> None:
  """Called by the child after each case."""
  print(_PASSED if passed else _FAILED, flush=True)


def supervise(command: list[str], limit_s: float) -> list[bool]:
  """Whether each case passed.

  Args:
    command: of the child; `--first=i` is added, the case to begin with.
    limit_s: a child that has begun and then says nothing for so long is ended,
      with all that it started; its case failed.

  Raises:
    SystemExit: the child's status, if it never told how many cases there are.
  """
  passed, count = [], None
  while count is None or len(passed) < count:
    before = len(passed)
    with subprocess.Popen(
      [*command, f'--first={before}'],
      stdout=subprocess.PIPE,
      text=True,
      start_new_session=True,
    ) as child:
      for line in _lines(child, limit_s):
        word, *rest = line.split() or ['']
        if word == _TOTAL:
          count = int(rest[0])
        elif word in (_PASSED, _FAILED):
          passed.append(word == _PASSED)
        else:
          print(line, end='', flush=True)
    if count is None:
      raise SystemExit(child.returncode)
    told = len(passed) > before
    if len(passed) < count and not (told and child.returncode == LOST):
      print(f'FAILED: the process ended with {child.returncode}', flush=True)
      passed.append(False)
  return passed


def _lines(child, limit_s):
  """What the child prints; it is killed when it prints nothing for long."""
  wait_s = max(limit_s, _START_S)
  while True:
    timer = threading.Timer(wait_s, _give_up, (child, wait_s))
    timer.start()
    try:
      line = child.stdout.readline()
    except BaseException:  # Its session is its own: no Ctrl-C reaches it.
      _kill(child)
      raise
    finally:
      timer.cancel()
    if not line:
      return
    yield line
    wait_s = limit_s


def _give_up(child, wait_s):
  print(f'nothing was said for {wait_s:g} s: ending it', flush=True)
  _kill(child)


def _kill(child):
  """Also what it started, which may hold its output open."""
  with contextlib.suppress(ProcessLookupError):
    os.killpg(child.pid, signal.SIGKILL)
