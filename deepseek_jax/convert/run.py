"""A conversion from one directory to another, whatever the two hold.

Everything is checked first.  Then `DST.partial` fills up, a file at a time,
and is renamed to DST when it is whole: the same call after a kill goes on with
the files that are missing.
"""

import collections
import math
import pathlib
import shutil
from typing import Any, NamedTuple

from deepseek_jax import config as config_lib
from deepseek_jax.convert import (
  check,
  hf,
  hf_config,
  official,
  orbax_io,
  sources,
  stream,
)

TARGETS = ('jax', 'hf', 'official')


class Plan(NamedTuple):
  """What a conversion writes, decided and checked.

  Attributes:
    opened: the source.
    source: its tensors as they are written.
    files: with tensors; the small ones follow in the end.
    record: JSON that a restart must find unchanged.
  """

  opened: hf.Checkpoint
  source: sources.Source
  files: list[stream.File]
  record: dict


def convert(
  src: str | pathlib.Path,
  dst: str | pathlib.Path,
  to: str,
  dtype: str = 'keep',
  *,
  use_ema: bool = False,
  mp: int = 1,
  keep_extra: bool = False,
  progress: bool = False,
) -> None:
  """Converts a checkpoint.

  Args:
    src: see `plan`, also for `to`, `dtype`, `use_ema`, `mp` and `keep_extra`.
    dst: directory to make; must not exist, or be empty.
    to: the layout of `dst`.
    dtype: its number format.
    use_ema: read the averaged parameters.
    mp: ranks of the official layout.
    keep_extra: carry what is no part of the model along.
    progress: show a bar with bytes per second and the time left.

  Raises:
    ValueError: as `plan_to`.
  """
  src, dst = (pathlib.Path(p).expanduser() for p in (src, dst))
  dst = dst.absolute()  # Of `.` there is no name.
  options = {'use_ema': use_ema, 'mp': mp, 'keep_extra': keep_extra}
  made = plan_to(dst, src, to, dtype, **options)
  partial = _partial(dst)
  _begin(partial, made)
  stream.write(made.files, made.source, partial, progress)
  _finish(made, partial, src, dst, to)
  partial.rename(dst)


def plan_to(
  dst: str | pathlib.Path, src: str | pathlib.Path, *args: Any, **options: Any
) -> Plan:
  """`plan`, and checks that it can be carried out.

  Args:
    dst: see `convert`.
    src: see `plan`, also for the others.
    *args: likewise.
    **options: likewise.

  Raises:
    ValueError: as `plan`; if DST is not empty, the disk is too full, or
      `DST.partial` is of another conversion.
  """
  dst = pathlib.Path(dst).expanduser().absolute()
  _check_target(dst)
  made = plan(src, *args, **options)
  _check_partial(_partial(dst), made)
  return made


def plan(
  src: str | pathlib.Path,
  to: str,
  dtype: str = 'keep',
  *,
  use_ema: bool = False,
  mp: int = 1,
  keep_extra: bool = False,
) -> Plan:
  """Opens and checks a source and lists what is to be written.

  Args:
    src: directory of Hugging Face or official files, or workdir of a run.
    to: 'jax' (a workdir), 'hf' or 'official'.
    dtype: 'keep', 'bf16', 'f32' or 'fp8'.
    use_ema: the averaged parameters of a run.
    mp: ranks of the official layout.
    keep_extra: carry tensors that are no part of the model along.

  Raises:
    ValueError: naming what is wrong with an argument, file, key or tensor.
  """
  if to not in TARGETS:
    raise ValueError(f'--to={to}: use one of {", ".join(TARGETS)}')
  if mp < 1 or (mp > 1 and to != 'official'):
    raise ValueError(f'--mp={mp}: ranks are 1 or more, and of --to=official')
  opened = hf.open_checkpoint(src, use_ema, keep_extra)
  source, model = hf.cast(opened, dtype), opened.config.model
  if to == 'jax':
    check.one_dtype_a_leaf(source, model)
    files = orbax_io.files(source, model)
  else:
    hf.released_config(model, opened.hf, src)  # Refuses what has no such form.
    files = hf.files(source)
    if to == 'official':
      _official_args(opened, source)  # Refuses more.
      official.warn_of_gate(model)
      files = official.files(source, model, mp)
  beside = (orbax_io.EXTRA, official.REST)
  record = {
    'source': str(pathlib.Path(src).expanduser().absolute()),
    'stamp': source.stamp,
    'to': to,
    'dtype': dtype,
    'mp': mp,
    'keep_extra': keep_extra,
    hf.BESIDE: [f.path for f in files if f.path in beside],
  }
  return Plan(opened, source, files, record)


