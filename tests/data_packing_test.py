"""Packing loses, repeats and mixes nothing; FIM can be undone."""

import numpy as np
from absl.testing import absltest, parameterized

from deepseek_jax.data import fim, packing, store, tokenizer

TOKENIZER = tokenizer.Tokenizer.train(['some text'], 262)
BOS, EOS, PAD = TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.pad_id


def make_store(lengths):
  """Documents whose tokens are all different, from 100 on."""
  offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
  tokens = np.arange(100, 100 + offsets[-1], dtype=np.uint16)
  return store.Store(tokens, offsets, np.zeros(len(lengths), bool), 'made up')


def make_rows(lengths, seq_len, order=None, **kwargs):
  order = np.arange(len(lengths)) if order is None else order
  return packing.PackedRows(
    make_store(lengths), TOKENIZER, order, seq_len, **kwargs
  )


def undo_fim(body):
  """The original of `<begin> prefix <hole> suffix <end> middle`."""
  begin, hole, end = TOKENIZER.fim_ids
  body = list(body)
  if begin not in body:
    return body
  assert body[0] == begin and body.count(begin) == 1
  i, j = body.index(hole), body.index(end)
  return body[1:i] + body[j + 1 :] + body[i + 1 : j]


class FimTest(parameterized.TestCase):
  @parameterized.parameters(1, 2, 3, 50)
  def test_reorder_is_undone(self, n):
    tokens = np.arange(100, 100 + n, dtype=np.uint16)
    for index in range(100):
      moved = fim.reorder(tokens, TOKENIZER.fim_ids, 7, index)
      self.assertEqual(moved.dtype, np.int32)
      self.assertLen(moved, n + fim.EXTRA_TOKENS)
      self.assertEqual(undo_fim(moved), list(tokens))

  def test_cuts_are_uniform(self):
    """Every gap is cut, the first and the last as often as the others."""
    cuts = []
    for index in range(6000):
      _, hole, end = TOKENIZER.fim_ids
      moved = list(
        fim.reorder(np.arange(100, 103), TOKENIZER.fim_ids, 0, index)
      )
      prefix, middle = moved.index(hole) - 1, len(moved) - moved.index(end) - 1
      cuts += [prefix, prefix + middle]
    share = np.bincount(cuts, minlength=4) / len(cuts)
    # Four standard deviations of a share of 1/4 in 12,000 draws.
    np.testing.assert_array_less(abs(share - 0.25), 4 * (0.1875 / 12000) ** 0.5)

  def test_choice(self):
    chosen = fim.choose(20_000, 0.1, 3)
    self.assertLess(abs(chosen.mean() - 0.1), 4 * (0.09 / 20_000) ** 0.5)
    # A corpus that grows at its end keeps what was chosen.
    np.testing.assert_array_equal(fim.choose(10, 0.1, 3), chosen[:10])
    self.assertTrue((fim.choose(20_000, 0.1, 4) != chosen).any())
    self.assertFalse(fim.choose(1000, 0.0, 0).any())
    self.assertTrue(fim.choose(1000, 1.0, 0).all())


class PackedRowsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.rng = np.random.default_rng(0)

  @parameterized.product(
    seq_len=(2, 3, 7, 64, 1000), rate=(None, 0.0, 0.5, 1.0), pad=(False, True)
  )
  def test_every_token_is_a_target_once(self, seq_len, rate, pad):
    lengths = self.rng.integers(1, 40, 60)
    order = packing.shuffled(np.arange(60), seed=5)
    kwargs = {'fim': None if rate is None else packing.Fim(rate, 5)}
    rows = make_rows(lengths, seq_len, order, pad_last=pad, **kwargs)
    stream = np.concatenate([rows.document(i) for i in range(60)])
    self.assertLen(stream, rows.n_tokens)

    targets = [rows[r]['tokens'][1:] for r in range(len(rows))]
    inputs = [rows[r]['tokens'][:-1] for r in range(len(rows))]
    targets = np.concatenate([*targets, np.zeros(0, np.int32)])
    inputs = np.concatenate([*inputs, np.zeros(0, np.int32)])
    n = (rows.n_tokens - 1) // seq_len * seq_len
    if pad:
      n = rows.n_tokens - 1
      self.assertLess(len(targets) - n, seq_len)
      np.testing.assert_array_equal(targets[n:], PAD)
    else:
      self.assertLen(targets, n)
    np.testing.assert_array_equal(targets[:n], stream[1 : n + 1])
    np.testing.assert_array_equal(inputs[:n], stream[:n])

    originals = []
    for i, index in enumerate(order):
      document = rows.document(i)
      self.assertEqual((document[0], document[-1]), (BOS, EOS))
      originals.append((index, undo_fim(document[1:-1])))
    joined = np.concatenate([body for _, body in sorted(originals)])
    np.testing.assert_array_equal(joined, make_store(lengths).tokens)

  @parameterized.product(seq_len=(2, 5, 33), rate=(0.0, 0.5))
  def test_segments_number_documents_within_a_row(self, seq_len, rate):
    lengths = self.rng.integers(1, 30, 40)
    rows = make_rows(lengths, seq_len, fim=packing.Fim(rate, 1), pad_last=True)
    owner = np.concatenate(
      [np.full(len(rows.document(i)), i) for i in range(40)]
    )
    for r in range(len(rows)):
      row = rows[r]
      for value in row.values():
        self.assertEqual((value.shape, value.dtype), ((seq_len + 1,), np.int32))
      here = owner[r * seq_len : (r + 1) * seq_len + 1]
      segments = row['segments'][: len(here)]
      np.testing.assert_array_equal(segments, here - here[0] + 1)
      self.assertFalse(row['segments'][len(here) :].any())
      np.testing.assert_array_equal(row['tokens'][len(here) :], PAD)

  def test_rows_do_not_depend_on_history(self):
    lengths = self.rng.integers(1, 30, 40)
    kwargs = {'fim': packing.Fim(0.5, 1)}
    forward = make_rows(lengths, 8, **kwargs)
    expected = [forward[r] for r in range(len(forward))]
    other = make_rows(lengths, 8, **kwargs)
    for r in reversed(range(len(other))):
      for key, value in other[r].items():
        np.testing.assert_array_equal(value, expected[r][key])

  def test_a_subset_keeps_its_documents(self):
    """FIM draws by the store's index, so the split does not change it."""
    lengths = self.rng.integers(5, 30, 40)
    every = make_rows(lengths, 8, fim=packing.Fim(0.5, 1))
    order = np.arange(39, 0, -3)
    some = make_rows(lengths, 8, order, fim=packing.Fim(0.5, 1))
    for i, index in enumerate(order):
      np.testing.assert_array_equal(some.document(i), every.document(index))

  @parameterized.parameters(((3,), 4, 1, 1), ((3,), 5, 0, 1), ((1,), 2, 1, 1))
  def test_few_tokens(self, lengths, seq_len, whole, padded):
    self.assertLen(make_rows(lengths, seq_len), whole)
    self.assertLen(make_rows(lengths, seq_len, pad_last=True), padded)

  def test_out_of_range(self):
    rows = make_rows((9, 9), 4)
    for r in (-1, len(rows)):
      with self.assertRaises(IndexError):
        rows[r]

  def test_shuffle(self):
    documents = np.arange(10, 1010)
    first = packing.shuffled(documents, 0)
    np.testing.assert_array_equal(first, packing.shuffled(documents, 0))
    np.testing.assert_array_equal(np.sort(first), documents)
    self.assertLess((first == packing.shuffled(documents, 1)).sum(), 20)
    self.assertLess((first == documents).sum(), 20)


if __name__ == '__main__':
  absltest.main()
