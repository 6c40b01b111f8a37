"""`ops.fp8_experts.expert_ffn` on a GPU: codes moved once, products by group.

V3 section 3.3.1, figure 6.  Choice: the kernels of `permute`, `grouped` and
`quantize`.  Rows lie in blocks of 128 of one expert, which in the reference too
are tiles along the tokens.  SwiGLU is quantised where it is computed; its
gradient is left to XLA, which fuses it.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import layout as layout_lib

from deepseek_jax.kernels import dispatch, experts, grouped, mosaic, permute
from deepseek_jax.ops import fp8_experts as reference
from deepseek_jax.ops import grouped as layouts
from deepseek_jax.ops.formats import E4M3
from deepseek_jax.ops.fp8_linear import quantize_weight
from deepseek_jax.ops.fp8_matmul import Accumulation
from deepseek_jax.ops.fp8_recipe import Kept, Recipe
from deepseek_jax.ops.grouped import Layout
from deepseek_jax.ops.quantize import (
  BLOCK,
  GRADIENT_MIN_AMAX,
  ROW_TILE,
  SQUARE_TILE,
  Quantized,
)

_KERNEL = 'mosaic_gpu'
_ROW_MAJOR = layout_lib.Layout((0, 1, 2))


def obstacles(
  x_TD: jax.Array, w1_EDF: jax.Array | Quantized, recipe: Recipe
) -> list[str]:
  """Why the kernels do not compute the experts of these arguments."""
  found = permute.obstacles(x_TD.shape, x_TD.dtype)
  formats = recipe.fmt, recipe.gradient_fmt, recipe.dispatch.fmt
  if formats != (E4M3,) * 3:
    found.append(f'the codes are {", ".join(map(str, formats))}, not e4m3')
  tiles = recipe.activation_tile, recipe.weight_tile, recipe.gradient_tile
  if tiles != (ROW_TILE, SQUARE_TILE, ROW_TILE):
    found.append(f'the tiles are {tiles}')
  if recipe.accumulation != Accumulation():
    found.append(f'sums are {recipe.accumulation.kind}')
  D, F = w1_EDF.shape[1:]
  if (D % BLOCK or F % BLOCK) and not mosaic.is_interpreted():
    found.append(f'the widths {D} and {F} are not multiples of {BLOCK}')
  return found


def expert_ffn(
  x_TD: jax.Array,
  w1_EDF: jax.Array | Quantized,
  w2_EFD: jax.Array | Quantized,
  w3_EDF: jax.Array | Quantized,
  expert_ids_TK: jax.Array,
  weights_TK: jax.Array,
  recipe: Recipe,
  implementation: str | None = None,
) -> jax.Array:
  """`ops.fp8_experts.expert_ffn`, by kernels where they can run."""
  weights = w1_EDF, w2_EFD, w3_EDF
  found = obstacles(x_TD, w1_EDF, recipe)
  choice = dispatch.choose(implementation, found, 'fp8 experts', x_TD, w1_EDF)
  if not choice.is_kernel:
    return reference.expert_ffn(
      x_TD, *weights, expert_ids_TK, weights_TK, recipe
    )
  layout = layouts.lay_out(expert_ids_TK, w1_EDF.shape[0])
  layout = jax.tree.map(lambda x: checkpoint_name(x, 'routing'), layout)
  return _ffn(x_TD, weights, weights_TK, layout, recipe)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _ffn(x_TD, weights, weights_TK, layout, recipe):
  return _fwd(x_TD, weights, weights_TK, layout, recipe)[0]


def _fwd(x_TD, weights, weights_TK, layout, recipe):
  w1, w2, w3 = (_quantize(w, recipe) for w in weights)
  sent = checkpoint_name(_rowwise(x_TD, recipe.dispatch, recipe), 'linear_in')
  x = _permute(sent, layout)
  dot = functools.partial(_dot, layout=layout, dtype=x_TD.dtype)
  gate, up = dot(x, w1), dot(x, w3)
  kept = tuple(_rowwise(v, recipe.swiglu, recipe) for v in (gate, up))
  kept = checkpoint_name(kept, 'ffn_up')
  gates_R = experts.gate_weights(weights_TK, layout)
  hidden = recipe.steps.swiglu(gate, up, gates_R, recipe.fmt, recipe.scale)
  y_TD = _unpermute(dot(hidden, w2), layout)
  return y_TD, (sent, weights, weights_TK, layout, kept)


def _bwd(recipe, residuals, dy_TD):
  sent, weights, weights_TK, layout, kept = residuals
  w1, w2, w3 = (_quantize(w, recipe).mT for w in weights)
  sent_dy = _rowwise(dy_TD, recipe.dispatch_gradient, recipe)
  dy = _permute(sent_dy, layout)
  gates_R = experts.gate_weights(weights_TK, layout)
  dhidden = _dot(dy, w2, layout, jnp.float32)
  hidden, vjp = jax.vjp(
    experts.hidden_of, *(q.dequantize() for q in kept), gates_R
  )
  *dinputs, dgates_R = vjp(dhidden)
  dinputs = [v.astype(dy_TD.dtype) for v in dinputs]
  operand = Kept(E4M3, recipe.scale, GRADIENT_MIN_AMAX)
  codes = (_rowwise(v, operand, recipe) for v in dinputs)
  pairs = list(zip(codes, (w1, w3)))
  dx = grouped.fp8_dots(pairs, layout.groups, dy_TD.dtype, _KERNEL)
  dws = (None,) * 3
  if not isinstance(weights[0], Quantized):
    x = _turned(_permute(sent, layout), recipe.dispatch, recipe)
    dy = _turned(dy, recipe.dispatch_gradient, recipe)
    tile, scale = recipe.turned()
    along = functools.partial(
      recipe.steps.quantize, tile=tile, fmt=E4M3, scale=scale
    )
    hidden = along(hidden.astype(dy_TD.dtype))
    dgate, dup = (along(v, min_amax=GRADIENT_MIN_AMAX) for v in dinputs)
    pairs = (x, dgate), (hidden, dy), (x, dup)
    dws = tuple(
      grouped.fp8_outer(*pair, layout.groups, implementation=_KERNEL).astype(
        w.dtype
      )
      for pair, w in zip(pairs, weights)
    )
  dweights_TK = dgates_R.at[layout.row_TK].get(mode='fill', fill_value=0)
  return (
    _unpermute(dx, layout),
    dws,
    dweights_TK.astype(weights_TK.dtype),
    None,
  )


_ffn.defvjp(_fwd, _bwd)


def _quantize(w_EKN: jax.Array | Quantized, recipe: Recipe) -> Quantized:
  """Codes that lie as the weight does.

  Else XLA saves the transposition of a layer's codes by transposing the float32
  weights of all layers beforehand, and back for what wants them as they were.
  """
  q = quantize_weight(w_EKN, recipe)
  codes = layout_lib.with_layout_constraint(q.codes, _ROW_MAJOR)
  return dataclasses.replace(q, codes=codes)


def _rowwise(x: jax.Array, kept: Kept, recipe: Recipe) -> Quantized:
  how = kept.fmt, kept.scale
  return recipe.steps.quantize(x, ROW_TILE, *how, min_amax=kept.min_amax)


def _turned(sent: Quantized, kept: Kept, recipe: Recipe) -> Quantized:
  """What was sent, as an operand of Wgrad."""
  tile, scale = recipe.turned(kept)
  how = tile, E4M3, scale
  return recipe.steps.requantize(sent, *how, min_amax=kept.min_amax)


def _permute(q: Quantized, layout: Layout) -> Quantized:
  """Rows of codes and of scales, zero where there is no token."""
  codes = permute.permute(q.codes, layout, _KERNEL)
  return Quantized(codes, layouts.permute(q.scales, layout), q.tile, q.fmt)


def _unpermute(rows_RD: jax.Array, layout: Layout) -> jax.Array:
  return permute.unpermute(rows_RD, layout, implementation=_KERNEL)


def _dot(x: Quantized, w: Quantized, layout: Layout, dtype: Any) -> jax.Array:
  return grouped.fp8_dot(x, w, layout.groups, dtype, _KERNEL)
