"""Plans a run without any device.

    python -m experiments.plan --schedule=dualpipe --ranks=8 --microbatches=20
    python -m experiments.plan --schedule=zb_h1 --costs=1,2.5,0.8 --out=zb.svg
    python -m experiments.plan --preset=deepseek_v3 --device=h800 \
      --parallel.data=2 --parallel.node=8 --parallel.expert=8 \
      --parallel.stage=16 \
      --parallel.stage_layers=3,4,4,4,4,4,4,4,4,4,4,4,4,4,4,2 \
      --parallel.zero1 --parallel.expert_buffer=1.2 \
      --train.micro_batch_size=128 --data.batch_size_start=0

With `--schedule`: a pipeline schedule step by step, each rank's bubble and the
micro-batches whose activations it holds.  Without: what a run takes of each
device, what crosses each axis of the mesh in a step, and how fast a step can
be.
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
_MOST = 100_000  # Forwards of a schedule, which take some ten seconds.
_DEVICE = absl_flags.DEFINE_string('device', 'h800', 'h800, h100 or h200.')
flags.define(default_preset='deepseek_v3')


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

  ranks, microbatches = _RANKS.value, _MICROBATCHES.value
  if ranks * microbatches > _MOST:
    raise ValueError(
      f'ranks={ranks} times microbatches={microbatches}: use at most {_MOST:,}'
    )
  schedule = schedules.make(_SCHEDULE.value, ranks, microbatches)
  run = simulate.simulate(schedule, _costs())
  if _OUT.value is not None:
    timeline.draw(run, _OUT.value)
  print(timeline.text(run))


def _plan_run() -> None:
  from deepseek_jax.parallel import schedules
  from deepseek_jax.planner import communication, report

  config, _ = flags.resolve()
  schedule, parallel = None, config.parallel
  if parallel.stage > 1:
    count = communication.microbatches(config)
    schedule = schedules.make(parallel.schedule, parallel.stage, count)
    _check(config)
  print(report.text(config, _DEVICE.value, schedule))


def _check(config) -> None:
  """Refuses stages that a run would refuse, which knows every shape."""
  from deepseek_jax.training import layout, step

  layout.places(step.declare(step.build_model(config)), config)


def main() -> None:
  """Prints the plan that the flags ask for."""
  given = {name for name in absl_flags.FLAGS if absl_flags.FLAGS[name].present}
  is_run = _SCHEDULE.value is None
  other = {'ranks', 'microbatches', 'costs', 'out'}
  if not is_run:
    other = {'preset', 'config', 'device'}
  for name in sorted(given & other):
    raise ValueError(
      f'--{name} is of the plan of a {"schedule" if is_run else "run"}: '
      f'{"add" if is_run else "drop"} --schedule, or drop it'
    )
  _plan_run() if is_run else _plan_schedule()


if __name__ == '__main__':
  flags.run(main)
