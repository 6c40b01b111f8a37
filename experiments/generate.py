"""Continues a text with a trained model.

    python -m experiments.generate --prompt='import '      # runs/quickstart
    python -m experiments.generate --workdir=runs/aux --ema --temperature=0

Reads the newest checkpoint, also while the run goes on.  Every new token costs
a pass over the whole text.
"""

import pathlib

from absl import flags as absl_flags

from deepseek_jax import flags

_WORKDIR = absl_flags.DEFINE_string(
  'workdir', 'runs/quickstart', 'Directory of the run.'
)
_EMA = absl_flags.DEFINE_bool('ema', False, 'Use the averaged parameters.')
_PROMPT = absl_flags.DEFINE_string('prompt', 'import ', 'Text to continue.')
_MAX_NEW_TOKENS = absl_flags.DEFINE_integer(
  'max_new_tokens', 128, 'At most so many are added.', lower_bound=1
)
_TEMPERATURE = absl_flags.DEFINE_float(
  'temperature', 0.8, '0: always the likeliest token.', lower_bound=0
)
_SEED = absl_flags.DEFINE_integer('seed', 0, 'Of the draws.', lower_bound=0)


def main() -> None:
  """Prints the prompt and what the model adds to it."""
  workdir = pathlib.Path(_WORKDIR.value).expanduser()
  if not workdir.is_dir():
    raise ValueError(f'--workdir={workdir}: no such directory')
  if not _PROMPT.value:
    raise ValueError("--prompt is empty: give a text, such as 'import '")
  from deepseek_jax.data import tokenizer as tokenizer_lib
  from deepseek_jax.inference import generate
  from deepseek_jax.training import checkpoint, loop
  from deepseek_jax.training import step as step_lib

  config, variables, _ = checkpoint.load_for_inference(workdir, _EMA.value)
  loop.use_compilation_cache(config)
  tokenizer = tokenizer_lib.Tokenizer.load(workdir / 'tokenizer.json')
  # As in training, where every document begins with this token.
  prompt = [tokenizer.bos_id, *tokenizer.encode(_PROMPT.value)]
  [output] = generate.generate(
    step_lib.build_model(config),
    variables,
    [prompt],
    _MAX_NEW_TOKENS.value,
    temperature=_TEMPERATURE.value,
    seed=_SEED.value,
    stop_id=tokenizer.eos_id,
  )
  # Together: a character may begin in one and end in the other.
  print(tokenizer.decode([*prompt, *output]))


if __name__ == '__main__':
  flags.run(main)
