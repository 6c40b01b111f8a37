"""Speed and memory beside `transformers`, measured alternately in one run.

    python -m experiments.bench                       # bench_cpu
    python -m experiments.bench --suite=decode        # prefill and generation
    python -m experiments.bench --suite=decode --workdir=runs/quickstart
    python -m experiments.bench --suite=remat         # recomputation policies
    python -m experiments.bench --suite=saved         # kept for backward, FP8
    python -m experiments.bench --suite=parallel --preset=quickstart
    python -m experiments.bench --suite=pipeline --preset=tiny
    python -m experiments.bench --suite=gpu           # bench_gpu, BF16 and FP8
    python -m experiments.bench --suite=gpu --dry_run # compiled, without a GPU
    python -m experiments.bench --preset=tiny --rounds=2

Prints ratios: other work on the machine slows both sides of each.
"""

import contextlib
import json
import pathlib
import statistics
import subprocess
import sys

from absl import flags as absl_flags

from deepseek_jax import config as config_lib
from deepseek_jax import flags, presets
from deepseek_jax.convert import orbax_io
from deepseek_jax.planner import flops as flops_lib
from experiments import bench_gpu, bench_pipeline, bench_worker

_SUITE = absl_flags.DEFINE_enum(
  'suite',
  'train',
  ['train', 'decode', 'remat', 'saved', 'parallel', 'pipeline', 'gpu'],
  'What is compared.',
)
_ROUNDS = absl_flags.DEFINE_integer(
  'rounds', 5, 'Timed rounds after one of warm-up.', lower_bound=1
)
_DRY_RUN = absl_flags.DEFINE_bool(
  'dry_run', False, 'Suite gpu: compile for an H100, and print the memory.'
)
_AGAINST = absl_flags.DEFINE_list(
  'against',
  ['transformers:grouped_mm:sdpa', 'transformers:eager:sdpa'],
  'Implementations to compare with; see bench_worker.py.',
)
_WORKDIR = absl_flags.DEFINE_string(
  'workdir', '', 'Suite decode: a run whose model writes, and drafts.'
)
_SCHEDULES = absl_flags.DEFINE_list(
  'schedules', list(config_lib.PIPELINES), 'Suite pipeline: rows of the table.'
)
flags.define(default_preset='bench_cpu')

OURS = 'deepseek_jax'
_PRESETS = {'gpu': 'bench_gpu', 'saved': 'deepseek_v3'}  # Of these suites.
_CACHES = ('dynamic', 'static')  # Of transformers.


