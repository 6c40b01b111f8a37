"""Starts several processes of one command on this machine, as one run.

    python -m experiments.launch --processes=2 -- \\
      python -m experiments.train --preset=tiny --data.batch_size=8 \\
      --parallel.data=8 --parallel.cpu_devices=4

Each gets the --parallel flags by which they find each other.  If one ends
badly, the others do within a minute, and so does this program, with its status.
On a cluster, let srun or mpirun start the command, with
--parallel.num_processes=0: see BUILD.md.
"""

import errno
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

from absl import flags as absl_flags

from deepseek_jax import flags

_PROCESSES = absl_flags.DEFINE_integer(
  'processes', 2, 'How many.', lower_bound=1
)
# A process notices by itself that another is gone, and says so.
_GRACE_SECONDS = 45
_PORTS = 15_000, 32_000  # Linux gives connections those from 32,768 on.


def free_port() -> int:
  """A port of this machine that nobody listens to.

  It is not one of those that the kernel gives to connections: one of these may
  be gone before the first process, which imports JAX first, listens to it.
  """
  while True:
    port = random.randrange(*_PORTS)
    with socket.socket() as s:
      try:
        s.bind(('127.0.0.1', port))
      except OSError as error:
        if error.errno != errno.EADDRINUSE:
          raise
      else:
        return port


def _start(command: list[str]) -> list[subprocess.Popen]:
  count, coordinator = _PROCESSES.value, f'127.0.0.1:{free_port()}'
  return [
    subprocess.Popen(
      [
        *command,
        f'--parallel.num_processes={count}',
        f'--parallel.process_id={i}',
        f'--parallel.coordinator={coordinator}',
      ],
      # Else a Ctrl-C would reach them twice, which means to quit at once.
      start_new_session=True,
    )
    for i in range(count)
  ]


def _wait(processes: list[subprocess.Popen]) -> int:
  """The status of the first that ends badly, or 0 when all have ended well."""
  bad, deadline, are_running = 0, float('inf'), True
  while are_running:
    are_running = any(p.poll() is None for p in processes)
    failed = [i for i, p in enumerate(processes) if p.poll()]
    if failed and not bad:
      bad = processes[failed[0]].returncode
      deadline = time.monotonic() + _GRACE_SECONDS
      print(
        f'process {failed[0]} ended with status {bad}; the others follow',
        file=sys.stderr,
      )
    if time.monotonic() > deadline:
      for process in processes:
        process.kill()
    time.sleep(0.1 if are_running else 0)
  return bad


def main(command: list[str]) -> None:
  """Runs what follows `--`, several times at once."""
  if not command:
    raise ValueError(
      'no command to start: write --processes=2 -- python -m experiments.train '
      '--workdir=runs/two, and the flags of that'
    )
  if not shutil.which(command[0]):
    raise ValueError(f'{command[0]}: no such program')
  processes = _start(command)

  def forward(number, _):
    for process in processes:
      process.send_signal(number)

  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, forward)
  status = _wait(processes)
  sys.exit(128 - status if status < 0 else status)


if __name__ == '__main__':
  flags.run(main, takes_command=True)
