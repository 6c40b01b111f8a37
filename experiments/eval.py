"""Validation loss, bits per byte and MTP acceptance of a trained model.

    python -m experiments.eval                             # runs/quickstart
    python -m experiments.eval --workdir=runs/aux --ema --batches=0

    python -m experiments.eval --parallel.expert=2 --parallel.cpu_devices=4

Reads the newest checkpoint, also while the run goes on; on several devices none
holds more than its part.  The last line of the output is JSON.
"""

import json
import pathlib

from absl import flags as absl_flags

from deepseek_jax import config as config_lib
from deepseek_jax import flags
from experiments import large_pages

_WORKDIR = absl_flags.DEFINE_string(
  'workdir', 'runs/quickstart', 'Directory of the run.'
)
_EMA = absl_flags.DEFINE_bool('ema', False, 'Use the averaged parameters.')
_FP8 = absl_flags.DEFINE_bool(
  'fp8',
  None,
  'Quantise the inputs of linear layers; of FP8 weights, otherwise, only the '
  'weights are (default: as the config says).',
)
_BATCHES = absl_flags.DEFINE_integer(
  'batches',
  None,
  'Validation batches; 0: all (default: train.eval_batches of the run).',
  lower_bound=0,
)
flags.define_axes()


def main() -> None:
  """Prints a line for each result, then all of them as JSON."""
  workdir = pathlib.Path(_WORKDIR.value).expanduser()
  if not workdir.is_dir():
    raise ValueError(f'--workdir={workdir}: no such directory')
  from deepseek_jax.data import pipeline, tokenizer
  from deepseek_jax.evaluation import run
  from deepseek_jax.kernels import dispatch
  from deepseek_jax.training import state, step_log
  from deepseek_jax.training import trained as trained_lib

  changes = {
    'train.eval_batches': _BATCHES.value,
    'precision.fp8.enabled': _FP8.value,
  }
  changes = {name: v for name, v in changes.items() if v is not None}
  parallel = trained_lib.start(flags.axes())
  trained = trained_lib.load(workdir, _EMA.value, parallel, changes)
  config = trained.config
  # The run's own tokenizer: here the source might train another.
  saved = str(workdir / 'tokenizer.json')
  corpus = pipeline.load(config.data, config.model.vocab_size)
  if not corpus.tokenizer.equals(tokenizer.Tokenizer.load(saved)):
    config = config_lib.replace(config, {'data.tokenizer': saved})
    corpus = pipeline.load(config.data, config.model.vocab_size)
  evaluate = run.make_evaluate(trained.model, config, corpus, trained.layout)
  final = state.TrainState(step=trained.step, opt_state={}, **trained.variables)
  with dispatch.told(step_log.say):
    results = {'step': trained.step, 'ema': _EMA.value, **evaluate(final)}
  for name, value in results.items():
    shown = f'{value:.4f}' if type(value) is float else value
    print(f'{name:24}{shown!s:>10}')
  print(json.dumps(results))


if __name__ == '__main__':
  large_pages.use()
  flags.run(main)
