"""The published models, and the small ones that this repository runs.

Every preset is a function that returns a `Config`, written as a difference from
DeepSeek-V3, whose settings are the defaults of `config.py`.
"""

import dataclasses
from collections.abc import Callable

from deepseek_jax import config as config_lib

Config = config_lib.Config


def deepseek_v3() -> Config:
  """DeepSeek-V3: 671B parameters, 37B active, 14.8T tokens (V3 section 4.2).

  The micro-batch is that of one data-parallel step of 15,360 sequences; the
  shape of the batch ramp is not published: 3072 to 15,360 over 469B tokens.
  The only preset in FP8 (section 3.3).
  """
  return Config(
    precision=config_lib.PrecisionConfig(
      fp8=config_lib.FP8Config(enabled=True)
    ),
    data=config_lib.DataConfig(batch_size_start=3072),
    optim=config_lib.OptimConfig(ema_decay=0.999),
    train=config_lib.TrainConfig(micro_batch_size=256, eval_batches=1),
  )


def deepseek_v2() -> Config:
  """DeepSeek-V2: 236B parameters, 21B active, 8.1T tokens (V2 section 3.1).

  Of its three balance losses this is the expert-level one; its token dropping
  per device is not reproduced.
  """
  return Config(
    model=config_lib.ModelConfig(
      vocab_size=102400,
      dim=5120,
      inter_dim=12288,
      n_layers=60,
      n_dense_layers=1,
      n_mtp_layers=0,
      moe=config_lib.MoEConfig(
        n_routed_experts=160,
        n_shared_experts=2,
        n_activated_experts=6,
        moe_inter_dim=1536,
        n_limited_groups=3,
        score_func='softmax',
        group_score='max',
        norm_topk=False,
        route_scale=16.0,
        balance='aux_loss',
        aux_loss='expert',
      ),
      rope=config_lib.RopeConfig(mscale=0.707),
    ),
    data=config_lib.DataConfig(
      batch_size=9216,
      batch_size_start=2304,
      batch_ramp_fraction=225 / 8100,
      fim_rate=0.0,
    ),
    optim=config_lib.OptimConfig(
      lr=2.4e-4,
      schedule='v2',
      gamma='0',
      alpha='0.003',
      mtp_weight='0',
    ),
    train=config_lib.TrainConfig(
      steps=220973, micro_batch_size=256, eval_batches=1
    ),
  )


def deepseek_v2_lite() -> Config:
  """DeepSeek-V2-Lite: 15.7B parameters, 2.4B active (V2 appendix B)."""
  base = deepseek_v2()
  return dataclasses.replace(
    base,
    model=dataclasses.replace(
      base.model,
      dim=2048,
      inter_dim=10944,
      n_layers=27,
      n_heads=16,
      mla=config_lib.MLAConfig(q_lora_rank=0),
      moe=dataclasses.replace(
        base.model.moe,
        n_routed_experts=64,
        moe_inter_dim=1408,
        n_expert_groups=1,
        n_limited_groups=1,
        route_scale=1.0,
      ),
    ),
    data=config_lib.DataConfig(batch_size=4608, fim_rate=0.0),
    optim=dataclasses.replace(
      base.optim, lr=4.2e-4, schedule='v2_lite', alpha='0.001'
    ),
    train=config_lib.TrainConfig(
      steps=301997, micro_batch_size=256, eval_batches=1
    ),
  )


def loss_free_1b() -> Config:
  """The 1B model of the loss-free balancing paper (arXiv 2408.15664, App. A).

  100B tokens.  Its FFN width is not published; d_ff = 8/3 d with the stated
  granularity 16/3 gives 512 per expert and the stated 1B in total.
  """
  return Config(
    model=config_lib.ModelConfig(
      vocab_size=32064,
      dim=1024,
      inter_dim=2731,
      n_layers=10,
      n_dense_layers=1,
      n_heads=8,
      n_mtp_layers=0,
      attention='mha',
      moe=config_lib.MoEConfig(
        n_routed_experts=64,
        n_shared_experts=2,
        n_activated_experts=6,
        moe_inter_dim=512,
        n_expert_groups=1,
        n_limited_groups=1,
        norm_topk=False,
        route_scale=1.0,
      ),
    ),
    data=config_lib.DataConfig(seq_len=2048, batch_size=1152, fim_rate=0.0),
    optim=config_lib.OptimConfig(
      lr=1e-3,
      schedule='cosine',
      warmup_steps=1000,
      gamma='0.001',
      alpha='0',
      mtp_weight='0',
    ),
    train=config_lib.TrainConfig(
      steps=40000, micro_batch_size=128, eval_batches=1
    ),
  )


def loss_free_3b() -> Config:
  """The 3B model of the loss-free balancing paper: 200B tokens."""
  base = loss_free_1b()
  return dataclasses.replace(
    base,
    model=dataclasses.replace(
      base.model,
      dim=1280,
      inter_dim=3413,
      n_layers=12,
      n_heads=10,
      moe=dataclasses.replace(base.model.moe, moe_inter_dim=853),
    ),
    data=dataclasses.replace(base.data, batch_size=1728),
    optim=dataclasses.replace(
      base.optim, lr=7.8e-4, schedule='v2_lite', warmup_steps=2000
    ),
    train=config_lib.TrainConfig(
      steps=56514, micro_batch_size=144, eval_batches=1
    ),
  )


