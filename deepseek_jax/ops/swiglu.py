"""SwiGLU, and SwiGLU whose inputs are kept in FP8 (V3 section 3.3.3).

What enters the down projection is computed again in the backward pass, from
the kept inputs, and never stored.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.ops.fp8_recipe import Recipe


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
  """`silu(gate) * up` in their dtype."""
  return jax.nn.silu(gate) * up


def fp8_swiglu(
  gate_TF: jax.Array, up_TF: jax.Array, recipe: Recipe
) -> tuple[jax.Array, jax.Array]:
  """`swiglu`, and the same of its inputs as they are kept.

  From the second the down projection takes its weight gradient, so that it does
  not matter what is computed again; the gradient of the first is that at the
  kept inputs.

  Args:
    gate_TF: compute dtype.
    up_TF: likewise.
    recipe: of the layer.
  """
  kept = tuple(
    recipe.swiglu.quantize(jax.lax.stop_gradient(x)) for x in (gate_TF, up_TF)
  )
  kept = checkpoint_name(kept, 'ffn_up')
  again = swiglu(*(q.dequantize() for q in kept)).astype(gate_TF.dtype)
  return _rounded(gate_TF, up_TF, kept), again


@jax.custom_vjp
def _rounded(gate, up, kept):
  return swiglu(gate, up)


def _fwd(gate, up, kept):
  return swiglu(gate, up), (kept, jnp.zeros((), gate.dtype))


def _bwd(residuals, dhidden):
  kept, like = residuals
  inputs = (q.dequantize() for q in kept)
  _, vjp = jax.vjp(swiglu, *inputs)
  dgate, dup = vjp(dhidden.astype(jnp.float32))
  return dgate.astype(like.dtype), dup.astype(like.dtype), None


_rounded.defvjp(_fwd, _bwd)
