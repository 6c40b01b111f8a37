"""Many equal layers on one stacked parameter tree, and their recomputation."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# What the paper's selective policy keeps for the backward pass: inputs of
# linears and of SwiGLU, attention's output, the router.  RMSNorms, the MLA
# up-projections and SwiGLU's output are computed again (V3 section 3.2.3).
_SELECTIVE = jax.checkpoint_policies.save_only_these_names(
  'q_latent',
  'kv_latent',
  'attn_out',
  'attn_lse',
  'routing',
  'expert_rows',
  'ffn_up',
)


def init_stacked(layer: nn.Module, rng: jax.Array, n_layers: int, *args) -> Any:
  """Variables of `n_layers` independent `layer`s, stacked [L, ...].

  Partitioning metadata gain a leading axis 'layers'.
  """

  def init(key):
    return layer.init(key, *args)

  stacked = jax.vmap(init)(jax.random.split(rng, n_layers))
  return nn.meta.add_axis(stacked, 0, {nn.PARTITION_NAME: 'layers'})


def rematerialised(apply, policy: str, index: int = 0):
  """`apply` under a policy; `index` is a layer's place in its group."""
  if policy == 'full' or (policy == 'alternate' and index == 0):
    return jax.checkpoint(apply)
  if policy == 'selective':
    return jax.checkpoint(apply, policy=_SELECTIVE)
  return apply


def apply_stacked(
  layer: nn.Module,
  variables: Any,
  x_BTD: jax.Array,
  *args: Any,
  remat: str = 'none',
  scan: bool = True,
) -> tuple[jax.Array, Any]:
  """Runs the layers in turn; each takes `x` and `args`, gives `(x, stats)`.

  Args:
    layer: unbound module of one layer.
    variables: its collections, every leaf with a leading [L].
    x_BTD: input of the first layer.
    *args: the same for every layer.
    remat: 'none'; 'full': keep only each layer's input; 'alternate': full for
      every other layer; 'selective': the paper's.
    scan: compile one layer and loop, rather than L copies; the same result.

  Returns:
    The last layer's output and the stacked statistics.
  """
  n_layers = jax.tree.leaves(variables)[0].shape[0]
  group = 2 if remat == 'alternate' else 1

  def run(x, layer_variables, index):
    apply = rematerialised(layer.apply, remat, index % group)
    return apply(layer_variables, x, *args)

  def run_group(x, group_variables):
    stats = []
    for i in range(group):
      x, s = run(x, jax.tree.map(lambda v: v[i], group_variables), i)  # noqa: B023
      stats.append(s)
    return x, jax.tree.map(lambda *s: jnp.stack(s), *stats)

  scanned = n_layers // group * group if scan and n_layers > group else 0
  collected = []
  if scanned:
    grouped = jax.tree.map(
      lambda v: v[:scanned].reshape(-1, group, *v.shape[1:]), variables
    )
    x_BTD, stats = jax.lax.scan(run_group, x_BTD, grouped)
    collected.append(jax.tree.map(lambda s: s.reshape(-1, *s.shape[2:]), stats))
  for i in range(scanned, n_layers):
    x_BTD, stats = run(x_BTD, jax.tree.map(lambda v: v[i], variables), i)  # noqa: B023
    collected.append(jax.tree.map(lambda s: s[None], stats))
  return x_BTD, jax.tree.map(lambda *s: jnp.concatenate(s), *collected)
