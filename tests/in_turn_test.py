"""Cases in a child process: the next one begins where a crash was."""

import sys

import pytest

from experiments import in_turn

# Cases: passes, fails, dies, loses the device, hangs, passes.
_CHILD = """
import os, sys, time
from experiments import in_turn
first = int(sys.argv[-1].partition('=')[2])
in_turn.announce(6)
for case in range(first, 6):
  print('case', case, flush=True)
  if case == 2:
    os._exit(1)
  if case == 4:
    time.sleep(1e4)
  in_turn.tell(case in (0, 5))
  if case == 3:
    sys.exit(in_turn.LOST)
"""


def test_what_dies_or_hangs_is_failed_and_the_next_begun(capfd):
  passed = in_turn.supervise([sys.executable, '-u', '-c', _CHILD], 10)
  assert passed == [True, False, False, False, False, True]
  lines = capfd.readouterr().out.splitlines()
  assert [line for line in lines if line.startswith('case')] == [
    f'case {i}' for i in range(6)
  ]
  ends = [line.split(' (')[0] for line in lines if 'FAILED' in line]
  assert ends == [f'FAILED: the process ended with {n}' for n in (1, -9)]


def test_a_child_that_never_begins_ends_all():
  with pytest.raises(SystemExit) as caught:
    in_turn.supervise([sys.executable, '-c', 'raise SystemExit(2)'], 10)
  assert caught.value.code == 2
