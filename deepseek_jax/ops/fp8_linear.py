"""A linear layer whose three products are FP8 (V3 section 3.3.1, figure 6).

Fprop, Dgrad and Wgrad each quantise their own operands: activations and
gradients in 1 x 128 tiles, weights in 128 x 128 blocks, and both operands of
Wgrad in 128 x 1 tiles along the tokens.  Between forward and backward only the
activation's codes are kept.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.ops import quantize
from deepseek_jax.ops.fp8_recipe import Recipe
from deepseek_jax.ops.quantize import Packed, Quantized


class Input(NamedTuple):
  """An activation, quantised once for all the matrices that it meets.

  Attributes:
    x_TD: what it was, compute dtype; only its gradient is of use.
    codes: Fprop's operand.
    saved: what is kept of it for Wgrad; often `codes`.  An array, where that is
      computed again from something else.
  """

  x_TD: jax.Array
  codes: Quantized
  saved: Quantized | Packed | jax.Array

  @property
  def shape(self) -> tuple[int, ...]:
    """Of what it was."""
    return self.x_TD.shape


def quantize_input(
  x_TD: jax.Array,
  recipe: Recipe,
  saved: Quantized | Packed | jax.Array | None = None,
  codes: Quantized | None = None,
) -> Input:
  """`x_TD` for `fp8_linear`.

  Args:
    x_TD: activations.
    recipe: of the layers that take it.
    saved: instead of what the recipe keeps, if there is something already.
    codes: Fprop's operand, if it was quantised where it was computed.
  """
  constant = jax.lax.stop_gradient(x_TD)
  how = (recipe.activation_tile, recipe.fmt, recipe.scale)
  if codes is None:
    codes = recipe.steps.quantize(constant, *how)
  kept = recipe.saved
  if saved is None and how == (quantize.ROW_TILE, kept.fmt, kept.scale):
    saved = codes
  elif saved is None:
    saved = quantize.pack(kept.quantize(constant))
  return Input(x_TD, codes, saved)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def fp8_linear(
  inputs: Input, w_DF: jax.Array | Quantized, recipe: Recipe
) -> jax.Array:
  """`x @ w` in FP8: [T, F] in the dtype of `x_TD`.

  The gradient of `w_DF` is float32, rounded to its dtype.

  Args:
    inputs: of `quantize_input`.
    w_DF: weights; float32 master weights are rounded once, to FP8.  Quantised
      ones, of a converted checkpoint, are taken as they are, and constant.
    recipe: formats, tiles and sums.
  """
  return _fwd(inputs, w_DF, recipe)[0]


def _fwd(inputs, w_DF, recipe):
  w = quantize_weight(w_DF, recipe)
  dtype = inputs.x_TD.dtype
  y = recipe.steps.dot(inputs.codes, w, recipe.accumulation, dtype)
  return y, (inputs.saved, w_DF, jnp.zeros((), dtype))


def _bwd(recipe, residuals, dy_TF):
  saved, w_DF, like_x = residuals
  dx_TD = input_gradient(dy_TF, w_DF, recipe, like_x.dtype)
  if isinstance(w_DF, Quantized):
    return Input(dx_TD, None, None), None
  dw_DF = weight_gradient(saved, dy_TF, recipe).astype(w_DF.dtype)
  return Input(dx_TD, None, None), dw_DF


fp8_linear.defvjp(_fwd, _bwd)


def quantize_weight(w_DF: jax.Array | Quantized, recipe: Recipe) -> Quantized:
  """The operand of Fprop, and transposed of Dgrad."""
  if isinstance(w_DF, Quantized):
    return w_DF
  return quantize.quantize(w_DF, recipe.weight_tile, recipe.fmt, recipe.scale)


def input_gradient(
  dy_TF: jax.Array,
  w_DF: jax.Array | Quantized,
  recipe: Recipe,
  dtype: Any = jnp.float32,
) -> jax.Array:
  """Dgrad, `dy @ w^T`: [T, D]."""
  dy = _quantize_gradient(dy_TF, recipe.gradient_tile, recipe)
  w = quantize_weight(w_DF, recipe)
  return recipe.steps.dot(dy, w.mT, recipe.accumulation, dtype)


def weight_gradient(
  saved: Quantized | Packed | jax.Array, dy_TF: jax.Array, recipe: Recipe
) -> jax.Array:
  """Wgrad, `x^T @ dy`, both in tiles along the tokens: float32 [D, F]."""
  if isinstance(saved, jax.Array):
    tile, scale = recipe.turned()
    x = recipe.steps.quantize(saved, tile, recipe.fmt, scale)
  else:
    tile, scale = recipe.turned(recipe.saved)
    x = recipe.steps.requantize(quantize.unpack(saved), tile, recipe.fmt, scale)
  dy = _quantize_gradient(dy_TF, tile, recipe)
  return recipe.steps.dot(x.mT, dy, recipe.accumulation)


def _quantize_gradient(dy_TF, tile, recipe):
  least = quantize.GRADIENT_MIN_AMAX
  return recipe.steps.quantize(
    dy_TF, tile, recipe.gradient_fmt, recipe.scale, min_amax=least
  )
