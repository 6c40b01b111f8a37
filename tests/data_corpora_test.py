"""Documents are read whole, in order, as a stream, or refused by name."""

import dataclasses
import json
import pathlib
import tempfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl.testing import absltest, parameterized

from deepseek_jax import config as config_lib
from deepseek_jax.data import corpora

TEXTS = ['first\r\ntext', 'zwei – 二 🙂', ' ', 'last\n']


def config(source, **kwargs):
  return config_lib.DataConfig(source=str(source), **kwargs)


def read(source, **kwargs):
  return list(corpora.documents(config(source, **kwargs)))


class CorporaTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.dir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def write(self, name, data):
    path = self.dir / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path

  def test_stdlib_is_real_text_without_tests_or_packages(self):
    documents = dict(corpora.documents(config_lib.DataConfig()))
    self.assertIn('JSON', documents['json/decoder.py'])
    self.assertGreater(sum(map(len, documents.values())), 8_000_000)
    for name in documents:
      self.assertNotIn('site-packages', name)
      self.assertNotIn('/tests/', f'/{name}')
      self.assertNotIn('/test/', f'/{name}')
    again = [name for name, _ in corpora.documents(config_lib.DataConfig())]
    self.assertEqual(list(documents), again)

  def test_directory_glob_and_file(self):
    self.write('a/b.txt', 'b')
    self.write('c.md', 'c')
    self.write('empty.txt', '')
    self.write('ignored.png', b'\x89PNG\0')
    self.write('.hidden/d.txt', 'd')
    self.assertEqual(read(self.dir), [('a/b.txt', 'b'), ('c.md', 'c')])
    self.assertEqual(read(self.dir / '**/*.txt'), [('a/b.txt', 'b')])
    self.assertEqual(read(self.dir / 'c.md'), [('c.md', 'c')])
    # A name with glob characters is a file first.
    path = self.write('x[1].txt', 'x')
    self.assertEqual(read(path), [('x[1].txt', 'x')])

  def test_what_a_directory_has_beside_is_counted(self):
    for name in 'a.txt', 'b/c.csv', 'd.jsonl.gz', 'e.CSV', 'README', '.hidden':
      self.write(name, 'x')
    self.assertEqual(read(self.dir), [('a.txt', 'x')])
    self.assertEqual(
      corpora.passed_over(config(self.dir)), {'.csv': 2, '.gz': 1, '': 1}
    )
    for source in 'stdlib', self.dir / 'a.txt', self.dir / '*':
      self.assertEmpty(corpora.passed_over(config(source)))

  @parameterized.parameters('{"step": 3}', '[]', '3', 'not JSON')
  def test_another_programs_state_is_no_dataset(self, text):
    self.write('state.json', text)
    self.write('dataset_info.json', '{}')
    self.write('a.txt', 'a')
    self.assertEqual(read(self.dir), [('a.txt', 'a')])

  def test_a_link_to_nothing_is_refused(self):
    self.write('a.txt', 'a')
    (self.dir / 'b.txt').symlink_to('c.txt')
    for source in self.dir, self.dir / '*.txt':
      with self.assertRaisesRegex(ValueError, 'link .*b.txt leads to no file'):
        read(source)

  def test_links_are_followed_and_a_loop_is_refused(self):
    self.write('elsewhere/a/b.txt', 'b')
    self.write('here/c.txt', 'c')
    here = self.dir / 'here'
    (here / 'd').symlink_to(self.dir / 'elsewhere')
    expected = [('c.txt', 'c'), ('d/a/b.txt', 'b')]
    self.assertEqual(read(here), expected)
    self.assertEqual(read(here / '**/*.txt'), expected)
    up = self.dir / 'elsewhere/a/up'
    up.symlink_to(self.dir / 'elsewhere')
    self.check_is_refused(here, 'd/a.* and .*d/a/up/a are|d and .*d/a/up are')
    up.unlink()
    (here / 'e.txt').symlink_to('d/a/b.txt')
    self.check_is_refused(here, 'the link .*e.txt leads to .*d/a/b.txt')

  def check_is_refused(self, folder, message):
    for source in folder, folder / '**/*.txt':
      with self.assertRaisesRegex(ValueError, message):
        read(source)

  def test_what_two_links_or_a_sibling_show_twice_is_refused(self):
    self.write('data/v3/a.txt', 'a')
    (self.dir / 'data/latest').symlink_to('v3')
    data = self.dir / 'data'
    self.check_is_refused(data, '/(latest|v3) and .*/(latest|v3) are one')
    for name in 'latest', 'v3':  # Each alone is read.
      self.assertEqual(read(data / name), [('a.txt', 'a')])
      self.assertEqual(read(data / f'{name[:2]}*/*'), [(f'{name}/a.txt', 'a')])
    self.write('b/b/b.txt', 'b')
    self.write('b/a/a.txt', 'a')
    (self.dir / 'b/a/l').symlink_to('../b')
    (self.dir / 'b/b/m').symlink_to('../a')
    self.check_is_refused(self.dir / 'b', 'are one directory')
    self.check_is_refused(self.dir / 'b/a', 'a and .*a/l/m are one directory')

  def test_tables(self):
    table = pa.table({'id': range(4), 'text': TEXTS})
    # A blank line counts as a line and is no document.
    rows = '\n\n'.join(json.dumps({'text': t, 'n': 1}) for t in TEXTS)
    jsonl = self.write('t.jsonl', rows)
    self.assertEqual(
      read(jsonl), [(f't.jsonl#{2 * i + 1}', t) for i, t in enumerate(TEXTS)]
    )
    parquet = self.dir / 't.parquet'
    pq.write_table(table, parquet, row_group_size=3)
    feather = self.dir / 'f.arrow'
    with pa.ipc.new_file(str(feather), table.schema) as writer:
      writer.write_table(table, max_chunksize=3)
    for path in parquet, feather:
      expected = [(f'{path.name}#{i}', t) for i, t in enumerate(TEXTS)]
      self.assertEqual(read(path), expected)

  def test_memory_does_not_grow_with_the_row_groups_of_parquet(self):
    rng = np.random.default_rng(0)
    texts = [rng.bytes(500).hex() for _ in range(500)]
    table, peaks = pa.table({'text': texts}), []
    for groups in 4, 8:
      path = self.dir / f'{groups}.parquet'
      with pq.ParquetWriter(path, table.schema) as writer:
        for _ in range(groups):
          writer.write_table(table)
      before = pa.total_allocated_bytes()
      documents = corpora.documents(config(path))
      held = [pa.total_allocated_bytes() for _ in documents]
      self.assertLen(held, groups * len(texts))
      peaks.append(max(held) - before)
    self.assertGreater(peaks[0], 1_000_000)
    self.assertLess(peaks[1], 1.1 * peaks[0])

  def write_dataset(self, folder, texts, n_files=2):
    """Writes what `datasets.Dataset.save_to_disk` writes."""
    names = [f'data-{i:05}-of-{n_files:05}.arrow' for i in range(n_files)]
    size = -(-len(texts) // n_files)
    for i, name in enumerate(names):
      table = pa.table({'body': texts[i * size : (i + 1) * size]})
      self.write(f'{folder}/{name}', b'')
      with pa.ipc.new_stream(
        str(self.dir / folder / name), table.schema
      ) as writer:
        writer.write_table(table, max_chunksize=2)
    self.write(f'{folder}/dataset_info.json', '{}')
    state = {'_data_files': [{'filename': name} for name in names]}
    self.write(f'{folder}/state.json', json.dumps(state))

  def test_saved_dataset(self):
    self.write_dataset('saved', [*TEXTS, None, ''])
    documents = read(self.dir / 'saved', text_field='body')
    self.assertEqual([text for _, text in documents], TEXTS)
    (self.dir / 'saved/state.json').unlink()  # As in the cache of `datasets`.
    self.assertEqual(read(self.dir / 'saved', text_field='body'), documents)
    with self.assertRaisesRegex(ValueError, "'text'; it has 'body'"):
      read(self.dir / 'saved')

  def test_dataset_of_splits(self):
    for name in 'train', 'test':
      self.write_dataset(f'splits/{name}', TEXTS)
    self.write('splits/dataset_dict.json', '{"splits": ["train", "test"]}')
    with self.assertRaisesRegex(ValueError, 'splits test, train; name one'):
      read(self.dir / 'splits')
    documents = read(self.dir / 'splits/train', text_field='body')
    self.assertEqual([text for _, text in documents], TEXTS)

  @parameterized.parameters(
    'plain line\n', 'wörter ohne\n', '二', '🙂', 'a🙂', 'ab🙂', 'x'
  )
  def test_large_file_in_pieces(self, unit):
    text = unit * (5 * corpora.PIECE_BYTES // (2 * len(unit.encode())))
    documents = read(self.write('large.txt', text))
    self.assertEqual(''.join(t for _, t in documents), text)
    names = [f'large.txt#{i}' for i in range(len(documents))]
    self.assertEqual([n for n, _ in documents], names)
    self.assertGreater(len(documents), 2)
    for _, piece in documents[:-1]:
      self.assertLessEqual(len(piece.encode()), corpora.PIECE_BYTES)
      self.assertTrue(piece.endswith('\n') or '\n' not in unit)

  @parameterized.product(excess=(-1, 0, 1), end=(b'\n', b'x', '二'.encode()))
  def test_piece_boundary(self, excess, end):
    data = b'x' * (corpora.PIECE_BYTES + excess - len(end)) + end
    documents = read(self.write('edge.txt', data))
    self.assertEqual(''.join(t for _, t in documents).encode(), data)
    self.assertLen({n for n, _ in documents}, len(documents))

  @parameterized.parameters(
    ('a.txt', b'one\ntwo\xff\n', 'a.txt: byte 7 in line 2 is not UTF-8'),
    ('a.txt', b'one\0', 'a.txt: NUL at character 3'),
    ('a.jsonl', b'{"text": "x"}\n{"text"', r'a.jsonl, line 2: .*JSON object'),
    ('a.jsonl', b'\n[1]', 'a.jsonl, line 2: not a JSON object'),
    ('a.jsonl', b'{"body": "x"}', r"line 1: no column .*'text'.* has 'body'"),
    ('a.jsonl', b'{"text": 3}', r"line 1: 'text' is of type int"),
    ('a.jsonl', b'{"text": "\xff"}', 'a.jsonl, line 1: .*utf-8'),
    ('a.jsonl', b'{"text": "\\ud800"}', 'a.jsonl#1: lone surrogate'),
    ('a.jsonl', b'{"text": "\\u0000"}', 'a.jsonl#1: NUL at character 0'),
    ('a.parquet', b'not parquet', 'a.parquet, row 0'),
    ('a.arrow', b'not arrow!', 'a.arrow, row 0'),
  )
  def test_bad_file_is_refused(self, name, data, message):
    path = self.write(name, data)
    with self.assertRaisesRegex(ValueError, message):
      read(path)

  def test_error_deep_in_a_large_file(self):
    lines = b'0123456789\n' * (corpora.PIECE_BYTES // 8)
    path = self.write('a.txt', lines + b'\xfe')
    line = lines.count(b'\n') + 1
    expected = f'byte {len(lines)} in line {line} is not UTF-8'
    with self.assertRaisesRegex(ValueError, expected):
      read(path)

  def test_bad_columns(self):
    path = self.dir / 'a.parquet'
    pq.write_table(pa.table({'text': [1, 2], 'body': ['x', 'y']}), path)
    with self.assertRaisesRegex(ValueError, "row 0: 'text' is of type int"):
      read(path)
    with self.assertRaisesRegex(ValueError, "'nope'; it has 'text', 'body'"):
      read(path, text_field='nope')
    path.write_bytes(path.read_bytes()[:-20])  # An interrupted download.
    with self.assertRaisesRegex(ValueError, 'a.parquet'):
      read(path, text_field='body')

  @parameterized.parameters('nothing.txt', '*.nothing', '')
  def test_no_file(self, name):
    with self.assertRaisesRegex(ValueError, 'no file found; give'):
      read(self.dir / name)

  def test_home_is_expanded(self):
    source = config_lib.DataConfig(source='~no_such_user_here/x.txt')
    with self.assertRaisesRegex(ValueError, 'no file found'):
      corpora.find_files(source)
    absent = dataclasses.replace(source, source='~/no such file.txt')
    with self.assertRaisesRegex(ValueError, 'no file found'):
      corpora.find_files(absent)


if __name__ == '__main__':
  absltest.main()
