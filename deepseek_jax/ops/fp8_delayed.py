"""Delayed scaling: one FP8 scale per tensor, out of the steps before.

What V3 is compared with, not what it does: it scales online, tile by tile
(section 3.3.2).  The recipe is that of Transformer Engine: a tensor is scaled
by its largest amax of some steps, and clipped where it has grown since.  As
long as there is none, by its own.

The amaxes go with their weight through the layers, and what a pass has seen
comes back in the place of their gradient: forward and backward pass alike.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.ops import quantize as quantize_lib
from deepseek_jax.ops.formats import Format
from deepseek_jax.ops.fp8_recipe import Recipe
from deepseek_jax.ops.quantize import WHOLE, Packed, Quantized


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Delayed:
  """A weight, and what the operands of its three products are scaled by.

  Attributes:
    w: float32 master weight; of experts, all together.
    amax: float32 [..., 3], of the layer's input, of the weight, and of the
      output's gradient; 0 where none is known.  In a gradient: those seen.
  """

  w: jax.Array
  amax: jax.Array

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the weight."""
    return self.w.shape

  @property
  def dtype(self) -> Any:
    """Of the weight."""
    return self.w.dtype


def seen(x: jax.Array) -> jax.Array:
  """The amax of a whole tensor, float32 []; NaN if one is in it."""
  return quantize_lib.tile_amax(x.reshape(1, -1), WHOLE)[0, 0]


def known(amax: jax.Array, x: jax.Array) -> jax.Array:
  """`amax`, or the tensor's own where that is 0: float32 [..., 1, 1]."""
  own = quantize_lib.tile_amax(x, WHOLE)
  return jnp.where(amax > 0, amax, own)


def quantize(
  x: jax.Array,
  amax: jax.Array,
  fmt: Format,
  scale: str,
  min_amax: float = quantize_lib.MIN_AMAX,
) -> Quantized:
  """`x` under one scale, `amax`'s; what is larger is clipped.

  The codes are bytes: see `Quantized.raw`.
  """
  how = fmt, scale, known(amax, x), min_amax
  return quantize_lib.quantize(x, WHOLE, *how).raw


def quantize_weight(weight: Delayed, recipe: Recipe) -> Quantized:
  """The operand of Fprop, and transposed of Dgrad."""
  return quantize(weight.w, weight.amax[1], recipe.fmt, recipe.scale)


def linear(
  x_TD: jax.Array,
  weight: Delayed,
  recipe: Recipe,
  saved: Quantized | Packed | jax.Array | None = None,
) -> jax.Array:
  """`fp8_linear.fp8_linear` with delayed scales: [T, F] in the dtype of `x_TD`.

  Wgrad takes the codes of Fprop: a scale of a whole tensor has no orientation.

  Args:
    x_TD: activations.
    weight: [D, F].
    recipe: formats and sums; tiles are whole tensors.
    saved: what is kept of `x_TD` already, instead of these codes.
  """
  constant = jax.lax.stop_gradient(x_TD)
  amax = jax.lax.stop_gradient(weight.amax)
  codes = quantize(constant, amax[0], recipe.fmt, recipe.scale)
  codes, found = checkpoint_name((codes, seen(constant)), 'linear_in')
  return _product(x_TD, weight, (codes, saved, found), recipe)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(x_TD, weight, kept, recipe):
  return _fwd(x_TD, weight, kept, recipe)[0]


def _fwd(x_TD, weight, kept, recipe):
  codes, saved, found = kept
  w = quantize_weight(weight, recipe)
  y_TF = recipe.steps.dot(codes, w, recipe.accumulation, x_TD.dtype)
  saved = codes if saved is None else saved
  return y_TF, (saved, found, weight, jnp.zeros((), x_TD.dtype))


def _bwd(recipe, residuals, dy_TF):
  saved, found, weight, like_x = residuals
  how = recipe.gradient_fmt, recipe.scale, quantize_lib.GRADIENT_MIN_AMAX
  dy = quantize(dy_TF, weight.amax[2], *how)
  w = quantize_weight(weight, recipe)
  dx_TD = recipe.steps.dot(dy, w.mT, recipe.accumulation, like_x.dtype)
  x = saved
  if not (isinstance(saved, Quantized) and saved.tile == WHOLE):
    if not isinstance(saved, jax.Array):
      x = quantize_lib.unpack(saved).dequantize()
    amax = jnp.where(weight.amax[0] > 0, weight.amax[0], found)
    x = quantize(x, amax, recipe.fmt, recipe.scale)
  dw_DF = recipe.steps.dot(x.mT, dy, recipe.accumulation)
  amax_3 = jnp.stack([found, seen(weight.w), seen(dy_TF)])
  return dx_TD, Delayed(dw_DF.astype(weight.dtype), amax_3), None


_product.defvjp(_fwd, _bwd)
