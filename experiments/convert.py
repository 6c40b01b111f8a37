"""Carries a checkpoint between Hugging Face, the official layout and JAX.

    python -m experiments.convert --src=DeepSeek-V3 --dst=runs/v3 --to=jax
    python -m experiments.convert --src=runs/quickstart --dst=out --to=hf --ema
    python -m experiments.convert --src=DeepSeek-V3 --dst=x --to=hf --dry_run

--src is a directory of safetensors files, Hugging Face's or the official
repository's, or the workdir of a run.  Nothing is lost on the way and back.
All of it is checked before anything is written; after a kill, the same command
goes on where it was.
"""

from absl import flags as absl_flags

from deepseek_jax import flags
from deepseek_jax.convert import hf, run

_SRC = absl_flags.DEFINE_string('src', None, 'Directory to read.')
_DST = absl_flags.DEFINE_string('dst', None, 'Directory to make.')
_TO = absl_flags.DEFINE_enum(
  'to', None, run.TARGETS, 'jax: a workdir for eval and generate.'
)
_DTYPE = absl_flags.DEFINE_enum(
  'dtype',
  'keep',
  hf.DTYPES,
  'fp8: 128 x 128 blocks, as DeepSeek-V3 is released; the rest BF16.',
)
_EMA = absl_flags.DEFINE_bool('ema', False, "A run's averaged parameters.")
_MP = absl_flags.DEFINE_integer(
  'mp', 1, 'Ranks of the official layout.', lower_bound=1
)
_KEEP_EXTRA = absl_flags.DEFINE_bool(
  'keep_extra', False, 'Carry tensors along that are no part of the model.'
)
_DRY_RUN = absl_flags.DEFINE_bool(
  'dry_run', False, 'Check, and print what would be written.'
)


def main() -> None:
  """Checks the source, prints the plan and carries it out."""
  for name in ('src', 'dst', 'to'):
    if not absl_flags.FLAGS[name].value:
      raise ValueError(f'--{name} is missing; --help shows how to call it')
  options = {
    'use_ema': _EMA.value,
    'mp': _MP.value,
    'keep_extra': _KEEP_EXTRA.value,
  }
  if _DRY_RUN.value:
    made = run.plan_to(
      _DST.value, _SRC.value, _TO.value, _DTYPE.value, **options
    )
    print(run.summary(made))
    return
  run.convert(
    _SRC.value, _DST.value, _TO.value, _DTYPE.value, **options, progress=True
  )
  print(f'wrote {_DST.value}')


if __name__ == '__main__':
  flags.run(main)
