"""`ops.experts.expert_ffn` on a GPU: rows moved once, products by group.

Choice: the kernels of `permute` and `grouped`, with SwiGLU and its gradient
left to XLA, which fuses them.  The rows of each expert are padded to blocks of
128, so that a tile is of one expert.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.kernels import dispatch, grouped, permute
from deepseek_jax.ops import experts as reference
from deepseek_jax.ops import grouped as layouts

_KERNEL = 'mosaic_gpu'


def obstacles(x_TD: jax.Array, w1_EDF: jax.Array) -> list[str]:
  """Why the kernels do not compute the experts of these arguments."""
  found = []
  if not x_TD.dtype == w1_EDF.dtype == jnp.bfloat16:
    found.append(f'the operands are {x_TD.dtype.name} and {w1_EDF.dtype.name}')
  if w1_EDF.shape[2] % 8:
    found.append(f'the width {w1_EDF.shape[2]} is not a multiple of 8')
  return found + permute.obstacles(x_TD.shape, x_TD.dtype)


def expert_ffn(
  x_TD: jax.Array,
  w1_EDF: jax.Array,
  w2_EFD: jax.Array,
  w3_EDF: jax.Array,
  expert_ids_TK: jax.Array,
  weights_TK: jax.Array,
  implementation: str | None = None,
) -> jax.Array:
  """`ops.experts.expert_ffn`, by kernels where they can run."""
  found = obstacles(x_TD, w1_EDF)
  choice = dispatch.choose(implementation, found, 'experts', x_TD, w1_EDF)
  weights = w1_EDF, w2_EFD, w3_EDF
  if not choice.is_kernel:
    return reference.expert_ffn(x_TD, *weights, expert_ids_TK, weights_TK)
  layout = layouts.lay_out(expert_ids_TK, w1_EDF.shape[0])
  layout = jax.tree.map(lambda x: checkpoint_name(x, 'routing'), layout)
  return _ffn(x_TD, weights, weights_TK, layout)


@jax.custom_vjp
def _ffn(x_TD, weights, weights_TK, layout):
  return _fwd(x_TD, weights, weights_TK, layout)[0]


def _fwd(x_TD, weights, weights_TK, layout):
  w1, w2, w3 = weights
  x = permute.permute(x_TD, layout, _KERNEL)
  gate, up = (checkpoint_name(_dot(x, w, layout), 'ffn_up') for w in (w1, w3))
  hidden = hidden_of(gate, up, gate_weights(weights_TK, layout))
  y = _dot(hidden.astype(x.dtype), w2, layout)
  y_TD = permute.unpermute(y, layout, implementation=_KERNEL)
  return y_TD, (x_TD, weights, weights_TK, layout, gate, up)


def _bwd(residuals, dy_TD):
  x_TD, (w1, w2, w3), weights_TK, layout, gate, up = residuals
  dy = permute.permute(dy_TD, layout, _KERNEL)
  dhidden = grouped.dot(dy, w2, layout.groups, True, jnp.float32, _KERNEL)
  hidden, vjp = jax.vjp(hidden_of, gate, up, gate_weights(weights_TK, layout))
  dgate, dup, dweights_R = vjp(dhidden)
  pairs = (dgate, w1), (dup, w3)
  dx = grouped.dots(pairs, layout.groups, True, x_TD.dtype, _KERNEL)
  x = permute.permute(x_TD, layout, _KERNEL)
  dw1, dw2, dw3 = (
    grouped.outer(*pair, layout.groups, implementation=_KERNEL).astype(w1.dtype)
    for pair in ((x, dgate), (hidden.astype(x.dtype), dy), (x, dup))
  )
  dweights_TK = dweights_R.at[layout.row_TK].get(mode='fill', fill_value=0)
  return (
    permute.unpermute(dx, layout, implementation=_KERNEL),
    (dw1, dw2, dw3),
    dweights_TK.astype(weights_TK.dtype),
    None,
  )


_ffn.defvjp(_fwd, _bwd)


def _dot(x, w, layout):
  return grouped.dot(x, w, layout.groups, implementation=_KERNEL)


def hidden_of(
  gate_RF: jax.Array, up_RF: jax.Array, weights_R: jax.Array
) -> jax.Array:
  """SwiGLU times the gate weights, in float32."""
  gate, up = gate_RF.astype(jnp.float32), up_RF.astype(jnp.float32)
  return jax.nn.silu(gate) * up * weights_R[:, None]


def gate_weights(weights_TK: jax.Array, layout: layouts.Layout) -> jax.Array:
  """float32 [R], zero for rows without a token."""
  flat = weights_TK.reshape(-1).astype(jnp.float32)
  return flat.at[layout.choice_R].get(mode='fill', fill_value=0)
