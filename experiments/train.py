"""Trains a DeepSeek-V3, or any variation of it.

    python -m experiments.train                        # quickstart, ~3 minutes
    python -m experiments.train --preset=tiny --workdir=/tmp/tiny
    python -m experiments.train --model.moe.balance=aux_loss --workdir=runs/aux

The same command goes on where an interrupted run stopped.
"""

from absl import flags as absl_flags

from deepseek_jax import flags
from experiments import large_pages

_WORKDIR = absl_flags.DEFINE_string(
  'workdir', None, 'Directory of the run (default: runs/<preset>).'
)
flags.define()


def main() -> None:
  """Runs the loop on the command line's config."""
  config, base = flags.resolve()
  workdir = _WORKDIR.value or f'runs/{absl_flags.FLAGS.preset}'
  # After the flags are known to be right: JAX takes seconds to import.
  from deepseek_jax.evaluation import run
  from deepseek_jax.kernels import dispatch
  from deepseek_jax.training import step_log

  with dispatch.told(step_log.say):
    run.train(config, workdir, base)


if __name__ == '__main__':
  large_pages.use()
  flags.run(main)
