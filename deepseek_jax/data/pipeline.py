"""From a `DataConfig` to batches: deterministic, shuffled, resumable.

The training iterator is grain's, so its state is a few bytes of JSON that orbax
saves with the parameters.  Grain is imported when an iterator is made, because
its import takes seconds.
"""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from deepseek_jax import config as config_lib
from deepseek_jax.data import fim as fim_lib
from deepseek_jax.data import packing
from deepseek_jax.data import store as store_lib
from deepseek_jax.data import tokenizer as tokenizer_lib

if TYPE_CHECKING:
  import grain

Batch = dict[str, np.ndarray]  # tokens and segments, int32 [B, T + 1].

_ROWS = 4  # Beside the other streams of random numbers.
_ENDLESS = 2**48  # Rows.
# A row takes tens of microseconds; two threads stay ahead of any step.
_THREADS, _BATCHES_AHEAD = 2, 8


@dataclasses.dataclass(frozen=True)
class Corpus:
  """A corpus in rows, ready to be drawn from.

  Attributes:
    tokenizer: what made the tokens.
    train: rows of the training documents, shuffled, some with FIM.
    validation: rows of the others in their own order, without FIM.
    fingerprint: a hash of every token and the split; a run that resumes on
      another one would not continue what it began.
  """

  tokenizer: tokenizer_lib.Tokenizer
  train: packing.PackedRows
  validation: packing.PackedRows
  fingerprint: str


def load(config: config_lib.DataConfig, vocab_size: int) -> Corpus:
  """Reads, splits, tokenises and packs a corpus; the tokens are cached.

  Args:
    config: the source, the tokenizer and how rows are made of them.
    vocab_size: the model's; a tokenizer that is trained here has at most as
      many ids.

  Raises:
    ValueError: a bad source or tokenizer (see `corpora` and `tokenizer`), FIM
      without its tokens, or training text too short for a row.
  """
  store, tokenizer = store_lib.open_store(config, vocab_size)
  if config.fim_rate > 0 and tokenizer.fim_ids is None:
    raise ValueError(
      f'data.fim_rate={config.fim_rate}: the tokenizer lacks '
      f'{", ".join(tokenizer_lib.FIM)}; use data.fim_rate=0'
    )
  fim = packing.Fim(config.fim_rate, config.seed) if config.fim_rate else None
  train_documents = np.flatnonzero(~store.is_validation)
  train = packing.PackedRows(
    store,
    tokenizer,
    packing.shuffled(train_documents, config.seed),
    config.seq_len,
    fim=fim,
  )
  if not len(train):
    raise ValueError(
      f'data.seq_len={config.seq_len}: the training documents have '
      f'{train.n_tokens} tokens; use at most {train.n_tokens - 1} or more text'
    )
  validation = packing.PackedRows(
    store,
    tokenizer,
    np.flatnonzero(store.is_validation),
    config.seq_len,
    pad_last=True,
  )
  return Corpus(tokenizer, train, validation, store.fingerprint)


def train_iterator(
  corpus: Corpus,
  config: config_lib.DataConfig,
  batch_size: int,
  *,
  first_row: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> 'grain.DatasetIterator[Batch]':
  """Endless batches of training rows, in a new order every epoch.

  Of a global batch of B = `batch_size` rows, process p yields rows
  [p b, (p + 1) b) with b = B / process_count: what a step sees does not depend
  on the number of processes.  Epochs follow one another without a gap, so a
  batch may hold the end of one and the beginning of the next.  `first_row` rows
  are left out, at once.

  The iterator has `get_state` and `set_state`, and grain.checkpoint saves and
  restores it; a state is good for the same corpus, config, `batch_size`,
  `first_row` and `process_count`.

  Raises:
    ValueError: `process_count` does not divide `batch_size`, or an epoch is
      shorter than a batch.
  """
  import grain

  local_size = _local_size(batch_size, process_count)
  rows = corpus.train
  if len(rows) < batch_size:
    raise ValueError(
      f'data.batch_size={batch_size}: the training documents have '
      f'{rows.n_tokens} tokens, which fill {len(rows)} rows of data.seq_len='
      f'{rows.seq_len}; use at most {len(rows)}, shorter rows or more text'
    )
  # Grain adds the epoch to its seed: seeds as close as ours are must not be.
  seed = int(fim_lib.uniforms(1, config.seed, _ROWS)[0] * 2**32)
  dataset = grain.MapDataset.source(rows).shuffle(seed=seed)
  # Endless in effect: grain's own endless length overflows at batches of one.
  dataset = dataset.repeat(-(-_ENDLESS // len(rows)))
  dataset = dataset[first_row:]
  # Every process's part of every batch in turn, of which this takes its own.
  dataset = dataset.batch(local_size)[process_index::process_count]
  options = grain.ReadOptions(
    num_threads=_THREADS, prefetch_buffer_size=_BATCHES_AHEAD
  )
  return iter(dataset.to_iter_dataset(options))


def validation_batches(
  corpus: Corpus,
  batch_size: int,
  n_rows: int | None = None,
  *,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[Batch]:
  """The same batches of validation rows every time.

  All rows in order, or, if `n_rows` is fewer, that many spread evenly over
  them.  The last batch is filled up with rows of padding, segment 0.
  Processes share a batch as in `train_iterator`.

  Raises:
    ValueError: `process_count` does not divide `batch_size`.
  """
  local_size = _local_size(batch_size, process_count)
  rows = corpus.validation
  wanted = len(rows) if n_rows is None else min(len(rows), n_rows)
  chosen = np.arange(wanted) * len(rows) // max(wanted, 1)
  for first in range(0, wanted, batch_size):
    begin = first + process_index * local_size
    part = [rows[int(r)] for r in chosen[begin : begin + local_size]]
    part += [rows.empty_row()] * (local_size - len(part))
    yield {key: np.stack([row[key] for row in part]) for key in part[0]}


def _local_size(batch_size: int, process_count: int) -> int:
  if batch_size % process_count:
    raise ValueError(
      f'data.batch_size={batch_size}: must be a multiple of the '
      f'{process_count} processes'
    )
  return batch_size // process_count
