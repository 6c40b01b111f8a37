"""Cross-entropy without a [T, V] array, and the balance losses."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.config import MoEConfig

# Tokens whose logits exist at once, as [chunk, V] in float32.  For V = 129,280
# they are 265 MB; all 4,096 tokens of a sequence would be 2.1 GB.
_CHUNK_TOKENS = 512


class CrossEntropy(NamedTuple):
  """Sums over tokens; every one a float32 scalar.

  Attributes:
    loss: sum of weight * (nll + z_loss * logsumexp^2).  Differentiable.
    nll: sum of weight * nll, in nats.
  """

  loss: jax.Array
  nll: jax.Array


def _chunk_length(batch: int, length: int) -> int:
  """That of as few chunks as the limit allows, all about equally long."""
  n = -(-length // max(1, _CHUNK_TOKENS // batch))
  return -(-length // n)


def _split(x: jax.Array, chunk: int) -> jax.Array:
  """[B, T, ...] -> [n, B, chunk, ...], zeros at the end; B stays sharded."""
  if missing := -x.shape[1] % chunk:
    x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
  return x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1)


def _join(chunks: jax.Array, length: int) -> jax.Array:
  """The inverse of `_split`."""
  x = chunks.swapaxes(0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def logits(hidden: jax.Array, head_VD: jax.Array) -> jax.Array:
  """The output head: `hidden` [..., D] to float32 [..., V]."""
  return jnp.einsum(
    '...D,VD->...V', hidden, head_VD, preferred_element_type=jnp.float32
  )


def _chunk_loss(hidden, head, targets, weights, z_loss):
  """One chunk's `CrossEntropy`, its logits and their logsumexp."""
  z_TV = logits(hidden, head)
  lse = jax.nn.logsumexp(z_TV, axis=-1)
  target_z = jnp.take_along_axis(z_TV, targets[..., None], -1)[..., 0]
  nll = jnp.sum(weights * (lse - target_z))
  loss = nll + z_loss * jnp.sum(weights * lse**2)
  return CrossEntropy(loss, nll), z_TV, lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(
  hidden_BTD: jax.Array,
  head_VD: jax.Array,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  z_loss: float = 0.0,
) -> CrossEntropy:
  """Weighted token cross-entropy of `hidden @ head^T`, chunk by chunk.

  At no time, forward or backward, do the logits of all tokens exist.  The
  gradient is computed in the forward pass of each chunk, where the logits are
  at hand, so nothing is recomputed: weights must therefore be given here and
  not applied afterwards.

  Args:
    hidden_BTD: compute dtype.
    head_VD: compute dtype.
    targets_BT: int32.
    weights_BT: float32, 0 for tokens that do not count; no gradient.
    z_loss: coefficient of logsumexp^2.

  Returns:
    `CrossEntropy`; only `.loss` carries a gradient.
  """
  return _forward(
    hidden_BTD, head_VD, targets_BT, weights_BT, z_loss, with_grad=False
  )[0]


def _forward(hidden, head, targets, weights, z_loss, with_grad):
  chunk = _chunk_length(*targets.shape)

  def body(carry, xs):
    sums, head_grad = carry
    # Products of matrices: see `layers/linear.py`.
    h, t, w = (x.reshape(-1, *x.shape[2:]) for x in xs)
    chunk_sums, z_TV, lse = _chunk_loss(h, head, t, w, z_loss)
    sums = jax.tree.map(jnp.add, sums, chunk_sums)
    if not with_grad:
      return (sums, head_grad), None
    prob = jnp.exp(z_TV - lse[..., None])
    slope = w * (1 + 2 * z_loss * lse)
    iota = jax.lax.broadcasted_iota(jnp.int32, z_TV.shape, 1)
    hit = jnp.where(iota == t[..., None], w[..., None], 0.0)
    dlogits = (prob * slope[..., None] - hit).astype(h.dtype)
    dh = jnp.einsum('TV,VD->TD', dlogits, head).astype(h.dtype)
    head_grad += jnp.einsum(
      'TV,TD->VD', dlogits, h, preferred_element_type=jnp.float32
    )
    return (sums, head_grad), dh.reshape(xs[0].shape)

  zeros = CrossEntropy(jnp.float32(0), jnp.float32(0))
  head_grad = jnp.zeros(head.shape if with_grad else (), jnp.float32)
  xs = tuple(_split(x, chunk) for x in (hidden, targets, weights))
  (sums, head_grad), dhidden = jax.lax.scan(body, (zeros, head_grad), xs)
  if not with_grad:
    return sums, None
  dhidden = _join(dhidden, hidden.shape[1])
  return sums, (dhidden, head_grad.astype(head.dtype))


