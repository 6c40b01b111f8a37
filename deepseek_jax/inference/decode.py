"""Plain decoding: a token of every sequence per pass, many passes a call."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.inference import cache as cache_lib
from deepseek_jax.models import deepseek
from deepseek_jax.ops import sampling

# On a GPU XLA makes one product of several with the same rows, if the matrices
# are small, and for that would copy them in every pass.
OPTIONS = {'xla_gpu_dot_merger_threshold_mb': 0}


class Rows(NamedTuple):
  """How far each sequence has come; B rows.

  Attributes:
    pending_B: int32, the last token, not yet in the cache.
    budget_B: int32, how many more tokens may be added; 0: finished.
    keys_B: PRNG keys; token n of a row is drawn with its key folded with n.
  """

  pending_B: jax.Array
  budget_B: jax.Array
  keys_B: jax.Array


class Carry(NamedTuple):
  """All that one compiled call hands to the next."""

  cache: cache_lib.Cache
  rows: Rows
  load_LE: jax.Array | None


def keys_at(rows: Rows, positions_B: jax.Array) -> jax.Array:
  """The key of each row for the token at a position."""
  return jax.vmap(jax.random.fold_in)(rows.keys_B, positions_B)


def emit(
  rows: Rows, tokens_BT: jax.Array, valid_BT: jax.Array, stop_ids: jax.Array
) -> tuple[Rows, jax.Array, jax.Array]:
  """Ends rows at a stop token or an empty budget.

  Args:
    rows: before.
    tokens_BT: new tokens, in order.
    valid_BT: bool, a prefix of each row.
    stop_ids: int32 [n].

  Returns:
    The rows, `pending_B` the last valid token; int32 [B, T], what to put out,
    -1 for nothing; int32 [B], how many tokens that took, a stop token included.
  """
  T = tokens_BT.shape[1]
  is_stop = (tokens_BT[..., None] == stop_ids).any(-1) & valid_BT
  before = jnp.cumsum(is_stop, 1) - is_stop
  open_BT = valid_BT & (before == 0)
  open_BT &= jnp.arange(T) < rows.budget_B[:, None]
  out_BT = jnp.where(open_BT & ~is_stop, tokens_BT, -1)
  stopped_B = (open_BT & is_stop).any(1)
  taken_B = open_BT.sum(1, dtype=jnp.int32)
  budget_B = rows.budget_B - taken_B
  last = jnp.maximum(valid_BT.sum(1) - 1, 0)[:, None]
  pending_B = jnp.take_along_axis(tokens_BT, last, 1)[:, 0]
  rows = rows._replace(
    pending_B=pending_B, budget_B=jnp.where(stopped_B, 0, budget_B)
  )
  return rows, out_BT, taken_B


@functools.partial(jax.jit, static_argnums=0)
def first(model, weights, last_BD, lengths_B, rows, how, stop_ids):
  """Chooses the token after each prompt: (rows, int32 [B, 1])."""
  logits_BV = model.apply(weights, last_BD, method='unembed')
  token_B = sampling.choose(logits_BV, keys_at(rows, lengths_B), how)
  valid = jnp.ones((len(token_B), 1), bool)
  return emit(rows, token_B[:, None], valid, stop_ids)[:2]


@functools.partial(
  jax.jit,
  static_argnums=(0, 1),
  donate_argnums=3,
  compiler_options=OPTIONS,
)
def decode(
  model: deepseek.Transformer,
  steps: int,
  weights: dict[str, Any],
  carry: Carry,
  how: sampling.Sampling,
  stop_ids: jax.Array,
) -> tuple[Carry, jax.Array]:
  """At most `steps` passes; fewer if every row ends: (carry, int32 [B, steps]).

  The whole loop is one program: neither Python nor the host comes in between.
  """
  B = carry.rows.budget_B.shape[0]

  def body(loop):
    i, (cache, rows, load_LE), out = loop
    live_B = rows.budget_B > 0
    hidden, layers, load = model.apply(
      weights,
      rows.pending_B[:, None],
      cache.lengths_B[:, None],
      live_B[:, None].astype(jnp.float32),
      cache.layers,
      method='extend',
    )
    lengths_B = cache.lengths_B + live_B
    logits_BV = model.apply(weights, hidden[:, 0], method='unembed')
    token_B = sampling.choose(logits_BV, keys_at(rows, lengths_B), how)
    rows, new, _ = emit(rows, token_B[:, None], live_B[:, None], stop_ids)
    carry = Carry(
      cache._replace(layers=layers, lengths_B=lengths_B),
      rows,
      load_LE if load is None else load_LE + load,
    )
    out = jax.lax.dynamic_update_slice_in_dim(out, new, i, 1)
    return i + 1, carry, out

  def goes_on(loop):
    return (loop[0] < steps) & (loop[1].rows.budget_B > 0).any()

  out = jnp.full((B, steps), -1, jnp.int32)
  _, carry, out = jax.lax.while_loop(goes_on, body, (0, carry, out))
  return carry, out
