"""The commands: a small sweep, then its runs evaluated and sampled."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest

from experiments import fp8_error
from experiments.ablations import fp8_noise
from tests import tolerances

_ROOT = pathlib.Path(__file__).parent.parent
_ARMS = ('gamma=0.001', 'gamma=0')
_NO_KERNELS = 'kernels: none of mosaic_gpu: the device is a cpu'


def _command(program, *arguments, typed=None):
  """(exit status, stdout, stderr) of `python -m experiments.<program>`."""
  done = subprocess.run(
    [sys.executable, '-m', f'experiments.{program}', *arguments],
    capture_output=True,
    input=typed,
    text=True,
    cwd=_ROOT,
  )
  return done.returncode, done.stdout, done.stderr


def test_errors_of_fp8_products():
  arms = {
    'V3': fp8_noise.ARMS['V3'],
    'never': fp8_noise.ARMS['14 bits, never promoted'],
  }
  _, _, *rows = fp8_error.table(arms).splitlines()
  v3, never = (
    [float(cell.strip(' %')) for cell in row.split('|')[2:-1]] for row in rows
  )
  assert max(v3[:4]) < 6 and v3[4] == 0
  # A token that is lost beside others; what 14 bits lose.
  assert never[2] > 99 and 1 < never[4] < 2


@pytest.fixture(scope='module')
def swept(tmp_path_factory):
  """(arguments, workdir) of a sweep: two arms that are one compiled program."""
  folder = tmp_path_factory.mktemp('experiments')
  for i in range(30):
    lines = [f'def f{i}_{j}(x):\n  return x + {i * j}\n' for j in range(20)]
    (folder / f'{i}.txt').write_text('\n'.join(lines))
  arguments = [
    'sweep',
    '--preset=tiny',
    f'--workdir={folder / "sweep"}',
    '--sweep=optim.gamma=0.001,0; seed=0',
    '--columns=val_loss,max_vio,parameters',
    f'--data.source={folder / "*.txt"}',
    f'--data.cache_dir={folder / "cache"}',
    '--data.val_fraction=0.2',
    '--model.n_layers=2',
    '--model.n_mtp_layers=0',
    '--train.steps=2',
    '--train.eval_every=2',
    '--train.eval_batches=1',
    '--train.save_every=2',
  ]
  status, output, errors = _command(*arguments)
  assert status == 0, errors
  return arguments, folder / 'sweep', output


def _runs(workdir):
  return sorted((workdir / 'runs').iterdir())


@pytest.mark.slow
def test_a_sweep_leaves_a_table_and_a_picture_and_is_not_repeated(swept):
  arguments, workdir, output = swept
  rows = [line for line in output.splitlines() if line.startswith('| ')]
  assert [row.split(' | ')[0][2:] for row in rows[2:]] == list(_ARMS)
  assert (workdir / 'table.md').read_text().startswith(rows[0])
  assert (workdir / 'table.png').exists()
  assert len(_runs(workdir)) == 2
  before = {p: p.stat().st_mtime_ns for p in workdir.glob('runs/*/*')}
  status, again, _ = _command(*arguments)
  assert (status, again) == (0, output)
  assert {p: p.stat().st_mtime_ns for p in workdir.glob('runs/*/*')} == before


@pytest.mark.slow
def test_evaluates_as_the_run_did(swept, tmp_path):
  """Also if the tokenizer that it was given is no longer there."""
  _, workdir, _ = swept
  run = tmp_path / 'run'
  shutil.copytree(_runs(workdir)[0], run)
  meta = run / 'checkpoints/2/meta/metadata'
  saved = json.loads(meta.read_text())
  saved['config']['data']['tokenizer'] = str(tmp_path / 'tokenizer.json')
  meta.write_text(json.dumps(saved))
  status, output, errors = _command('eval', f'--workdir={run}')
  assert status == 0, errors
  assert errors.splitlines().count(_NO_KERNELS) == 1
  *lines, last = output.splitlines()
  results = json.loads(last)
  record = json.loads((run / 'metrics.jsonl').read_text().splitlines()[-1])
  for name in ('val_loss', 'val_bpb'):
    assert results[name] == record[name]
    assert any(line.startswith(name) for line in lines)
  assert (results['step'], results['ema']) == (2, False)


@pytest.mark.slow
def test_evaluates_and_continues_on_several_devices(swept):
  """The experts divided, with copies of busy ones: one device's numbers."""
  _, workdir, _ = swept
  run = _runs(workdir)[0]
  devices = ['--parallel.expert=2', '--parallel.cpu_devices=4']
  status, output, errors = _command('eval', f'--workdir={run}', *devices)
  assert status == 0, errors
  results = json.loads(output.splitlines()[-1])
  record = json.loads((run / 'metrics.jsonl').read_text().splitlines()[-1])
  for name in ('val_loss', 'val_bpb'):
    tolerances.assert_close(
      results[name], record[name], tolerances.COMPONENT_PARITY, name
    )
  arguments = [
    'generate',
    f'--workdir={run}',
    '--prompt=def f',
    '--prompt=  return',
    '--max_new_tokens=6',
    '--temperature=0',
  ]
  status, expected, errors = _command(*arguments)
  assert status == 0, errors
  status, output, errors = _command(
    *arguments, *devices, '--redundant_experts=4'
  )
  assert status == 0, errors
  assert output == expected and len(output) > 30


