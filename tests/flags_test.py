"""The command line: precedence, types, and what each mistake answers.

After a deliberate change of the settings, write the golden file anew:

    python -m tests.flags_test > tests/flags_golden.txt
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from absl import flags as absl_flags
from absl.testing import parameterized

from deepseek_jax import config as config_lib
from deepseek_jax import flags, presets

ROOT = pathlib.Path(__file__).parents[1]
PROGRAM = '''"""Shows what changes.

  python -m experiments.program --preset=tiny
"""

import json

from absl import flags as absl_flags

from deepseek_jax import config, flags

absl_flags.DEFINE_string('workdir', 'runs/tiny', 'Where the run is kept.')
flags.define('tiny')


def main():
  resolved, base = flags.resolve()
  print(config.diff(base, resolved))
  if resolved.train.seed == 66:
    int('a bug')
  if resolved.train.seed == 77:
    json.loads('x')  # Raised in Python, not in C.
  if resolved.train.seed == 88:
    raise ValueError('a mistake')
  if resolved.train.seed == 99:
    raise FloatingPointError('not finite')


flags.run(main)
'''


def _resolve(*arguments, preset='tiny'):
  values = absl_flags.FlagValues()
  flags.define(preset, values)
  values(['program', *arguments])
  return flags.resolve(values)


class ResolveTest(parameterized.TestCase):
  def _file(self, text):
    folder = self.enter_context(tempfile.TemporaryDirectory())
    path = pathlib.Path(folder) / 'my_config.py'
    path.write_text(text)
    return str(path)

  @parameterized.parameters(*presets.PRESETS)
  def test_preset(self, name):
    config, base = _resolve(f'--preset={name}')
    self.assertEqual(config, presets.PRESETS[name]())
    self.assertEqual(config, base)

  def test_every_leaf_can_be_set_to_its_own_value(self):
    tiny = presets.tiny()
    leaves = config_lib.leaves(presets.quickstart())
    leaves['data.seq_len'] = 512
    arguments = [f'--{name}={value}' for name, value in leaves.items()]
    config, base = _resolve(*arguments)
    self.assertEqual(base, tiny)
    self.assertEqual(config_lib.leaves(config), leaves)

  def test_precedence_is_preset_file_flags(self):
    path = self._file(
      'from deepseek_jax import config, presets\n'
      'def get_config():\n'
      '  return config.replace(presets.tiny(), {"optim.lr": 0.5, '
      '"train.steps": 7})\n'
    )
    config, base = _resolve(f'--config={path}', '--train.steps=9')
    self.assertEqual(config_lib.diff(base, config), {'train.steps': (7, 9)})
    self.assertEqual(base.optim.lr, 0.5)

  @parameterized.parameters(
    ('--model.moe.norm_topk', True),
    ('--nomodel.moe.norm_topk', False),
    ('--model.moe.norm_topk=true', True),
    ('--model.moe.norm_topk=False', False),
    ('--model.moe.norm_topk=0', False),
  )
  def test_switches(self, argument, expected):
    config, _ = _resolve(argument)
    self.assertIs(config.model.moe.norm_topk, expected)

  def test_falsy_values_count_as_given(self):
    config, _ = _resolve(
      '--model.n_mtp_layers=0', '--optim.lr=0', '--notrain.scan_layers'
    )
    self.assertEqual(config.model.n_mtp_layers, 0)
    self.assertEqual(config.optim.lr, 0.0)
    self.assertIs(type(config.optim.lr), float)
    self.assertFalse(config.train.scan_layers)

  def test_a_change_of_two_leaves_is_checked_once_both_are_made(self):
    # Four experts alone would not divide into tiny's groups of two each.
    arguments = (
      '--model.moe.n_routed_experts=6',
      '--model.moe.n_expert_groups=3',
    )
    config, _ = _resolve(*arguments)
    self.assertEqual(config.model.moe.n_expert_groups, 3)
    with self.assertRaisesRegex(ValueError, 'n_expert_groups=4: must divide'):
      _resolve(arguments[0])

  @parameterized.parameters(
    ('x = 1', r'defines no function get_config\(\)'),
    ('get_config = 3', r'defines no function get_config\(\)'),
    ('def get_config():\n  return {}', '.* returned dict, not a Config'),
    ('def get_config(): pass', '.* returned NoneType, not a Config'),
    ('\n\nimport nothing_here', 'ModuleNotFoundError in line 3: No module'),
    ('def get_config():\n  return 1 / 0', 'ZeroDivisionError in line 2: div'),
    ('def get_config(:', 'SyntaxError: '),
    ('def get_config(name): pass', 'TypeError: .*argument'),
  )
  def test_wrong_file(self, text, message):
    path = self._file(text)
    with self.assertRaisesRegex(ValueError, f'--config={path}: {message}'):
      _resolve(f'--config={path}')

  @parameterized.parameters('/does/not/exist.py', '/', '')
  def test_no_file(self, path):
    with self.assertRaisesRegex(ValueError, f'--config={path}: no such file'):
      _resolve(f'--config={path}')

  def test_golden(self):
    golden = (ROOT / 'tests/flags_golden.txt').read_text()
    self.assertEqual(flags.describe(), golden, f'If meant so: {__doc__}')

  def test_table_has_every_leaf_and_fits(self):
    names = [
      line.split('=')[0].strip(' -')
      for line in flags.describe().splitlines()
      if line.startswith('  --')
    ]
    leaves = list(config_lib.leaves(config_lib.Config()))
    self.assertCountEqual(names, ['preset', 'config', *leaves])
    self.assertLessEqual(max(map(len, flags.describe().splitlines())), 80)

  def test_choices_are_those_of_the_config(self):
    base = config_lib.Config()
    for name, value in config_lib.leaves(base).items():
      if name in flags.CHOICES:
        for choice in flags.CHOICES[name]:
          built = config_lib.replace(base, {name: choice})
          self.assertEqual(config_lib.leaves(built)[name], choice)
      elif type(value) is str:
        try:  # A leaf that takes only some names must be in CHOICES.
          config_lib.replace(base, {name: 'no such name'})
        except ValueError as error:
          self.assertNotIn('use one of', str(error))


def _from_json(text):
  return config_lib.from_dict(config_lib.Config, json.loads(text))


class JsonTest(parameterized.TestCase):
  @parameterized.parameters(*presets.PRESETS)
  def test_round_trip(self, name):
    config = presets.PRESETS[name]()
    self.assertEqual(_from_json(config_lib.to_json(config)), config)

  def test_missing_keys_keep_their_defaults(self):
    config = _from_json('{"optim": {"lr": 1}}')
    expected = dataclasses.replace(config_lib.OptimConfig(), lr=1.0)
    self.assertEqual(config, config_lib.Config(optim=expected))

  @parameterized.parameters(
    ('[]', 'must be a section'),
    ('{"optimizer": {}}', 'unknown config field optimizer'),
    ('{"optim": {"lr": "1"}}', 'optim.lr'),
    ('{"train": {"steps": 1.5}}', 'train.steps'),
    ('{"train": {"scan_layers": 1}}', 'train.scan_layers'),
  )
  def test_mistakes(self, text, message):
    with self.assertRaisesRegex(ValueError, message):
      _from_json(text)


class ClosestTest(parameterized.TestCase):
  @parameterized.parameters(
    ('model.moe.balanse', ['model.moe.balance']),
    ('moe.balance', ['model.moe.balance']),
    ('balance', ['model.moe.balance']),
    ('model.balance', ['model.moe.balance']),
    ('lr', ['optim.lr']),
    ('optim.learning_rate', []),
    ('seed', ['data.seed', 'train.seed']),
    ('train.seeed', ['train.seed']),
    ('model.mla.kv_lora', ['model.mla.kv_lora_rank']),
    ('zzzzz', []),
    ('', []),
  )
  def test_leaves(self, word, expected):
    names = config_lib.leaves(config_lib.Config())
    found = flags.closest(word, names)
    if word == 'optim.learning_rate':  # Anything, but not too much.
      self.assertLessEqual(len(found), 3)
    else:
      self.assertEqual(found, expected)

  def test_no_names(self):
    self.assertEqual(flags.closest('a', []), [])


class ProgramTest(parameterized.TestCase):
  def _run(self, *arguments):
    folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
    (folder / 'experiments').mkdir()
    (folder / 'experiments/__init__.py').touch()
    (folder / 'experiments/program.py').write_text(PROGRAM)
    return subprocess.run(
      [sys.executable, '-m', 'experiments.program', *arguments],
      cwd=folder,
      env=os.environ | {'PYTHONPATH': str(ROOT)},
      capture_output=True,
      text=True,
      check=False,
    )

  def test_runs(self):
    result = self._run('--train.seed', '5', '--notrain.scan_layers')
    self.assertEqual(result.returncode, 0, result.stderr)
    self.assertEqual(
      result.stdout,
      "{'train.seed': (0, 5), 'train.scan_layers': (True, False)}\n",
    )
    self.assertEqual(result.stderr, '')

  @parameterized.parameters(
    (
      '--model.moe.balanse=none',
      'unknown flag --model.moe.balanse; did you mean --model.moe.balance?',
    ),
    (
      '--batch-size=3',
      'unknown flag --batch-size; did you mean --data.batch_size?',
    ),
    ('--workdri=3', 'unknown flag --workdri; did you mean --workdir?'),
    ('--qqqqqqqqq', 'unknown flag --qqqqqqqqq; --help lists them'),
    ('--optim.lr=abc', 'flag --optim.lr=abc: must be a number'),
    ('--train.steps=1.5', 'flag --train.steps=1.5: must be an integer'),
    (
      '--model.moe.norm_topk=maybe',
      'flag --model.moe.norm_topk=maybe: must be true or false',
    ),
    (
      '--model.attention=mlaa',
      'flag --model.attention=mlaa: use one of mla, mha, gqa, mqa; '
      'did you mean mla?',
    ),
    (
      '--preset=tinny',
      f'flag --preset=tinny: use one of {", ".join(presets.PRESETS)}; '
      'did you mean tiny?',
    ),
    ('--optim.lr', 'Missing value for flag --optim.lr'),
    (
      '--model.moe.n_expert_groups=3',
      'model.moe.n_expert_groups=3: must divide n_routed_experts=8; '
      'use one of [1, 2, 4, 8]',
    ),
    ('--optim.lr=nan', 'optim.lr=nan: use at least 0'),
    ('--config=a.py', '--config=a.py: no such file'),
    (
      'optim.lr=3',
      "unexpected argument 'optim.lr=3'; write flags as --name=value",
    ),
  )
  def test_mistake_is_one_line(self, argument, message):
    result = self._run(argument)
    self.assertEqual(result.stderr, f'ERROR: {message}\n')
    self.assertEqual(result.stdout, '')
    self.assertEqual(result.returncode, 2)

  @parameterized.parameters(
    ('66', "ValueError: invalid literal for int() with base 10: 'a bug'"),
    ('77', 'json.decoder.JSONDecodeError: Expecting value'),
  )
  def test_bug_keeps_its_traceback(self, seed, last_line):
    result = self._run(f'--train.seed={seed}')
    self.assertEqual(result.returncode, 1)
    self.assertIn('Traceback', result.stderr)
    self.assertStartsWith(result.stderr.splitlines()[-1], last_line)

  @parameterized.parameters(('88', 'a mistake'), ('99', 'not finite'))
  def test_message_for_the_user_while_running(self, seed, message):
    result = self._run(f'--train.seed={seed}')
    self.assertEqual(result.returncode, 2)
    self.assertEqual(result.stderr, f'ERROR: {message}\n')

  @parameterized.parameters('--help', '-h')
  def test_help(self, argument):
    result = self._run(argument)
    self.assertEqual(result.returncode, 0, result.stderr)
    self.assertStartsWith(result.stdout, 'Shows what changes.\n')
    self.assertIn('--workdir: Where the run is kept.', result.stdout)
    self.assertIn('default preset: tiny', result.stdout)
    self.assertEndsWith(result.stdout, flags.describe())


if __name__ == '__main__':
  print(flags.describe(), end='')
