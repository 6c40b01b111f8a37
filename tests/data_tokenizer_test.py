"""Every text survives the tokenizer; no text can forge a special token."""

import json
import pathlib
import tempfile
from unittest import mock

import numpy as np
import tokenizers
from absl.testing import absltest, parameterized

from deepseek_jax.data import tokenizer as tokenizer_lib

TEXTS = [
  'def f(x):\n    return x + 1234567\n\n\n' * 20,
  'The quick brown fox jumps over the lazy dog.\r\n' * 20,
  'für 二十一 🙂\t' * 20,
]
NASTY = [
  '',
  ' ',
  '\n\n  \n',
  ''.join(map(chr, range(256))),
  'a\0b',
  '🙂\u200d\ufeff\U0010ffff e\u0301',
  *tokenizer_lib.SPECIALS,
  'x'.join(tokenizer_lib.SPECIALS),
]


def trained(vocab_size=300):
  return tokenizer_lib.Tokenizer.train(TEXTS, vocab_size)


class TokenizerTest(parameterized.TestCase):
  @parameterized.parameters(*NASTY, *TEXTS)
  def test_round_trip_and_byte_lengths(self, text):
    tokenizer = trained()
    ids = tokenizer.encode(text)
    self.assertEqual(ids.dtype, np.int32)
    self.assertEqual(tokenizer.decode(ids, skip_specials=False), text)
    self.assertEqual(tokenizer.byte_lengths[ids].sum(), len(text.encode()))
    specials = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    self.assertNoCommonElements(ids, [*specials, *tokenizer.fim_ids])

  def test_special_tokens(self):
    tokenizer = trained()
    self.assertEqual(
      (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id), (0, 1, 2)
    )
    self.assertEqual(tokenizer.fim_ids, (3, 4, 5))
    self.assertEqual(
      tokenizer.decode(range(6), skip_specials=False),
      '<｜begin▁of▁sentence｜><｜end▁of▁sentence｜><｜▁pad▁｜>'
      '<｜fim▁begin｜><｜fim▁hole｜><｜fim▁end｜>',
    )
    self.assertEqual(tokenizer.decode(range(6)), '')
    self.assertFalse(tokenizer.byte_lengths[:6].any())
    self.assertEqual(tokenizer.byte_lengths.shape, (tokenizer.vocab_size,))

  def test_numbers_split_and_line_ends_merge(self):
    tokenizer = trained()
    inner = tokenizers.Tokenizer.from_str(tokenizer._inner.to_str())
    pieces = inner.pre_tokenizer.pre_tokenize_str('x = 1234567;\n\ny')
    self.assertEqual(
      [piece for piece, _ in pieces],
      ['x', 'Ġ=', 'Ġ', '123', '456', '7', ';ĊĊ', 'y'],
    )

  def test_training_is_deterministic_and_bounded(self):
    sizes = [trained(size).vocab_size for size in (262, 300, 10_000)]
    self.assertEqual(sizes[:2], [262, 300])
    self.assertLess(sizes[2], 10_000)  # A small text has few merges.
    self.assertEqual(trained()._inner.to_str(), trained()._inner.to_str())
    with self.assertRaisesRegex(ValueError, 'model.vocab_size=261.*least 262'):
      trained(261)

  def test_save_and_load(self):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    path = pathlib.Path(folder) / 'tokenizer.json'
    tokenizer = trained()
    tokenizer.save(path)
    loaded = tokenizer_lib.Tokenizer.load(path)
    for text in NASTY + TEXTS:
      np.testing.assert_array_equal(loaded.encode(text), tokenizer.encode(text))
    about = path.with_name('tokenizer_config.json')
    self.assertEqual(
      json.loads(about.read_text())['eos_token'], tokenizer_lib.EOS
    )
    about.unlink()
    with (  # A kill leaves no half of a file.
      mock.patch.object(pathlib.Path, 'replace', side_effect=OSError),
      self.assertRaises(OSError),
    ):
      tokenizer.save(path)
    self.assertFalse(about.exists())
    about.write_text('{"chat_template": "x"}')
    tokenizer.save(path)
    self.assertEqual(about.read_text(), '{"chat_template": "x"}')

  def test_fits_model(self):
    tokenizer = trained()
    tokenizer.check_fits(tokenizer.vocab_size)
    tokenizer.check_fits(tokenizer.vocab_size + 64)
    with self.assertRaisesRegex(ValueError, 'model.vocab_size=299.*least 300'):
      tokenizer.check_fits(299)

  def test_deepseek_file_with_ordinary_fim_tokens(self):
    """There the FIM and chat tokens are not declared special."""
    definition = json.loads(trained()._inner.to_str())
    for token in definition['added_tokens']:
      token['special'] = token['content'] == tokenizer_lib.BOS
    chat = dict(definition['added_tokens'][0], id=300, content='<｜User｜>')
    word = dict(chat, id=301, content='二字', special=False)
    definition['added_tokens'] += [chat, word]
    tokenizer = tokenizer_lib.Tokenizer(json.dumps(definition))
    self.assertEqual(tokenizer.vocab_size, 302)
    text = 'x<｜fim▁hole｜><｜User｜> 二字'
    ids = tokenizer.encode(text)
    self.assertEqual(tokenizer.decode(ids), text)
    self.assertEqual(tokenizer.byte_lengths[ids].sum(), len(text.encode()))
    self.assertEqual(tokenizer.byte_lengths[301], 6)
    self.assertNotIn(tokenizer.fim_ids[1], ids)
    self.assertNotIn(300, ids)
    self.assertIn(301, ids)

  def test_ignores_truncation_padding_and_added_specials(self):
    tokenizer = trained()
    inner = tokenizers.Tokenizer.from_str(tokenizer._inner.to_str())
    inner.enable_truncation(3)
    inner.enable_padding(length=100)
    inner.post_processor = tokenizers.processors.TemplateProcessing(
      f'{tokenizer_lib.BOS} $A', special_tokens=[(tokenizer_lib.BOS, 0)]
    )
    loaded = tokenizer_lib.Tokenizer(inner.to_str())
    np.testing.assert_array_equal(
      loaded.encode(TEXTS[0]), tokenizer.encode(TEXTS[0])
    )

  def test_other_families(self):
    inner = tokenizers.Tokenizer(
      tokenizers.models.BPE(
        {f'<0x{b:02X}>': b for b in range(256)} | {'▁': 256, 'ö': 257},
        [],
        byte_fallback=True,
      )
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
      prepend_scheme='never'
    )
    inner.add_special_tokens(['<s>', '</s>'])
    tokenizer = tokenizer_lib.Tokenizer(inner.to_str())
    self.assertEqual((tokenizer.bos_id, tokenizer.eos_id), (258, 259))
    self.assertEqual(tokenizer.pad_id, tokenizer.eos_id)
    self.assertIsNone(tokenizer.fim_ids)
    text = 'a ö 二'
    ids = tokenizer.encode(text)
    self.assertEqual(tokenizer.byte_lengths[ids].sum(), len(text.encode()))

  def test_a_piece_of_the_model_must_not_be_special(self):
    """As in T5's: the best pieces of 'a</s>b' have </s> among them."""
    pieces = [('<unk>', 0.0), ('<s>', 0.0), ('</s>', 0.0)]
    pieces += [(f'<0x{b:02X}>', -9.0) for b in range(256)]
    pieces += [('a', -2.0), ('b', -2.0)]

    def loaded(pieces):
      model = tokenizers.models.Unigram(pieces, 0, byte_fallback=True)
      inner = tokenizers.Tokenizer(model)
      decoders = tokenizers.decoders
      inner.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse()]
      )
      inner.add_special_tokens(['<s>', '</s>'])
      return tokenizer_lib.Tokenizer(inner.to_str(), 'mine.json')

    with self.assertRaisesRegex(
      ValueError, "'mine.json': '<s>' in a text becomes the special token 1"
    ):
      loaded(pieces)
    tokenizer = loaded([pieces[0], *pieces[3:]])
    ids = tokenizer.encode('a</s>b')
    self.assertNotIn(tokenizer.eos_id, ids)
    self.assertEqual(tokenizer.decode(ids), 'a</s>b')

  def test_unusable_files(self):
    def refused(message, definition):
      with self.assertRaisesRegex(ValueError, message):
        tokenizer_lib.Tokenizer(definition, 'mine.json')

    refused("'mine.json': not a tokenizer.json", '{"model": 1}')
    refused("'mine.json': not a tokenizer.json", 'no JSON')
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    (folder / 'latin.json').write_bytes(b'{"model": "\xe9"}')
    with self.assertRaisesRegex(ValueError, "latin.json': not a tokenizer"):
      tokenizer_lib.Tokenizer.load(folder / 'latin.json')
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({'<s>': 0}))
    refused('neither byte-level nor', words.to_str())
    bare = tokenizers.Tokenizer(tokenizers.models.BPE({'a': 0}, []))
    bare.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    refused('none of <｜begin▁of▁sentence｜>, <s>', bare.to_str())
    with self.assertRaisesRegex(ValueError, "'/no/such': no such file"):
      tokenizer_lib.Tokenizer.load('/no/such')


if __name__ == '__main__':
  absltest.main()
