"""Every leaf of a `Config` as a command-line flag; configs as JSON.

    python -m experiments.train --preset=tiny --model.moe.balance=aux_loss

A flag wins over `--config=file.py`, which wins over `--preset`.  A program
calls `define()` when it is imported, `run(main)` under `__main__`, and
`resolve()` in `main`.  A user's mistake ends in one line and exit status 2.
"""

import dataclasses
import difflib
import dis
import inspect
import pathlib
import re
import runpy
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

from absl import app, flags, logging

from deepseek_jax import config as config_lib
from deepseek_jax import presets

Config = config_lib.Config

# Leaves that take one of a few names; the rest of the checks is config.py's.
CHOICES = {
  'model.attention': config_lib.ATTENTIONS,
  'model.moe.score_func': config_lib.SCORE_FUNCS,
  'model.moe.group_score': config_lib.GROUP_SCORES,
  'model.moe.balance': config_lib.BALANCES,
  'model.moe.aux_loss': config_lib.AUX_LOSSES,
  'precision.compute_dtype': config_lib.DTYPES,
  'precision.mu_dtype': config_lib.MOMENT_DTYPES,
  'precision.nu_dtype': config_lib.MOMENT_DTYPES,
  'precision.fp8.scale': config_lib.SCALES,
  'precision.fp8.turned_scale': config_lib.SCALES,
  'precision.fp8.activation_tile': config_lib.TILES,
  'precision.fp8.weight_tile': config_lib.TILES[1:],
  'precision.fp8.gradient_tile': config_lib.TILES,
  'precision.fp8.accumulate': config_lib.ACCUMULATE,
  'precision.kernels': config_lib.KERNELS,
  'optim.schedule': config_lib.LR_SCHEDULES,
  'train.remat': config_lib.REMATS,
  'train.nonfinite': config_lib.NONFINITES,
  'parallel.schedule': config_lib.PIPELINES,
}
_KINDS = {int: 'an integer', float: 'a number', bool: 'true or false'}
_BOOLS = {'true': True, '1': True, 'false': False, '0': False}
_WIDTH = 80
# What evaluation and generation know of `parallel`, and its default there.
_AXES = {
  'parallel.data': 'what the others leave',
  'parallel.fsdp': '1',
  'parallel.node': '1',
  'parallel.expert': '1',
  'parallel.cpu_devices': 'the devices that are there',
  'parallel.num_processes': '1',
  'parallel.process_id': '-1',
  'parallel.coordinator': 'empty',
}


def define(
  default_preset: str = 'quickstart',
  flag_values: flags.FlagValues = flags.FLAGS,
) -> None:
  """Registers `--preset`, `--config` and one flag per leaf of `Config`.

  A leaf's flag is None unless it is given.
  """
  text = 'Settings to start from.'
  preset = _Parser(str, tuple(presets.PRESETS))
  _define(flag_values, 'preset', preset, default_preset, text)
  text = 'Python file with `get_config() -> Config`, instead of a preset.'
  _define(flag_values, 'config', _Parser(str), None, text)
  for section in _sections(presets.deepseek_v3()):
    for name, value, comment in section.leaves:
      parser = _Parser(type(value), CHOICES.get(name, ()))
      text = f'{comment} (V3: {value})'.strip()
      _define(flag_values, name, parser, None, text)


def define_axes(flag_values: flags.FlagValues = flags.FLAGS) -> None:
  """Registers those `--parallel` flags that a program without training has."""
  for name, value, comment in _axes():
    text = f'{comment} (default: {_AXES[name]})'
    _define(flag_values, name, _Parser(type(value)), None, text)


def axes(flag_values: flags.FlagValues = flags.FLAGS) -> dict[str, Any]:
  """The flags of `define_axes` that are given, as fields of ParallelConfig."""
  given = {name: flag_values[name].value for name in _AXES}
  return {k.partition('.')[2]: v for k, v in given.items() if v is not None}


def resolve(
  flag_values: flags.FlagValues = flags.FLAGS,
) -> tuple[Config, Config]:
  """The config that the command line asks for, and that of its preset or file.

  `config.diff` of the second and the first is what this run changes.

  Raises:
    ValueError: if the file or the values are wrong.
  """
  path, preset = flag_values['config'].value, flag_values['preset'].value
  base = presets.PRESETS[preset]() if path is None else _from_file(path)
  given = {name: flag_values[name].value for name in config_lib.leaves(base)}
  given = {name: value for name, value in given.items() if value is not None}
  return config_lib.replace(base, given), base


