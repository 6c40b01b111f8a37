"""Compiles a run's step, or other programs, for GPUs that are not here.

    python -m experiments.compile --preset=deepseek_v3 --what=moe_layer \
      --parallel.node=8 --parallel.expert=8 --train.micro_batch_size=64
    python -m experiments.compile --preset=deepseek_v2_lite --parallel.fsdp=8 \
      --train.micro_batch_size=8 --data.batch_size=8 --topology=h200
    python -m experiments.compile --preset=deepseek_v3 --what=decode \
      --parallel.node=8 --parallel.expert=8 --data.batch_size=1024 \
      --data.batch_size_start=0 --train.micro_batch_size=0 --speculative=1

Prints the kernels that were chosen, the memory of each device beside the
planner's, what crosses each axis of the mesh, and how long compiling took.  Of
loops whose length is decided at run time (further rounds of the experts) one
pass is counted, and so is one of whatever a pipeline's tick may leave out (the
head, the sums of gradients), which as work beside a collective counts for
nothing.  Of a pipeline's branches a rank takes one at a tick; the table counts
all of them at every tick, which is more than any rank sends to its experts.
Generation (`prefill`, a chunk of every prompt, or `decode`, a pass over every
text, with `--speculative` drafts) is of `--data.batch_size` texts, each of
`--data.seq_len` tokens, by weights in the compute dtype.
The devices are `--parallel`'s; JAX's CUDA plugin is needed, not CUDA: see
deepseek_jax/parallel/topology.py.
"""

import os
import time
from typing import TextIO

from absl import flags as absl_flags

from deepseek_jax import flags

_WHAT = absl_flags.DEFINE_enum(
  'what',
  'train_step',
  ['decode', 'moe_layer', 'prefill', 'train_step'],
  'What is compiled.',
)
_SPECULATIVE = absl_flags.DEFINE_integer(
  'speculative', 0, 'As of `generate`.', lower_bound=0
)
_TOPOLOGY = absl_flags.DEFINE_string('topology', 'h100', 'h100 or h200.')
_OVERLAP = absl_flags.DEFINE_bool(
  'overlap', False, 'Also print what may run beside each collective.'
)
_HLO = absl_flags.DEFINE_string('hlo', None, 'Also write the program here.')
flags.define(default_preset='deepseek_v3')


def _open() -> TextIO:
  try:
    return open(_HLO.value or os.devnull, 'w')
  except OSError as error:
    raise ValueError(f'--hlo={_HLO.value}: {error.strerror}') from error


def _generation(config, devices):
  """`prefill` or `decode`."""
  from deepseek_jax.inference import ahead as inference
  from deepseek_jax.training import ahead
  from deepseek_jax.training import layout as layout_lib

  started = time.perf_counter()
  weights = ahead.weights(config, devices)
  with layout_lib.ambient(weights.layout):
    served = inference.serve(
      weights.model,
      weights.variables,
      config.data.batch_size,
      config.data.seq_len,
      _SPECULATIVE.value,
      weights.everywhere,
    )
    lowered = getattr(inference, f'lower_{_WHAT.value}')(served)
  return ahead.compiled(lowered, weights.layout, started)


def main() -> None:
  """Compiles and prints."""
  from deepseek_jax.kernels import dispatch, mosaic
  from deepseek_jax.parallel import topology
  from deepseek_jax.training import ahead

  config, _ = flags.resolve()
  generates = _WHAT.value in ('decode', 'prefill')
  if _SPECULATIVE.value and not (generates and config.model.n_mtp_layers):
    raise ValueError(
      f'--speculative={_SPECULATIVE.value} with --what={_WHAT.value} and '
      f'model.n_mtp_layers={config.model.n_mtp_layers}: use 0, or decode or '
      'prefill of a model with MTP'
    )
  _open().close()  # It may not be writable: before minutes of compilation.
  try:
    devices = topology.topology(_TOPOLOGY.value, config.parallel.n_devices)
  except RuntimeError as error:  # What to install.
    raise ValueError(str(error)) from error
  make = _generation if generates else getattr(ahead, _WHAT.value)
  with dispatch.told(print), mosaic.for_hopper():
    program = make(config, devices)
  if _HLO.value:
    with _open() as file:
      file.write(program.hlo)
  print(ahead.describe(program, config, is_step=_WHAT.value == 'train_step'))
  if _OVERLAP.value:
    print(ahead.describe_overlap(program))


if __name__ == '__main__':
  flags.run(main)
