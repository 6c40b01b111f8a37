"""A corpus becomes the same batches everywhere, again and after a restart."""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from unittest import mock

import grain
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl.testing import absltest, parameterized

from deepseek_jax import config as config_lib
from deepseek_jax.data import pipeline, store, tokenizer

VOCAB = 300


def make_texts(n=60):
  rng = np.random.default_rng(0)
  words = np.array(['alpha', 'beta', 'def f(x):\n', '12', '🙂', 'für'])
  return [' '.join(rng.choice(words, rng.integers(5, 50))) for _ in range(n)]


def assert_batches_equal(actual, expected):
  for a, e in zip(actual, expected, strict=True):
    np.testing.assert_array_equal(a['tokens'], e['tokens'])
    np.testing.assert_array_equal(a['segments'], e['segments'])


def take(iterator, n):
  return [next(iterator) for _ in range(n)]


class DataCase(parameterized.TestCase):
  """A small corpus of JSONL and a cache of its own."""

  def setUp(self):
    super().setUp()
    self.dir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.source = self.dir / 'texts.jsonl'
    self.write(make_texts())
    self.config = config_lib.DataConfig(
      source=str(self.source),
      val_fraction=0.2,
      seq_len=16,
      fim_rate=0.5,
      seed=3,
      cache_dir=str(self.dir / 'cache'),
    )

  def write(self, texts):
    rows = [json.dumps({'text': text}) for text in texts]
    self.source.write_text('\n'.join(rows))

  def load(self, **kwargs):
    return pipeline.load(dataclasses.replace(self.config, **kwargs), VOCAB)