def summary(made: Plan) -> str:
  """The plan in words: tensors and bytes by dtype, files, what is left out."""
  parts = [part for file in made.files for part in file.parts]
  totals = collections.Counter()
  counts = collections.Counter()
  for part in parts:
    totals[part.spec.dtype.name] += math.prod(part.spec.shape)
    counts[part.spec.dtype.name] += 1
  model = made.opened.config.model
  lines = [
    f'{model.n_layers} layers of {model.dim}, '
    f'{model.moe.n_routed_experts} experts, {model.n_mtp_layers} MTP layers'
  ]
  for name, total in totals.most_common():
    lines.append(f'{name:>14}: {total:,} numbers in {counts[name]:,} tensors')
  if made.opened.extra:
    lines.append(f'no part of the model: {", ".join(made.opened.extra)}')
  lines += [f'{f.nbytes:>16,}  {f.path}' for f in made.files[:8]]
  if len(made.files) > 8:
    lines.append(f'{"...":>16}  {len(made.files)} files in all')
  lines.append(f'{sum(f.nbytes for f in made.files):>16,}  bytes')
  return '\n'.join(lines)


def _official_args(opened, source):
  return official.to_args(
    opened.config.model,
    hf.has_fp8(source),
    hf_config.is_power_of_two(opened.hf or {}),
  )


def _check_target(dst):
  if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
    raise ValueError(f'--dst={dst} exists and is not empty; name another')
  above = next(p for p in dst.parents if p.exists())
  if not above.is_dir():
    raise ValueError(f'--dst={dst}: {above} is no directory; name another')


def _partial(dst):
  return dst.with_name(dst.name + '.partial')


def _check_partial(partial, made):
  """Whether it is of the same conversion, if it is there, and can be filled."""
  found = partial / hf.RECORD
  is_ours = found.exists() and hf_config.read(found) == made.record
  if partial.exists() and not is_ours:
    raise ValueError(
      f'{partial} is of another conversion, or its source has changed since; '
      'remove it'
    )
  needed = sum(f.nbytes for f in made.files)
  if partial.exists():
    needed -= sum(p.stat().st_size for p in partial.rglob('*') if p.is_file())
  disk = next(p for p in partial.parents if p.exists())
  free = shutil.disk_usage(disk).free
  if needed > free:
    raise ValueError(f'{disk}: {needed:,} bytes needed, {free:,} are free')


def _begin(partial, made):
  """Makes the directory, unless an earlier call has."""
  if not partial.exists():
    fresh = partial.with_name(f'.{partial.name}')
    fresh.mkdir(parents=True, exist_ok=True)
    hf.write_json(fresh / hf.RECORD, made.record)
    fresh.rename(partial)


def _finish(made, partial, src, dst, to):
  """The small files, which make the large ones a checkpoint."""
  opened, source, model = made.opened, made.source, made.opened.config.model
  if to == 'hf':
    hf.write_companions(partial, source, model, opened.hf, src)
    return
  hf.copy_companions(src, partial)
  if to == 'official':
    hf.write_config(partial, source, model, opened.hf, src)
    hf.write_json(partial / official.ARGS, _official_args(opened, source))
    return
  config = hf.run_config(opened, source)
  if (partial / 'tokenizer.json').exists():
    path = dst / 'tokenizer.json'
    config = config_lib.replace(config, {'data.tokenizer': str(path)})
  orbax_io.write_metadata(partial, source, config)
  (partial / hf.CONFIG).write_text(config_lib.to_json(config))
  if opened.hf:
    described = hf_config.describe(
      opened.hf, source.specs[hf.EMBED].dtype.name, hf.has_fp8(source)
    )
    hf.write_json(partial / hf.KEPT_CONFIG, described)
