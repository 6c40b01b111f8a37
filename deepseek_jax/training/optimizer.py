"""AdamW with clipping and low-precision moments (V3 sections 3.3.2 and 4.2).

The learning rate is an argument of each update, not part of the state: the host
evaluates the schedule, and one compiled step serves the whole run.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from deepseek_jax import config as config_lib


class AdamWState(NamedTuple):
  """Updates done (int32 []), and the moments, shaped like the parameters."""

  count: jax.Array
  mu: Any  # In precision.mu_dtype.
  nu: Any  # In precision.nu_dtype.


def decays(path: jax.tree_util.KeyPath) -> bool:
  """Whether weight decay acts on the parameter at `path`: on matrices only.

  Layers are stacked, so the rank does not tell a vector.  The vectors of this
  model are the RMSNorm weights, whose names all end in 'norm'.
  """
  names = [e.key for e in path if isinstance(e, jax.tree_util.DictKey)]
  return not (names and names[-1].endswith('norm'))


def global_norm(tree: Any) -> jax.Array:
  """The l2 norm of all leaves together, float32 []; NaN or inf if one has."""
  squares = (
    jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)
  )
  return jnp.sqrt(sum(squares, start=jnp.float32(0)))


def adamw(
  config: config_lib.OptimConfig, precision: config_lib.PrecisionConfig
) -> optax.GradientTransformationExtraArgs:
  """AdamW with decoupled decay, after clipping the gradients' global norm.

  `tx.update(grads, state, params, lr=lr)` returns what is to be added to the
  parameters.  Arithmetic is float32; only the stored moments are rounded, to
  the dtypes of `precision`.  A non-finite gradient gives non-finite updates:
  the caller looks at `global_norm(grads)`.
  """

  def init(params):
    def zeros(dtype):
      return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype), params)

    count = jnp.zeros([], jnp.int32)
    return AdamWState(
      count, mu=zeros(precision.mu_dtype), nu=zeros(precision.nu_dtype)
    )

  def update(grads, state, params, *, lr):
    count = optax.safe_increment(state.count)
    norm = global_norm(grads)
    clip = jnp.where(norm > config.clip_norm, config.clip_norm / norm, 1.0)
    mu_scale = 1 / _bias_correction(config.b1, count)
    nu_scale = 1 / _bias_correction(config.b2, count)

    def leaf(path, grad, mu, nu, param):
      grad = clip * grad.astype(jnp.float32)
      m = config.b1 * mu.astype(jnp.float32) + (1 - config.b1) * grad
      v = config.b2 * nu.astype(jnp.float32) + (1 - config.b2) * grad * grad
      step = m * mu_scale / (jnp.sqrt(v * nu_scale) + config.eps)
      if decays(path):
        step += config.weight_decay * param
      return (
        (-lr * step).astype(param.dtype),
        m.astype(mu.dtype),
        v.astype(nu.dtype),
      )

    leaves = jax.tree_util.tree_map_with_path(
      leaf, grads, state.mu, state.nu, params
    )
    updates, mu, nu = jax.tree.transpose(
      jax.tree.structure(params), jax.tree.structure((0, 0, 0)), leaves
    )
    return updates, AdamWState(count, mu, nu)

  return optax.GradientTransformationExtraArgs(init, update)


def _bias_correction(decay: float, count: jax.Array) -> jax.Array:
  """1 - decay^count, without the cancellation where `decay` is near 1."""
  log_decay = math.log(decay) if decay > 0 else -math.inf
  return -jnp.expm1(count * log_decay)
