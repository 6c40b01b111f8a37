"""The steps of FP8 linear layers under the setting `precision.kernels`."""

from deepseek_jax.kernels import fp8_matmul, quantize, turn
from deepseek_jax.ops.fp8_recipe import REFERENCE, Steps


def steps(setting: str) -> Steps:
  """What `fp8_recipe.of` takes: kernels where they can run, or nowhere."""
  if setting == 'xla':
    return REFERENCE
  return Steps(
    turn.quantize,
    turn.requantize,
    fp8_matmul.dot,
    quantize.swiglu,
    quantize.rms_norm,
  )
