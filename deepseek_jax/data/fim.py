"""Fill-in-the-middle, prefix-suffix-middle form (V3 section 4.1).

A share of the documents is reordered before packing into
`<fim_begin> prefix <fim_hole> suffix <fim_end> middle`, from which a model
learns to fill a gap.  The cuts lie between tokens: the document keeps its
tokens and grows by exactly `EXTRA_TOKENS`, so that its place in the packed
stream is known without reading it.  Cuts within a token would need the text
encoded again; the papers do not say which they use.
"""

import numpy as np

EXTRA_TOKENS = 3

# Streams of random numbers that are independent of each other and of epochs.
_CHOICE, _CUTS = 1, 2


def uniforms(n: int, *key: int) -> np.ndarray:
  """`n` uniform numbers in [0, 1), float64, a function of the key alone."""
  return np.random.Generator(np.random.PCG64(key)).random(n)


def choose(n_documents: int, rate: float, seed: int) -> np.ndarray:
  """Which documents are reordered, bool [n_documents], a share of `rate`."""
  return uniforms(n_documents, seed, _CHOICE) < rate


def reorder(
  tokens: np.ndarray, fim_ids: tuple[int, int, int], seed: int, index: int
) -> np.ndarray:
  """Reorders document `index`, `[n]` tokens, into `[n + EXTRA_TOKENS]`.

  Both cuts are uniform over the n + 1 gaps, so any part may be empty; they
  depend on the seed and the index alone.
  """
  begin, hole, end = fim_ids
  cuts = np.sort(uniforms(2, seed, _CUTS, index) * (len(tokens) + 1))
  prefix, middle, suffix = np.split(tokens, cuts.astype(np.int64))
  return np.concatenate(
    [[begin], prefix, [hole], suffix, [end], middle], dtype=np.int32
  )
