"""Continues texts with a trained or converted model, or talks to it.

    python -m experiments.generate --prompt='import '      # runs/quickstart
    python -m experiments.generate --prompt='def ' --prompt='class ' --ema
    python -m experiments.generate --temperature=0 --speculative=1
    python -m experiments.generate --workdir=runs/chat --interactive
    python -m experiments.generate --parallel.expert=4 \\
        --parallel.cpu_devices=8 --redundant_experts=8
    python -m experiments.launch --processes=2 -- \\
      python -m experiments.generate --parallel.fsdp=8 --parallel.cpu_devices=4

Reads the newest checkpoint, also while the run goes on.  A single text appears
as it is made; speed, and how many drafts of MTP stood, go to stderr.  Several
devices divide the model and the prompts; of several processes one talks.
"""

import hashlib
import pathlib
import sys
import time

from absl import flags as absl_flags

from deepseek_jax import flags
from experiments import large_pages, reading

_PROMPT = absl_flags.DEFINE_multi_string(
  'prompt', ['import '], 'Text to continue; repeat it for a batch.'
)
_PROMPTS_FILE = absl_flags.DEFINE_string(
  'prompts_file', '', 'A text per line, instead of --prompt.'
)
_INTERACTIVE = absl_flags.DEFINE_bool(
  'interactive',
  False,
  'Read texts from the terminal: turns of a conversation, if the tokenizer in '
  'the workdir has a chat template.',
)
_MAX_NEW_TOKENS = absl_flags.DEFINE_integer(
  'max_new_tokens', 128, 'At most so many are added.', lower_bound=1
)
_TEMPERATURE = absl_flags.DEFINE_float(
  'temperature', 0.8, '0: always the likeliest token.', lower_bound=0
)
_TOP_K = absl_flags.DEFINE_integer(
  'top_k', 0, 'Only the k likeliest tokens; 0: all.', lower_bound=0
)
_TOP_P = absl_flags.DEFINE_float(
  'top_p', 1.0, 'Only the likeliest tokens that first sum to it.'
)
_SPECULATIVE = absl_flags.DEFINE_integer(
  'speculative', 0, 'Tokens that MTP drafts per pass; 0: none.', lower_bound=0
)
_SEED = absl_flags.DEFINE_integer(
  'seed', 0, 'Of the draws.', lower_bound=0, upper_bound=2**32 - 1
)
_REDUNDANT = absl_flags.DEFINE_integer(
  'redundant_experts',
  0,
  'Copies of the busiest experts of each layer, by the load of the texts '
  'written before (expert_load.json in the workdir), else of the last step.',
  lower_bound=0,
)
absl_flags.adopt_module_key_flags(reading)


class Generator:
  """A loaded model that writes texts."""

  def __init__(self, parallel):
    """`parallel`: of `trained.start`."""
    from deepseek_jax.data import tokenizer as tokenizer_lib
    from deepseek_jax.inference import weights

    changes = {
      # Nothing is trained: any batch will do that so many devices can share.
      'data.batch_size': parallel.n_devices,
      'data.batch_size_start': 0,
      'train.micro_batch_size': 0,
    }
    workdir = reading.workdir()
    path = workdir / 'tokenizer.json'
    if not path.is_file():
      raise ValueError(
        f'--workdir={workdir}: no tokenizer.json in it; name the workdir of a '
        "run, or put the model's there"
      )
    self.tokenizer = tokenizer_lib.Tokenizer.load(path)
    trained = reading.load(parallel, changes)
    self._model, self._layout = trained.model, trained.layout
    self._workdir = workdir
    variables = weights.unstack(self._model, trained.variables)
    if _REDUNDANT.value:
      variables = _with_copies(variables, workdir, trained.config)
    self._variables = variables

  def complete(self, prompts, on_tokens=None):
    """A `generate.Generation` of the prompts; speed goes to stderr."""
    from deepseek_jax.inference import generate
    from deepseek_jax.training import layout as layout_lib

    started = time.perf_counter()
    with layout_lib.ambient(self._layout):
      result = generate.generate(
        self._model,
        self._variables,
        prompts,
        _MAX_NEW_TOKENS.value,
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        seed=_SEED.value,
        stop_ids=[self.tokenizer.eos_id],
        drafts=_SPECULATIVE.value,
        on_tokens=on_tokens,
      )
    count, seconds = sum(map(len, result.tokens)), time.perf_counter() - started
    note = f'{count} tokens, {count / seconds:.1f} a second'
    if result.acceptance:
      shares = ', '.join(f'{share:.0%}' for share in result.acceptance)
      note += f'; drafts that stood: {shares}'
      note += f'; {result.tokens_per_pass:.2f} tokens a pass'
    _say(f'\n[{note}]', file=sys.stderr)
    return result

  def remember(self, result) -> None:
    """Counts what experts did, for copies of the busiest; texts come first."""
    from deepseek_jax.inference import load_balance
    from deepseek_jax.training import process

    if result.load_LE is not None and process.is_first():
      load_balance.remember(self._workdir, result.load_LE)

  def write(self, prompt: list[int], shown: int) -> list[int]:
    """Completes one prompt on stdout as it comes, from token `shown` on."""
    ids, written = list(prompt[shown:]), 0

    def say(final=False):
      nonlocal written
      text = self.tokenizer.decode(ids)
      # A character may begin in one token and end in the next.
      end = len(text) if final else len(text.rstrip('\ufffd'))
      _say(text[written:end], end='', flush=True)
      written = max(written, end)

    def on_tokens(new):
      ids.extend(new[0])
      say()

    say()
    result = self.complete([prompt], on_tokens)
    say(final=True)
    _say()
    self.remember(result)
    return result.tokens[0]

  def document(self, text: str) -> list[int]:
    """As in training, where every document begins with this token."""
    return [self.tokenizer.bos_id, *self.tokenizer.encode(text).tolist()]


