"""A whole training run: the loop, its validation and its samples."""

import os
import pathlib
from collections.abc import Callable
from typing import Any

from deepseek_jax import config as config_lib
from deepseek_jax.data import pipeline
from deepseek_jax.evaluation import perplexity
from deepseek_jax.inference import generate
from deepseek_jax.training import layout as layout_lib
from deepseek_jax.training import loop, process
from deepseek_jax.training import state as state_lib

_SAMPLES, _PROMPT_TOKENS, _NEW_TOKENS = 4, 16, 128
_TEMPERATURE = 0.8


def train(
  config: config_lib.Config,
  workdir: str | os.PathLike,
  base: config_lib.Config | None = None,
) -> None:
  """Trains, evaluates and samples; see `loop.train`."""
  loop.train(
    config,
    workdir,
    base,
    make_evaluate=make_evaluate,
    write_samples=write_samples,
  )


def make_evaluate(
  model: Any,
  config: config_lib.Config,
  corpus: pipeline.Corpus,
  layout: layout_lib.Layout | None = None,
) -> Callable[[state_lib.TrainState], dict[str, float]]:
  """Evaluation of a state on `train.eval_batches` batches (0: all) of rows.

  A batch is `data.batch_size` rows, however they are cut: they pass by the
  micro-batch, of which a pipeline's stages take one each at the same time.
  """
  layout = layout and layout.for_evaluation()
  eval_step = perplexity.make_eval_step(model, config, layout)
  n_rows = config.train.eval_batches * config.data.batch_size
  size = config.micro_batch_size * config.parallel.stage
  index, count = layout.share(size) if layout else (0, 1)

  def evaluate(state):
    batches = pipeline.validation_batches(
      corpus,
      size,
      n_rows or None,
      process_index=index,
      process_count=count,
    )
    return perplexity.evaluate(
      eval_step,
      state.params,
      state.router_state,
      batches,
      corpus.tokenizer.byte_lengths,
    )

  return evaluate


def write_samples(
  workdir: pathlib.Path,
  model: Any,
  variables: dict[str, Any],
  corpus: pipeline.Corpus,
  config: config_lib.Config,
  step: int,
  layout: layout_lib.Layout | None = None,
) -> None:
  """Continues the beginnings of validation documents: samples/<step>.txt.

  With a layout, every process calls it, and the first one writes.
  """
  tokenizer, rows = corpus.tokenizer, corpus.validation
  count = min(_SAMPLES, len(rows.documents))
  # Its last token says that it is over, and does not begin anything.
  prompts = [
    rows.document(i)[:-1][:_PROMPT_TOKENS].tolist() for i in range(count)
  ]
  with layout_lib.ambient(layout):
    outputs = generate.generate(
      model,
      variables,
      prompts,
      min(_NEW_TOKENS, config.data.seq_len),
      temperature=_TEMPERATURE,
      seed=config.train.seed,
      stop_ids=[tokenizer.eos_id],
    ).tokens
  if not process.is_first():
    return
  texts = [
    f'=== {tokenizer.decode(prompt)!r}\n{tokenizer.decode(output)}\n'
    for prompt, output in zip(prompts, outputs)
  ]
  path = workdir / 'samples' / f'{step}.txt'
  path.parent.mkdir(exist_ok=True)
  path.write_text('\n'.join(texts), encoding='utf-8')
