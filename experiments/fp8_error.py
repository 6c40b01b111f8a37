"""Errors of one FP8 product and of its gradients, by recipe.

Behind `experiments/ablations/fp8_noise.py`, which asks the question.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from deepseek_jax import config as config_lib
from deepseek_jax import presets
from deepseek_jax.ops import fp8_linear, fp8_recipe


def measure(x, w, dy, recipe) -> list[float]:
  """Errors of rows: Fprop, Dgrad, its worst, Wgrad; largest of Fprop's sums.

  Args:
    x: [T, K] inputs.
    w: [K, N] weights.
    dy: [T, N] gradient of the product.
    recipe: what is rounded, and how sums are.

  Returns:
    Relative errors; the last in standard deviations of the sums.
  """
  inputs, turned = (fp8_linear.quantize_input(v, recipe) for v in (x, x.T))
  weight = fp8_linear.quantize_weight(w, recipe)
  y = recipe.steps.dot(inputs.codes, weight, recipe.accumulation)
  dx = fp8_linear.input_gradient(dy, w.T, recipe)
  dw = fp8_linear.weight_gradient(turned.saved, dy.T, recipe)
  fprop, dgrad, wgrad = (
    np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
    for got, want in ((y, x @ w), (dx, dy @ w), (dw, x @ dy.T))
  )
  exact = np.float64(inputs.codes.dequantize()) @ weight.dequantize()
  sums = np.abs(y - exact).max() / exact.std()
  return [fprop.mean(), dgrad.mean(), dgrad.max(), wgrad.mean(), sums]


def table(arms: dict[str, dict[str, Any]]) -> str:
  """A row for each arm: 64 tokens, K = 4096, outlier channels and tokens."""
  rng = np.random.default_rng(0)
  x, w, dy = (rng.standard_normal((64, 4096)) for _ in range(3))
  x *= np.exp(rng.standard_normal(4096))
  dy *= np.exp(3 * rng.standard_normal((64, 1)))
  arrays = [jnp.asarray(a, jnp.float32) for a in (x, w.T, dy)]
  lines = ['| recipe | Fprop | Dgrad | worst token | Wgrad | sums |']
  lines.append(f'| --- |{" ---: |" * 5}')
  for name, updates in arms.items():
    config = config_lib.replace(presets.ablation(), updates)
    row = measure(*arrays, fp8_recipe.of(config.precision.fp8))
    lines.append(f'| {name} | {" | ".join(f"{v:.2%}" for v in row)} |')
  return '\n'.join(lines)