def _cross_entropy_fwd(hidden, head, targets, weights, z_loss):
  return _forward(hidden, head, targets, weights, z_loss, with_grad=True)


def _cross_entropy_bwd(z_loss, grads, cotangent):
  del z_loss
  scale = cotangent.loss
  dhidden, dhead = jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads)
  return dhidden, dhead, None, None


cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def greedy(hidden_BTD: jax.Array, head_VD: jax.Array) -> jax.Array:
  """The most likely token at each position, chunk by chunk: int32 [B, T]."""
  chunk = _chunk_length(*hidden_BTD.shape[:2])

  def best(hidden):
    return logits(hidden, head_VD).argmax(-1).astype(jnp.int32)

  chosen = jax.lax.map(best, _split(hidden_BTD, chunk))
  return _join(chosen, hidden_BTD.shape[1])


def balance_loss(
  scores_BTE: jax.Array,
  expert_ids_BTK: jax.Array,
  config: MoEConfig,
  mask_BT: jax.Array,
  batch_sum: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> jax.Array:
  """`sum_i f_i P_i` of one layer, summed over sequences: float32 scalar.

  Multiply by alpha and divide by the number of sequences.  `config.aux_loss`:

  - sequence: V3 equations 17 to 20.  f counts the top-K of the plain scores
    (no bias, no groups) times E / (K T); P is the mean of s / sum(s).
  - batch: the same over all sequences as one (V3 section 4.5.3).
  - expert: V2 section 2.2.3, equations 23 to 25.  f counts the experts really
    selected; P is the mean of the plain scores.
  - gshard: f counts first choices only, with K = 1 (GShard, algorithm 1).

  Args:
    scores_BTE: float32, without bias; f carries no gradient, P does.
    expert_ids_BTK: int32, the experts selected, best first.
    config: kind of loss, E and K.
    mask_BT: float32, 0 for padding.
    batch_sum: where devices share the batch, sums over them.  The result is
      then this device's share of the loss.
  """
  E, K = config.n_routed_experts, config.n_activated_experts
  probs = scores_BTE
  if config.aux_loss in ('sequence', 'batch'):
    _, expert_ids_BTK = jax.lax.top_k(jax.lax.stop_gradient(scores_BTE), K)
    probs = scores_BTE / scores_BTE.sum(-1, keepdims=True)
  elif config.aux_loss == 'gshard':
    expert_ids_BTK, K = expert_ids_BTK[..., :1], 1
  chosen_BTE = jax.nn.one_hot(expert_ids_BTK, E, dtype=jnp.float32).sum(-2)
  is_batch = config.aux_loss == 'batch'
  axes, total = ((0, 1), batch_sum) if is_batch else ((1,), lambda x: x)
  tokens = jnp.maximum(total(mask_BT.sum(axes)), 1.0)[..., None]
  mask = mask_BT[..., None]
  f = E / (K * tokens) * total((chosen_BTE * mask).sum(axes))
  p = (probs * mask).sum(axes) / tokens
  loss = jnp.sum(f * p)
  # Every kind is a sum over sequences, so that one division serves them all.
  if is_batch:
    loss *= total(mask_BT.any(-1).sum())
  return loss
