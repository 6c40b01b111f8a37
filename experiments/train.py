"""Trains a DeepSeek-V3, or any variation of it.

    python -m experiments.train                        # quickstart, ~3 minutes
    python -m experiments.train --preset=tiny --workdir=/tmp/tiny
    python -m experiments.train --model.moe.balance=aux_loss \\
      --optim.alpha=0.01 --workdir=runs/aux

The same command goes on where an interrupted run stopped.
"""

import pathlib
import shlex

from absl import flags as absl_flags

from deepseek_jax import flags
from experiments import large_pages

_WORKDIR = absl_flags.DEFINE_string(
  'workdir', None, 'Directory of the run (default: runs/<preset or file>).'
)
flags.define()


def main() -> None:
  """Runs the loop on the command line's config."""
  config, base = flags.resolve()
  workdir = _WORKDIR.value or f'runs/{flags.base_name()}'
  # After the flags are known to be right: JAX takes seconds to import.
  from deepseek_jax.evaluation import run
  from deepseek_jax.kernels import dispatch
  from deepseek_jax.training import step_log

  with dispatch.told(step_log.say):
    run.train(config, workdir, base)
  moe = config.model.moe
  if moe.n_routed_experts and moe.balance != 'aux_loss':
    other = ('--model.moe.balance=', '--optim.alpha=')
    given = [word for word in flags.given() if not word.startswith(other)]
    again = shlex.join([*given, f'--workdir={pathlib.Path(workdir)}_aux'])
    step_log.say(
      f'  python -m experiments.train {again} \\\n'
      '    --model.moe.balance=aux_loss --optim.alpha=0.01  # And MaxVio?'
    )


if __name__ == '__main__':
  large_pages.use()
  flags.run(main)
