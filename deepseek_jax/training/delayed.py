"""The amaxes of delayed FP8 scaling, from one optimizer step to the next.

V3 scales online (section 3.3.2); this is what that is compared with.  Each
weight that is multiplied in FP8 has a history [L, N, 3] of the operands of its
products: see `ops/fp8_delayed.py`.  It moves once per optimizer step, by the
largest amax of all micro-batches.
"""

from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.config import FP8Config
from deepseek_jax.ops.fp8_delayed import Delayed

# Weights of layers/linear.py and of the experts.
_ATTENTION = ('wq', 'wq_a', 'wq_b', 'wkv_a', 'wkv_b', 'wk', 'wv', 'wo')
_WEIGHTS = (*_ATTENTION, 'w1', 'w2', 'w3')


def histories(params: Any, fp8: FP8Config) -> Any:
  """Of `amax_history` steps, newest first: zeros, at the paths of FP8 weights.

  Empty where scales are online.
  """
  steps = fp8.enabled and fp8.amax_history

  def of(tree):
    inner = {k: of(v) for k, v in tree.items() if isinstance(v, dict)}
    return {k: v for k, v in inner.items() if v} | {
      k: jnp.zeros((v.shape[0], steps, 3), jnp.float32)
      for k, v in tree.items()
      if k in _WEIGHTS
    }

  return of(params) if steps else {}


def attach(params: Any, amax: Any) -> Any:
  """`params` with `Delayed` for weights that have a history."""
  if isinstance(amax, dict):
    return {
      k: attach(v, amax[k]) if k in amax else v for k, v in params.items()
    }
  return Delayed(params, amax.max(1))


def detach(grads: Any, amax: Any) -> tuple[Any, Any]:
  """The plain gradients, and histories into which has gone what they saw."""
  if isinstance(amax, dict):
    both = {k: detach(grads[k], old) for k, old in amax.items()}
    plain = {k: g for k, (g, _) in both.items()}
    return {**grads, **plain}, {k: new for k, (_, new) in both.items()}
  new = jnp.concatenate([grads.amax[:, None], amax[:, :-1]], 1)
  return grads.w, new


def add(a: Any, b: Any) -> Any:
  """The sum of two micro-batches' gradients, and the larger of their amaxes."""

  def leaf(x, y):
    if isinstance(x, Delayed):
      return Delayed(x.w + y.w, jnp.maximum(x.amax, y.amax))
    return x + y

  return jax.tree.map(leaf, a, b, is_leaf=lambda x: isinstance(x, Delayed))
