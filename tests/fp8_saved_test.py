"""What compiled layers keep for backward: codes and scales, and the plan's sum.

The expected bytes are written out from V3's map (FACTS 3.1).
"""

from absl.testing import parameterized

from deepseek_jax import config as config_lib
from deepseek_jax import presets
from experiments import bench_saved

_T = 256
_DIMS = {
  'model.n_mtp_layers': 0,
  'model.dim': 256,
  'model.inter_dim': 384,
  'model.mla.q_lora_rank': 128,
  'model.mla.kv_lora_rank': 128,
  'model.mla.qk_nope_head_dim': 32,
  'model.mla.qk_rope_head_dim': 16,
  'model.mla.v_head_dim': 64,
  'model.moe.moe_inter_dim': 128,
  'data.seq_len': _T,
  'data.batch_size': 1,
  'precision.compute_dtype': 'bfloat16',
}


def _config(fp8):
  updates = {**_DIMS, 'precision.fp8.enabled': fp8}
  return config_lib.replace(presets.tiny(), updates)


def _codes(count, bits=8):
  """Bytes of codes, and of a float32 scale for each 128."""
  return count * bits / 8 + 4 * count / 128


def _mla(fp8, policy):
  D, Q, C, P, N, H, U = 256, 128, 128, 16, 2, 32, 64
  kept = 2 * (D + Q + C + P) + 4 * N  # Input and latents; logsumexp.
  kept += _codes(N * U, 12) if fp8 else 2 * N * U
  if policy == 'none':
    kept += 2 * N * (H + P) + 2 * N * (H + U)
    kept += _codes(D + Q + C) if fp8 else 0
  return kept


def _ffn(F, fp8, policy):
  D = 256
  kept = 2 * D + (_codes(2 * F) if fp8 else 4 * F)
  return kept + (_codes(D) if fp8 and policy == 'none' else 0)


def _moe(fp8, policy):
  D, E, K, F = 256, 8, 2, 128
  rows = K + (128 if fp8 else 64) / _T  # The last block may run over the end.
  kept = 4 * E + 8 * K  # Logits; ids, and their order by experts.
  kept += rows * (_codes(2 * F) if fp8 else 4 * F)
  kept += _ffn(F, fp8, policy)  # The shared expert, and the input of both.
  return kept + (_codes(D) if fp8 and policy == 'none' else 0)


_EXPECTED = {
  'MLA': _mla,
  'dense FFN': lambda fp8, policy: _ffn(384, fp8, policy),
  'MoE': _moe,
}


class SavedTest(parameterized.TestCase):
  @parameterized.product(
    kind=bench_saved.KINDS, fp8=(False, True), policy=bench_saved.POLICIES
  )
  def test_bytes_are_those_of_the_recipe(self, kind, fp8, policy):
    found = bench_saved.saved_bytes(_config(fp8), kind, policy) / _T
    # A few pointers and counts are no token's.
    self.assertAlmostEqual(found, _EXPECTED[kind](fp8, policy), delta=1)
