"""Copies what the ablations asked and found into README.md.

    python -m experiments.findings

The source is the docstring of every file in experiments/ablations; a test
fails while README.md says something else.
"""

import ast
import pathlib
import re

from deepseek_jax import flags

ROOT = pathlib.Path(__file__).parent.parent
_SECTION = re.compile(
  r'(<!-- findings: .* -->\n).*?(<!-- end of findings -->)', re.DOTALL
)


def section() -> str:
  """Markdown: each question, with the rest of its file's docstring."""
  parts = []
  for path in sorted((ROOT / 'experiments/ablations').glob('*.py')):
    doc = ast.get_docstring(ast.parse(path.read_text(encoding='utf-8')))
    if doc:
      question, _, rest = doc.partition('\n')
      link = path.relative_to(ROOT).as_posix()
      parts.append(f'### [{question}]({link})\n\n{rest.strip()}\n')
  return '\n'.join(parts)


def filled(readme: str) -> str:
  """The text of README.md with `section` between its two marks.

  Raises:
    ValueError: if the marks are not there.
  """
  text, n = _SECTION.subn(
    lambda match: f'{match[1]}\n{section()}\n{match[2]}', readme
  )
  if n != 1:
    raise ValueError(f'README.md: found {n} findings sections, wanted 1')
  return text


def main() -> None:
  """Rewrites README.md."""
  path = ROOT / 'README.md'
  path.write_text(filled(path.read_text(encoding='utf-8')), encoding='utf-8')


if __name__ == '__main__':
  flags.run(main)