@pytest.mark.slow
@pytest.mark.parametrize(
  'arguments, message',
  [
    (
      ['generate', '--parallel.expert=4', '--parallel.cpu_devices=4']
      + ['--redundant_experts=3'],
      '8 experts and these are 11',
    ),
    (
      ['eval', '--parallel.data=3', '--parallel.cpu_devices=3'],
      'data.batch_size=8: ',
    ),
    (['eval', '--parallel.stage=2'], 'unknown flag --parallel.stage'),
  ],
)
def test_devices_that_do_not_fit_are_refused(swept, arguments, message):
  program, *flags = arguments
  run = _runs(swept[1])[0]
  status, _, errors = _command(program, f'--workdir={run}', *flags)
  last = errors.splitlines()[-1]
  assert status == 2 and last.startswith('ERROR: ') and message in last, errors


@pytest.mark.slow
def test_continues_the_prompt(swept):
  _, workdir, _ = swept
  arguments = ['generate', f'--workdir={_runs(workdir)[0]}', '--prompt=def f']
  status, output, errors = _command(*arguments, '--max_new_tokens=3', '--ema')
  assert status == 0, errors
  assert output.startswith('def f')
  assert len(output) > len('def f\n')
  told = [x for x in errors.splitlines() if x.startswith('kernels: ')]
  assert any('product of few rows' in x or 'none of cpu' in x for x in told)
  assert len(set(told)) == len(told)


@pytest.mark.slow
def test_a_conversation(swept):
  """Each line is a turn, and the model's answers are turns as well."""
  _, workdir, _ = swept
  run = _runs(workdir)[1]
  (run / 'chat_template.jinja').write_text(
    "{{ bos_token }}{% for m in messages %}{{ m['role'][0] + m['content'] }}"
    "{% endfor %}{% if messages[-1]['content'] == 'last' and "
    "messages|map(attribute='role')|list != ['user', 'assistant', 'user'] %}"
    "{{ raise_exception('a turn is lost') }}{% endif %}"
  )
  arguments = [f'--workdir={run}', '--interactive', '--max_new_tokens=3']
  status, output, errors = _command(
    'generate', *arguments, typed='first\n\nlast\n'
  )
  assert status == 0, errors
  assert output.count('> ') == 4, output  # An empty line is no turn.
  assert errors.count('3 tokens, ') == 2, errors


@pytest.mark.slow
def test_a_run_in_fp8_codes_is_evaluated_and_continued(swept, tmp_path):
  _, workdir, _ = swept
  run, codes = _runs(workdir)[0], tmp_path / 'codes'
  arguments = [f'--src={run}', f'--dst={codes}', '--to=jax', '--dtype=fp8']
  status, _, errors = _command('convert', *arguments)
  assert status == 0, errors
  status, output, errors = _command('eval', f'--workdir={codes}', '--fp8')
  assert status == 0, errors
  loss = json.loads(output.splitlines()[-1])['val_loss']
  record = json.loads((run / 'metrics.jsonl').read_text().splitlines()[-1])
  assert loss != record['val_loss']
  tolerances.assert_close(loss, record['val_loss'], tolerances.BFLOAT16)
  arguments = [
    f'--workdir={codes}', '--prompt=def f', '--prompt=  return', '--nofp8',
    '--max_new_tokens=6', '--temperature=0',
  ]  # fmt: skip
  status, text, errors = _command('generate', *arguments)
  assert status == 0, errors
  assert text.startswith('def f') and len(text) > 30
  assert (codes / 'expert_load.json').is_file()

  # Two processes divide the codes, and one talks.
  for program, *flags in (
    ['eval', f'--workdir={codes}', '--fp8'],
    # There are no metrics: copies go by what the texts above have counted.
    ['generate', *arguments, '--redundant_experts=2'],
  ):
    status, output, errors = _command(
      'launch', '--processes=2', '--', sys.executable,
      '-m', f'experiments.{program}', *flags, '--parallel.cpu_devices=2',
      '--parallel.expert=2', '--parallel.fsdp=2',
    )  # fmt: skip
    assert status == 0, errors
    # Not what gloo, which carries collectives between CPUs, connects.
    if program == 'eval':
      divided = json.loads(output.splitlines()[-1])['val_loss']
      tolerances.assert_close(divided, loss, tolerances.COMPONENT_PARITY)
    else:
      assert output == text
      assert errors.count('tokens, ') == 1