def quickstart() -> Config:
  """Every part of V3 in a model that two CPU cores train in five minutes."""
  return Config(
    model=config_lib.ModelConfig(
      vocab_size=2048,
      dim=128,
      inter_dim=384,
      n_layers=4,
      n_dense_layers=1,
      n_heads=4,
      init_std=0.02,  # 0.006 is right at width 7168, too small at 128.
      mla=config_lib.MLAConfig(
        q_lora_rank=64,
        kv_lora_rank=48,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
      ),
      moe=config_lib.MoEConfig(
        n_routed_experts=16,
        n_activated_experts=4,
        moe_inter_dim=64,
        n_expert_groups=4,
        n_limited_groups=2,
      ),
    ),
    precision=config_lib.PrecisionConfig(compute_dtype='float32'),
    data=config_lib.DataConfig(seq_len=256, batch_size=8),
    optim=config_lib.OptimConfig(
      lr=3e-3,
      warmup_steps=30,
      ema_decay=0.99,
      gamma='0.005,0@0.96622',  # For 220 steps instead of 245,103.
    ),
    train=config_lib.TrainConfig(
      steps=220, remat='none', eval_every=55, eval_batches=8, save_every=55
    ),
  )


def ablation() -> Config:
  """The model of experiments/ablations: small, for dozens of runs on two cores.

  Without MTP and groups, as the models of the papers' own ablations.  In 120
  steps the bias must cross the spread of the scores in tens, not in hundreds:
  gamma is five times V3's.
  """
  base = quickstart()
  return dataclasses.replace(
    base,
    model=dataclasses.replace(
      base.model,
      vocab_size=1024,
      dim=64,
      inter_dim=128,
      n_layers=3,
      n_mtp_layers=0,
      mla=config_lib.MLAConfig(
        q_lora_rank=36,  # Equal parameters: see experiments/ablations.
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
      ),
      gqa=config_lib.GQAConfig(n_kv_heads=2, head_dim=16),
      moe=dataclasses.replace(
        base.model.moe, moe_inter_dim=32, n_expert_groups=1, n_limited_groups=1
      ),
    ),
    data=dataclasses.replace(base.data, seq_len=64, batch_size=8),
    optim=dataclasses.replace(
      base.optim, warmup_steps=20, ema_decay=0.0, gamma='0.005'
    ),
    train=config_lib.TrainConfig(
      steps=120,
      remat='none',
      log_every=1,
      eval_every=120,
      eval_batches=64,
      save_every=120,
      keep=1,
    ),
  )


def bench_cpu() -> Config:
  """The model on which speed is compared with `transformers` on a CPU."""
  return Config(
    model=config_lib.ModelConfig(
      vocab_size=8192,
      dim=512,
      inter_dim=1408,
      n_layers=8,
      n_dense_layers=1,
      n_heads=8,
      n_mtp_layers=0,
      mla=config_lib.MLAConfig(
        q_lora_rank=256,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
      ),
      moe=config_lib.MoEConfig(
        n_routed_experts=32,
        n_activated_experts=4,
        moe_inter_dim=256,
        n_expert_groups=4,
        n_limited_groups=2,
      ),
    ),
    precision=config_lib.PrecisionConfig(
      compute_dtype='float32', mu_dtype='float32', nu_dtype='float32'
    ),
    data=config_lib.DataConfig(seq_len=512, batch_size=8),
    optim=config_lib.OptimConfig(warmup_steps=10),
    train=config_lib.TrainConfig(steps=20, remat='none'),
  )


def bench_gpu() -> Config:
  """V2-Lite cut to one GPU of 80 GB: 3.9B parameters, 1.2B of them active.

  12 of 27 layers and 32 of 64 experts; widths, heads and vocabulary are whole.
  """
  base = deepseek_v2_lite()
  return dataclasses.replace(
    base,
    model=dataclasses.replace(
      base.model,
      n_layers=12,
      moe=dataclasses.replace(base.model.moe, n_routed_experts=32),
    ),
    data=dataclasses.replace(base.data, batch_size=16),
    optim=dataclasses.replace(base.optim, warmup_steps=10),
    train=config_lib.TrainConfig(steps=20, micro_batch_size=2),
  )


def tiny() -> Config:
  """The model of the tests: every part of V3, compiled in seconds."""
  base = quickstart()
  return dataclasses.replace(
    base,
    model=dataclasses.replace(
      base.model,
      vocab_size=512,
      dim=32,
      inter_dim=64,
      n_layers=3,
      n_heads=2,
      mla=config_lib.MLAConfig(
        q_lora_rank=16,
        kv_lora_rank=12,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
      ),
      moe=dataclasses.replace(
        base.model.moe,
        n_routed_experts=8,
        n_activated_experts=2,
        moe_inter_dim=16,
      ),
    ),
    data=dataclasses.replace(base.data, seq_len=32, batch_size=8),
    optim=dataclasses.replace(base.optim, warmup_steps=2),
    train=config_lib.TrainConfig(
      steps=10,
      remat='none',
      log_every=1,
      eval_every=5,
      eval_batches=2,
      save_every=5,
    ),
  )


PRESETS: dict[str, Callable[[], Config]] = {
  f.__name__: f
  for f in (
    deepseek_v3,
    deepseek_v2,
    deepseek_v2_lite,
    loss_free_1b,
    loss_free_3b,
    quickstart,
    ablation,
    bench_cpu,
    bench_gpu,
    tiny,
  )
}
