"""The training loop: a straight line from a config to a finished run."""

import contextlib
import os
import pathlib
import signal
import textwrap
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from deepseek_jax import config as config_lib
from deepseek_jax.data import pipeline
from deepseek_jax.data import tokenizer as tokenizer_lib
from deepseek_jax.training import (
  checkpoint,
  holdings,
  optimizer,
  plots,
  process,
  schedules,
  step_log,
)
from deepseek_jax.training import ema as ema_lib
from deepseek_jax.training import feed as feed_lib
from deepseek_jax.training import layout as layout_lib
from deepseek_jax.training import state as state_lib
from deepseek_jax.training import step as step_lib
from deepseek_jax.training.step_log import say

# (model, config, corpus, layout) -> (state -> named results).
MakeEvaluate = Callable[
  [Any, config_lib.Config, pipeline.Corpus, layout_lib.Layout | None],
  Callable[[state_lib.TrainState], dict[str, float]],
]
# (workdir, model, variables, corpus, config, step, layout): workdir/samples.
WriteSamples = Callable[..., None]


def train(
  config: config_lib.Config,
  workdir: str | os.PathLike,
  base: config_lib.Config | None = None,
  *,
  make_evaluate: MakeEvaluate,
  write_samples: WriteSamples,
) -> None:
  """Trains up to `train.steps`, going on from the newest checkpoint if any.

  However often it is interrupted and called again, the losses are bitwise those
  of a run that never was.  `workdir` gets config.json, tokenizer.json,
  metrics.jsonl, tensorboard/, checkpoints/, plots/ and samples/.

  Args:
    config: of the run.
    workdir: of the run; made if need be.
    base: what `config` is a variation of, to show what differs.
    make_evaluate: validation; evaluation lies above training, which therefore
      is given it.  `evaluation.run.train` is this function with both.
    write_samples: generation, at the end, by all processes together.

  Raises:
    ValueError: bad data settings; another run in `workdir`, another model, or
      no step left to be trained with other settings.
    FloatingPointError: a loss or gradient is not finite (`train.nonfinite`).
    SystemExit: 128 + signal, after SIGTERM or SIGINT and a checkpoint.
  """
  started, workdir = time.perf_counter(), pathlib.Path(workdir).expanduser()
  process.join(config.parallel)
  process.use_compilation_cache(config)
  with process.together(), contextlib.ExitStack() as stack:
    model = step_lib.build_model(config)
    layout = step_lib.make_layout(model, config)
    if process.is_first():
      stack.enter_context(checkpoint.lock(workdir))
    leaves = config_lib.leaves(config)
    process.check_flags(str(workdir), leaves)  # With the lock, or not at all.
    checkpoint.check_shared(workdir)
    _announce(config, workdir, base, model, layout)
    saver = stack.enter_context(checkpoint.Checkpointer(workdir, config))
    tx = optimizer.adamw(config.optim, config.precision)
    train_step = step_lib.make_train_step(model, config, tx, layout=layout)
    corpus = pipeline.load(config.data, config.model.vocab_size)
    process.check_same({'data.source and its tokens': corpus.fingerprint})
    _keep_tokenizer(workdir, corpus.tokenizer)
    schedule = schedules.Schedule(config)
    state, position, ema = _init_or_restore(model, tx, config, saver, layout)
    done, last, stop = int(state.step), config.train.steps, 0
    if done < last:  # Else it is that of the run as it was trained.
      _write_config(workdir, config)
    feed = feed_lib.Feed(corpus, config, position, layout)
    evaluate = make_evaluate(model, config, corpus, layout)
    if ema:
      stack.callback(ema.close)
    log = step_log.StepLog(workdir, config, state, schedule, started)
    agree = process.Agreement(layout and layout.mesh)
    with log, _Interrupt() as interrupt:
      while done < last and not stop:
        # Nothing here waits for the step that it starts: the host reads the
        # metrics of the step before, and draws the next batch, beside it.
        batch = feed.draw(schedule.batch_size(done))
        state, row = train_step(state, batch, schedule.at(done))
        if ema:
          ema.update(state.params, row['finite'])
        log.add(done, row)
        done += 1
        if done % config.train.eval_every == 0 or done == last:
          with log.pause():
            log.extend(evaluate(state))
        stop = agree(interrupt.received)
        if done % config.train.save_every == 0 or done == last or stop:
          log.flush()  # Raises on what is not finite: that is never saved.
          with log.pause():
            saver.save(state, feed.position, ema and ema.value())
      saver.wait()
    if stop:
      name = signal.Signals(stop).name
      say(f'{name}: step {done} is saved; the same command goes on there')
      raise SystemExit(128 + stop)
    variables = _for_inference(state, layout)
    write_samples(workdir, model, variables, corpus, config, done, layout)
    if process.is_first():
      plots.draw(workdir)
    _say_goodbye(workdir, done)


