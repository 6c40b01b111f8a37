"""SwiGLU, and SwiGLU whose inputs are kept in FP8 (V3 section 3.3.3).

What enters the down projection is computed again in the backward pass, from
the kept inputs, and never stored.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.ops.fp8_linear import Input
from deepseek_jax.ops.fp8_recipe import Recipe
from deepseek_jax.ops.quantize import ROW_TILE


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
  """`silu(gate) * up` in their dtype."""
  return jax.nn.silu(gate) * up


def fp8_swiglu(gate_TF: jax.Array, up_TF: jax.Array, recipe: Recipe) -> Input:
  """`swiglu` in float32, rounded once and quantised: the input of `w2`.

  What is saved is the same of the inputs as they are kept.  From it the down
  projection takes its weight gradient, so that it does not matter what is
  computed again; the gradient of SwiGLU is that at the kept inputs.

  Args:
    gate_TF: compute dtype.
    up_TF: likewise.
    recipe: of the down projection.
  """
  inputs, steps = jax.lax.stop_gradient((gate_TF, up_TF)), recipe.steps
  how, dtype = (recipe.swiglu.fmt, recipe.swiglu.scale), gate_TF.dtype
  kept = tuple(steps.quantize(x, ROW_TILE, *how) for x in inputs)
  kept = checkpoint_name(kept, 'ffn_up')
  again = swiglu(*(q.dequantize() for q in kept)).astype(dtype)
  if recipe.activation_tile == ROW_TILE:
    codes = steps.swiglu(*inputs, fmt=recipe.fmt, scale=recipe.scale)
  else:
    codes = steps.quantize(
      _rounded_once(*inputs), recipe.activation_tile, recipe.fmt, recipe.scale
    )
  return Input(_rounded(gate_TF, up_TF, kept), codes, again)


def _rounded_once(gate, up):
  hidden = swiglu(gate.astype(jnp.float32), up.astype(jnp.float32))
  return hidden.astype(gate.dtype)


@jax.custom_vjp
def _rounded(gate, up, kept):
  return _rounded_once(gate, up)


def _fwd(gate, up, kept):
  return _rounded_once(gate, up), (kept, jnp.zeros((), gate.dtype))


def _bwd(residuals, dhidden):
  kept, like = residuals
  inputs = (q.dequantize() for q in kept)
  _, vjp = jax.vjp(swiglu, *inputs)
  dgate, dup = vjp(dhidden.astype(jnp.float32))
  return dgate.astype(like.dtype), dup.astype(like.dtype), None


_rounded.defvjp(_fwd, _bwd)
