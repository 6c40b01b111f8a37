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
| E5M2 gradients | 3.40% | 5.85% | 8.35% | 6.84% | 0.00% |
| Dgrad 128 x 128 | 3.40% | 9.18% | 101.24% | 6.58% | 0.00% |
| per tensor | 3.81% | 9.80% | 100.00% | 5.64% | 0.00% |
| 14 bits, never promoted | 3.83% | 9.80% | 100.00% | 5.67% | 1.36% |
| 14 bits, every 128 | 3.81% | 9.80% | 100.00% | 5.63% | 0.43% |

Rounding of operands is most of it.  A token whose gradient is 1/500,000 of
another's is lost in a block that both share; at 1/7,000 (an exponent of 2, not
3, in `fp8_error.table`) E4M3's subnormals still hold it.  Promotion takes the
error of sums to a third.  Wgrad rounds a saved activation a second time, which
powers of two mostly spare.
"""

from deepseek_jax import flags
from experiments import fp8_error

_FP8 = 'precision.fp8.'
_TENSOR = {
  f'{_FP8}{x}_tile': 'tensor' for x in ('activation', 'weight', 'gradient')
}
_HOPPER = {**_TENSOR, f'{_FP8}accumulate': 'hopper14'}
ARMS = {
  'V3': {},
  'scales 2^n': {f'{_FP8}scale': 'ceil'},
  'E5M2': {f'{_FP8}fmt': 'e5m2', f'{_FP8}gradient_fmt': 'e5m2'},
  'E5M2 gradients': {f'{_FP8}gradient_fmt': 'e5m2'},
  'Dgrad 128 x 128': {f'{_FP8}gradient_tile': '128x128'},
  'per tensor': _TENSOR,
  '14 bits, never promoted': {**_HOPPER, f'{_FP8}promote': 0},
  '14 bits, every 128': _HOPPER,
}

if __name__ == '__main__':
  flags.run(lambda: print(fp8_error.table(ARMS)))
