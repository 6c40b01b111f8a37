"""Cases in a child process: the next one begins where a crash was."""

import sys

import pytest

from experiments import in_turn

# Cases: passes, fails, dies, loses the device, the same untold, hangs (as does
# what it started, which would speak in the end), passes.
_CHILD = """
import os, subprocess, sys, time
from experiments import in_turn
first = int(sys.argv[-1].partition('=')[2])
in_turn.announce(7)
for case in range(first, 7):
  print('case', case, flush=True)
  if case == 2:
    os._exit(1)
  if case == 4:
    sys.exit(in_turn.LOST)
  if case == 5:
    subprocess.Popen(['sh', '-c', 'sleep 60; echo case of a grandchild'])
    time.sleep(60)
  in_turn.tell(case in (0, 6))
  if case == 3:
    sys.exit(in_turn.LOST)
"""


def test_what_dies_or_hangs_is_failed_and_the_next_begun(capfd):
  """The limit is between two lines of a child, not of Python's start."""
  passed = in_turn.supervise([sys.executable, '-u', '-c', _CHILD], 4)
  assert passed == [True, *[False] * 5, True]
  lines = capfd.readouterr().out.splitlines()
  assert [line for line in lines if line.startswith('case')] == [
    f'case {i}' for i in range(7)
  ]
  assert [line for line in lines if not line.startswith('case')] == [
    'FAILED: the process ended with 1',
    'FAILED: the process ended with 3',
    'nothing was said for 4 s: ending it',
    'FAILED: the process ended with -9',
  ]


def test_a_child_that_never_begins_ends_all():
  with pytest.raises(SystemExit) as caught:
    in_turn.supervise([sys.executable, '-c', 'raise SystemExit(2)'], 10)
  assert caught.value.code == 2
