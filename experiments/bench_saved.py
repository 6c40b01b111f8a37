"""The suite `saved` of bench.py: what layers keep for their backward pass.

A layer's forward pass is compiled so that it returns what its backward pass
reads, weights aside; the bytes are those of the compiled program's outputs.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax import config as config_lib
from deepseek_jax.layers import mla, mlp, moe, stack
from deepseek_jax.ops import norms

PRECISIONS = {
  'BF16': {'precision.fp8.enabled': False},
  'FP8': {'precision.fp8.enabled': True},
}
KINDS = ('MLA', 'dense FFN', 'MoE')
POLICIES = ('selective', 'none')


def _layer(config: config_lib.Config, kind: str) -> nn.Module:
  model, precision = config.model, config.precision
  if kind == 'MLA':
    return mla.MLA(model, precision)
  if kind == 'MoE':
    return moe.MoE(model, precision)
  return mlp.MLP(model.inter_dim, model.init_std, precision)


def saved_bytes(config: config_lib.Config, kind: str, policy: str) -> int:
  """What a layer and the norm before it keep of one sequence, input included.

  Args:
    config: the model, its precision, and the length of the sequence.
    kind: one of `KINDS`.
    policy: `train.remat`; 'none' or 'selective'.
  """
  T, dtype = config.data.seq_len, config.precision.compute_dtype
  x = jax.ShapeDtypeStruct((1, T, config.model.dim), dtype)
  more = {'MLA': jnp.int32, 'MoE': jnp.float32}  # Positions, and a mask.
  args = [jax.ShapeDtypeStruct((1, T), more[kind])] if kind in more else []
  layer = _layer(config, kind)
  variables = nn.meta.unbox(
    jax.eval_shape(layer.init, jax.random.key(0), x, *args)
  )

  def normalised(variables, x, *args):  # The norm before a layer reads x.
    ones = jnp.ones(x.shape[-1:], jnp.float32)
    x = norms.rms_norm(x, ones, config.model.norm_eps)
    return layer.apply(variables, x, *args)

  apply = stack.rematerialised(normalised, policy)

  def forward(variables, x, *args):
    def out(params, x):
      y = apply({**variables, 'params': params}, x, *args)
      return y[0] if kind == 'MoE' else y

    _, vjp = jax.vjp(out, variables['params'], x)
    given = [id(v) for v in jax.tree.leaves((variables, args))]
    return [v for v in jax.tree.leaves(vjp) if id(v) not in given]

  compiled = jax.jit(forward).lower(variables, x, *args).compile()
  return compiled.memory_analysis().output_size_in_bytes


def table(config: config_lib.Config) -> str:
  """Bytes per token of each kind of layer, under V3's policy and without."""
  config = config_lib.replace(config, {'precision.compute_dtype': 'bfloat16'})
  T = config.data.seq_len
  lines = [
    f'bytes per token, of {T} tokens, in the compiled program',
    '| layer | remat | BF16 | FP8 | FP8 / BF16 |',
    '|---|---|---|---|---|',
  ]
  kinds = [k for k in KINDS if k != 'MoE' or config.model.n_moe_layers]
  for kind in kinds:
    for policy in POLICIES:
      bf16, fp8 = (
        saved_bytes(config_lib.replace(config, updates), kind, policy) / T
        for updates in PRECISIONS.values()
      )
      lines.append(
        f'| {kind} | {policy} | {bf16:,.0f} | {fp8:,.0f} | {fp8 / bf16:.2f} |'
      )
  return '\n'.join(lines)
