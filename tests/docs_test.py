"""README.md and BUILD.md: their commands, paths, tables and pictures hold."""

import ast
import json
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from deepseek_jax import presets
from experiments import findings
from tests import conftest

_ROOT = pathlib.Path(__file__).parent.parent
_README = (_ROOT / 'README.md').read_text(encoding='utf-8')
_BUILD = (_ROOT / 'BUILD.md').read_text(encoding='utf-8')
_PROGRAMS = (
  '.', '.ci/run', 'cp', 'mkdir', 'pip', 'pytest', 'python', 'python3.11', 'rm',
  'ruff', 'srun', 'tensorboard',
)  # fmt: skip


def _blocks(text, language):
  return re.findall(rf'^```{language}\n(.*?)^```', text, re.M | re.S)


def _commands(text):
  """Shell commands as lists of words; `a && b` is two, `X=y a` is `a`."""
  lines = text.replace('\\\n', ' ').splitlines()
  parts = [part for line in lines for part in line.split(' && ')]
  words = [shlex.split(part, comments=True) for part in parts]
  bare = [[w for w in part if not re.match(r'[A-Z_]+=', w)] for part in words]
  return [part for part in bare if part]


_SHELL = _blocks(_README, 'bash') + _blocks(_BUILD, 'bash')
_DOCUMENTED = [command for block in _SHELL for command in _commands(block)]


def _in_docstrings():
  """The `python -m experiments...` of the programs' own docstrings."""
  for path in sorted((_ROOT / 'experiments').rglob('*.py')):
    if path.name == 'bench_worker.py':  # For bench.py, and without flags.
      continue
    doc = ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'))) or ''
    joined = doc.replace('\\\n', ' ')
    yield from _commands(
      '\n'.join(re.findall(r'^ +(python -m experiments.*)$', joined, re.M))
    )


def _experiments():
  """Each documented (program, its arguments) once."""
  commands = [*_DOCUMENTED, *_in_docstrings()]
  commands = [c[c.index('python') :] if c[0] == 'srun' else c for c in commands]
  found = {
    (command[2], *command[3:])
    for command in commands
    if command[:2] == ['python', '-m'] and command[2].startswith('experiments.')
  }
  return sorted(found)


def _run(*arguments):
  return subprocess.run(
    [sys.executable, '-m', *arguments],
    cwd=_ROOT,
    capture_output=True,
    text=True,
  )


@pytest.mark.parametrize('block', _SHELL)
def test_blocks_are_shell(block):
  subprocess.run(['bash', '-n'], input=block, text=True, check=True)


def test_programs_and_files_exist():
  assert len(_DOCUMENTED) > 20
  extras = (_ROOT / 'setup.py').read_text().partition('extras_require')[2]
  for program, *arguments in _DOCUMENTED:
    assert program in _PROGRAMS, program
    for word in arguments:
      for path in re.findall(r'tests/\w+\.py', word):
        assert (_ROOT / path).is_file(), path
      for extra in re.findall(r'^\.\[(\w+)\]$', word):
        assert f"'{extra}': " in extras, extra


@pytest.mark.parametrize('command', _experiments(), ids=' '.join)
def test_flags_parse(command):
  """All flags are read before a stray argument, which then ends the program."""
  done = _run(*command, 'stray')
  if '--help' in command:
    assert done.returncode == 0 and '--train.steps' in done.stdout
    return
  assert done.returncode == 2
  assert "ERROR: unexpected argument 'stray'" in done.stderr, done.stderr


def test_ci_runs_the_test_command_of_the_readme():
  [command] = [b for b in _blocks(_README, 'bash') if 'pytest' in b]
  assert command in (_ROOT / '.ci/run').read_text()


def test_python_3_12_leaves_out_only_what_needs_torch():
  left_out = '|'.join(pathlib.Path(name).stem for name in conftest.NEED_TORCH)
  own = rf'from tests\.({left_out}) import|from tests import.*\bhf\b'
  torch = re.compile(rf'^(import torch|from torch\b|{own})', re.M)
  tests = (_ROOT / 'tests').glob('*_test.py')
  needs = {p.name for p in tests if torch.search(p.read_text())}
  assert set(conftest.NEED_TORCH) == needs


def test_paper_table_names_files_that_cite_the_section():
  rows = re.findall(r'^\| (V\d) ([\d.]+) \|.*\| (.+) \|$', _README, re.M)
  assert len(rows) >= 15
  for _, section, cell in rows:
    links = re.findall(r'\[(.+?)\]\((.+?)\)', cell)
    assert links, cell
    for name, path in links:
      assert path == f'deepseek_jax/{name}'
      cited = rf'(?<![\d.]){re.escape(section)}(?!\.?\d)'
      assert re.search(cited, (_ROOT / path).read_text()), (section, path)


@pytest.mark.parametrize('text', [_README, _BUILD], ids=['README', 'BUILD'])
def test_links_lead_somewhere(text):
  for target in re.findall(r'\]\(([^)#]+)\)', text):
    if not target.startswith('https://'):
      assert (_ROOT / target).exists(), target
      if target.endswith('.png'):
        assert (_ROOT / target).stat().st_size < 200_000, target


def test_readme_has_the_findings():
  assert findings.filled(_README) == _README, 'run experiments.findings'


def test_python_blocks_run():
  import jax

  config = presets.tiny()
  experts = config.model.moe.n_routed_experts
  scope = {
    'config': config,
    'logits_TE': jax.random.normal(jax.random.key(0), (5, experts)),
    'bias_E': jax.numpy.zeros(experts),
  }
  for block in _blocks(_README, 'python'):
    exec(block, scope)
  assert scope['chosen'].expert_ids_TK.shape == (5, 2)


@pytest.mark.slow
def test_the_first_three_commands_run(tmp_path):
  """Training, evaluation and generation as documented, but small."""
  for i in range(30):
    lines = [f'def f{i}_{j}(x):\n  return x + {i * j}\n' for j in range(20)]
    (tmp_path / f'{i}.txt').write_text('\n'.join(lines))
  small = [
    '--preset=tiny',
    f'--data.source={tmp_path / "*.txt"}',
    f'--data.cache_dir={tmp_path / "cache"}',
    '--data.val_fraction=0.2',
    '--model.n_layers=2',
    '--model.n_mtp_layers=0',
    '--train.steps=2',
    '--train.eval_every=2',
    '--train.eval_batches=1',
    '--train.save_every=2',
  ]
  workdir = tmp_path / 'run'
  commands = [
    c[2:] for c in _commands('\n'.join(_blocks(_README, 'bash'))) if c[2:]
  ]
  train, evaluate, generate = [
    command for command in commands if command[0].startswith('experiments.')
  ][:3]
  for command in (
    [*train, *small, f'--workdir={workdir}'],
    [*evaluate, f'--workdir={workdir}'],
    [*generate, f'--workdir={workdir}', '--max_new_tokens=3'],
  ):
    done = _run(*command)
    assert done.returncode == 0, done.stderr
    if command[0] == 'experiments.eval':
      results = json.loads(done.stdout.splitlines()[-1])
      assert results['step'] == 2 and results['val_bpb'] > 0
  assert done.stdout.startswith('import ')
  assert (workdir / 'plots' / 'losses.png').exists()
