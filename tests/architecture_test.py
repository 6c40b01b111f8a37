"""The house rules of docs/DESIGN.md, read off the source with `ast`."""

import ast
import functools
import pathlib
import subprocess
import sys

from absl.testing import absltest, parameterized

_ROOT = pathlib.Path(__file__).parent.parent
_PACKAGE = _ROOT / 'deepseek_jax'
# Room -> rooms and modules of the package that it may import.
_MAY_IMPORT = {
  'config': (),
  'presets': ('config',),
  'flags': ('config', 'presets'),
  'ops': ('ops', 'config'),
  'kernels': ('kernels', 'ops', 'config'),
  'parallel': ('parallel', 'ops', 'config'),
  'layers': ('layers', 'kernels', 'ops', 'config', 'parallel.sharding',
             'parallel.expert', 'parallel.halves'),
  'models': ('models', 'layers', 'kernels', 'ops', 'config',
             'parallel.sharding', 'parallel.expert'),
  'data': ('data', 'config'),
  'training': (
    'training', 'models', 'layers', 'parallel', 'ops', 'data', 'config',
    'planner',
  ),
  'inference': ('inference', 'models', 'parallel', 'ops', 'config'),
  'evaluation': ('evaluation', 'inference', 'training', 'data', 'config',
                 'models', 'ops'),
  'posttraining': ('posttraining', 'training', 'inference', 'models', 'ops',
                   'data', 'config'),
  'convert': ('convert', 'models', 'ops', 'config'),
  'planner': ('planner', 'config', 'parallel.schedules', 'parallel.simulate',
              'parallel.ticks'),
}  # fmt: skip
_PURE = ('config', 'parallel.schedules', 'parallel.simulate', 'parallel.ticks')


def _modules() -> dict[str, pathlib.Path]:
  """Module name below the package, such as `ops.rope` -> its file."""
  return {
    '.'.join(path.relative_to(_PACKAGE).with_suffix('').parts): path
    for path in sorted(_PACKAGE.rglob('*.py'))
    if path.name != '__init__.py'
  }


@functools.cache
def _imports(path: pathlib.Path) -> frozenset[str]:
  """Every name imported anywhere in a file, functions included.

  `from a import b` gives `a.b`, which is longer than a module if b is a name.
  """
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: relative import'
      names |= {f'{node.module}.{alias.name}' for alias in node.names}
  return frozenset(names)


def _own(name: str) -> str | None:
  """`deepseek_jax.ops.rope.rotate` -> `ops.rope`; None if not ours."""
  top, _, rest = name.partition('.')
  if top != 'deepseek_jax':
    return None
  parts = rest.split('.')
  while parts and '.'.join(parts) not in _modules():
    parts.pop()
  assert parts, f'{name} is no module of the package'
  return '.'.join(parts)


def _own_imports(path: pathlib.Path) -> set[str]:
  return {own for name in _imports(path) if (own := _own(name))}


def _within(module: str, rooms: tuple[str, ...]) -> bool:
  return any(module == r or module.startswith(r + '.') for r in rooms)


