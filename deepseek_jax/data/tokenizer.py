"""Byte-level BPE: trained here, or any tokenizer.json (V3 section 4.1).

The special tokens carry DeepSeek's own names.  A text that happens to contain
such a name is encoded as the ordinary characters it consists of: a document
can never end itself or open a fill-in-the-middle.
"""

import functools
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tokenizers

BOS = '<｜begin▁of▁sentence｜>'
EOS = '<｜end▁of▁sentence｜>'
PAD = '<｜▁pad▁｜>'
# Fill-in-the-middle: before the prefix, the suffix and the middle.
FIM = ('<｜fim▁begin｜>', '<｜fim▁hole｜>', '<｜fim▁end｜>')
SPECIALS = (BOS, EOS, PAD, *FIM)

# Other families' names, tried in this order when a tokenizer lacks DeepSeek's.
_OTHER_BOS = ('<s>', '<bos>', '<|begin_of_text|>', '<|endoftext|>')
_OTHER_EOS = ('</s>', '<eos>', '<|end_of_text|>', '<|endoftext|>')
_OTHER_PAD = ('<pad>', '[PAD]')

# What a token may not cross: up to three digits; a word with one leading space
# or sign; signs with the line ends after them (section 4.1); white space.
_SPLIT = '|'.join(
  (
    r'\p{N}{1,3}',
    r'[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+',
    r' ?[\p{P}\p{S}]+[\r\n]*',
    r'\s*[\r\n]+',
    r'\s+(?!\S)',
    r'\s+',
  )
)