class LoadTest(DataCase):
  def test_split_is_complete_and_by_name(self):
    corpus = self.load(fim_rate=0.0)
    train, validation = corpus.train.documents, corpus.validation.documents
    texts = make_texts()
    self.assertCountEqual([*train, *validation], range(len(texts)))
    for rows in corpus.train, corpus.validation:
      for i, index in enumerate(rows.documents):
        ids = rows.document(i)
        self.assertEqual(corpus.tokenizer.decode(ids), texts[index])
    for i in range(len(texts)):
      held_out = store.draw(f'texts.jsonl#{i + 1}', 'split') < 0.2
      self.assertEqual(i in validation, held_out)
    # A pinned value: the split is the same on every machine.
    self.assertAlmostEqual(
      store.draw('a.py', 'split'), 0.9646149720306451, places=12
    )

  @parameterized.product(n=(1, 2, 3), val_fraction=(1e-9, 0.5, 1 - 1e-9))
  def test_both_sides_hold_something(self, n, val_fraction):
    texts = make_texts()[:n]
    self.write(texts)
    corpus = self.load(val_fraction=val_fraction, seq_len=2, fim_rate=0.0)
    train = [
      corpus.train.document(i) for i in range(len(corpus.train.documents))
    ]
    rest = corpus.validation
    held_out = [rest.document(i) for i in range(len(rest.documents))]
    self.assertNotEmpty(train)
    self.assertNotEmpty(held_out)
    size = sum(
      corpus.tokenizer.byte_lengths[ids].sum() for ids in train + held_out
    )
    self.assertEqual(size, sum(len(text.encode()) for text in texts))

  def test_corpus_is_tokenised_once(self):
    first = self.load()
    with mock.patch.object(store, '_make', side_effect=AssertionError):
      # Nothing that leaves the tokens alone makes them again.
      second = self.load(seed=9, seq_len=8, fim_rate=0.0)
    self.assertEqual(first.fingerprint, second.fingerprint)
    prints = {first.fingerprint, self.load(val_fraction=0.4).fingerprint}
    prints.add(pipeline.load(self.config, VOCAB - 20).fingerprint)
    self.write(make_texts(61))
    prints.add(self.load().fingerprint)
    self.assertLen(prints, 4)

  def test_what_a_directory_has_beside_is_said(self):
    folder = self.dir / 'folder'
    folder.mkdir()
    self.source.rename(folder / 'texts.jsonl')
    (folder / 'table.csv').write_text('a,b')
    with contextlib.redirect_stderr(io.StringIO()) as said:
      self.load(source=str(folder))
    self.assertIn('by suffix: 1 .csv\n', said.getvalue())

  def test_files_alike_in_name_size_and_time_are_told_apart(self):
    """In another directory, and in the place of the first."""
    first, stat = self.load().fingerprint, self.source.stat()
    text = self.source.read_text().replace('alpha', 'gamma')
    self.assertLen(text, len(self.source.read_text()))
    other = self.dir / 'other' / self.source.name
    other.parent.mkdir()
    for path in other, self.source:
      path.write_text(text)
      os.utime(path, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
      second = self.load(source=str(path)).fingerprint
      self.assertNotEqual(first, second)

  def test_a_kill_leaves_nothing_that_is_read(self):
    texts = make_texts()
    with (
      mock.patch.object(
        tokenizer.Tokenizer, 'encode_batch', side_effect=KeyboardInterrupt
      ),
      self.assertRaises(KeyboardInterrupt),
    ):
      self.load()
    self.assertLen(list((self.dir / 'cache').glob('*.partial')), 1)
    corpus = self.load(fim_rate=0.0)
    n = len(corpus.train.documents) + len(corpus.validation.documents)
    self.assertLen(texts, n)
    self.assertEmpty(list((self.dir / 'cache').glob('*.partial')))

  def test_two_processes_make_one_store(self):
    code = (
      'import sys, json; from deepseek_jax import config; '
      'from deepseek_jax.data import pipeline; '
      'c = config.DataConfig(**json.loads(sys.argv[1])); '
      f'print(pipeline.load(c, {VOCAB}).fingerprint)'
    )
    arguments = [sys.executable, '-c', code]
    arguments.append(json.dumps(dataclasses.asdict(self.config)))
    runs = [
      subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE
      )
      for _ in range(2)
    ]
    outputs = [run.communicate(timeout=600) for run in runs]
    self.assertEqual([run.returncode for run in runs], [0, 0], outputs)
    self.assertEqual(outputs[0][0], outputs[1][0])
    made = [err.count(b'training a BPE') for _, err in outputs]
    self.assertEqual(sum(made), 1)

  def test_given_tokenizer(self):
    path = self.dir / 'tokenizer.json'
    own = tokenizer.Tokenizer.train(make_texts(), 280)
    own.save(path)
    corpus = self.load(tokenizer=str(path))
    self.assertEqual(corpus.tokenizer.vocab_size, 280)
    with self.assertRaisesRegex(ValueError, 'model.vocab_size=279.*least 280'):
      pipeline.load(dataclasses.replace(self.config, tokenizer=str(path)), 279)
    parts = json.loads(path.read_text().replace('fim▁hole', 'gap'))
    path.write_text(json.dumps(parts))
    with self.assertRaisesRegex(ValueError, 'fim_rate=0.5: .*fim_rate=0$'):
      self.load(tokenizer=str(path))
    self.assertIsNone(
      self.load(tokenizer=str(path), fim_rate=0.0).tokenizer.fim_ids
    )

  def test_fingerprint_is_of_ids_not_of_what_is_shown(self):
    """Which tokens are hidden when a text is shown decides no id."""
    own = json.loads(tokenizer.Tokenizer.train(make_texts(), 280).definition)
    think = dict(own['added_tokens'][0], id=280, content='<think>')
    prints, shown = set(), set()
    for special in True, False:
      path = self.dir / f'{special}.json'
      added = [*own['added_tokens'], {**think, 'special': special}]
      path.write_text(json.dumps({**own, 'added_tokens': added}))
      corpus = self.load(tokenizer=str(path))
      prints.add(corpus.fingerprint)
      shown.add(corpus.tokenizer.decode([280]))
    self.assertLen(prints, 1)
    self.assertEqual(shown, {'', '<think>'})

  def test_wide_vocabulary(self):
    """Ids above 65,535 need the wider file."""
    own = tokenizer.Tokenizer.train(make_texts(), VOCAB)
    parts = json.loads(own._inner.to_str())
    vocab = parts['model']['vocab']
    vocab.update({f'unused{i}': VOCAB + i for i in range(1 << 16)})
    used = own._inner.id_to_token(int(own.encode(make_texts()[0])[0]))
    vocab[used], vocab['unused65535'] = vocab['unused65535'], vocab[used]
    path = self.dir / 'wide.json'
    path.write_text(json.dumps(parts))
    config = dataclasses.replace(self.config, tokenizer=str(path), fim_rate=0.0)
    corpus = pipeline.load(config, 1 << 17)
    ids = corpus.train.document(0)
    self.assertEqual(
      corpus.tokenizer.decode(ids), make_texts()[corpus.train.documents[0]]
    )
    streams = [corpus.train.document(i) for i in range(20)]
    self.assertGreater(max(map(np.max, streams)), 1 << 16)

  def test_too_short_or_empty(self):
    n = self.load().train.n_tokens
    with self.assertRaisesRegex(
      ValueError, f'seq_len={n}: .* {n} tokens; use at most {n - 1}'
    ):
      self.load(seq_len=n)
    self.assertLen(self.load(seq_len=n - 1).train, 1)
    self.write(['', ''])
    with self.assertRaisesRegex(ValueError, '0 documents that are not empty'):
      self.load()
    self.write(['x'])
    with self.assertRaisesRegex(ValueError, '1 tokens; give more text'):
      self.load()

  def test_bad_row_is_named_and_leaves_no_store(self):
    self.source.write_text('{"text": "good"}\n{"text": 7}')
    for _ in range(2):
      with self.assertRaisesRegex(ValueError, 'texts.jsonl, line 2'):
        self.load()

  def test_cache_that_cannot_be_made(self):
    with self.assertRaisesRegex(ValueError, 'data.cache_dir=.*choose'):
      self.load(cache_dir=str(self.source / 'below_a_file'))


