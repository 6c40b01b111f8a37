"""Where does the error of an FP8 product come from?

DeepSeek-V3 section 3.3.2: tensor cores keep about 14 bits of a sum, an error of
nearly 2 % at K = 4096; promotion every 128 removes it.  Appendix B.2: blocks of
128 x 128 fail for gradients, whose outliers belong to tokens.

    python -m experiments.ablations.fp8_noise  # 20 seconds on 2 cores

Relative errors, mean of rows, 2026-11-24, CPU; for sums the largest error over
their standard deviation:

| recipe | Fprop | Dgrad | worst token | Wgrad | sums |
| --- | ---: | ---: | ---: | ---: | ---: |
| V3 | 3.40% | 3.66% | 5.10% | 6.58% | 0.00% |
| scales 2^n | 3.78% | 3.84% | 5.30% | 4.94% | 0.00% |
| E5M2 | 6.71% | 7.39% | 10.37% | 9.44% | 0.00% |
| Dgrad 128 x 128 | 3.40% | 9.18% | 101.24% | 6.58% | 0.00% |
| per tensor | 3.81% | 9.80% | 100.00% | 5.64% | 0.00% |
| 14 bits, never promoted | 3.83% | 9.80% | 100.00% | 5.67% | 1.36% |
| 14 bits, every 128 | 3.81% | 9.80% | 100.00% | 5.63% | 0.43% |

Rounding of operands is most of it.  A token whose gradient is 1/500,000 of
another's is lost in a block that both share; at 1/7,000 (an exponent of 2 in
place of 3 below) E4M3's subnormals still hold it.  Promotion takes the error of
sums to a third.  Wgrad rounds a saved activation a second time, which powers of
two mostly spare.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from deepseek_jax import config, flags
from deepseek_jax.ops import fp8_linear, fp8_recipe

_TENSOR = {f'{x}_tile': 'tensor' for x in ('activation', 'weight', 'gradient')}
_HOPPER = {**_TENSOR, 'accumulate': 'hopper14'}
ARMS = {
  'V3': {},
  'scales 2^n': {'scale': 'ceil'},
  'E5M2': {'fmt': 'e5m2', 'gradient_fmt': 'e5m2'},
  'Dgrad 128 x 128': {'gradient_tile': '128x128'},
  'per tensor': _TENSOR,
  '14 bits, never promoted': {**_HOPPER, 'promote': 0},
  '14 bits, every 128': _HOPPER,
}


def measure(x, w, dy, recipe) -> list[float]:
  """Errors of rows: Fprop, Dgrad, its worst, Wgrad; largest of Fprop's sums."""
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


def main() -> None:
  """Prints the table: 64 tokens, K = 4096, outlier channels and tokens."""
  rng = np.random.default_rng(0)
  x, w, dy = (rng.standard_normal((64, 4096)) for _ in range(3))
  x *= np.exp(rng.standard_normal(4096))
  dy *= np.exp(3 * rng.standard_normal((64, 1)))
  arrays = [jnp.asarray(a, jnp.float32) for a in (x, w.T, dy)]
  print('| recipe | Fprop | Dgrad | worst token | Wgrad | sums |')
  print(f'| --- |{" ---: |" * 5}')
  for name, changes in ARMS.items():
    fp8 = dataclasses.replace(config.FP8Config(), **changes)
    row = measure(*arrays, fp8_recipe.of(fp8))
    print(f'| {name} | {" | ".join(f"{v:.2%}" for v in row)} |')


if __name__ == '__main__':
  flags.run(main)
