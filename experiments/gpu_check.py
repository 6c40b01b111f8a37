"""Every kernel checked against its reference, then timed beside what else can.

    python -m experiments.gpu_check
    python -m experiments.gpu_check --only=fp8_matmul,decode --rounds=20
    python -m experiments.gpu_check --shapes=small      # also without a GPU

The candidates of a case are timed alternately; the share is of what a BF16
product, or a copy, reaches in the same run.  Without a Hopper GPU nothing is
timed: references are checked, and kernels are interpreted, or lowered for CUDA
where this jax cannot interpret them.
"""

import datetime
import importlib.util
import statistics
import subprocess
import sys
import time

from absl import flags as absl_flags

from deepseek_jax import flags

_ONLY = absl_flags.DEFINE_list('only', [], 'Cases whose names start so.')
_ROUNDS = absl_flags.DEFINE_integer(
  'rounds', 10, 'Timed rounds of each candidate.', lower_bound=1
)
_SHAPES = absl_flags.DEFINE_enum(
  'shapes', 'real', ['real', 'small'], "The models' own, or a CPU's."
)
_SECONDS = 0.02  # Of one timed round: so many calls that it lasts so long.


def main() -> None:
  """Exits with 1 if a result is wrong or a kernel fails."""
  import jax

  from deepseek_jax.kernels import dispatch
  from experiments import gpu_cases

  obstacles = dispatch.device_obstacles()
  print(_versions(jax), flush=True)
  small = _SHAPES.value == 'small' or bool(obstacles)
  if obstacles:
    print(
      f'No Hopper GPU: {"; ".join(obstacles)}. Nothing is timed, and no kernel '
      'runs as it would there: small shapes, references, interpreter, lowering.'
    )
  cases = _chosen(list(gpu_cases.all_cases(small)))
  ceilings = None if obstacles else _ceilings(small)
  failed = 0
  for case in cases:
    try:
      failed += not (_dry(case) if obstacles else _check(case))
      if ceilings:
        _time(case, ceilings)
    except Exception as error:  # One kernel must not hide the others.
      failed += 1
      print(f'{case.name}: FAILED: {type(error).__name__}: {str(error)[:300]}')
  print(f'{failed} failed' if failed else 'all passed')
  sys.exit(bool(failed))


def _chosen(cases):
  """Those that `--only` names."""
  chosen = [
    case
    for case in cases
    if not _ONLY.value or case.name.startswith(tuple(_ONLY.value))
  ]
  if not chosen:
    raise ValueError(
      f'--only={",".join(_ONLY.value)}: no such case; the cases begin with '
      f'{", ".join(sorted({case.name.split()[0] for case in cases}))}'
    )
  return chosen


def _versions(jax):
  command = ['git', 'rev-parse', '--short', 'HEAD']
  commit = subprocess.run(command, capture_output=True, text=True).stdout
  device = jax.devices()[0]
  return (
    f'{datetime.date.today()} commit {commit.strip() or "unknown"}, jax '
    f'{jax.__version__}, {device.device_kind}'
  )


def _error(case, actual, operands):
  """The largest error, relative to the largest magnitude of the truth."""
  import jax
  import numpy as np

  expected = case.view(jax.jit(case.truth)(*operands), *operands)
  worst = 0.0
  for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
    a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
    error = np.abs(a - e).max() / max(np.abs(e).max(), 1e-30)
    worst = max(worst, error if np.isfinite(a).all() else np.inf)
  return worst


def _judge(case, what, result, operands):
  """Prints one line; whether the result is right."""
  error = _error(case, case.view(result, *operands), operands)
  right = error <= case.error
  verdict = 'ok' if right else 'WRONG'
  print(f'{case.name}: {what} {verdict}, error {error:.1e}', flush=True)
  return right


def _check(case):
  """The kernel, on the device."""
  import jax

  operands = case.make()
  kernel = jax.jit(lambda *a: case.run(*a, implementation='mosaic_gpu'))
  return _judge(case, 'kernel', kernel(*operands), operands)