class TrainIteratorTest(DataCase):
  def test_epochs_hold_every_row_once_in_new_orders(self):
    corpus = self.load()
    n = len(corpus.train)
    iterator = pipeline.train_iterator(corpus, self.config, 3)
    # Three epochs of n rows are n batches of three, whatever n is.
    batches = take(iterator, n)
    for batch in batches:
      for value in batch.values():
        self.assertEqual((value.shape, value.dtype), ((3, 17), np.int32))
    rows = np.concatenate([batch['tokens'] for batch in batches])
    expected = sorted(tuple(corpus.train[r]['tokens']) for r in range(n))
    epochs = [list(map(tuple, rows[i * n : (i + 1) * n])) for i in range(3)]
    for epoch in epochs:
      self.assertEqual(sorted(epoch), expected)
    self.assertNotEqual(epochs[0], epochs[1])
    self.assertNotEqual(epochs[1], epochs[2])

  def test_seed_decides(self):
    def first(seed):
      config = dataclasses.replace(self.config, seed=seed)
      corpus = pipeline.load(config, VOCAB)
      return take(pipeline.train_iterator(corpus, config, 8), 2)

    assert_batches_equal(first(3), first(3))
    self.assertTrue((first(3)[0]['tokens'] != first(4)[0]['tokens']).any())
    first(2**40)  # Wider than grain's own seeds.

  @parameterized.parameters(2, 4, 8)  # 8: one row each.
  def test_processes_share_the_same_batches(self, count):
    corpus = self.load()
    n = len(corpus.train) // 4 + 3  # Beyond an epoch.
    whole = take(pipeline.train_iterator(corpus, self.config, 8), n)
    parts = [
      take(
        pipeline.train_iterator(
          corpus, self.config, 8, process_index=p, process_count=count
        ),
        n,
      )
      for p in range(count)
    ]
    joined = [
      {key: np.concatenate([b[key] for b in batch]) for key in batch[0]}
      for batch in zip(*parts, strict=True)
    ]
    assert_batches_equal(joined, whole)
    with self.assertRaisesRegex(ValueError, 'multiple of the 3 processes'):
      pipeline.train_iterator(corpus, self.config, 8, process_count=3)

  def test_resume_in_a_fresh_process(self):
    corpus = self.load()
    iterator = pipeline.train_iterator(corpus, self.config, 4)
    take(iterator, 7)
    state = iterator.get_state()
    expected = take(iterator, 5)
    code = (
      'import sys, json; from deepseek_jax import config; import numpy as np; '
      'from deepseek_jax.data import pipeline; '
      'c = config.DataConfig(**json.loads(sys.argv[1])); '
      f'i = pipeline.train_iterator(pipeline.load(c, {VOCAB}), c, 4); '
      'i.set_state(json.loads(sys.argv[2])); '
      'b = [next(i) for _ in range(5)]; '
      'print(json.dumps([{k: v.tolist() for k, v in x.items()} for x in b]))'
    )
    arguments = [json.dumps(dataclasses.asdict(self.config)), json.dumps(state)]
    output = subprocess.run(
      [sys.executable, '-c', code, *arguments],
      capture_output=True,
      check=True,
      timeout=600,
      # Other hashes of strings, so that none decides an order.
      env=os.environ | {'PYTHONHASHSEED': '77'},
    ).stdout
    assert_batches_equal(json.loads(output), expected)

  def test_resume_through_orbax(self):
    corpus = self.load()
    iterator = pipeline.train_iterator(corpus, self.config, 4)
    take(iterator, 9)
    with ocp.CheckpointManager(self.dir / 'checkpoints') as manager:
      manager.save(
        1,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave({'w': jnp.ones(3)}),
          data=grain.checkpoint.CheckpointSave(iterator),
        ),
      )
      expected = take(iterator, 5)  # While it is being saved.
      manager.wait_until_finished()
      resumed = pipeline.train_iterator(corpus, self.config, 4)
      manager.restore(
        1,
        args=ocp.args.Composite(
          state=ocp.args.StandardRestore({'w': jnp.zeros(3)}),
          data=grain.checkpoint.CheckpointRestore(resumed),
        ),
      )
    assert_batches_equal(take(resumed, 5), expected)

  def test_too_few_rows(self):
    corpus = self.load()
    n = len(corpus.train)
    next(pipeline.train_iterator(corpus, self.config, n))
    with self.assertRaisesRegex(ValueError, f'fill {n} rows .*at most {n},'):
      pipeline.train_iterator(corpus, self.config, n + 1)

  def test_grain_is_imported_late(self):
    code = (
      'import sys; from deepseek_jax.data import pipeline; '
      'print([m for m in ("grain", "jax", "pyarrow") if m in sys.modules])'
    )
    output = subprocess.check_output([sys.executable, '-c', code], text=True)
    self.assertEqual(output.strip(), '[]')