class Tokenizer:
  """Text to token ids and back.

  Attributes:
    vocab_size: one more than the largest id.
    bos_id, eos_id: the tokens around every document.
    pad_id: fills rows after the last document; `eos_id` if there is no other.
    fim_ids: begin, hole and end of fill-in-the-middle; None if lacking.
  """

  def __init__(self, definition: str | bytes, name: str = 'tokenizer'):
    """Reads the content of a tokenizer.json.

    Raises:
      ValueError: it is no tokenizer.json, its tokens cannot represent every
        byte, it has no beginning- or end-of-sentence token, or makes a special
        token of its name in a text.
    """
    try:
      parts = json.loads(definition)
      self._declared = _mark_specials(parts)
      self._inner = tokenizers.Tokenizer.from_str(json.dumps(parts))
    except Exception as error:  # `tokenizers` raises bare Exception.
      raise ValueError(
        f'data.tokenizer={name!r}: not a tokenizer.json: {error}'
      ) from None
    self._byte_level = '"ByteLevel"' in json.dumps(
      [parts.get('pre_tokenizer'), parts.get('decoder')]
    )
    if not self._byte_level and not parts['model'].get('byte_fallback'):
      raise ValueError(
        f'data.tokenizer={name!r}: neither byte-level nor with byte fallback, '
        'so it loses text; use a byte-level BPE, or none to train one'
      )
    self._inner.encode_special_tokens = True  # Names in a text are text.
    self._inner.no_truncation()
    self._inner.no_padding()
    self._vocab = self._inner.get_vocab(with_added_tokens=True)
    self.vocab_size = 1 + max(self._vocab.values())
    self.bos_id = self._find(name, BOS, *_OTHER_BOS)
    self.eos_id = self._find(name, EOS, *_OTHER_EOS)
    known_pad = [t for t in (PAD, *_OTHER_PAD) if t in self._vocab]
    self.pad_id = self._vocab[known_pad[0]] if known_pad else self.eos_id
    has_fim = all(token in self._vocab for token in FIM)
    self.fim_ids = tuple(map(self._vocab.get, FIM)) if has_fim else None
    around = {self.bos_id, self.eos_id, self.pad_id, *(self.fim_ids or ())}
    self._controls = self._declared | around
    self._check_names(name)

  @classmethod
  def load(cls, path: str | pathlib.Path) -> 'Tokenizer':
    """Reads a tokenizer.json file.

    Raises:
      ValueError: it is missing or unusable; see `__init__`.
    """
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
      raise ValueError(
        f'data.tokenizer={str(path)!r}: no such file; give a tokenizer.json, '
        'or leave it empty to train one'
      )
    return cls(file.read_bytes(), str(path))

  @classmethod
  def train(cls, texts: Iterable[str], vocab_size: int) -> 'Tokenizer':
    """Trains a byte-level BPE of at most `vocab_size` ids, specials first.

    All 256 bytes are tokens, so every text survives the round trip.  A small
    corpus may end with fewer ids than asked for.

    Raises:
      ValueError: `vocab_size` has no room for the bytes and special tokens.
    """
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    least = len(alphabet) + len(SPECIALS)
    if vocab_size < least:
      raise ValueError(
        f'model.vocab_size={vocab_size}: 256 bytes and {len(SPECIALS)} special '
        f'tokens need at least {least}'
      )
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    pre = tokenizers.pre_tokenizers
    inner.pre_tokenizer = pre.Sequence(
      [
        pre.Split(tokenizers.Regex(_SPLIT), 'isolated'),
        pre.ByteLevel(add_prefix_space=False, use_regex=False),
      ]
    )
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=vocab_size,
      special_tokens=list(SPECIALS),
      initial_alphabet=alphabet,
      show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return cls(inner.to_str())

  @property
  def definition(self) -> str:
    """All that decides the ids of a text, whatever a file declares special."""
    return self._inner.to_str(pretty=True)

  def equals(self, other: 'Tokenizer') -> bool:
    """Whether both turn every text into the same ids."""
    return self.definition == other.definition

  def save(self, path: str | pathlib.Path) -> None:
    """Writes a tokenizer.json that `load` and `transformers` read.

    The latter takes the names of the tokens around a text from
    tokenizer_config.json, which is written beside it unless one is there: it
    may hold a chat template.
    """
    ids = {'bos_token': self.bos_id, 'eos_token': self.eos_id}
    about = {key: self._inner.id_to_token(i) for key, i in ids.items()}
    about['tokenizer_class'] = 'PreTrainedTokenizerFast'
    text = json.dumps(about, indent=2, ensure_ascii=False) + '\n'
    path = pathlib.Path(path)
    about_path = path.with_name('tokenizer_config.json')
    partial = path.with_name(f'.{path.name}')  # Renamed: never half a file.
    if not about_path.exists():
      partial.write_text(text, encoding='utf-8')
      partial.replace(about_path)
    parts = json.loads(self._inner.to_str())
    for token in parts['added_tokens']:
      token['special'] = token['id'] in self._declared
    text = json.dumps(parts, indent=2, ensure_ascii=False)
    partial.write_text(text, encoding='utf-8')
    partial.replace(path)

  def encode(self, text: str) -> np.ndarray:
    """Token ids of `text`, int32, without any special token."""
    return next(self.encode_batch([text]))

  def encode_batch(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
    """`encode` for many texts at once, on all cores."""
    for encoding in self._inner.encode_batch_fast(
      texts, add_special_tokens=False
    ):
      yield np.asarray(encoding.ids, np.int32)

  def encode_marked(self, text: str) -> np.ndarray:
    """As `encode`, but names of special tokens become these tokens.

    For text from a chat template, whose markup they are; never for documents.
    """
    self._inner.encode_special_tokens = False
    try:
      return self.encode(text)
    finally:
      self._inner.encode_special_tokens = True

  def decode(self, ids: Sequence[int], skip_specials: bool = True) -> str:
    """Text of token ids; bytes that are no UTF-8 become U+FFFD.

    Ids without a token, in the padding of a model's vocabulary, give nothing.
    `skip_specials` leaves out what the file itself calls special, and tokens
    around documents and of fill-in-the-middle, but no ordinary added token: R1
    thinks between <think> and </think>.
    """
    controls = self._controls if skip_specials else ()
    return self._inner.decode(
      [int(i) for i in ids if int(i) not in controls],
      skip_special_tokens=False,
    )

  @functools.cached_property
  def byte_lengths(self) -> np.ndarray:
    """Bytes of UTF-8 that each id stands for, int32 [vocab_size].

    Special tokens stand for none, so that the sum over the ids of a document
    is its length in bytes, the denominator of bits per byte.  Exact for a
    byte-level BPE without normaliser; a tokenizer that adds a space before the
    text counts it.
    """
    lengths = np.zeros(self.vocab_size, np.int32)
    added = self._inner.get_added_tokens_decoder()
    for token, i in self._vocab.items():
      if i in added:
        lengths[i] = 0 if added[i].special else len(token.encode())
      elif self._byte_level:
        lengths[i] = len(token)  # One character of its alphabet is one byte.
      elif len(token) == 6 and token.startswith('<0x'):
        lengths[i] = 1
      else:
        lengths[i] = len(token.replace('▁', ' ').encode())
    return lengths

  def check_fits(self, vocab_size: int) -> None:
    """Checks that a model of `vocab_size` ids has a row for every token.

    Raises:
      ValueError: it has not.
    """
    if self.vocab_size > vocab_size:
      raise ValueError(
        f'model.vocab_size={vocab_size}: the tokenizer has ids up to '
        f'{self.vocab_size - 1}; use at least {self.vocab_size}'
      )

  def _check_names(self, source: str) -> None:
    """A piece of the model itself is found in a text, special or not."""
    added = self._inner.get_added_tokens_decoder()
    special = {i for i, token in added.items() if token.special}
    special |= {self.bos_id, self.eos_id, self.pad_id, *(self.fim_ids or ())}
    names = {i: self._inner.id_to_token(i) for i in sorted(special)}
    texts = [f'{name} a{name}b' for name in names.values()]
    for (i, name), ids in zip(names.items(), self.encode_batch(texts)):
      if i in ids:
        raise ValueError(
          f'data.tokenizer={source!r}: {name!r} in a text becomes the special '
          f'token {i}, so that a document can end itself; use a byte-level '
          'BPE, or none to train one'
        )

  def _find(self, source: str, *names: str) -> int:
    for name in names:
      if name in self._vocab:
        return self._vocab[name]
    raise ValueError(
      f'data.tokenizer={source!r}: none of {", ".join(names)} is a token; '
      'add one of them to its added_tokens'
    )


def _mark_specials(parts: dict[str, Any]) -> set[int]:
  """Declares every added token in angle brackets special.

  DeepSeek's own file lists fill-in-the-middle and chat tokens as ordinary
  added tokens, which would be recognised in the text of a document.

  Returns:
    The ids of those that were special before.
  """
  before = {t['id'] for t in parts['added_tokens'] if t['special']}
  for token in parts['added_tokens']:
    content = token['content']
    token['special'] |= content.startswith('<') and content.endswith('>')
  return before
