"""A corpus as token ids on disk, made once and memory-mapped ever after.

The directory `<cache_dir>/<key>` holds `tokens.bin` (uint16 or uint32, all
documents one after another without special tokens), `documents.npz` (offsets
and the split) and `tokenizer.json`; the key is a hash of all they depend on.
They are written under another name and renamed when complete, under a lock:
whoever is killed leaves nothing that will be read, and of several processes
one does the work.
"""

import array
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import pathlib
import re
import shutil
import sys
from collections.abc import Iterable, Iterator

import numpy as np
import tqdm

from deepseek_jax import config as config_lib
from deepseek_jax.data import corpora
from deepseek_jax.data import tokenizer as tokenizer_lib

TRAIN_BYTES = 32 << 20  # The text that BPE training sees, at most.
_END_BYTES = 1 << 16  # Of each file, at both ends, that its key depends on.
_BATCH_CHARS = 1 << 19  # Encoded at once; an encoding is 100 times its text.
_FORMAT = 2  # Counted up when the same inputs begin to give other files.


@dataclasses.dataclass(frozen=True)
class Store:
  """The encoded documents of a corpus.

  Attributes:
    tokens: memory-mapped uint16 or uint32 [n_tokens].
    offsets: int64 [n_documents + 1]; document i is
      `tokens[offsets[i]:offsets[i + 1]]`, never empty.
    is_validation: bool [n_documents].
    fingerprint: a hash of all of these and the tokenizer; differs whenever
      training would see other numbers.
  """

  tokens: np.ndarray
  offsets: np.ndarray
  is_validation: np.ndarray
  fingerprint: str


def open_store(
  config: config_lib.DataConfig, vocab_size: int
) -> tuple[Store, tokenizer_lib.Tokenizer]:
  """Opens the store of `config`'s corpus, making it first if need be.

  Raises:
    ValueError: see `corpora.documents` and `tokenizer.Tokenizer`; or the cache
      directory cannot be written.
  """
  if config.tokenizer:  # Refused before any work is done.
    tokenizer_lib.Tokenizer.load(config.tokenizer).check_fits(vocab_size)
  cache = pathlib.Path(config.cache_dir).expanduser()
  folder = cache / _key(config, vocab_size)
  if not folder.is_dir():
    with _lock(folder.with_suffix('.lock')):
      if not folder.is_dir():  # Another process may have just made it.
        _make(config, vocab_size, folder)
  tokenizer = tokenizer_lib.Tokenizer.load(folder / 'tokenizer.json')
  with np.load(folder / 'documents.npz') as file:
    documents = dict(file)
  tokens = np.memmap(folder / 'tokens.bin', _dtype(tokenizer), mode='r')
  store = Store(
    tokens=np.asarray(tokens),  # A plain view: slices of a memmap are slow.
    offsets=documents['offsets'],
    is_validation=documents['is_validation'],
    fingerprint=str(documents['fingerprint']),
  )
  return store, tokenizer


def draw(name: str, purpose: str) -> float:
  """A number in [0, 1) that is the same for this name on every machine."""
  digest = hashlib.sha256(f'{purpose}:{name}'.encode()).digest()
  return int.from_bytes(digest[:8], 'big') / 2**64


def split(
  draws: np.ndarray, lengths: np.ndarray, val_fraction: float
) -> tuple[np.ndarray, np.ndarray]:
  """Which documents validate, and the lengths they have.

  A document validates if its `draw` is below `val_fraction`, whatever the
  others are.  If that leaves one side empty, the shortest document validates
  or the longest trains.  A lone document is cut in two: the end validates.

  Args:
    draws: float64 [n_documents].
    lengths: tokens, int64 [n_documents].
    val_fraction: the share of documents that validate, in expectation.

  Returns:
    is_validation, bool [n_documents], and lengths, int64 [n_documents].

  Raises:
    ValueError: there is no document, or one of a single token.
  """
  total = int(lengths.sum())
  if total < 2:
    raise ValueError(
      f'data.source: {len(lengths)} documents that are not empty, {total} '
      'tokens; give more text'
    )
  if len(lengths) == 1:
    held_out = min(max(1, round(total * val_fraction)), total - 1)
    return np.array([False, True]), np.array([total - held_out, held_out])
  is_validation = draws < val_fraction
  if not is_validation.any():
    is_validation[np.argmin(lengths)] = True
  elif is_validation.all():
    is_validation[np.argmax(lengths)] = False
  return is_validation, lengths