_OF_TWO_PROCESSES = """
import pathlib, sys
from unittest import mock
import jax, numpy as np
from absl import flags
from jax.experimental import multihost_utils
from experiments import generate

flags.FLAGS(['generate', '--redundant_experts=2'])
generator = mock.Mock(document=lambda text: [text])
generator.tokenizer.decode = str
generator.complete.return_value.tokens = [[1], [2]]
generator.remember = lambda _: print('counted')
generate._complete(generator, ['a', 'b'])
jax.process_count = lambda: 2
multihost_utils.process_allgather = lambda x: np.stack([x, x + 1])
generate._with_copies({}, pathlib.Path(sys.argv[1]), None)
"""


def test_loads_are_kept_after_the_texts_and_read_alike(tmp_path):
  """Where processes read another load, copies of experts would differ."""
  (tmp_path / 'expert_load.json').write_text('[[1, 2]]')
  done = subprocess.run(
    [sys.executable, '-c', _OF_TWO_PROCESSES, str(tmp_path)],
    capture_output=True,
    text=True,
    cwd=_ROOT,
  )
  assert done.stdout == "['a', 1]\n---\n['b', 2]\n---\ncounted\n"
  last = done.stderr.splitlines()[-1]
  assert 'the load of experts in' in last, done.stderr
  assert 'process 1 has another value' in last


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['eval', '--workdir=/no/such'], '--workdir=/no/such: no such directory'),
    (['generate', '--workdir=/no/such'], 'no such directory'),
    (['generate', '--workdir=tests', '--prompt='], '--prompt is empty'),
    (
      ['generate', '--workdir=tests', '--prompts_file=docs/losses.png'],
      '--prompts_file=docs/losses.png: not UTF-8',
    ),
    (
      ['generate', '--workdir=tests', '--interactive']
      + ['--parallel.num_processes=2'],
      'several processes cannot share a terminal',
    ),
    (['eval', '--workdir=tests'], 'no checkpoints in it'),
    (['eval', '--batches=-1'], 'batches'),
    (['sweep'], '--sweep is empty'),
    (['sweep', '--sweep=lr=1'], 'did you mean optim.lr?'),
    (['sweep', '--sweep=seed=0', '--columns=x'], "no 'x'; there are val_loss"),
    (['sweep', '--sweep=optim.lr=-1'], 'optim.lr=-1.0: use at least 0'),
    (['ablations.mtp', '--seeds=x'], 'must be an integer'),
    (['bench', '--suite=pipeline', '--schedules=1f1b,x'], "schedule='x': use"),
    (['compile', '--hlo=/no/such'], '--hlo=/no/such: No such file'),
    (['plan', '--schedule=1f1b', '--out=/proc/x.png'], 'x.png: No such file'),
    (['plan', '--schedule=1f1b', '--out=x.gif'], 'end it in .png or .svg'),
    (['ablations.mtp', '--model.dims=1'], 'did you mean --model.dim?'),
  ],
)
def test_a_mistake_is_one_line(arguments, message):
  status, output, errors = _command(*arguments)
  assert status == 2 and not output
  assert errors.startswith('ERROR: '), errors
  assert message in errors
  assert len(errors.splitlines()) == 1, errors


@pytest.mark.parametrize(
  'balance, more, workdir',
  [
    ('none', ['--optim.alpha=0.5', '--workdir=runs/x/'], 'runs/x/'),
    ('aux_loss', [], 'runs/mine'),
  ],
)
def test_train_says_what_it_was_given(balance, more, workdir, tmp_path):
  file = tmp_path / 'mine.py'
  file.write_text(
    'from deepseek_jax import presets\nget_config = presets.tiny\n'
  )
  code = (
    'import runpy; from deepseek_jax.evaluation import run\n'
    'run.train = lambda _, workdir, base: print(workdir, base.train.steps)\n'
    'runpy.run_module("experiments.train", run_name="__main__")'
  )
  flags = [f'--config={file}', '--notrain.scan_layers', '--optim.lr=0.5']
  more = [f'--model.moe.balance={balance}', *more]
  done = subprocess.run(
    [sys.executable, '-c', code, *flags, *more], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout == f'{workdir} 10\n'
  words = ' '.join(done.stderr.split())
  expected = ' '.join(flags[:1] + ['--optim.lr=0.5', '--notrain.scan_layers'])
  if balance == 'aux_loss':  # The proposal was followed.
    assert 'experiments.train' not in words
  else:
    assert f'experiments.train {expected} --workdir=runs/x_aux' in words


def test_help_of_an_ablation_shows_its_question_and_its_flags():
  status, output, _ = _command('ablations.balance', '--help')
  assert status == 0
  assert output.startswith('Does balancing by a bias')
  for flag in ('--seeds', '--workdir', '--columns', '--model.moe.balance'):
    assert flag in output
