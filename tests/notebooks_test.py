"""Every notebook: short, without outputs, and run from top to bottom."""

import pathlib
import re

import nbclient
import nbformat
import pytest

_ROOT = pathlib.Path(__file__).parent.parent
_NOTEBOOKS = sorted((_ROOT / 'notebooks').glob('*.ipynb'))
_EACH = pytest.mark.parametrize('path', _NOTEBOOKS, ids=lambda path: path.stem)


def _read(path):
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  code = [cell for cell in notebook.cells if cell.cell_type == 'code']
  return notebook, code


def test_there_are_notebooks():
  assert _NOTEBOOKS


@_EACH
def test_is_short_and_stripped(path):
  notebook, code = _read(path)
  first = notebook.cells[0].source
  question = first.splitlines()[0]
  assert question.startswith('# ') and question.endswith('?')
  assert 'colab-badge.svg' in first and f'notebooks/{path.name})' in first
  assert '`%pip install git+https://github.com/' in first
  assert 1 <= len(code) <= 15
  for cell in code:
    assert not cell.outputs and cell.execution_count is None
    assert not re.search(r'^\s*(def|class) ', cell.source, re.M), cell.source


@_EACH
@pytest.mark.slow
def test_runs(path, tmp_path, monkeypatch):
  monkeypatch.setenv('PYTHONPATH', str(_ROOT))  # Also when not installed.
  notebook, code = _read(path)
  resources = {'metadata': {'path': str(tmp_path)}}
  nbclient.NotebookClient(
    notebook, timeout=600, kernel_name='python3', resources=resources
  ).execute()
  images = [
    output
    for cell in code
    for output in cell.outputs
    if 'image/png' in output.get('data', {})
  ]
  assert len(images) >= 3  # Pictures are the point: at least so many.