def _key(config: config_lib.DataConfig, vocab_size: int) -> str:
  """Names the store by a hash of all that decides its content."""
  files = []
  for name, path in corpora.find_files(config).items():
    stat, where = path.stat(), str(path.resolve())
    ends = _hash_ends(path, stat.st_size)
    files.append((name, where, stat.st_size, stat.st_mtime_ns, ends))
  tokenizer = vocab_size
  if config.tokenizer:
    file = pathlib.Path(config.tokenizer).expanduser()
    tokenizer = hashlib.sha256(file.read_bytes()).hexdigest()
  parts = [_FORMAT, files, config.text_field, config.val_fraction, tokenizer]
  digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
  readable = re.sub(r'\W+', '_', pathlib.Path(config.source).stem)
  return f'{readable[:32]}-{digest[:16]}'


def _hash_ends(path: pathlib.Path, size: int) -> str:
  """Of the first and last bytes: a copy may keep size and time of another."""
  with path.open('rb') as file:
    first = file.read(_END_BYTES)
    file.seek(max(size - _END_BYTES, 0))
    return hashlib.sha256(first + file.read(_END_BYTES)).hexdigest()


@contextlib.contextmanager
def _lock(path: pathlib.Path) -> Iterator[None]:
  """Holds a lock that the system releases when the process dies."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open('w')
  except OSError as error:
    raise ValueError(
      f'data.cache_dir={str(path.parent)!r}: {error}; choose a directory that '
      'can be written'
    ) from None
  with file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _dtype(tokenizer: tokenizer_lib.Tokenizer) -> np.dtype:
  return np.dtype('<u2' if tokenizer.vocab_size <= 1 << 16 else '<u4')


def _make(
  config: config_lib.DataConfig, vocab_size: int, folder: pathlib.Path
) -> None:
  """Writes the store beside `folder` and renames it when complete."""
  partial = folder.with_suffix('.partial')
  shutil.rmtree(partial, ignore_errors=True)  # Of a process that was killed.
  partial.mkdir()
  total = sum(p.stat().st_size for p in corpora.find_files(config).values())
  if others := corpora.passed_over(config):
    counts = ', '.join(f'{n} {kind or "?"}' for kind, n in others.most_common())
    print(
      f'data: passed over in {config.source}, by suffix: {counts}',
      file=sys.stderr,
    )
  if config.tokenizer:
    tokenizer = tokenizer_lib.Tokenizer.load(config.tokenizer)
  else:
    texts = list(_sample(config, total))
    print(f'data: training a BPE of {vocab_size} ids', file=sys.stderr)
    tokenizer = tokenizer_lib.Tokenizer.train(texts, vocab_size)
  tokenizer.save(partial / 'tokenizer.json')
  digest = hashlib.sha256(tokenizer.definition.encode())
  lengths, draws = array.array('q'), array.array('d')
  with (partial / 'tokens.bin').open('wb') as file:
    for batch in _batches(_progress(corpora.documents(config), total)):
      names, texts = zip(*batch)
      for name, ids in zip(names, tokenizer.encode_batch(texts)):
        if len(ids):
          data = ids.astype(_dtype(tokenizer)).tobytes()
          digest.update(data)
          file.write(data)
          lengths.append(len(ids))
          draws.append(draw(name, 'split'))
  is_validation, sizes = split(
    np.array(draws), np.array(lengths, np.int64), config.val_fraction
  )
  digest.update(sizes.tobytes() + is_validation.tobytes())
  np.savez(
    partial / 'documents.npz',
    offsets=np.concatenate([[0], np.cumsum(sizes)]),
    is_validation=is_validation,
    fingerprint=digest.hexdigest(),
  )
  partial.rename(folder)


def _sample(config: config_lib.DataConfig, total: int) -> Iterator[str]:
  """Training documents for the BPE, about `TRAIN_BYTES` of `total` bytes.

  Documents that validate are not among them, unless there is no other.
  """
  room = TRAIN_BYTES
  for name, text in corpora.documents(config):
    chosen = draw(name, 'bpe') * total < TRAIN_BYTES
    if chosen and draw(name, 'split') >= config.val_fraction:
      yield text
      room -= len(text.encode())
      if room <= 0:
        return
  if room == TRAIN_BYTES:
    yield from (
      text for _, text in itertools.islice(corpora.documents(config), 1)
    )


def _batches(
  documents: Iterable[corpora.Document],
) -> Iterator[list[corpora.Document]]:
  """Groups documents to be encoded together."""
  batch, size = [], 0
  for document in documents:
    batch.append(document)
    size += len(document[1])
    if size >= _BATCH_CHARS:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


def _progress(
  documents: Iterable[corpora.Document], total: int
) -> Iterator[corpora.Document]:
  """A progress bar on stderr; `total` is in bytes, of files as they lie."""
  with tqdm.tqdm(
    total=total, unit='B', unit_scale=True, desc='tokenising', leave=False
  ) as bar:
    for document in documents:
      yield document
      bar.update(len(document[1].encode()))
