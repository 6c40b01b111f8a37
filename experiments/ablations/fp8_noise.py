"""Where does the error of an FP8 product come from?

DeepSeek-V3 section 3.3.2: tensor cores keep about 14 bits of a sum, an error of
nearly 2 % at K = 4096; promotion every 128 removes it.  Appendix B.2: blocks of
128 x 128 fail for gradients, whose outliers belong to tokens.

    python -m experiments.ablations.fp8_noise  # 20 seconds on 2 cores

Relative errors, mean of rows, 2026-11-30, CPU; for sums the largest error over
their standard deviation:

| recipe | Fprop | Dgrad | worst token | Wgrad | sums |
| --- | ---: | ---: | ---: | ---: | ---: |
| V3 | 3.41% | 3.72% | 4.87% | 3.42% | 0.00% |
| scales 2^n | 3.80% | 3.78% | 4.87% | 3.58% | 0.00% |
| E5M2 | 6.86% | 7.45% | 10.28% | 6.58% | 0.00% |
| E5M2 gradients | 3.41% | 5.89% | 7.88% | 3.53% | 0.00% |
| Dgrad 128 x 128 | 3.41% | 9.36% | 105.25% | 3.42% | 0.00% |
| per tensor | 3.85% | 10.16% | 100.00% | 4.39% | 0.00% |
| 14 bits, never promoted | 3.85% | 10.16% | 100.00% | 4.39% | 1.19% |
| 14 bits, every 128 | 3.85% | 10.16% | 100.00% | 4.39% | 0.30% |
| V3, 14 bits, every 128 | 3.42% | 3.72% | 4.87% | 3.43% | 0.26% |

Rounding of operands is most of it.  A token whose gradient is 1/500,000 of
another's is lost in a block that both share; at 1/7,000 (an exponent of 2, not
3, in `fp8_error.draw`) E4M3's subnormals still hold it.  Promotion takes the
error of sums to a quarter, not to nothing: what is left is cut off within one
instruction, of 32 products aligned to the largest, and always downwards (a mean
of -0.15%; promotion every 32 leaves 0.29% and 0.25%).  Outlier channels make
the largest large: without them 1.17% becomes 0.08%, and 0.07% with V3's tiles.
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
  'V3, 14 bits, every 128': {f'{_FP8}accumulate': 'hopper14'},
}

if __name__ == '__main__':
  flags.run(lambda: print(fp8_error.table(ARMS)))