class Worker:
  """A process that runs one implementation."""

  def __init__(self, name: str, options: dict):
    command = [sys.executable, '-m', 'experiments.bench_worker', name]
    self.name = name
    self._process = subprocess.Popen(
      [*command, json.dumps(options)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    self.build = self._answer()['seconds']

  def run(self, task: str) -> dict:
    """Runs one task and returns what it measured."""
    self._process.stdin.write(task + '\n')
    self._process.stdin.flush()
    return self._answer()

  def _answer(self) -> dict:
    line = self._process.stdout.readline()
    if not line:
      raise ValueError(f'{self.name} failed; its messages are above')
    return json.loads(line)

  def close(self) -> None:
    """Ends the process."""
    self._process.stdin.close()
    self._process.wait()


def measure(workers: list[Worker], rounds: int) -> dict[str, dict]:
  """Medians of `rounds` alternating rounds, per worker and task."""
  tasks = ('train', 'forward', 'matmul')
  ready = {w.name: w.build + w.run('ready')['seconds'] for w in workers}
  seconds = {w.name: {t: [] for t in tasks} for w in workers}
  for i in range(rounds + 1):
    for task in tasks:
      for worker in workers:
        elapsed = worker.run(task)['seconds']
        if i:
          seconds[worker.name][task].append(elapsed)
  return {
    w.name: {
      'ready': ready[w.name],
      **{t: statistics.median(s) for t, s in seconds[w.name].items()},
      **w.run('memory'),
    }
    for w in workers
  }


def _table(results: dict[str, dict], config: config_lib.Config) -> str:
  tokens = config.data.batch_size * config.data.seq_len
  flops = flops_lib.train_per_token(config.model, config.data.seq_len) * tokens
  rate = max(2 * bench_worker.MATMUL**3 / r['matmul'] for r in results.values())
  ours = results[OURS]
  lines = [
    f'matmul rate of this machine in this run: {rate / 1e9:.0f} GFLOP/s',
    f'{flops / 1e9:.0f} GFLOP per training step of {tokens} tokens',
    '| | train tokens/s | share of matmul rate | forward tokens/s | '
    'share | peak GB | ready s |',
    '|---|---|---|---|---|---|---|',
  ]
  for name, r in results.items():
    lines.append(
      f'| {name} | {tokens / r["train"]:.0f} '
      f'| {flops / r["train"] / rate:.0%} | {tokens / r["forward"]:.0f} '
      f'| {flops / 3 / r["forward"] / rate:.0%} '
      f'| {r["peak_bytes"] / 1e9:.2f} | {r["ready"]:.1f} |'
    )
  others = [r for name, r in results.items() if name != OURS]
  if others:
    for task in ('train', 'forward'):
      ratio = min(r[task] for r in others) / ours[task]
      lines.append(f'{task}: {ratio:.2f} times the faster of the others')
    ratio = ours['peak_bytes'] / min(r['peak_bytes'] for r in others)
    lines.append(f'peak memory: {ratio:.2f} times the smaller of the others')
  return '\n'.join(lines)


def measure_decode(
  workers: list[Worker], rounds: int, has_mtp: bool
) -> dict[tuple[int, str, int], tuple[float, float, float | None]]:
  """(batch, worker, way) -> median seconds of prefill, and per new token.

  The third is the share of the drafts that stood, None without drafts.

  The ways of `transformers` are its dynamic and its static cache (0, 1); ours
  are drafts per pass: none, and one if there is an MTP module.
  """
  new, result = bench_worker.PROMPT, {}
  for batch in bench_worker.BATCHES:
    cases = [(w, way) for w in workers for way in (0, 1)]
    cases = [(w, way) for w, way in cases if w.name != OURS or way <= has_mtp]
    seconds, stood = {case: ([], []) for case in cases}, {}
    for i in range(rounds + 1):
      for (worker, way), (prefill, decode) in seconds.items():
        short = worker.run(f'generate {batch} 1 {way}')['seconds']
        answer = worker.run(f'generate {batch} {new} {way}')
        stood[worker, way] = answer.get('stood')
        if i:
          prefill.append(short)
          decode.append((answer['seconds'] - short) / (new - 1))
    for (worker, way), times in seconds.items():
      medians = map(statistics.median, times)
      result[batch, worker.name, way] = *medians, stood[worker, way]
  return result


def _decode_table(results: dict[tuple[int, str, int], tuple]) -> str:
  n = bench_worker.PROMPT
  lines = [
    f'prompts of {n} tokens, {n} new ones each, greedy',
    '| | batch | prefill ms | decode tokens/s | drafts that stood |',
    '|---|---|---|---|---|',
  ]
  for (batch, name, way), (prefill, decode, stood) in results.items():
    share = '' if stood is None else f'{stood:.0%}'
    what = (
      ('', ', drafting')[way] if name == OURS else f', {_CACHES[way]} cache'
    )
    lines.append(
      f'| {name}{what} | {batch} | {prefill * 1e3:.0f} | {batch / decode:.1f} '
      f'| {share} |'
    )
  for batch in sorted({key[0] for key in results}):
    others = [v for k, v in results.items() if k[0] == batch and k[1] != OURS]
    if others:
      ratios = [
        min(column) / mine
        for column, mine in zip(zip(*others), results[batch, OURS, 0][:2])
      ]
      lines.append(
        f'batch {batch}: prefill {ratios[0]:.2f}, decode {ratios[1]:.2f} times '
        'the faster of the others'
      )
  return '\n'.join(lines)


def _remat_table(config: config_lib.Config) -> str:
  """Bytes of the compiled step under each recomputation policy."""
  import jax
  import numpy as np

  from deepseek_jax.training import optimizer, process, schedules, step

  process.use_compilation_cache(config)
  lines = ['| remat | temporary MB | x none |', '|---|---|---|']
  base = None
  for policy in config_lib.REMATS:
    varied = config_lib.replace(config, {'train.remat': policy})
    model = step.build_model(varied)
    tx = optimizer.adamw(varied.optim, varied.precision)
    state = step.abstract_state(model, tx)
    A = varied.data.batch_size // varied.micro_batch_size
    shape = (A, varied.micro_batch_size, varied.data.seq_len + 1)
    tokens = jax.ShapeDtypeStruct(shape, np.int32)
    compiled = (
      step.make_train_step(model, varied, tx)
      .lower(
        state,
        {'tokens': tokens, 'segments': tokens},
        schedules.Schedule(varied).at(0),
      )
      .compile()
    )
    memory = compiled.memory_analysis().temp_size_in_bytes
    base = base or memory
    lines.append(f'| {policy} | {memory / 1e6:.0f} | {memory / base:.2f} |')
  return '\n'.join(lines)


def _gpu_table(options: dict, config: config_lib.Config) -> str:
  if _DRY_RUN.value:
    return bench_gpu.compile_only(config)

  def start(updates):
    changed = {**options['updates'], **updates}
    return Worker(OURS, {**options, 'updates': changed})

  return bench_gpu.measure(start, config, _ROUNDS.value)


def _trained_config():
  flag = f'--workdir={_WORKDIR.value}'
  if _SUITE.value != 'decode':
    raise ValueError(f'{flag} with --suite={_SUITE.value}: use decode')
  if given := flags.given():
    raise ValueError(f'{flag}: a run has its settings; drop {" ".join(given)}')
  path = pathlib.Path(_WORKDIR.value).expanduser()
  if not (path / orbax_io.CHECKPOINTS).is_dir():
    raise ValueError(f'{flag}: no checkpoints in it; name the workdir of a run')
  return orbax_io.Workdir(path).run


def main() -> None:
  """Runs the suite on the command line's config and prints its table."""
  if not absl_flags.FLAGS['preset'].present:
    preset = _PRESETS.get(_SUITE.value, absl_flags.FLAGS.preset)
    absl_flags.FLAGS.preset = preset
  config, _ = flags.resolve()
  if _WORKDIR.value:
    config = _trained_config()
  if _SUITE.value == 'remat':
    print(_remat_table(config))
    return
  if _SUITE.value == 'saved':
    from experiments import bench_saved

    print(bench_saved.table(config))
    return
  if _SUITE.value == 'parallel':
    from experiments import bench_parallel

    for line in bench_parallel.lines(config, _ROUNDS.value):
      print(line, flush=True)
    return
  if _SUITE.value == 'pipeline':
    for line in bench_pipeline.lines(config, _SCHEDULES.value):
      print(line, flush=True)
    return
  if _SUITE.value == 'train' and _AGAINST.value and config.model.n_mtp_layers:
    config = config_lib.replace(config, {'model.n_mtp_layers': 0})
    print('without MTP, which transformers does not train')
  preset = absl_flags.FLAGS.preset
  updates = config_lib.diff(presets.PRESETS[preset](), config)
  options = {
    'preset': preset,
    'updates': {name: new for name, (_, new) in updates.items()},
    'decodes': _SUITE.value == 'decode',
    'workdir': _WORKDIR.value,
  }
  if _SUITE.value == 'gpu':
    print(_gpu_table(options, config))
    return
  with contextlib.ExitStack() as stack:
    workers = []
    for name in [OURS, *_AGAINST.value]:
      workers.append(Worker(name, options))
      stack.callback(workers[-1].close)
    if _SUITE.value == 'decode':
      has_mtp = config.model.n_mtp_layers > 0
      print(_decode_table(measure_decode(workers, _ROUNDS.value, has_mtp)))
    else:
      print(_table(measure(workers, _ROUNDS.value), config))


if __name__ == '__main__':
  flags.run(main)
