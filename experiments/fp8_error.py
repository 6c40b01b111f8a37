"""Errors of one FP8 product and of its gradients, by recipe.

Behind `experiments/ablations/fp8_noise.py`, which asks the question.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax import config as config_lib
from deepseek_jax import presets
from deepseek_jax.ops import fp8_linear, fp8_recipe

_LONG, _SHORT = 4096, 64  # What is summed over, and the other two axes.


class Operands(NamedTuple):
  """Of three products, each of 64 x 4096 by 4096 x 64.

  Activations have outlier channels, gradients outlier tokens.

  Attributes:
    x_TD: Fprop's input, D = 4096.
    w_DF: its weight, with which Dgrad is taken as [F, D].
    dy_TD: Dgrad's gradient.
    x_SF: Wgrad's input, of S = 4096 tokens.
    dy_SF: Wgrad's gradient.
  """

  x_TD: jax.Array
  w_DF: jax.Array
  dy_TD: jax.Array
  x_SF: jax.Array
  dy_SF: jax.Array


def draw() -> Operands:
  """The same every time."""
  rng = np.random.default_rng(0)

  def activation(tokens, channels):
    x = rng.standard_normal((tokens, channels))
    return x * np.exp(rng.standard_normal(channels))

  def gradient(tokens, channels):
    dy = rng.standard_normal((tokens, channels))
    return dy * np.exp(3 * rng.standard_normal((tokens, 1)))

  arrays = (
    activation(_SHORT, _LONG),
    rng.standard_normal((_LONG, _SHORT)),
    gradient(_SHORT, _LONG),
    activation(_LONG, _SHORT),
    gradient(_LONG, _SHORT),
  )
  return Operands(*(jnp.asarray(a, jnp.float32) for a in arrays))


def measure(o: Operands, recipe: fp8_recipe.Recipe) -> list[float]:
  """Errors of rows: Fprop, Dgrad, its worst, Wgrad; largest of Fprop's sums.

  Rows are tokens, of Wgrad the input's channels.

  Returns:
    Relative errors; the last in standard deviations of the sums.
  """
  inputs, kept = (
    fp8_linear.quantize_input(x, recipe) for x in (o.x_TD, o.x_SF)
  )
  weight = fp8_linear.quantize_weight(o.w_DF, recipe)
  y = recipe.steps.dot(inputs.codes, weight, recipe.accumulation)
  dx = fp8_linear.input_gradient(o.dy_TD, o.w_DF.T, recipe)
  dw = fp8_linear.weight_gradient(kept.saved, o.dy_SF, recipe)
  exact = [np.asarray(a, np.float64) for a in o]
  fprop, dgrad, wgrad = (
    np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
    for got, want in (
      (y, exact[0] @ exact[1]),
      (dx, exact[2] @ exact[1]),
      (dw, exact[3].T @ exact[4]),
    )
  )
  exact = np.float64(inputs.codes.dequantize()) @ weight.dequantize()
  sums = np.abs(y - exact).max() / exact.std()
  return [fprop.mean(), dgrad.mean(), dgrad.max(), wgrad.mean(), sums]


def table(arms: dict[str, dict[str, Any]]) -> str:
  """A row for each arm."""
  operands = draw()
  lines = ['| recipe | Fprop | Dgrad | worst token | Wgrad | sums |']
  lines.append(f'| --- |{" ---: |" * 5}')
  for name, updates in arms.items():
    config = config_lib.replace(presets.ablation(), updates)
    row = measure(operands, fp8_recipe.of(config.precision.fp8))
    lines.append(f'| {name} | {" | ".join(f"{v:.2%}" for v in row)} |')
  return '\n'.join(lines)
