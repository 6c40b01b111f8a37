"""Plans a run without any device.

    python -m experiments.plan --schedule=dualpipe --ranks=8 --microbatches=20
    python -m experiments.plan --schedule=zb_h1 --costs=1,2.5,0.8 --out=zb.svg

With `--schedule`: the pipeline schedule step by step, each rank's bubble and
the micro-batches whose activations it holds.
"""

from absl import flags as absl_flags

from deepseek_jax import flags

_SCHEDULE = absl_flags.DEFINE_string(
  'schedule',
  None,
  'gpipe, 1f1b, interleaved, zb_h1, dualpipe or dualpipe_v.',
)
_RANKS = absl_flags.DEFINE_integer('ranks', 8, 'Devices along the pipeline.')
_MICROBATCHES = absl_flags.DEFINE_integer(
  'microbatches', 20, 'Micro-batches of one optimizer step.'
)
_COSTS = absl_flags.DEFINE_list(
  'costs',
  '1,2,1,3,0',
  'Time of a forward, a whole backward, its weight gradient, an overlapped '
  'pair, and the latency of a message; those left out keep their defaults.',
)
_OUT = absl_flags.DEFINE_string('out', None, 'Also draw to this .png or .svg.')


def _costs():
  from deepseek_jax.parallel import simulate

  values = _COSTS.value
  try:
    numbers = [float(value) for value in values]
  except ValueError:
    numbers = []
  if not 1 <= len(numbers) <= 5:
    raise ValueError(f'--costs={",".join(values)}: give 1 to 5 numbers')
  return simulate.Costs(*numbers)


def _plan_schedule() -> None:
  from deepseek_jax.parallel import schedules, simulate
  from deepseek_jax.planner import timeline

  schedule = schedules.make(_SCHEDULE.value, _RANKS.value, _MICROBATCHES.value)
  run = simulate.simulate(schedule, _costs())
  print(timeline.text(run))
  if _OUT.value:
    timeline.draw(run, _OUT.value)


def main() -> None:
  """Prints the plan that the flags ask for."""
  if _SCHEDULE.value is None:
    raise ValueError('--schedule is not set: name one, such as dualpipe')
  _plan_schedule()


if __name__ == '__main__':
  flags.run(main)
