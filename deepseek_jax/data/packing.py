"""Documents packed into rows of fixed length, with random access (V3 4.1).

The documents of a split, each as `[BOS] tokens [EOS]` and a share of them in
fill-in-the-middle form, stand one after another in a shuffled order.  Row r is
the T + 1 tokens from position r T, where T is `data.seq_len`: rows overlap by
one token, so that each token but the first is the target of one position.
What a row holds is a function of the corpus and the config alone, never of what
was read before or how many processes read.
"""

import dataclasses

import numpy as np

from deepseek_jax.data import fim as fim_lib
from deepseek_jax.data import store as store_lib
from deepseek_jax.data import tokenizer as tokenizer_lib

_ORDER = 3  # Beside fim's streams of random numbers.


@dataclasses.dataclass(frozen=True)
class Fim:
  """Fill-in-the-middle: the share of documents, and what draws them."""

  rate: float
  seed: int


class PackedRows:
  """Rows of packed documents; `rows[r]` is independent of all other rows.

  Attributes:
    seq_len: T.
    documents: the store's indices of the documents, in packed order.
    n_tokens: the length of the packed stream, special tokens included.
  """

  def __init__(
    self,
    store: store_lib.Store,
    tokenizer: tokenizer_lib.Tokenizer,
    documents: np.ndarray,
    seq_len: int,
    *,
    fim: Fim | None = None,
    pad_last: bool = False,
  ):
    """Lays out the stream; reads no token.

    Args:
      store: the encoded corpus.
      tokenizer: gives the special tokens.
      documents: indices into `store`, int64 [n], in the order they are packed.
      seq_len: T.
      fim: whether some documents are reordered, and which.
      pad_last: keep the last, shorter row and pad it, instead of dropping it.
    """
    self.seq_len = seq_len
    self.documents = documents
    self._store, self._tokenizer, self._fim = store, tokenizer, fim
    lengths = np.diff(store.offsets)[documents] + 2
    if fim:
      chosen = fim_lib.choose(len(store.is_validation), fim.rate, fim.seed)
      self._is_fim = chosen[documents]
      lengths += fim_lib.EXTRA_TOKENS * self._is_fim
    self._ends = np.cumsum(lengths)
    self.n_tokens = int(self._ends[-1])
    targets = self.n_tokens - 1
    self._len = -(-targets // seq_len) if pad_last else targets // seq_len

  def __len__(self) -> int:
    return self._len

  def __getitem__(self, row: int) -> dict[str, np.ndarray]:
    """Row `row` as `tokens` and `segments`, both int32 [T + 1].

    Segments number the documents that the row touches from 1 on; padding has
    segment 0 and the pad token.
    """
    if not 0 <= row < self._len:
      raise IndexError(f'row {row} of {self._len}')
    position = row * self.seq_len
    stop = min(position + self.seq_len + 1, self.n_tokens)
    tokens, segments = self.empty_row().values()
    i = int(np.searchsorted(self._ends, position, side='right'))
    filled, segment = 0, 1
    while position < stop:
      left = int(self._ends[i]) - position  # Of document i.
      piece = self.document(i)[-left:][: stop - position]
      tokens[filled : filled + len(piece)] = piece
      segments[filled : filled + len(piece)] = segment
      filled, position = filled + len(piece), position + len(piece)
      i, segment = i + 1, segment + 1
    return {'tokens': tokens, 'segments': segments}

  def empty_row(self) -> dict[str, np.ndarray]:
    """A row of padding."""
    shape = self.seq_len + 1
    return {
      'tokens': np.full(shape, self._tokenizer.pad_id, np.int32),
      'segments': np.zeros(shape, np.int32),
    }

  def document(self, i: int) -> np.ndarray:
    """The i-th document of the stream with its special tokens, int32."""
    index = int(self.documents[i])
    begin, end = self._store.offsets[index : index + 2]
    body = self._store.tokens[begin:end]
    if self._fim and self._is_fim[i]:
      ids = self._tokenizer.fim_ids
      body = fim_lib.reorder(body, ids, self._fim.seed, index)
    bos, eos = self._tokenizer.bos_id, self._tokenizer.eos_id
    return np.concatenate([[bos], body, [eos]], dtype=np.int32)


def shuffled(documents: np.ndarray, seed: int) -> np.ndarray:
  """`documents` in an order that is a function of their number and the seed."""
  uniforms = fim_lib.uniforms(len(documents), seed, _ORDER)
  # NumPy promises the same `permutation` within a version only; sorting its
  # uniform numbers leans on less.
  return documents[np.argsort(uniforms, kind='stable')]