class ImportsTest(parameterized.TestCase):
  def test_rooms_import_only_what_they_may(self):
    for module, path in _modules().items():
      room = module.partition('.')[0]
      self.assertIn(room, _MAY_IMPORT, f'{path}: a room without a rule')
      for other in _own_imports(path):
        self.assertTrue(
          _within(other, _MAY_IMPORT[room]), f'{module} imports {other}'
        )

  def test_no_cycles(self):
    graph = {m: _own_imports(path) for m, path in _modules().items()}
    done, path = set(), []

    def visit(module):
      self.assertNotIn(module, path, f'cycle: {path}')
      if module in done:
        return
      path.append(module)
      for other in sorted(graph[module]):
        visit(other)
      done.add(path.pop())

    for module in graph:
      visit(module)
    self.assertLen(done, len(graph))

  def test_nobody_imports_experiments_or_tests(self):
    for path in _modules().values():
      tops = {name.partition('.')[0] for name in _imports(path)}
      self.assertEmpty(
        tops & {'experiments', 'tests', 'notebooks', 'torch'}, path
      )

  def test_torch_is_imported_in_tests_only(self):
    for path in (_ROOT / 'experiments').rglob('*.py'):
      tops = {name.partition('.')[0] for name in _imports(path)}
      # Benchmarks measure transformers, and torch's products.
      is_bench = path.name.startswith(('bench', 'gpu_'))
      allowed = {'torch', 'transformers'} if is_bench else set()
      self.assertEmpty(
        tops & {'torch', 'transformers', 'tests'} - allowed, path
      )

  def test_absl_flags_only_in_flags(self):
    for module, path in _modules().items():
      uses = any(name.startswith('absl.flags') for name in _imports(path))
      self.assertTrue(not uses or module == 'flags', path)

  def test_releases_of_jax_differ_in_one_module_of_the_kernels(self):
    for name, path in _modules().items():
      if name.startswith('kernels.') and name != 'kernels.mosaic':
        self.assertNotRegex(path.read_text(), '__version|jax[.]_src', name)

  def test_ops_know_nothing_of_flax(self):
    for module, path in _modules().items():
      if _within(module, ('ops', 'kernels', 'parallel')):
        tops = {name.partition('.')[0] for name in _imports(path)}
        self.assertNotIn('flax', tops, path)

  def test_no_environment_reads_and_no_globals(self):
    for path in _modules().values():
      for node in ast.walk(ast.parse(path.read_text())):
        self.assertNotIsInstance(node, ast.Global, path)
        if isinstance(node, ast.Attribute):
          self.assertNotIn(node.attr, ('environ', 'getenv'), path)


class ImportTimeTest(parameterized.TestCase):
  def test_configs_and_schedules_import_the_standard_library_only(self):
    for module in _PURE:
      if module not in _modules():
        continue
      names = _imports(_modules()[module])
      tops = {n.partition('.')[0] for n in names if _own(n) not in _PURE}
      self.assertContainsSubset(tops, sys.stdlib_module_names)

  def test_importing_configs_is_light_and_importing_all_starts_no_device(self):
    modules = [f'deepseek_jax.{m}' for m in _modules()]
    code = (
      'import sys, importlib\n'
      'import deepseek_jax.config, deepseek_jax.presets\n'
      "assert 'jax' not in sys.modules and 'numpy' not in sys.modules\n"
      f'for name in {modules}: importlib.import_module(name)\n'
      'from jax._src import xla_bridge\n'
      "assert not xla_bridge._backends, 'a device was started'\n"
      "assert 'torch' not in sys.modules\n"
      "assert 'flax.nnx' not in sys.modules\n"
    )
    done = subprocess.run(
      [sys.executable, '-c', code], cwd=_ROOT, capture_output=True, text=True
    )
    self.assertEqual(done.returncode, 0, done.stderr)

  def test_module_level_is_definitions_only(self):
    """No calls for effect, no loops, no `with` when a module is imported."""
    allowed = (
      ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign,
      ast.AnnAssign,
    )  # fmt: skip
    for module, path in _modules().items():
      for node in ast.parse(path.read_text()).body[1:]:
        effect = not isinstance(node, allowed)
        if isinstance(node, ast.If):
          effect = getattr(node.test, 'id', '') != 'TYPE_CHECKING'
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
          # `f.defvjp(fwd, bwd)` completes a definition.
          function = node.value.func
          effect = getattr(function, 'attr', '') not in ('defvjp', 'defjvp')
        self.assertFalse(effect, f'{module}, line {node.lineno}')


class DocumentationTest(parameterized.TestCase):
  def test_every_module_says_what_it_is(self):
    folders = (_PACKAGE, _ROOT / 'experiments', _ROOT / 'tests')
    paths = [p for folder in folders for p in folder.rglob('*.py')]
    self.assertGreater(len(paths), 30)
    for path in paths:
      if path.name == '__init__.py' and not path.read_text().strip():
        continue
      doc = ast.get_docstring(ast.parse(path.read_text()))
      self.assertIsNotNone(doc, path)
      first = doc.splitlines()[0]
      self.assertGreater(len(first.split()), 2, path)
      self.assertRegex(first[-1], r'[.?]', f'{path}: {first}')


if __name__ == '__main__':
  absltest.main()
