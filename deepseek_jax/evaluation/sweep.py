"""Runs of many variations of one config, each with several seeds.

A point of a sweep is a dictionary of updates, `{'model.moe.balance': 'none'}`;
a sweep is a list of points, made with `prod`.  An arm is all of a point but its
seeds.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from deepseek_jax import config as config_lib
from deepseek_jax.training import metrics

Updates = dict[str, Any]
Points = list[Updates]

# Leaves that change the luck of a run and not the question it answers.
SEEDS = ('train.seed', 'data.seed')
_TAIL = 0.2  # Share of the records, the last, over which noise is averaged.
_SPEED = 'tokens_per_second'


def axis(name: str, values: Iterable[Any]) -> Points:
  """One point for each value of a leaf; `seed` stands for all `SEEDS`."""
  names = SEEDS if name == 'seed' else (name,)
  return [dict.fromkeys(names, value) for value in values]


def prod(*factors: Points) -> Points:
  """Every combination; later factors win where leaves are the same."""
  return [_merge(points) for points in itertools.product(*factors)]


def _merge(points: Iterable[Updates]) -> Updates:
  return {k: v for point in points for k, v in point.items()}


def split(points: Points) -> tuple[dict[str, Updates], Points]:
  """The distinct arms of `points`, named by their values, and the seeds.

  Raises:
    ValueError: if two arms would have the same name.
  """
  arms, seeds = {}, []
  for point in points:
    arm = {k: v for k, v in point.items() if k not in SEEDS}
    seed = {k: v for k, v in point.items() if k in SEEDS}
    text = ', '.join(f'{k.rpartition(".")[2]}={v}' for k, v in arm.items())
    if arms.setdefault(text or 'as given', arm) != arm:
      raise ValueError(f'two arms of the sweep are both called {text!r}')
    if seed not in seeds:
      seeds.append(seed)
  return arms, seeds


@dataclasses.dataclass(frozen=True)
class Run:
  """One finished run of an arm.

  Attributes:
    arm: its name.
    config: resolved, with the seeds.
    workdir: where it is.
    records: its metrics; see `training.metrics.read`.
    results: what a table shows of it; see `measure`.
  """

  arm: str
  config: config_lib.Config
  workdir: pathlib.Path
  records: list[dict[str, Any]]
  results: dict[str, float]


def run(
  base: config_lib.Config,
  arms: dict[str, Updates],
  seeds: Points,
  workdir: str | os.PathLike,
  facts: Callable[[config_lib.Config], dict[str, float]],
) -> list[Run]:
  """Trains what is not yet trained of every arm with every seed, in turn.

  A run's directory is `workdir/<hash of its config>`: one that is finished is
  not repeated, not even by another sweep that needs the same config, and an
  interrupted one goes on.  A run that diverges is reported and left out.

  Args:
    base: what the arms vary.
    arms: updates by name.
    seeds: updates, each for one run of every arm.
    workdir: of the runs.
    facts: results that a config has without training, such as its size.

  Raises:
    ValueError: bad updates, before anything is trained.
    SystemExit: on SIGTERM or SIGINT, after a checkpoint.
  """
  # Seeds outside, so that an interrupted sweep has every arm once.
  plan = [
    (arm, config_lib.replace(base, {**arms[arm], **seed}))
    for seed, arm in itertools.product(seeds, arms)
  ]
  runs = []
  for i, (arm, config) in enumerate(plan, 1):
    path = pathlib.Path(workdir).expanduser() / fingerprint(config)
    if not is_finished(path, config):
      _say(f'--- run {i} of {len(plan)}: {arm}, seed {config.train.seed}')
      try:
        _train(config, path, base)
      except FloatingPointError as error:
        _say(f'{arm} diverged and is left out: {error}')
        continue
    records = metrics.read(path)
    results = {**facts(config), **measure(records)}
    runs.append(Run(arm, config, path, records, results))
  return runs


def fingerprint(config: config_lib.Config) -> str:
  """A short hash of all that can change the result of a run."""
  tree = config_lib.to_dict(config)
  del tree['data']['cache_dir']
  text = json.dumps(tree, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def is_finished(path: pathlib.Path, config: config_lib.Config) -> bool:
  """Whether the last step of the run in `path` was made and evaluated."""
  records = metrics.read(path)
  last = records[-1] if records else {'step': -1}
  return last['step'] == config.train.steps - 1 and 'val_loss' in last


def _say(text):
  print(text, file=sys.stderr, flush=True)


def _train(config, path, base):
  # After the settings are known to be right: JAX takes seconds to import.
  from deepseek_jax.evaluation import run as run_lib
  from deepseek_jax.training import loop

  # No samples: nobody reads those of twenty runs.
  loop.train(
    config,
    path,
    base,
    make_evaluate=run_lib.make_evaluate,
    write_samples=lambda *_: None,
  )


def measure(records: Sequence[dict[str, Any]]) -> dict[str, float]:
  """The results of a run: its last validation, and what its end was like.

  Over the last fifth of the records: the mean 'loss'; the mean over steps and
  layers of 'max_vio', that of one batch; 'max_vio_summed', of the loads summed
  over these steps, which is what remains when the batches' own differences
  average out.  The loss-free balancing paper's MaxVio global (section 4.1) is
  of the validation set instead; here the bias moves between the batches.
  'tokens_per_second' is the median of all.
  """
  evaluated = [r for r in records if 'val_loss' in r]
  results = {k: v for k, v in evaluated[-1].items() if k.startswith('val_')}
  tail = records[-max(1, round(_TAIL * len(records))) :]
  results['loss'] = float(np.mean([r['loss'] for r in tail]))
  if 'load' in tail[-1]:
    load_TLE = np.array([r['load'] for r in tail], np.float64)
    results['max_vio'] = float(metrics.max_vio(load_TLE).mean())
    results['max_vio_summed'] = float(metrics.max_vio(load_TLE.sum(0)).mean())
  speeds = [r[_SPEED] for r in records if _SPEED in r]
  if speeds:
    results[_SPEED] = float(np.median(speeds))
  return results
