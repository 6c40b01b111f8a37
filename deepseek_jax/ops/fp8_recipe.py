"""What is quantised, and how: V3's recipe as data (V3 sections 3.3.1 to 3.3.3).

A `Recipe` says how one linear layer is quantised; `of` gives that of a layer
of the model under a config, by the name of its weight.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax

from deepseek_jax.config import FP8Config
from deepseek_jax.ops import formats, fp8_matmul, fused_quantize, quantize
from deepseek_jax.ops.formats import E4M3, Format
from deepseek_jax.ops.fp8_matmul import Accumulation

_TILES = {
  '1x128': quantize.ROW_TILE,
  '128x128': quantize.SQUARE_TILE,
  'tensor': quantize.WHOLE,
}


@dataclasses.dataclass(frozen=True)
class Kept:
  """How an array is kept, or sent, in 1 x 128 tiles.

  Attributes:
    fmt: of its codes.
    scale: see `quantize.scale_of`; where it is a power of two, so is that of
      the same numbers turned to 128 x 1: nothing is rounded but what the other
      format cannot hold.
    min_amax: likewise.
  """

  fmt: Format = E4M3
  scale: str = 'float32'
  min_amax: float = quantize.MIN_AMAX

  def message(self, x: jax.Array) -> quantize.Quantized:
    """`quantize`d, in as few bytes as can be; `dequantize` reads it."""
    q = self.quantize(x).raw
    return q if self.scale == 'float32' else q.narrow

  def quantize(self, x: jax.Array) -> quantize.Quantized:
    """`x` [..., I, J] in this form."""
    how = self.fmt, self.scale
    return quantize.quantize(x, quantize.ROW_TILE, *how, min_amax=self.min_amax)


class Steps(NamedTuple):
  """What computes the steps of a layer: functions, or kernels like them.

  Attributes:
    quantize: as `quantize.quantize`.
    requantize: as `quantize.requantize`.
    dot: as `fp8_matmul.dot`.
    swiglu: as `fused_quantize.swiglu`.
    rms_norm: as `fused_quantize.rms_norm`.
  """

  quantize: Callable[..., quantize.Quantized]
  requantize: Callable[..., quantize.Quantized]
  dot: Callable[..., jax.Array]
  swiglu: Callable[..., quantize.Quantized] = fused_quantize.swiglu
  rms_norm: Callable[..., quantize.Quantized] = fused_quantize.rms_norm


REFERENCE = Steps(quantize.quantize, quantize.requantize, fp8_matmul.dot)


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How one linear layer is quantised; the default is V3's.

  Attributes:
    fmt: of the operands of all three products.
    gradient_fmt: of output gradients, in Dgrad and Wgrad.
    scale: of these codes, unless `turned` says otherwise; see
      `quantize.scale_of`.
    saved: the activation between forward and backward; E5M6 for the input of
      `wo`, which attention's backward pass reads as well.
    swiglu: SwiGLU's inputs; its output is computed again from them.
    dispatch: tokens, as they are sent to the experts.
    activation_tile: of Fprop's input.
    gradient_tile: of Dgrad's; 128 x 128 is what diverges in appendix B.2.
    weight_tile: of Fprop's and Dgrad's weight.
    accumulation: of the sums.
    steps: what computes them.
  """

  fmt: Format = E4M3
  gradient_fmt: Format = E4M3
  scale: str = 'float32'
  saved: Kept = Kept()
  swiglu: Kept = Kept()
  dispatch: Kept = Kept(scale='ceil')
  activation_tile: tuple[int, int] = quantize.ROW_TILE
  gradient_tile: tuple[int, int] = quantize.ROW_TILE
  weight_tile: tuple[int, int] = quantize.SQUARE_TILE
  accumulation: Accumulation = Accumulation()
  steps: Steps = REFERENCE

  @property
  def dispatch_gradient(self) -> Kept:
    """Gradients of the experts' output, as they are sent to the experts."""
    scale, least = self.dispatch.scale, quantize.GRADIENT_MIN_AMAX
    return Kept(self.gradient_fmt, scale, least)

  def turned(self, kept: Kept | None = None) -> tuple[tuple[int, int], str]:
    """(tile, scale) of an operand of Wgrad, along the tokens.

    What was kept under powers of two gets such again: only then is nothing
    rounded but what the operands' format cannot hold, which is underflow and,
    of attention's output, 3 bits (V3 sections 3.3.2 and 3.3.3).  Scales of
    whole tensors have no orientation.

    Args:
      kept: in which form the operand was kept or sent, if in any.
    """
    if self.gradient_tile == quantize.WHOLE:
      return quantize.WHOLE, self.scale
    if kept is None or kept.scale == 'float32':
      return quantize.COLUMN_TILE, self.scale
    return quantize.COLUMN_TILE, kept.scale


def of(config: FP8Config, role: str = '', steps: Steps = REFERENCE) -> Recipe:
  """The recipe of the linear layer whose weight is named `role`."""
  fmt = formats.parse(config.fmt)
  turned = config.turned_scale
  saved = Kept(fmt, config.scale)
  if role == 'wo':
    saved = Kept(formats.parse(config.attn_out_fmt), turned)
  return Recipe(
    fmt=fmt,
    gradient_fmt=formats.parse(config.gradient_fmt),
    scale=config.scale,
    saved=saved,
    swiglu=Kept(formats.parse(config.swiglu_fmt), config.scale),
    dispatch=Kept(formats.parse(config.dispatch_fmt), turned),
    activation_tile=_TILES[config.activation_tile],
    gradient_tile=_TILES[config.gradient_tile],
    weight_tile=_TILES[config.weight_tile],
    accumulation=Accumulation(config.accumulate, config.promote),
    steps=steps,
  )
