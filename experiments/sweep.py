"""Trains every point of a grid, and writes one table and one picture.

    python -m experiments.sweep --preset=ablation --workdir=runs/balance \\
      --optim.alpha=0.01 \\
      --sweep='model.moe.balance=aux_free,aux_loss,none; seed=0,1,2'

--sweep is leaf=value,value; leaf=value ...: the product of all.  Values that
hold a comma themselves are separated by |, as in optim.gamma=0.001|0.01,0@0.9.
`seed` is train.seed (the initialisation) and data.seed (the order of the data)
together.  What differs in anything but seeds is an arm, a row of the table.

The same command goes on where it stopped: finished runs are not repeated.
"""

import pathlib
import sys
from typing import Any, NoReturn

from absl import flags as absl_flags

from deepseek_jax import config as config_lib
from deepseek_jax import flags
from deepseek_jax.evaluation import report, sweep
from deepseek_jax.planner import cache, parameters
from experiments import large_pages

Arms = dict[str, dict[str, Any]]

_COLUMNS = (
  'val_loss,val_loss_difference,val_bpb,max_vio,max_vio_summed,'
  'tokens_per_second,parameters'
)


def parse_grid(
  text: str, flag_values: absl_flags.FlagValues = absl_flags.FLAGS
) -> list[dict[str, Any]]:
  """The points of `--sweep`, each value read as the flag of its leaf is.

  Raises:
    ValueError: bad syntax, an unknown leaf, or a bad value of one.
  """
  factors = []
  for part in filter(None, (part.strip() for part in text.split(';'))):
    name, _, values = (piece.strip() for piece in part.partition('='))
    if not values:
      raise ValueError(f'--sweep: {part!r}: write leaf=value,value')
    leaf = 'train.seed' if name == 'seed' else name
    names = config_lib.leaves(config_lib.Config())
    if leaf not in names:
      near = ' or '.join(flags.closest(name, [*names, 'seed']))
      hint = f'; did you mean {near}?' if near else ''
      raise ValueError(f'--sweep: unknown setting {name}{hint}')
    parse = flag_values[leaf].parser.parse
    try:
      separator = '|' if '|' in values else ','
      parsed = [parse(v.strip()) for v in values.split(separator)]
    except ValueError as error:
      raise ValueError(f'--sweep: {part!r}: {error}') from None
    factors.append(sweep.axis(name, parsed))
  if not factors:
    raise ValueError("--sweep is empty: write --sweep='optim.lr=1e-3,3e-3'")
  return sweep.prod(*factors)


def facts(config: config_lib.Config) -> dict[str, float]:
  """What a table can say of a config without training it."""
  model = config.model
  active = parameters.main_model(model, active=True)
  return {
    'parameters': parameters.main_model(model),
    'active_parameters': active - parameters.embedding(model),
    'cache_bytes_per_token': cache.bytes_per_token(model),
  }


def define(preset: str, workdir: str, columns: str = _COLUMNS) -> None:
  """Registers the flags that every sweep has, and those of the config."""
  main = {'module_name': sys.argv[0]}  # So that --help shows them.
  text = 'Directory of the runs, of the table and of the picture.'
  absl_flags.DEFINE_string('workdir', workdir, text, **main)
  text = 'Columns of the table, of those in evaluation/report.py.'
  absl_flags.DEFINE_list('columns', columns.split(','), text, **main)
  flags.define(preset)


def train_and_report(
  config: config_lib.Config,
  arms: Arms,
  seeds: list[dict[str, Any]],
  name: str = 'table',
) -> None:
  """Runs `arms` x `seeds` on `config`; prints the table and its place."""
  columns, workdir = absl_flags.FLAGS.columns, absl_flags.FLAGS.workdir
  for column in columns:
    if column not in report.COLUMNS:
      known = ', '.join(report.COLUMNS)
      raise ValueError(f'--columns: no {column!r}; there are {known}')
  # After the flags are known to be right: JAX takes seconds to import.
  from deepseek_jax.kernels import dispatch
  from deepseek_jax.training import step_log

  with dispatch.told(step_log.say):
    runs = sweep.run(config, arms, seeds, pathlib.Path(workdir) / 'runs', facts)
  print(report.write(runs, columns, workdir, name))
  print(f'{workdir}/{name}.md and {workdir}/{name}.png')


def ablation(arms: Arms, name: str, columns: str) -> NoReturn:
  """The main of a file in `ablations/`: its arms with three seeds.

  All ablations share the runs of `runs/ablations`, so that an arm which is in
  several, such as the preset itself, is trained once.

  Args:
    arms: updates by name; the first is the one to compare with.
    name: of the table and the picture.
    columns: of the table, beyond the validation loss and its difference.
  """
  large_pages.use()
  define(
    'ablation', 'runs/ablations', f'val_loss,val_loss_difference,{columns}'
  )
  main_module = sys.argv[0]  # As in `define`.
  seeds = absl_flags.DEFINE_string(
    'seeds', '0,1,2', 'Seeds of every arm.', module_name=main_module
  )

  def main():
    points = parse_grid(f'seed={seeds.value}')
    train_and_report(flags.resolve()[0], arms, points, name)

  flags.run(main)


def main() -> None:
  """Runs the grid of the command line."""
  points = parse_grid(absl_flags.FLAGS.sweep)
  train_and_report(flags.resolve()[0], *sweep.split(points))


if __name__ == '__main__':
  large_pages.use()
  absl_flags.DEFINE_string('sweep', '', 'The grid: see above.')
  define('quickstart', 'runs/sweep')
  flags.run(main)
