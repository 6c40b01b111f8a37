"""What torch is given, where the GPU's check times it beside the kernels."""

import jax.numpy as jnp
import pytest
from torch.nn import functional

from experiments import gpu_cases, gpu_check
from tests import tolerances


def _scaled_mm(a, b, a_scales, a_kind, b_scales, b_kind):
  """torch's, in float32; the checks are those of its CUDA source."""
  (M, K), N = a.shape, b.shape[1]
  blocks, kinds = -(-K // 128), functional.ScalingType
  assert a.is_contiguous() and b.T.is_contiguous()
  assert a_kind == kinds.BlockWise1x128
  assert (*a_scales.shape, *a_scales.stride()) == (M, blocks, 1, M)
  if b_kind == kinds.BlockWise128x128:
    rows, columns = -(-blocks // 4) * 4, -(-N // 128)
    assert (*b_scales.shape, *b_scales.stride()) == (rows, columns, 1, rows)
    b_scales = b_scales.repeat_interleave(128, 1)[:blocks, :N]
  else:
    assert b_kind == kinds.BlockWise1x128
    assert (*b_scales.shape, *b_scales.stride()) == (N, blocks, 1, N)
    b_scales = b_scales.T
  a = a.float() * a_scales.repeat_interleave(128, 1)[:, :K]
  b = b.float() * b_scales.repeat_interleave(128, 0)[:K]
  return (a @ b).bfloat16()


@pytest.mark.parametrize('name', ['fp8_matmul 256', 'fp8_matmul wgrad'])
def test_torch_gets_scales_as_it_wants_them(name, monkeypatch):
  monkeypatch.setattr(functional, 'scaled_mm', _scaled_mm)
  cases = gpu_cases._products(256, 384, 320)
  case = next(c for c in cases if c.name.startswith(name))
  operands = case.make()
  result = gpu_check._in_torch(case.torch, operands).call()
  error = gpu_check._error(case, jnp.from_dlpack(result), operands)
  assert error <= tolerances.BFLOAT16
