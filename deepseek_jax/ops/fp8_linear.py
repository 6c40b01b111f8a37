"""A linear layer whose three products are FP8 (V3 section 3.3.1, figure 6).

Fprop, Dgrad and Wgrad each quantise their own operands: activations and
gradients in 1 x 128 tiles, weights in 128 x 128 blocks, and both operands of
Wgrad in 128 x 1 tiles along the tokens.  Between forward and backward only the
activation's codes are kept.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.ops import fp8_matmul, quantize
from deepseek_jax.ops.formats import E4M3, Format
from deepseek_jax.ops.fp8_matmul import Accumulation
from deepseek_jax.ops.quantize import Quantized


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How one linear layer is quantised; the default is V3's.

  Attributes:
    fmt: of the operands of all three products.
    gradient_fmt: of output gradients, in Dgrad and Wgrad.
    saved_fmt: of the activation between forward and backward: E5M6 for the
      input of `wo`.
    scale: of `fmt` codes; see `quantize.scale_of`.
    saved_scale: of the saved activation; a power of two where it is to be
      turned without a second rounding.
    activation_tile: of Fprop's input.
    gradient_tile: of Dgrad's; 128 x 128 is what diverges in appendix B.2.
    weight_tile: of Fprop's and Dgrad's weight.
    accumulation: of the sums.
  """

  fmt: Format = E4M3
  gradient_fmt: Format = E4M3
  saved_fmt: Format = E4M3
  scale: str = 'float32'
  saved_scale: str = 'float32'
  activation_tile: tuple[int, int] = quantize.ROW_TILE
  gradient_tile: tuple[int, int] = quantize.ROW_TILE
  weight_tile: tuple[int, int] = quantize.SQUARE_TILE
  accumulation: Accumulation = Accumulation()


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def fp8_linear(x_TD: jax.Array, w_DF: jax.Array, recipe: Recipe) -> jax.Array:
  """`x @ w` in FP8: [T, F] in the dtype of `x_TD`.

  The gradient of `w_DF` is float32, rounded to its dtype.

  Args:
    x_TD: activations, compute dtype.
    w_DF: weights; float32 master weights are rounded once, to FP8.
    recipe: formats, tiles and sums.
  """
  return _fwd(x_TD, w_DF, recipe)[0]


def _fwd(x_TD, w_DF, recipe):
  x, saved = quantize_input(x_TD, recipe)
  w = quantize.quantize(w_DF, recipe.weight_tile, recipe.fmt, recipe.scale)
  y = fp8_matmul.dot(x, w, recipe.accumulation).astype(x_TD.dtype)
  return y, (saved, w_DF, jnp.zeros((), x_TD.dtype))


def _bwd(recipe, residuals, dy_TF):
  saved, w_DF, like_x = residuals
  dx_TD = input_gradient(dy_TF, w_DF, recipe).astype(like_x.dtype)
  return dx_TD, weight_gradient(saved, dy_TF, recipe).astype(w_DF.dtype)


fp8_linear.defvjp(_fwd, _bwd)


def quantize_input(
  x_TD: jax.Array, recipe: Recipe
) -> tuple[Quantized, Quantized]:
  """The activation for Fprop, and as it is kept for Wgrad: often the same."""
  saved = quantize.quantize(
    x_TD, quantize.ROW_TILE, recipe.saved_fmt, recipe.saved_scale
  )
  how = (recipe.activation_tile, recipe.fmt, recipe.scale)
  if how == (quantize.ROW_TILE, recipe.saved_fmt, recipe.saved_scale):
    return saved, saved
  return quantize.quantize(x_TD, *how), saved


def input_gradient(
  dy_TF: jax.Array, w_DF: jax.Array, recipe: Recipe
) -> jax.Array:
  """Dgrad, `dy @ w^T`: float32 [T, D]."""
  dy = quantize.quantize(
    dy_TF, recipe.gradient_tile, recipe.gradient_fmt, recipe.scale
  )
  w = quantize.quantize(w_DF, recipe.weight_tile, recipe.fmt, recipe.scale)
  return fp8_matmul.dot(dy, w.mT, recipe.accumulation)


def weight_gradient(
  saved: Quantized, dy_TF: jax.Array, recipe: Recipe
) -> jax.Array:
  """Wgrad, `x^T @ dy`, both in tiles along the tokens: float32 [D, F]."""
  tile = _along_tokens(recipe)
  x = quantize.requantize(saved, tile, recipe.fmt, recipe.scale)
  dy = quantize.quantize(dy_TF, tile, recipe.gradient_fmt, recipe.scale)
  return fp8_matmul.dot(x.mT, dy, recipe.accumulation)


def _along_tokens(recipe: Recipe) -> tuple[int, int]:
  # Scales of whole tensors stay so in the weight gradient.
  is_whole = recipe.gradient_tile == quantize.WHOLE
  return quantize.WHOLE if is_whole else quantize.COLUMN_TILE


def saved_bytes(shape: tuple[int, int], recipe: Recipe) -> Any:
  """Bytes that `fp8_linear` keeps of an activation of `shape` for backward."""
  abstract = jax.eval_shape(
    lambda x: quantize_input(x, recipe)[1],
    jax.ShapeDtypeStruct(shape, jnp.float32),
  )
  return abstract.nbytes
