"""Every kernel checked against its reference, then timed beside what else can.

    python -m experiments.gpu_check
    python -m experiments.gpu_check --only=fp8_matmul,decode --rounds=20
    python -m experiments.gpu_check --shapes=small      # also without a GPU

Kernel and XLA are compared with a truth in float32.  The candidates of a case
are timed alternately, in calls that follow one another; what is bound by memory
moves more than the L2 holds.  The share is of what a BF16 product, or a copy,
reaches in the same run, whichever is more: 200 % is possible in FP8.  A case
that crashes or hangs is failed, and the next one is begun in a new process.
Without a Hopper GPU nothing is timed: references are checked, and kernels are
interpreted, or lowered for CUDA where this jax cannot interpret them.
"""

import datetime
import functools
import importlib.util
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from absl import flags as absl_flags

from deepseek_jax import flags
from experiments import in_turn

_ONLY = absl_flags.DEFINE_list('only', [], 'Cases whose names start so.')
_ROUNDS = absl_flags.DEFINE_integer(
  'rounds', 10, 'Timed rounds of each candidate.', lower_bound=1
)
_SHAPES = absl_flags.DEFINE_enum(
  'shapes', 'real', ['real', 'small'], "The models' own, or a CPU's."
)
_LIMIT = absl_flags.DEFINE_float(
  'limit', 400.0, 'Seconds without a word after which a case is given up.'
)
_FIRST = absl_flags.DEFINE_integer(
  'first', None, 'Begin with this case, in this process.', lower_bound=0
)
_SECONDS = 0.02  # Of one timed round: so many calls that it lasts so long.


class Candidate(NamedTuple):
  """What is timed.

  Attributes:
    call: starts it, and gives what it will be.
    wait: for that.
  """

  call: Callable[[], Any]
  wait: Callable[[Any], Any]


def main() -> None:
  """Exits with 1 if a result is wrong or a kernel fails."""
  if _FIRST.value is not None:
    _run_cases(_FIRST.value)
    return
  command = [sys.executable, '-u', '-m', 'experiments.gpu_check']
  passed = in_turn.supervise([*command, *sys.argv[1:]], _LIMIT.value)
  failed = passed.count(False)
  print(f'{failed} of {len(passed)} failed' if failed else 'all passed')
  sys.exit(bool(failed))


def _run_cases(first):
  """Those from `first` on, or up to one that leaves the device unusable."""
  from deepseek_jax.kernels import dispatch
  from experiments import gpu_cases

  obstacles = dispatch.device_obstacles()
  small = _SHAPES.value == 'small' or bool(obstacles)
  cases = _chosen(list(gpu_cases.all_cases(small)))
  in_turn.announce(len(cases))
  if not first:
    print(_versions(), flush=True)
  if obstacles and not first:
    print(
      f'No Hopper GPU: {"; ".join(obstacles)}. Nothing is timed, and no kernel '
      'runs as it would there: small shapes, references, interpreter, lowering.'
    )
  ceilings = None if obstacles else _ceilings(small)
  for case in cases[first:]:
    try:
      passed = _dry(case) if obstacles else _check(case)
      if ceilings:
        _time(case, ceilings)
    except Exception as error:  # One kernel must not hide the others.
      passed = False
      print(f'{case.name}: FAILED: {type(error).__name__}: {str(error)[:300]}')
    in_turn.tell(passed)
    if not passed and not _is_usable():
      print('the device takes no more programs: on in a new process')
      sys.exit(in_turn.LOST)


def _is_usable():
  """Whether the device still runs programs: not after an illegal access."""
  import jax

  try:
    return int(jax.jit(lambda x: x + 1)(1)) == 2
  except jax.errors.JaxRuntimeError:  # As every later case would raise.
    return False


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


def _versions():
  import jax

  commit = 'unknown'
  if shutil.which('git'):
    command = ['git', 'rev-parse', '--short', 'HEAD']
    done = subprocess.run(command, capture_output=True, text=True)
    commit = done.stdout.strip() or commit
  return (
    f'{datetime.date.today()} commit {commit}, jax {jax.__version__}, '
    f'{jax.devices()[0].device_kind}'
  )


def _error(case, actual, operands):
  """The largest distance of a result and its truth.

  Infinite if something is not finite, or has another shape; on the device, for
  the host would need 8 bytes for every number.
  """
  import jax
  import jax.numpy as jnp

  from deepseek_jax.ops import quantize

  def errors(actual, *operands):
    found = []
    expected = case.view(case.truth(*operands), *operands)
    leaves = (
      jax.tree.leaves(tree, is_leaf=quantize.is_leaf)
      for tree in (actual, expected)
    )
    for a, e in zip(*leaves, strict=True):
      if a.shape != e.shape:
        return jnp.inf
      error = case.distance(a, e)
      found.append(jnp.where(jnp.isfinite(error), error, jnp.inf))
    return jnp.stack(found).max()

  # Not TF32, which a GPU takes for float32 otherwise.
  with jax.default_matmul_precision('highest'):
    return float(jax.jit(errors)(case.view(actual, *operands), *operands))


