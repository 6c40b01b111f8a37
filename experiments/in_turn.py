"""Cases one after the other, and on with the next when one takes the process.

A kernel that reads beyond its memory leaves a CUDA context in which nothing
runs any more, and one that waits for ever takes its process along.  So cases
run in a child, which a new one follows after such a case.
"""

import subprocess
import threading

_TOTAL, _PASSED, _FAILED = '@total', '@passed', '@failed'
LOST = 3  # Exit status of a child that told its case, and can do no other.


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
    limit_s: a child that says nothing for so long is ended; its case failed.

  Raises:
    SystemExit: the child's status, if it never told how many cases there are.
  """
  passed, count = [], None
  while count is None or len(passed) < count:
    before = len(passed)
    with subprocess.Popen(
      [*command, f'--first={before}'], stdout=subprocess.PIPE, text=True
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
    if len(passed) < count and child.returncode != LOST:
      print(
        f'FAILED: the process ended with {child.returncode} (-9: it said '
        f'nothing for {limit_s:g} s)',
        flush=True,
      )
      passed.append(False)
  return passed


def _lines(child, limit_s):
  """What the child prints; it is killed when it prints nothing for long."""
  timer = threading.Timer(limit_s, child.kill)
  timer.start()
  for line in child.stdout:
    timer.cancel()
    timer = threading.Timer(limit_s, child.kill)
    timer.start()
    yield line
  timer.cancel()