class ValidationTest(DataCase):
  def test_all_rows_in_order_then_padding(self):
    corpus = self.load()
    rows = corpus.validation
    size = len(rows) // 2 + 1
    batches = list(pipeline.validation_batches(corpus, size))
    self.assertLen(batches, 2)
    joined = np.concatenate([batch['tokens'] for batch in batches])
    segments = np.concatenate([batch['segments'] for batch in batches])
    for r in range(len(rows)):
      np.testing.assert_array_equal(joined[r], rows[r]['tokens'])
      np.testing.assert_array_equal(segments[r], rows[r]['segments'])
    self.assertLen(joined, 2 * size)
    self.assertFalse(segments[len(rows) :].any())
    self.assertTrue((joined[len(rows) :] == corpus.tokenizer.pad_id).all())
    # Every byte of the validation documents is scored once.
    targets = joined[:, 1:][segments[:, 1:] > 0]
    documents = [rows.document(i) for i in range(len(rows.documents))]
    lengths = corpus.tokenizer.byte_lengths
    self.assertEqual(
      lengths[targets].sum(), lengths[np.concatenate(documents)].sum()
    )

  def test_few_rows_are_spread_evenly(self):
    corpus = self.load(seq_len=4)
    n = len(corpus.validation)
    batches = list(pipeline.validation_batches(corpus, 5, 15))
    self.assertLen(batches, 3)
    joined = np.concatenate([batch['tokens'] for batch in batches])
    chosen = [i * n // 15 for i in range(15)]
    expected = [corpus.validation[r]['tokens'] for r in chosen]
    np.testing.assert_array_equal(joined, expected)
    self.assertLen(set(chosen), 15)
    assert_batches_equal(pipeline.validation_batches(corpus, 5, 15), batches)
    self.assertEmpty(list(pipeline.validation_batches(corpus, 5, 0)))
    everything = pipeline.validation_batches(corpus, 5)
    assert_batches_equal(
      pipeline.validation_batches(corpus, 5, 10**6), list(everything)
    )

  def test_processes_share_batches(self):
    corpus = self.load()
    whole = list(pipeline.validation_batches(corpus, 8))
    parts = [
      pipeline.validation_batches(corpus, 8, process_index=p, process_count=2)
      for p in range(2)
    ]
    joined = [
      {key: np.concatenate([a[key], b[key]]) for key in a}
      for a, b in zip(*parts, strict=True)
    ]
    assert_batches_equal(joined, whole)


if __name__ == '__main__':
  absltest.main()
