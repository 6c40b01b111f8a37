"""Speculative decoding with the MTP modules (V3 section 5.4.3).

A pass drafts D tokens, runs the main model on the pending token and the drafts
at once, and keeps what `sampling.accept` lets stand, and one token more.  With
sampling every token has the model's own distribution; with greedy choice it is
the likeliest, and the text that of plain decoding.  Both hold up to rounding: a
product of D + 1 rows sums in another order than one of a single row.  So a near
tie may fall the other way: of 64 texts of 64 tokens none did in float32, but 5
in BF16 (`experiments/LOG.md`, 2026-11-30).

Depth k drafts as it was trained: from h^{k-1} at the last position and the
token k ahead of it.  Its cache needs true tokens only, while the drafts it saw
may since have fallen; so every pass runs it again over a window of the last
positions, which also covers the new ones.  Depths beyond the last module reuse
it one position on, its own hidden state in place of the main model's.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.inference import decode as decode_lib
from deepseek_jax.inference import prefill
from deepseek_jax.models import deepseek
from deepseek_jax.ops import sampling


class Window(NamedTuple):
  """The last positions of each row, W = M - 1 + D + 1 of them.

  Attributes:
    hidden_BWD: final hidden states of the main model.
    tokens_BW: the token after each.
    last_B: index of the last position in the cache; beyond it, arbitrary.
  """

  hidden_BWD: jax.Array
  tokens_BW: jax.Array
  last_B: jax.Array


class Tally(NamedTuple):
  """What drafting was good for.

  Attributes:
    tried_D: float32, drafts that all earlier drafts of the pass let be tested,
      those behind the end of a text left out.
    accepted_D: float32, those that stood.
    passes: float32 scalar, rows that a pass worked on.
    taken: float32 scalar, tokens that came of them, stop tokens included.
  """

  tried_D: jax.Array
  accepted_D: jax.Array
  passes: jax.Array
  taken: jax.Array


class Carry(NamedTuple):
  """All that one compiled call hands to the next."""

  plain: decode_lib.Carry
  window: Window
  tally: Tally


def init_carry(
  plain: decode_lib.Carry,
  last_BMD: jax.Array,
  tails: jax.Array,
  drafts: int,
) -> Carry:
  """The carry after prefill and the first token.

  Args:
    plain: its `rows.pending_B` is the first token.
    last_BMD: hidden states of each prompt's last M tokens, M the MTP modules.
    tails: int32 [B, M - 1], each prompt's last tokens.
    drafts: D.
  """
  B, M, _ = last_BMD.shape
  hidden = jnp.pad(last_BMD, ((0, 0), (0, drafts), (0, 0)))
  tokens = jnp.concatenate([tails, plain.rows.pending_B[:, None]], 1)
  tokens = jnp.pad(tokens, ((0, 0), (0, drafts)))
  window = Window(hidden, tokens, jnp.full(B, M - 1, jnp.int32))
  return Carry(
    plain,
    window,
    # No array twice: all of them are donated.
    Tally(*(jnp.zeros(shape) for shape in (drafts, drafts, (), ()))),
  )


def _at(x_BT: jax.Array, index_B: jax.Array, count: int = 1) -> jax.Array:
  """`count` entries of each row from its own index: [B, count, ...]."""
  index = index_B[:, None] + jnp.arange(count)
  index = index.reshape(*index.shape, *[1] * (x_BT.ndim - 2))
  return jnp.take_along_axis(x_BT, index, 1)


def _draft(model, weights, mtp, window, lengths_B, live_B, drafts, draw):
  """(caches, int32 [B, D], their probabilities [B, D, V], loads [E]).

  Caches and loads are of each module.
  """
  M, W = len(mtp), window.tokens_BW.shape[1]
  counts = [None] * M
  hidden, last_B, mtp = window.hidden_BWD, window.last_B, list(mtp)
  positions = (lengths_B - 1 - last_B)[:, None] + jnp.arange(W)
  tokens = jnp.pad(window.tokens_BW, ((0, 0), (0, drafts)))
  known_BW = live_B[:, None] & (jnp.arange(W) <= last_B[:, None])
  known_BW &= positions >= 0
  chosen, probs = [], []
  for j in range(1, drafts + 1):
    if j <= M:
      ahead, at, mask = tokens[:, j - 1 : j - 1 + W], positions, known_BW
    else:
      ahead, at = chosen[-1][:, None], lengths_B[:, None] - 1 + j - M
      mask = live_B[:, None]
    k = min(j, M)
    hidden, mtp[k - 1], counts_E = model.apply(
      weights,
      k,
      hidden,
      ahead,
      at,
      mask.astype(jnp.float32),
      mtp[k - 1],
      method='extend_ahead',
    )
    more = j > M and counts_E is not None
    counts[k - 1] = counts[k - 1] + counts_E if more else counts_E
    final = _at(hidden, last_B) if j <= M else hidden
    if j >= M:
      hidden = final  # What comes next goes on from the last position.
    token_B, probs_BV = draw(
      model.apply(weights, final[:, 0], method='unembed'), j
    )
    chosen.append(token_B)
    probs.append(probs_BV)
    tokens = tokens.at[jnp.arange(len(token_B)), last_B + j].set(token_B)
  return tuple(mtp), jnp.stack(chosen, 1), jnp.stack(probs, 1), counts


def _pass(model, weights, carry, drafts, how, stop_ids):
  """Drafts, verifies, keeps; int32 [B, D + 1] of output, -1 for nothing."""
  (cache, rows, load_LE), window, tally = carry
  live_B, n_B = rows.budget_B > 0, cache.lengths_B
  # One for each draft and one to accept; token n was drawn with n's own.
  keys = decode_lib.keys_at(rows, n_B + 1)
  keys = jax.vmap(lambda key: jax.random.split(key, drafts + 1))(keys)

  def draw(logits_BV, j):
    probs_BV = sampling.distribution(logits_BV, how)
    if how.kind == 'greedy':
      return jnp.argmax(logits_BV, -1).astype(jnp.int32), probs_BV
    return sampling.draw(keys[:, j], probs_BV), probs_BV

  mtp, drafted_BD, draft_probs, counts = _draft(
    model, weights, cache.mtp, window, n_B, live_B, drafts, draw
  )
  T = drafts + 1
  hidden, layers, load = model.apply(
    weights,
    jnp.concatenate([rows.pending_B[:, None], drafted_BD], 1),
    n_B[:, None] + jnp.arange(T),
    jnp.broadcast_to(live_B[:, None], (len(n_B), T)).astype(jnp.float32),
    cache.layers,
    method='extend',
  )
  probs = sampling.distribution(
    model.apply(weights, hidden, method='unembed'), how
  )
  count_B, next_B = sampling.accept(
    drafted_BD, draft_probs, probs, keys[:, 0], how
  )
  step = jnp.arange(T)
  new_BT = jnp.pad(drafted_BD, ((0, 0), (0, 1)))
  new_BT = jnp.where(step == count_B[:, None], next_B[:, None], new_BT)
  valid_BT = (step <= count_B[:, None]) & live_B[:, None]
  rows, out_BT, taken_B = decode_lib.emit(rows, new_BT, valid_BT, stop_ids)
  cache = cache._replace(
    layers=layers, mtp=mtp, lengths_B=n_B + live_B * (count_B + 1)
  )
  load_LE = prefill.add_load(load_LE, load, counts)
  return Carry(
    decode_lib.Carry(cache, rows, load_LE),
    _slide(window, hidden, new_BT, live_B, count_B, len(mtp)),
    _count(tally, live_B, count_B, taken_B, drafts),
  ), out_BT


def _slide(window, hidden_BTD, new_BT, live_B, count_B, M):
  """The window after a pass: M - 1 positions before the new ones."""
  first_B = window.last_B - (M - 2)
  hidden = jnp.concatenate(
    [_at(window.hidden_BWD, first_B, M - 1), hidden_BTD], 1
  )
  tokens = jnp.concatenate([_at(window.tokens_BW, first_B, M - 1), new_BT], 1)
  moved = Window(hidden, tokens, M - 1 + count_B)

  def keep_if_live(new, old):
    live = live_B.reshape(-1, *[1] * (new.ndim - 1))
    return jnp.where(live, new, old)

  return jax.tree.map(keep_if_live, moved, window)


def _count(tally, live_B, count_B, taken_B, drafts):
  depth = jnp.arange(drafts)
  counts_BD = depth < taken_B[:, None]  # None of a row that is not live.
  return Tally(
    tally.tried_D + (counts_BD & (depth <= count_B[:, None])).sum(0),
    tally.accepted_D + (counts_BD & (depth < count_B[:, None])).sum(0),
    tally.passes + live_B.sum(),
    tally.taken + taken_B.sum(),
  )


@functools.partial(
  jax.jit,
  static_argnums=(0, 1, 2),
  donate_argnums=4,
  compiler_options=decode_lib.OPTIONS,
)
def decode(
  model: deepseek.Transformer,
  drafts: int,
  passes: int,
  weights: dict[str, Any],
  carry: Carry,
  how: sampling.Sampling,
  stop_ids: jax.Array,
) -> tuple[Carry, jax.Array]:
  """At most `passes` passes: (carry, int32 [B, passes * (D + 1)]).

  Rows accept different numbers of drafts; -1 stands where there is no token.
  """
  B, T = carry.plain.rows.budget_B.shape[0], drafts + 1

  def body(loop):
    i, carry, out = loop
    carry, new = _pass(model, weights, carry, drafts, how, stop_ids)
    out = jax.lax.dynamic_update_slice_in_dim(out, new, i * T, 1)
    return i + 1, carry, out

  def goes_on(loop):
    return (loop[0] < passes) & (loop[1].plain.rows.budget_B > 0).any()

  out = jnp.full((B, passes * T), -1, jnp.int32)
  _, carry, out = jax.lax.while_loop(goes_on, body, (0, carry, out))
  return carry, out
