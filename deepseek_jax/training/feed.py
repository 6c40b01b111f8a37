"""The batches of a run, and where in the data it stands."""

from typing import Any

import numpy as np
from absl import logging

from deepseek_jax import config as config_lib
from deepseek_jax.data import pipeline
from deepseek_jax.training import layout as layout_lib


class Feed:
  """Draws `[A, b, T + 1]` batches and knows how to go on from `position`."""

  def __init__(
    self,
    corpus: pipeline.Corpus,
    config: config_lib.Config,
    position: dict[str, Any] | None = None,
    layout: layout_lib.Layout | None = None,
  ):
    """Opens the training rows, where `position` of an earlier feed says.

    Of each micro-batch this draws what the process's own devices work on.
    Another micro-batch size or number of processes goes on at the same row.
    Other rows (a changed corpus, length, FIM rate or seed) begin at their own
    first, with a warning.
    """
    data = config.data
    self._micro = config.micro_batch_size
    self._layout = layout
    index, self._shares = layout.share(self._micro) if layout else (0, 1)
    self._rows = {
      'corpus': corpus.fingerprint,
      'seq_len': data.seq_len,
      'fim_rate': data.fim_rate,
      'seed': data.seed,
    }
    self._drawn = 0  # Rows.
    self._begin = 0  # The row at which the iterator began.
    state = position and self._go_to(position)
    self._iterator = pipeline.train_iterator(
      corpus,
      data,
      self._micro,
      first_row=self._begin,
      process_index=index,
      process_count=self._shares,
    )
    if state:
      self._iterator.set_state(state)

  @property
  def position(self) -> dict[str, Any]:
    """Where the next batch begins: plain values for `Feed(position=...)`."""
    return {
      'rows': self._rows,
      'drawn': self._drawn,
      'begin': self._begin,
      'micro_batch_size': self._micro,
      'shares': self._shares,
      'iterator': self._iterator.get_state(),
    }

  def draw(self, batch_size: int) -> dict[str, Any]:
    """The next batch: 'tokens' and 'segments', int32 [A, b, T + 1].

    In numpy, or, with a layout, on its devices.

    Args:
      batch_size: A b sequences, where b is the micro-batch size.
    """
    n = batch_size // self._micro
    parts = [next(self._iterator) for _ in range(n)]
    self._drawn += batch_size
    batch = {key: np.stack([part[key] for part in parts]) for key in parts[0]}
    return self._layout.put_batch(batch) if self._layout else batch

  def _go_to(self, position):
    """Takes its rows; the iterator's state, if that is good for this feed."""
    cut = position['micro_batch_size'], position.get('shares', 1)
    changed = [k for k, v in self._rows.items() if position['rows'][k] != v]
    if changed:
      logging.warning(
        'data: %s changed since the checkpoint; starting at the first row',
        ', '.join(changed),
      )
      return None
    self._drawn = position['drawn']
    if cut == (self._micro, self._shares):
      self._begin = position.get('begin', 0)
      return position['iterator']
    self._begin = self._drawn
    return None
