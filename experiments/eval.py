"""Validation loss, bits per byte and MTP acceptance of a trained model.

    python -m experiments.eval                             # runs/quickstart
    python -m experiments.eval --workdir=runs/aux --ema --batches=0

    python -m experiments.eval --parallel.expert=2 --parallel.cpu_devices=4
    python -m experiments.launch --processes=2 -- \\
      python -m experiments.eval --parallel.fsdp=8 --parallel.cpu_devices=4

Reads the newest checkpoint, also while the run goes on; on several devices none
holds more than its part.  The last line of the output is JSON.
"""

import json
import pathlib

from absl import flags as absl_flags

from deepseek_jax import config as config_lib
from deepseek_jax import flags
from experiments import large_pages, reading

_BATCHES = absl_flags.DEFINE_integer(
  'batches',
  None,
  'Validation batches; 0: all (default: train.eval_batches of the run).',
  lower_bound=0,
)
absl_flags.adopt_module_key_flags(reading)


def main() -> None:
  """Prints a line for each result, then all of them as JSON."""
  reading.workdir()  # Before anything is waited for.
  from deepseek_jax.training import process
  from deepseek_jax.training import trained as trained_lib

  parallel = trained_lib.start(flags.axes())
  with process.together():
    results = _evaluate(parallel)
    if process.is_first():
      for name, value in results.items():
        shown = f'{value:.4f}' if type(value) is float else value
        print(f'{name:24}{shown!s:>10}')
      print(json.dumps(results))


def _evaluate(parallel):
  """The named results, in every process."""
  from deepseek_jax.data import pipeline, tokenizer
  from deepseek_jax.evaluation import run
  from deepseek_jax.kernels import dispatch
  from deepseek_jax.training import state, step_log

  trained = reading.load(parallel, {'train.eval_batches': _BATCHES.value})
  config = trained.config
  # The run's own tokenizer: here the source might train another, or what was
  # given have moved.
  saved, given = reading.workdir() / 'tokenizer.json', config.data.tokenizer
  own = config_lib.replace(config, {'data.tokenizer': str(saved)})
  if given and not pathlib.Path(given).expanduser().is_file():
    config = own
  corpus = pipeline.load(config.data, config.model.vocab_size)
  if not corpus.tokenizer.equals(tokenizer.Tokenizer.load(saved)):
    config = own
    corpus = pipeline.load(config.data, config.model.vocab_size)
  evaluate = run.make_evaluate(trained.model, config, corpus, trained.layout)
  final = state.TrainState(step=trained.step, opt_state={}, **trained.variables)
  with dispatch.told(step_log.say):
    results = evaluate(final)
  return {'step': trained.step, 'ema': reading.use_ema(), **results}


if __name__ == '__main__':
  large_pages.use()
  flags.run(main)