def _dry(case):
  """The reference, then the kernel as far as it goes without a GPU."""
  import jax

  from deepseek_jax.kernels import mosaic

  operands = case.make()
  reference = jax.jit(lambda *a: case.run(*a, implementation='xla'))
  right = _judge(case, 'reference', reference(*operands), operands)

  def kernel(*arguments):
    return case.run(*arguments, implementation='mosaic_gpu')

  try:
    if not mosaic.interprets_fp8():
      mosaic.lower(kernel, *operands)
      print(f'{case.name}: kernel lowered for CUDA')
      return right
    with mosaic.interpreted(pads=True):
      result = kernel(*operands)
    return _judge(case, 'kernel, interpreted,', result, operands) and right
  except ValueError as error:
    if "implementation='mosaic_gpu'" not in str(error):
      raise
    print(f'{case.name}: no kernel: {error}')
    return right


def _seconds(f, operands, calls):
  import jax

  started = time.perf_counter()
  for _ in range(calls):
    result = f(*operands)
  jax.block_until_ready(result)
  return (time.perf_counter() - started) / calls


def _medians(candidates, operands):
  """name -> median seconds of a call, timed alternately after a warm-up."""
  import jax

  ready, calls = {}, {}
  for name, f in candidates.items():
    try:
      ready[name] = jax.jit(f)
      _seconds(ready[name], operands, 1)
      once = _seconds(ready[name], operands, 1)
      calls[name] = max(1, int(_SECONDS / once))
    except Exception as error:  # An alternative that cannot is no failure.
      print(f'  {name}: cannot: {type(error).__name__}: {str(error)[:120]}')
      ready.pop(name, None)
  times = {name: [] for name in ready}
  for _ in range(_ROUNDS.value):
    for name, f in ready.items():
      times[name].append(_seconds(f, operands, calls[name]))
  return {name: statistics.median(values) for name, values in times.items()}


def _ceilings(small):
  """TFLOP/s of a BF16 product and GB/s of a copy, in this run."""
  import jax
  import jax.numpy as jnp

  n = 1024 if small else 8192
  a, b = (jax.random.normal(jax.random.key(i), (n, n)) for i in range(2))
  operands = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
  flops = 2 * n**3 / _medians({'bf16': jnp.matmul}, operands)['bf16']
  x = jnp.ones(2**24 if small else 2**29, jnp.bfloat16)
  seconds = _medians({'copy': lambda x: x + 1}, (x,))['copy']
  moved = 2 * x.nbytes / seconds
  print(
    f'ceilings: bf16 {flops / 1e12:.0f} TFLOP/s, copy {moved / 1e9:.0f} GB/s'
  )
  if importlib.util.find_spec('torch'):
    seconds = _torch_matmul(n)
    print(f'          torch bf16 {2 * n**3 / seconds / 1e12:.0f} TFLOP/s')
  return flops, moved


def _torch_matmul(n):
  """Seconds of a BF16 product in torch: the same ceiling, another library."""
  import torch

  a, b = (torch.randn(n, n, device='cuda').bfloat16() for _ in range(2))
  times = []
  for _ in range(_ROUNDS.value + 1):
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(10):
      a @ b
    torch.cuda.synchronize()
    times.append((time.perf_counter() - started) / 10)
  return statistics.median(times[1:])


def _time(case, ceilings):
  """A line for each candidate."""
  operands = case.make()
  kernel = {'kernel': lambda *a: case.run(*a, implementation='mosaic_gpu')}
  for name, seconds in _medians(kernel | case.others, operands).items():
    rate, ceiling = case.bytes / seconds, ceilings[1]
    text = f'{rate / 1e9:8.0f} GB/s'
    if case.flops:
      rate, ceiling = case.flops / seconds, ceilings[0]
      text = f'{rate / 1e12:8.1f} TFLOP/s'
    share = f'{rate / ceiling:6.0%}'
    print(f'  {name:28}{seconds * 1e6:12.1f} us {text} {share}', flush=True)


if __name__ == '__main__':
  flags.run(main)
