"""The FLOPs of training are the published ones."""

import dataclasses

from absl.testing import parameterized

from deepseek_jax import presets
from deepseek_jax.planner import flops


class TrainPerTokenTest(parameterized.TestCase):
  @parameterized.parameters(
    ('deepseek_v3', 0, 250.5),  # ISCA 2025, table 2; FACTS 1.9.
    ('deepseek_v3', 1, 260.6),  # 250.5 and 10.2, rounded, are 260.7.
    ('deepseek_v2', 0, 155.3),
  )
  def test_published(self, preset, mtp, gflops):
    model = presets.PRESETS[preset]().model
    model = dataclasses.replace(model, n_mtp_layers=mtp)
    self.assertEqual(round(flops.train_per_token(model, 4096) / 1e9, 1), gflops)

  def test_attention_grows_with_the_row(self):
    model = dataclasses.replace(presets.deepseek_v3().model, n_mtp_layers=0)
    short, long = (flops.train_per_token(model, t) for t in (4096, 8192))
    # Per layer: 3 (forward, twice in backward) x 2 x 128 heads x 320 / 2.
    self.assertEqual(long - short, 61 * 3 * 128 * 320 * 4096)
