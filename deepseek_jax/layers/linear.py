"""The one place where a linear layer multiplies, in plain numbers or in FP8.

V3's map (section 3.3.1): FP8 are the projections of attention and all three
matrices of dense FFN, shared and routed experts.  Embedding, head, gate, norms,
the attention core and MTP's `eh_proj` are not; they do not come here.
"""

import math
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config import PrecisionConfig
from deepseek_jax.kernels import dispatch, few_rows, fp8
from deepseek_jax.ops import (
  fp8_delayed,
  fp8_linear,
  fp8_recipe,
  norms,
  quantize,
)
from deepseek_jax.ops import swiglu as swiglu_lib
from deepseek_jax.ops.fp8_delayed import Delayed
from deepseek_jax.ops.fp8_linear import Input
from deepseek_jax.ops.quantize import Quantized


def normed(
  x: jax.Array, scale_D: jax.Array, eps: float, precision: PrecisionConfig
) -> Any:
  """`share` of `norms.rms_norm`, quantised where it is computed."""
  hidden = norms.rms_norm(x, scale_D, eps)
  recipe = recipe_of(precision)
  if not precision.fp8.enabled or recipe.activation_tile != quantize.ROW_TILE:
    return share(hidden, precision)
  x_TD = x.reshape(-1, x.shape[-1])
  codes = recipe.steps.rms_norm(
    *jax.lax.stop_gradient((x_TD, scale_D)), eps, recipe.fmt, recipe.scale
  )
  return _quantize(hidden, recipe, codes=codes)


def share(x: jax.Array | Input, precision: PrecisionConfig) -> Any:
  """`x` [..., D] for several `linear`s: with FP8 it is quantised once."""
  if not precision.fp8.enabled or isinstance(x, Input):
    return x
  if precision.fp8.amax_history:
    return x  # With delayed scales, each weight has its own of its input.
  return _quantize(x, recipe_of(precision))


def recipe_of(precision: PrecisionConfig, role: str = '') -> fp8_recipe.Recipe:
  """The recipe of a weight's layer, its steps by kernels where they can run."""
  return fp8_recipe.of(precision.fp8, role, fp8.steps(precision.kernels))


def _quantize(x, recipe, saved=None, codes=None):
  x_TD = x.reshape(-1, x.shape[-1])
  _, codes, kept = fp8_linear.quantize_input(x_TD, recipe, saved, codes)
  if saved is None:
    codes, kept = checkpoint_name((codes, kept), 'linear_in')
  return Input(x, codes, kept)


def linear(
  x: Any,
  w: jax.Array | Quantized | Delayed,
  role: str,
  precision: PrecisionConfig,
  axes: int = 1,
  saved: Any = None,
  decodes: bool = False,
) -> jax.Array:
  """`tensordot(x, w, axes)`: [..., *in] and [*in, *out] give [..., *out].

  The result has the dtype of `x`, and is named `role` for `stack`'s policies.

  Args:
    x: activations in compute dtype, or what `share` made of them.
    w: float32 master weights.  FP8 blocks lie on the [in, out] matrix, as in
      released checkpoints: they may span heads.  Quantised ones, of a converted
      checkpoint, are used as they are with FP8, else rounded to the dtype of
      `x` here, at every use.  `Delayed` ones bring scales.
    role: name of the weight; see `fp8_recipe.of`.
    precision: of the model.
    axes: how many axes `in` are.
    saved: what is kept of `x` for the backward pass already, if anything.
    decodes: inference, whose rows may be few: no gradient is taken.
  """
  D, out = math.prod(w.shape[:axes]), w.shape[axes:]
  lead = x.shape[: len(x.shape) - axes]
  if not precision.fp8.enabled:
    # Of matrices, not of higher ranks: the gradient by `w` would contract two
    # dimensions, for which XLA transposes both operands in memory.
    w_DF = quantize.dense(w, x.dtype, axes).reshape(D, -1)
    x_TD = x.reshape(-1, D)
    if decodes:
      chosen = dispatch.requested(precision.kernels)
      y_TF = few_rows.multiply(x_TD, w_DF, implementation=chosen)
    else:
      y_TF = x_TD @ w_DF
  elif isinstance(w, Delayed):
    if isinstance(x, Input):  # Of SwiGLU.
      x, saved = x.x_TD, x.saved
    w_DF = Delayed(w.w.reshape(D, -1), w.amax)
    recipe = recipe_of(precision, role)
    y_TF = fp8_delayed.linear(x.reshape(-1, D), w_DF, recipe, saved)
  else:
    recipe = recipe_of(precision, role)
    if not isinstance(x, Input):
      x = _quantize(x.reshape(-1, D), recipe, saved)
    x = x._replace(x_TD=x.x_TD.reshape(-1, D))
    w_DF = w.matrix(D) if isinstance(w, Quantized) else w.reshape(D, -1)
    y_TF = fp8_linear.fp8_linear(x, w_DF, recipe)
  return checkpoint_name(y_TF.reshape(*lead, *out), role)


def swiglu(gate: jax.Array, up: jax.Array, precision: PrecisionConfig) -> Any:
  """`silu(gate) * up`, as `linear` takes it for `w2`."""
  if not precision.fp8.enabled:
    gate, up = checkpoint_name((gate, up), 'ffn_up')
    return swiglu_lib.swiglu(gate, up)
  recipe, shape = recipe_of(precision, 'w2'), gate.shape
  gate, up = (x.reshape(-1, shape[-1]) for x in (gate, up))
  hidden = swiglu_lib.fp8_swiglu(gate, up, recipe)
  return hidden._replace(x_TD=hidden.x_TD.reshape(shape))


def attention_kept(precision: PrecisionConfig) -> fp8_recipe.Kept | None:
  """How attention's output is kept; None: as it is."""
  if not precision.fp8.enabled:
    return None
  return fp8_recipe.of(precision.fp8, 'wo').saved
