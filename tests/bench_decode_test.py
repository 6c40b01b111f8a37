"""The benchmark of decoding, by a model that is on disk; without torch."""

import subprocess
import sys

import pytest

from deepseek_jax.convert import run
from deepseek_jax.data import tokenizer as tokenizer_lib
from tests import convert_support as support


def _bench(*flags):
  command = [sys.executable, '-m', 'experiments.bench', '--suite=decode']
  done = subprocess.run([*command, *flags], capture_output=True, text=True)
  return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_decoding_with_and_without_drafts(tmp_path):
  """Its config is the checkpoint's, and no preset's."""
  model = support.model('v3', n_layers=2, vocab_size=400)
  src = tmp_path / 'src'
  support.write(src, model, support.random_tensors(model))
  (src / 'tokenizer_config.json').unlink()
  tokenizer = tokenizer_lib.Tokenizer.train(['def f(x):\n' * 9], 300)
  tokenizer.save(src / 'tokenizer.json')
  workdir = tmp_path / 'run'
  run.convert(src, workdir, 'jax', 'f32')
  (workdir / 'config.json').unlink()
  status, table, errors = _bench(
    '--against=', '--rounds=1', f'--workdir={workdir}'
  )
  assert status == 0, errors
  rows = table.splitlines()
  ours = [row for row in rows if row.startswith('| deepseek_jax')]
  assert [', drafting' in row for row in ours] == [False, True] * 2
  assert [row.endswith('% |') for row in ours] == [False, True] * 2


@pytest.mark.parametrize(
  'flags, message',
  [
    (
      ['--preset=tiny', '--model.n_layers=2'],
      'drop --preset=tiny --model.n_la',
    ),
    ([], 'no checkpoints in it'),
    (['--suite=train'], 'with --suite=train: use decode'),
  ],
)
def test_what_a_run_does_not_take_is_refused(flags, message):
  status, _, errors = _bench('--workdir=tests', *flags)
  assert status == 2 and message in errors
