"""How many bytes numbers take, in the formats of V3 section 3.3."""

import re

from deepseek_jax.config import Config

BYTES = {'float32': 4, 'bfloat16': 2, 'float16': 2}
_TILE = 128  # Numbers that share a scale.


def width(config: Config) -> int:
  """Bytes of a number in the compute dtype."""
  return BYTES[config.precision.compute_dtype]


def stored(config: Config, module: str, field: str, count: float) -> float:
  """Bytes of `count` numbers in the format of a field of `precision.fp8`.

  Codes, of which E5M6 takes 12 bits, and scales, float32, but bytes if they are
  sent and powers of two; the compute dtype, if the linears of the module
  ('attention', 'dense', 'experts') are not in FP8.
  """
  fp8 = config.precision.of(module).fp8
  if not fp8.enabled:
    return count * width(config)
  bits = 1 + sum(map(int, re.findall(r'\d+', getattr(fp8, field))))
  is_byte = field == 'dispatch_fmt' and fp8.turned_scale != 'float32'
  return count * (bits / 8 + (1 if is_byte else 4) / _TILE)