class _Interrupt(contextlib.AbstractContextManager):
  """Notes SIGTERM and SIGINT; a second one acts as if this were not here.

  Attributes:
    received: the signal's number, or 0.
  """

  def __init__(self):
    self.received = 0
    self._before = {}
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._before[number] = signal.signal(number, self._note)

  def _note(self, number, _):
    self.received = number
    name = signal.Signals(number).name
    say(f'{name}: saving after this step; again to quit at once')
    self._restore()

  def _restore(self):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def __exit__(self, *_):
    self._restore()


def _announce(config, workdir, base, model, layout):
  """The resolved config and what differs from the base, before all else."""
  leaves = [f'{k}={v!r}' for k, v in config_lib.leaves(config).items()]
  say(textwrap.fill('  '.join(leaves), 80, break_on_hyphens=False))
  changes = config_lib.diff(base, config) if base else {}
  for name, (old, new) in changes.items():
    say(f'changed from the base: {name}: {old!r} -> {new!r}')
  devices = jax.devices()
  say(f'{workdir}: {len(devices)} x {devices[0].device_kind}')
  if layout:
    say(holdings.table(step_lib.declare(model), config, layout))
  elif len(devices) > 1:
    say(f'one device is used; --parallel.data={len(devices)} uses all')


def _for_inference(state, layout):
  params = layout.for_inference(state.params) if layout else state.params
  return {'params': params, 'router_state': state.router_state}


def _init_or_restore(model, tx, config, saver, layout):
  """(state, position in the data or None, EMA or None)."""
  position = average = None
  if saver.latest_step() is None:
    state = step_lib.init_state(model, tx, config.train.seed, layout)
  else:
    like = step_lib.abstract_state(model, tx, layout)
    state, position, average = saver.restore(like)
    say(f'resuming after step {int(state.step)}')
  n = sum(x.size for x in jax.tree.leaves(state.params))
  say(f'{n:,} parameters')
  if not config.optim.ema_decay:
    return state, position, None
  average = state.params if average is None else average
  return state, position, ema_lib.HostEMA(average, config.optim.ema_decay)


def _keep_tokenizer(workdir, tokenizer):
  """Writes tokenizer.json, or checks that a resumed run still has the same.

  The default tokenizer is trained on what the machine has: another Python, for
  instance, is another text.
  """
  path = workdir / 'tokenizer.json'
  if not process.is_first():
    return
  if not path.exists():
    tokenizer.save(path)
  elif not tokenizer.equals(tokenizer_lib.Tokenizer.load(path)):
    raise ValueError(
      f'{path} differs from the tokenizer that data.source now gives: the run '
      f'began on other text; use --data.tokenizer={path} or another --workdir'
    )


def _write_config(workdir, config):
  if not process.is_first():
    return
  partial = workdir / '.config.json'  # Renamed: never half a file.
  partial.write_text(config_lib.to_json(config))
  partial.replace(workdir / 'config.json')


def _say_goodbye(workdir, done):
  say(
    f"""
Trained {done} steps.  In {workdir}:
  samples/{done}.txt   what the model writes
  plots/         losses, bits per byte, expert load, MaxVio, schedules
  metrics.jsonl  every number; tensorboard --logdir={workdir} shows them
  checkpoints/   step {done} and the last before it
Try next:
  python -m experiments.generate --workdir={workdir} --prompt='import '
  python -m experiments.eval --workdir={workdir}"""
  )
