"""From logits to tokens: temperature, top-k, top-p, and rejection sampling."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a token is chosen; the values are traced, the kind is compiled in.

  Build it with `sampling`.

  Attributes:
    temperature: float32 scalar, above 0 unless greedy.
    top_k: int32 scalar; V or more: all.
    top_p: float32 scalar in (0, 1].
    kind: 'greedy', 'plain' or 'filtered' (top-k or top-p at work).
  """

  temperature: jax.Array
  top_k: jax.Array
  top_p: jax.Array
  kind: str = dataclasses.field(metadata={'static': True})


def sampling(
  temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0
) -> Sampling:
  """A checked `Sampling`.

  Args:
    temperature: 0 is greedy, as is what float32 has no number for.
    top_k: only the k likeliest tokens; 0: all.
    top_p: of those, the likeliest whose probabilities first sum to it.

  Raises:
    ValueError: on a value out of range.
  """
  if not 0 <= temperature < float('inf'):
    raise ValueError(f'temperature={temperature}: use 0 (greedy) or above')
  if top_k < 0:
    raise ValueError(f'top_k={top_k}: use 0 (all tokens) or a count')
  if not 0 < top_p <= 1:
    raise ValueError(f'top_p={top_p}: use a probability in (0, 1]')
  tiny, every = jnp.finfo(jnp.float32).tiny, jnp.iinfo(jnp.int32).max
  kind = 'filtered' if top_k or top_p < 1 else 'plain'
  return Sampling(
    jnp.float32(temperature),
    jnp.int32(min(top_k or every, every)),
    jnp.float32(max(top_p, tiny)),
    'greedy' if temperature < tiny else kind,
  )


def distribution(logits: jax.Array, how: Sampling) -> jax.Array:
  """The probabilities that tokens are drawn with: float32 [..., V].

  Temperature, then top-k, then top-p, as `transformers` orders them.  Greedy:
  one for the first of the largest logits.
  """
  V = logits.shape[-1]
  if how.kind == 'greedy':
    return jax.nn.one_hot(jnp.argmax(logits, -1), V)
  # The largest becomes 0, which no temperature makes infinite.
  logits -= logits.max(-1, keepdims=True)
  probs = jax.nn.softmax(logits / how.temperature, -1)
  if how.kind == 'plain':
    return probs
  order = jnp.argsort(-probs, axis=-1, stable=True)
  ranked = jnp.take_along_axis(probs, order, -1)
  ranked = jnp.where(jnp.arange(V) < how.top_k, ranked, 0)
  ranked /= ranked.sum(-1, keepdims=True)
  before = jnp.cumsum(ranked, -1) - ranked
  # The first always stays, however small top_p.
  kept = (before < how.top_p) & (ranked > 0) | (jnp.arange(V) == 0)
  ranked = jnp.where(kept, ranked, 0)
  ranked /= ranked.sum(-1, keepdims=True)
  back = jnp.argsort(order, axis=-1)
  return jnp.take_along_axis(ranked, back, -1)


def draw(keys_B: jax.Array, probs_BV: jax.Array) -> jax.Array:
  """One token a row, from its own key: int32 [B]."""
  logs = jnp.log(probs_BV)  # -inf where a token is excluded.
  return jax.vmap(jax.random.categorical)(keys_B, logs).astype(jnp.int32)


def choose(logits_BV: jax.Array, keys_B: jax.Array, how: Sampling) -> jax.Array:
  """The next token of every row: int32 [B]."""
  if how.kind == 'greedy':
    return jnp.argmax(logits_BV, -1).astype(jnp.int32)
  return draw(keys_B, distribution(logits_BV, how))


def accept(
  drafts_BD: jax.Array,
  draft_probs_BDV: jax.Array,
  probs_BTV: jax.Array,
  keys_B: jax.Array,
  how: Sampling,
) -> tuple[jax.Array, jax.Array]:
  """How many drafts stand, and the token after them: (int32 [B], int32 [B]).

  Rejection sampling: draft d stands with probability min(1, p(d) / q(d)); the
  first that does not is replaced by a draw from max(p - q, 0), normalised; if
  all stand, one more comes from the last p.  Each resulting token then has the
  model's own distribution p, whatever q is (arXiv 2211.17192, appendix A.1).

  Args:
    drafts_BD: int32, D proposals, drawn from `draft_probs_BDV`.
    draft_probs_BDV: q.
    probs_BTV: p, of the model, T = D + 1.
    keys_B: a key per row.
    how: greedy needs no randomness.
  """
  D = drafts_BD.shape[1]
  at_draft = drafts_BD[..., None]
  p = jnp.take_along_axis(probs_BTV[:, :D], at_draft, -1)[..., 0]
  q = jnp.take_along_axis(draft_probs_BDV, at_draft, -1)[..., 0]
  keys = jax.vmap(jax.random.split)(keys_B)
  if how.kind == 'greedy':
    stands = p > 0
  else:
    u = jax.vmap(lambda key: jax.random.uniform(key, (D,)))(keys[:, 0])
    stands = u * q < p
  count_B = jnp.cumprod(stands, axis=1, dtype=jnp.int32).sum(1)
  # After the last draft nothing was proposed: q is 0 and p stays p.
  q_BTV = jnp.pad(draft_probs_BDV, ((0, 0), (0, 1), (0, 0)))
  pick = count_B[:, None, None]
  p_BV = jnp.take_along_axis(probs_BTV, pick, 1)[:, 0]
  q_BV = jnp.take_along_axis(q_BTV, pick, 1)[:, 0]
  rest_BV = jnp.maximum(p_BV - q_BV, 0)
  # Nothing can be left by rounding only, where p and q are the same.
  rest_BV = jnp.where(rest_BV.sum(-1, keepdims=True) > 0, rest_BV, p_BV)
  if how.kind == 'greedy':
    return count_B, jnp.argmax(rest_BV, -1).astype(jnp.int32)
  return count_B, draw(keys[:, 1], rest_BV)
