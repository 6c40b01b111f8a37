"""What layers keep for the backward pass, and what they need while they run.

The recomputation policies are those of `layers/stack.py` (V3 section 3.2.3).
"""

from typing import NamedTuple

from deepseek_jax.config import Config
from deepseek_jax.planner import communication, formats, parameters
from deepseek_jax.planner.placement import Stage

_HEAD_CHUNK = 512  # Tokens whose logits exist at once: ops/losses.py.
# Of `sizes`: what each policy keeps besides a layer's input.
_SELECTIVE = (
  'latents', 'attn_out', 'lse', 'wo', 'routing', 'rows', 'ffn_up',
)  # fmt: skip
_KEPT = {
  'full': (),
  'selective': _SELECTIVE,
  'none': (*_SELECTIVE, 'heads', 'w2', 'linear_in'),
}


class Rows(NamedTuple):
  """Rows that the experts of one device get of one micro-batch and layer."""

  expected: float  # The mean over devices, whatever the routing.
  worst: int  # If all tokens of the group chose its experts.
  allocated: float  # At a time; what is beyond it comes in further rounds.


def expert_rows(config: Config) -> Rows:
  """How much room the experts of a device need (V3 section 2.1.2: no drops)."""
  parallel, moe = config.parallel, config.model.moe
  tokens = communication.tokens_per_device(config)
  parts = parallel.node * parallel.expert
  expected = tokens * moe.n_activated_experts
  if parts == 1:
    return Rows(expected, round(expected), expected)
  own = moe.n_routed_experts // parts
  worst = round(tokens) * parts * min(moe.n_activated_experts, own)
  room = parallel.expert_buffer * expected or worst
  return Rows(expected, worst, min(room, worst))


def sizes(config: Config, is_moe: bool) -> dict[str, float]:
  """Bytes per token of one layer's intermediate results, by `_KEPT`'s names.

  Those of experts are of rows, not of tokens: see `row_sizes`.
  """
  m, width = config.model, formats.width(config)
  moe, mla = m.moe, m.mla
  if m.attention == 'mla':
    latents = mla.q_lora_rank + mla.kv_lora_rank + mla.qk_rope_head_dim
    q = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    heads = m.n_heads * (q + mla.qk_nope_head_dim + mla.v_head_dim)
    out = m.n_heads * mla.v_head_dim
  else:
    latents, out = 0, m.n_heads * m.gqa.head_dim
    heads = (m.n_heads + 2 * m.n_kv_heads) * m.gqa.head_dim
  inter = moe.n_shared_experts * moe.moe_inter_dim if is_moe else m.inter_dim
  # In FP8, what the projections and the FFN multiply.
  codes = {'attention': m.dim + latents, 'dense': m.dim}
  codes = sum(
    formats.stored(config, module, 'fmt', count)
    for module, count in codes.items()
    if config.precision.of(module).fp8.enabled
  )
  # Logits; ids, the permutation and its inverse.
  routing = 4 * (moe.n_routed_experts + 3 * moe.n_activated_experts)
  return {
    'latents': latents * width,
    'attn_out': formats.stored(config, 'attention', 'attn_out_fmt', out),
    'lse': 4 * m.n_heads,
    'wo': m.dim * width,
    'routing': routing if is_moe else 0,
    'ffn_up': formats.stored(config, 'dense', 'swiglu_fmt', 2 * inter),
    'heads': heads * width,
    'w2': m.dim * width if inter else 0,
    'linear_in': codes,
  }


def row_sizes(config: Config) -> dict[str, float]:
  """Bytes of one row of a routed expert, by `_KEPT`'s names.

  `rows` are what was dispatched; on one device they are read from the tokens.
  """
  m, parallel = config.model, config.parallel
  is_sent = parallel.node * parallel.expert > 1
  dispatched, _ = communication.token_bytes(config)
  return {
    'rows': dispatched if is_sent else 0,
    'ffn_up': formats.stored(
      config, 'experts', 'swiglu_fmt', 2 * m.moe.moe_inter_dim
    ),
  }