def _judge(case, what, result, operands):
  """Prints one line; whether the result is right."""
  error = _error(case, result, operands)
  right = error <= case.error
  verdict = 'ok' if right else 'WRONG'
  print(f'{case.name}: {what} {verdict}, error {error:.1e}', flush=True)
  return right


def _check(case):
  """The kernel, and XLA's reference, on the device."""
  import jax

  operands, right = case.make(), True
  for what, implementation in (('kernel', 'mosaic_gpu'), ('XLA', 'xla')):
    run = functools.partial(case.run, implementation=implementation)
    right &= _judge(case, what, jax.jit(run)(*operands), operands)
  return right


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


def _seconds(candidate, calls):
  started = time.perf_counter()
  for _ in range(calls):
    result = candidate.call()
  candidate.wait(result)
  return (time.perf_counter() - started) / calls


def _compiled(f, operands):
  import jax

  return Candidate(
    functools.partial(jax.jit(f), *operands), jax.block_until_ready
  )


def _medians(candidates):
  """name -> median seconds of a call, timed alternately after a warm-up."""
  calls = {}
  for name, candidate in candidates.items():
    try:
      _seconds(candidate, 1)
      calls[name] = max(1, int(_SECONDS / _seconds(candidate, 1)))
    except Exception as error:  # An alternative that cannot is no failure.
      text = ' '.join(str(error).split())[:120]
      print(f'  {name}: cannot: {type(error).__name__}: {text}', flush=True)
  times = {name: [] for name in calls}
  for _ in range(_ROUNDS.value):
    for name, count in calls.items():
      times[name].append(_seconds(candidates[name], count))
  return {name: statistics.median(values) for name, values in times.items()}


def _ceilings(small):
  """TFLOP/s of a BF16 product and GB/s of a copy, in this run."""
  import jax
  import jax.numpy as jnp

  n = 1024 if small else 8192
  a, b = (
    jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2)
  )
  x = jnp.ones(2**24 if small else 2**29, jnp.bfloat16)
  candidates = {
    'bf16': _compiled(jnp.matmul, (a, b)),
    'copy': _compiled(lambda x: x + 1, (x,)),
    'nothing': _compiled(lambda x: x + 1, (x[:1],)),
  }
  has_torch = _has_torch()
  if has_torch:
    candidates['torch'] = _in_torch(lambda a, b: lambda: a @ b, (a, b))
  seconds = _medians(candidates)
  flops, moved = 2 * n**3 / seconds['bf16'], 2 * x.nbytes / seconds['copy']
  print(
    f'ceilings: bf16 {flops / 1e12:.0f} TFLOP/s, copy {moved / 1e9:.0f} GB/s; '
    f'a call of nothing takes {seconds["nothing"] * 1e6:.0f} us'
  )
  if 'torch' in seconds:
    print(f'torch bf16 {2e-12 * n**3 / seconds["torch"]:.0f} TFLOP/s')
  return flops, moved


def _has_torch():
  if not importlib.util.find_spec('torch'):
    return False
  import torch

  return torch.cuda.is_available()


def _in_torch(prepare, operands):
  """The call that `prepare` gives, of the same memory, as torch sees it."""
  import torch

  def wait(_):
    torch.cuda.synchronize()

  return Candidate(prepare(*_torch_leaves(operands)), wait)


def _torch_leaves(operands):
  """A tensor for each array; codes, which DLPack may not know, as bytes."""
  import jax
  import torch

  from deepseek_jax.ops import quantize

  operands = jax.tree.map(
    lambda x: x.raw if isinstance(x, quantize.Quantized) else x,
    operands,
    is_leaf=quantize.is_leaf,
  )
  return [torch.from_dlpack(x) for x in jax.tree.leaves(operands)]


def _time(case, ceilings):
  """A line for each candidate."""
  operands = case.make()
  functions = {
    'kernel': functools.partial(case.run, implementation='mosaic_gpu'),
    'xla': functools.partial(case.run, implementation='xla'),
    **case.others,
  }
  candidates = {name: _compiled(f, operands) for name, f in functions.items()}
  if case.torch and _has_torch():
    candidates['torch'] = _in_torch(case.torch, operands)
  for name, seconds in _medians(candidates).items():
    rates = case.flops / seconds, case.bytes / seconds
    share = max(rate / most for rate, most in zip(rates, ceilings))
    units = (1e12, 'TFLOP/s'), (1e9, 'GB/s')
    texts = [
      f'{rate / unit:8.1f} {text}'
      for rate, (unit, text) in zip(rates, units)
      if rate
    ]
    print(
      f'  {name:28}{seconds * 1e6:12.1f} us {" ".join(texts)} {share:6.0%}',
      flush=True,
    )


if __name__ == '__main__':
  flags.run(main)