def base_name(flag_values: flags.FlagValues = flags.FLAGS) -> str:
  """The preset, or the stem of the file that takes its place."""
  path, preset = flag_values['config'].value, flag_values['preset'].value
  return preset if path is None else pathlib.Path(path).stem


def given(flag_values: flags.FlagValues = flags.FLAGS) -> list[str]:
  """The words of the command line that decide what `resolve` returns."""
  names = ('preset', 'config', *config_lib.leaves(config_lib.Config()))
  chosen = [flag_values[name] for name in names]
  return [flag.serialize() for flag in chosen if flag.present]


def run(main: Callable[..., None], takes_command: bool = False) -> NoReturn:
  """Parses the command line, calls `main` and exits.

  With `takes_command`, `main` is given the words that follow the flags.

  This package raises `ValueError` for a user's mistake, `FloatingPointError`
  for a run that diverged, and neither for anything else: from a `raise` of its
  own they are shown as a line.  Any other exception, also a `ValueError` out of
  a library, is a bug and keeps its traceback.
  """

  def guarded(argv: list[str]) -> None:
    if not flags.FLAGS['verbosity'].present:
      logging.set_verbosity(logging.WARNING)  # Orbax tells every detail.
    try:
      main(*[argv[1:]] * takes_command)
    except (ValueError, FloatingPointError) as error:
      if not _raised_here(error):
        raise
      _fail(str(error))

  app.run(guarded, flags_parser=lambda argv: _parse(argv, takes_command))


def describe() -> str:
  """The table of all flags that `--help` prints, by section of `Config`."""
  lines = [
    *_row('  --preset=NAME', ', '.join(presets.PRESETS)),
    *_row('  --config=FILE.py', 'Defines get_config() -> Config; no preset.'),
    '',
    'Every setting is a flag, shown with its value in deepseek_v3.  A switch',
    'is written --name, --noname or --name=false.',
  ]
  for section in _sections(presets.deepseek_v3()):
    lines += ['', *textwrap.wrap(f'{section.name}: {section.doc}', _WIDTH)]
    for name, value, comment in section.leaves:
      shown = str(value).lower() if type(value) is bool else value
      choices = ' | '.join(CHOICES.get(name, ()))
      notes = '. '.join(filter(None, (choices, comment)))
      lines += _row(f'  --{name}={shown}', notes)
  return '\n'.join(lines) + '\n'


def closest(word: str, names: Iterable[str]) -> list[str]:
  """The names most like `word`, none if nothing is near; best ones only.

  A dotted name is also compared without its first parts: 'lr' is 'optim.lr'.
  """

  def score(name: str) -> float:
    parts = name.split('.')
    tails = ('.'.join(parts[i:]) for i in range(len(parts)))
    tries = (difflib.SequenceMatcher(None, word, tail) for tail in tails)
    return max(match.ratio() for match in tries)

  scores = {name: score(name) for name in names}
  best = max(scores.values(), default=0)
  return [n for n, s in scores.items() if s == best >= 0.6][:3]


def _axes() -> Iterator[tuple[str, Any, str]]:
  """(name, default, comment) of each flag in `_AXES`."""
  for section in _sections(config_lib.Config()):
    yield from (leaf for leaf in section.leaves if leaf[0] in _AXES)


@dataclasses.dataclass(frozen=True)
class _Section:
  """One dataclass of the config: its leaves are (name, V3's value, comment)."""

  name: str
  doc: str
  leaves: list[tuple[str, Any, str]]


def _sections(config: Any, prefix: str = '') -> Iterator[_Section]:
  """Walks `Config`; a leaf's comment is the one beside it in config.py."""
  comments = dict(
    re.findall(r'^  (\w+): .*?  # (.*)$', inspect.getsource(type(config)), re.M)
  )
  values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
  inner = {k: v for k, v in values.items() if dataclasses.is_dataclass(v)}
  own = [
    (prefix + name, value, comments.get(name, ''))
    for name, value in values.items()
    if name not in inner
  ]
  if own:
    doc = inspect.getdoc(config).splitlines()[0]
    yield _Section(prefix.rstrip('.'), doc, own)
  for name, value in inner.items():
    yield from _sections(value, f'{prefix}{name}.')


def _row(left: str, right: str) -> list[str]:
  """One flag of the table; the note starts in a column, wrapped there."""
  column = 36
  if not right:
    return [left]
  notes = textwrap.wrap(right, _WIDTH - column)
  if len(left) < column - 1:
    first = left.ljust(column) + notes[0]
    return [first, *(' ' * column + note for note in notes[1:])]
  return [left, *(' ' * column + note for note in notes)]