def kept(config: Config, is_moe: bool, policy: str, rows: float) -> float:
  """Bytes of one layer and micro-batch that a policy keeps on a device.

  Args:
    config: of the run.
    is_moe: which kind of layer.
    policy: `train.remat`.
    rows: that the device's experts have room for; see `expert_rows`.
  """
  if policy == 'alternate':
    both = (kept(config, is_moe, p, rows) for p in ('none', 'full'))
    return sum(both) / 2
  width = formats.width(config)
  per_token, per_row = sizes(config, is_moe), row_sizes(config)
  names = _KEPT[policy]
  total = config.model.dim * width + sum(per_token.get(n, 0) for n in names)
  total *= communication.tokens_per_device(config)
  if is_moe:
    total += rows * sum(per_row.get(n, 0) for n in names)
  return total


def deferred(config: Config, is_moe: bool, rows: float) -> float:
  """Bytes of one layer and micro-batch that wait for the weights' gradients.

  The gradients of all linears' outputs, and those of their inputs that the
  backward pass has computed again: norms' results, and what SwiGLU gives.
  """
  m = config.model
  moe, mla = m.moe, m.mla
  if m.attention == 'mla':
    q = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    heads = m.n_heads * (q + mla.qk_nope_head_dim + mla.v_head_dim)
    heads += 2 * (mla.q_lora_rank + mla.kv_lora_rank) + mla.qk_rope_head_dim
  else:
    heads = (m.n_heads + 2 * m.n_kv_heads) * m.gqa.head_dim
  inter = moe.n_shared_experts * moe.moe_inter_dim if is_moe else m.inter_dim
  per_token = formats.stored(config, 'attention', 'fmt', heads + 2 * m.dim)
  per_token += formats.stored(config, 'dense', 'fmt', 2 * m.dim + 3 * inter)
  total = 0
  if is_moe:  # The router's, too, and what was dispatched.
    per_token += m.dim * formats.width(config) + 4 * moe.n_routed_experts
    row = m.dim + 3 * moe.moe_inter_dim
    total = rows * formats.stored(config, 'experts', 'fmt', row)
  return total + per_token * communication.tokens_per_device(config)


def of_stage(config: Config, stage: Stage, rows: float) -> float:
  """Bytes that a stage keeps of one micro-batch for its backward pass."""
  model, policy = config.model, config.train.remat
  is_moe = model.moe.n_routed_experts > 0
  total = stage.dense * kept(config, False, policy, rows)
  total += stage.moe * kept(config, True, policy, rows)
  total += stage.mtp * kept(config, is_moe, policy, rows)
  width = formats.width(config)
  # An MTP module's two inputs, of which `kept` has one; or the input of its
  # block, but not what leaves that.  A head's input and its gradient.
  vectors = (1 if policy == 'full' else 3) * stage.mtp
  vectors += 2 * (stage.mtp + 1) * stage.heads
  tokens = communication.tokens_per_device(config)
  return total + vectors * tokens * model.dim * width


def of_layer(config: Config, is_moe: bool, rows: float) -> float:
  """Bytes that the backward pass of one layer takes while it runs.

  What it computes again, the gradients of all its results, its experts' rows
  and their gradients, and its weights' gradients.  With FSDP and no pipeline
  also its gathered weights, and as many weights and gradients again, of the
  layer that is being gathered (`mesh.compiler_options`).  Attention's scores
  are taken to stay in a kernel.
  """
  model, parallel = config.model, config.parallel
  width = formats.width(config)
  total = 2 * kept(config, is_moe, 'none', rows)
  total -= kept(config, is_moe, config.train.remat, rows)
  own = parameters.layer(model, is_moe)
  if is_moe:
    total += rows * (model.dim + 2 * model.moe.moe_inter_dim) * width
    routed = parameters.routed_experts(model)
    own -= routed - routed // (parallel.node * parallel.expert)
  is_gathered = parallel.fsdp > 1 and parallel.stage == 1
  return total + own * (2 * (4 + width) if is_gathered else 4)


def of_heads(config: Config, stage: Stage) -> float:
  """Bytes that the losses take while they are computed.

  A head's gradient in float32, a chunk of logits with its probabilities and
  their gradient, and the gradients of all heads in the compute dtype, which
  stay until the backward pass is over.
  """
  if not stage.heads:
    return 0
  model = config.model
  table = parameters.embedding(model)
  tokens = min(_HEAD_CHUNK, communication.tokens_per_device(config))
  logits = 3 * 4 * tokens * model.vocab_size
  return (4 + (1 + stage.mtp) * formats.width(config)) * table + logits
