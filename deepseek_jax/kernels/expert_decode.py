"""`ops.expert_decode.expert_ffn`, by kernels: on a GPU by those of training.

They read the matrices of routed experts where they lie; the reference's loop
copies them first, and few rows cost little else.  FP8 weights stay with the
loop: codes would be turned for every token.
"""

import jax

from deepseek_jax.kernels import dispatch, experts, few_rows
from deepseek_jax.ops import expert_decode as reference
from deepseek_jax.ops.fp8_recipe import Recipe
from deepseek_jax.ops.quantize import Quantized


def expert_ffn(
  x_TD: jax.Array,
  w1_EDF: jax.Array | Quantized,
  w2_EFD: jax.Array | Quantized,
  w3_EDF: jax.Array | Quantized,
  expert_ids_TK: jax.Array,
  weights_TK: jax.Array,
  recipe: Recipe | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """`ops.expert_decode.expert_ffn`, by kernels where they can run."""
  weights = w1_EDF, w2_EFD, w3_EDF
  kernel = dispatch.kernel_for(implementation)
  if any(isinstance(w, Quantized) for w in weights):
    found = ['the weights are FP8']
  elif kernel == 'cpu':
    found = few_rows.obstacles(x_TD, *weights)
  else:
    found = experts.obstacles(x_TD, w1_EDF)
  op = 'experts of inference'
  choice = dispatch.choose(
    implementation, found, op, x_TD, w1_EDF, kernel=kernel
  )
  routed = expert_ids_TK, weights_TK
  if choice.implementation == 'cpu':
    return few_rows.expert_ffn(x_TD, *weights, *routed)
  if choice.is_kernel:
    return experts.expert_ffn(x_TD, *weights, *routed, choice.implementation)
  return reference.expert_ffn(x_TD, *weights, *routed, recipe)