class _Parser(flags.ArgumentParser):
  """Turns the text of a flag into a value of `kind`, or one of `choices`."""

  def __init__(self, kind: type, choices: tuple[str, ...] = ()):
    self._kind, self._choices = kind, choices

  def parse(self, argument: Any) -> Any:
    if argument is None or type(argument) is self._kind is not str:
      return argument
    if self._choices and argument not in self._choices:
      near = _did_you_mean(argument, self._choices)
      raise ValueError(f'use one of {", ".join(self._choices)}{near}')
    try:
      return (
        _BOOLS[argument.lower()] if self._kind is bool else self._kind(argument)
      )
    except (KeyError, ValueError):
      raise ValueError(f'must be {_KINDS[self._kind]}') from None

  def flag_type(self) -> str:
    return self._kind.__name__


def _define(
  flag_values: flags.FlagValues,
  name: str,
  parser: _Parser,
  default: str | None,
  text: str,
) -> None:
  boolean = parser.flag_type() == 'bool'
  serializer = flags.ArgumentSerializer()
  flag = flags.Flag(parser, serializer, name, default, text, boolean=boolean)
  flags.DEFINE_flag(flag, flag_values)


def _did_you_mean(
  word: str, names: Iterable[str], start: str = '', end: str = '?'
) -> str:
  near = [start + name for name in closest(word, names)]
  return f'; did you mean {" or ".join(near)}{end}' if near else ''


def _parse(argv: list[str], takes_command: bool) -> list[str]:
  """The flags parser of `run`: own help, and one line for each mistake."""
  if {'--help', '-help', '-h', '--helpshort'} & set(argv[1:]):
    _print_help()
  try:
    rest = flags.FLAGS(argv)
  except flags.UnrecognizedFlagError as error:
    word = error.flagname.replace('-', '_')
    near = _did_you_mean(word, flags.FLAGS, '--')
    _fail(f'unknown flag --{error.flagname}{near or "; --help lists them"}')
  except flags.Error as error:
    _fail(str(error))
  if len(rest) > 1 and not takes_command:
    _fail(f'unexpected argument {rest[1]!r}; write flags as --name=value')
  return rest


def _print_help() -> NoReturn:
  """The program's docstring, its own flags, and the table of settings."""
  print((sys.modules['__main__'].__doc__ or '').strip())
  print(flags.FLAGS.main_module_help())
  if 'preset' in flags.FLAGS:
    print(f'\nSettings (default preset: {flags.FLAGS["preset"].default}):')
    print(describe(), end='')
  elif set(_AXES) <= set(flags.FLAGS):
    print('\nSeveral devices; with any of these all of them are used:')
    for name, _, comment in _axes():
      print(*_row(f'  --{name}', f'{comment} ({_AXES[name]})'), sep='\n')
  sys.exit(0)


def _fail(message: str) -> NoReturn:
  print(f'ERROR: {message}', file=sys.stderr)
  sys.exit(2)


def _raised_here(error: Exception) -> bool:
  """Whether a `raise` in this package or in experiments/ threw the error.

  Not merely whether it came out of a frame of ours: the `ValueError` of a bad
  `int(text)` or unpacking also does, and is a bug.
  """
  trace = error.__traceback__
  while trace.tb_next is not None:
    trace = trace.tb_next
  frame = trace.tb_frame
  package = (frame.f_globals.get('__package__') or '').partition('.')[0]
  statement = dis.opname[frame.f_code.co_code[trace.tb_lasti]]
  ours = package in ('deepseek_jax', 'experiments')
  return ours and statement == 'RAISE_VARARGS'


def _from_file(path: str) -> Config:
  """Runs a config file and calls its `get_config`."""
  flag = f'--config={path}'
  if not pathlib.Path(path).is_file():
    raise ValueError(f'{flag}: no such file')
  try:
    get_config = runpy.run_path(path).get('get_config')
    config = get_config() if callable(get_config) else None
  except Exception as error:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    where = f' in line {lines[-1]}' if lines else ''
    kind = type(error).__name__
    raise ValueError(f'{flag}: {kind}{where}: {error}') from error
  if not callable(get_config):
    raise ValueError(f'{flag}: defines no function get_config()')
  if not isinstance(config, Config):
    kind = type(config).__name__
    raise ValueError(f'{flag}: get_config() returned {kind}, not a Config')
  return config