def _say(*what, **how):
  """Prints, in the first process."""
  from deepseek_jax.training import process

  if process.is_first():
    print(*what, **how)


def _with_copies(variables, workdir, config):
  """`variables` with the copies that `--redundant_experts` asks for."""
  import numpy as np

  from deepseek_jax.inference import load_balance
  from deepseek_jax.training import metrics, process

  flag = f'--redundant_experts={_REDUNDANT.value}'
  load_LE = load_balance.recall(workdir)
  if load_LE is None:
    loads = [row['load'] for row in metrics.read(workdir) if 'load' in row]
    if not loads:
      raise ValueError(
        f'{flag}: neither {workdir / load_balance.FILE} nor {metrics.FILE} has '
        'a load of experts, by which to choose; generate without it first, '
        'from a model with routed experts'
      )
    load_LE = np.array(loads[-1])
  # Each process reads for itself, and the file may change in between.
  digest = hashlib.sha256(load_LE.tobytes()).hexdigest()
  process.check_same({f'the load of experts in {workdir}': digest})
  axes, moe = config.parallel, config.model.moe
  devices = axes.node * axes.expert
  count = moe.n_routed_experts + _REDUNDANT.value
  if count % devices:
    raise ValueError(
      f'{flag}: {moe.n_routed_experts} experts and these are {count} in a '
      f'layer, which node x expert = {devices} devices cannot share; use a '
      f'multiple of {devices}'
    )
  placement = load_balance.place(
    load_LE, count, moe.n_expert_groups, axes.node, devices
  )
  return load_balance.add_replicas(variables, placement)


def _converse(generator: Generator, template: str) -> None:
  """A turn per line, until the input ends."""
  from deepseek_jax.inference import chat

  tokenizer, messages = generator.tokenizer, []
  around = {'bos_token': tokenizer.bos_id, 'eos_token': tokenizer.eos_id}
  specials = {
    name: tokenizer.decode([i], skip_specials=False)
    for name, i in around.items()
  }
  specials |= chat.load_specials(reading.workdir())
  while True:
    try:
      line = input('> ')
    except EOFError:
      return
    if not line:
      continue
    if not template:
      generator.write(generator.document(line), 1)
      continue
    messages.append({'role': 'user', 'content': line})
    text = chat.render(template, messages, specials)
    prompt = tokenizer.encode_marked(text).tolist()
    output = generator.write(prompt, len(prompt))
    messages.append({'role': 'assistant', 'content': tokenizer.decode(output)})


def _prompts() -> list[str]:
  if not _PROMPTS_FILE.value:
    if not all(_PROMPT.value):
      raise ValueError("--prompt is empty: give a text, such as 'import '")
    return _PROMPT.value
  path = pathlib.Path(_PROMPTS_FILE.value).expanduser()
  if not path.is_file():
    raise ValueError(f'--prompts_file={path}: no such file')
  try:
    lines = list(filter(None, path.read_text('utf-8').splitlines()))
  except UnicodeDecodeError as error:
    raise ValueError(f'--prompts_file={path}: not UTF-8: {error}') from None
  if not lines:
    raise ValueError(f'--prompts_file={path}: no text in it')
  return lines


def main() -> None:
  """Prints every prompt and what the model adds to it."""
  # Before anything is waited for.
  reading.workdir()
  prompts, axes = _prompts(), flags.axes()
  if _INTERACTIVE.value and axes.get('num_processes', 1) != 1:
    raise ValueError(
      '--interactive: several processes cannot share a terminal; give --prompt '
      'or --prompts_file, or start one process for all devices of a machine'
    )
  from deepseek_jax.kernels import dispatch
  from deepseek_jax.training import process, step_log
  from deepseek_jax.training import trained as trained_lib

  parallel = trained_lib.start(axes)
  with process.together(), dispatch.told(step_log.say):
    generator = Generator(parallel)
    if _INTERACTIVE.value:
      from deepseek_jax.inference import chat

      _converse(generator, chat.load_template(reading.workdir()))
    else:
      _complete(generator, prompts)


def _complete(generator: Generator, prompts: list[str]) -> None:
  """A single text as it comes, several when all are there."""
  ids = [generator.document(prompt) for prompt in prompts]
  if len(ids) == 1:
    generator.write(ids[0], 1)
    return
  result = generator.complete(ids)
  for prompt, output in zip(ids, result.tokens):
    # Together: a character may begin in one and end in the other.
    _say(f'{generator.tokenizer.decode([*prompt, *output])}\n---')
  generator.remember(result)


if __name__ == '__main__':
  large_pages.use()
  flags.run(main)
