"""Many equal layers on one stacked parameter tree, and their recomputation."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.kernels import dispatch
from deepseek_jax.parallel import halves

# What the paper's selective policy keeps for the backward pass: the latents,
# attention's output, the residual stream behind it, the routing and SwiGLU's
# inputs.  RMSNorms, the MLA up-projections and SwiGLU's output are computed
# again (V3 section 3.2.3).  In FP8, attention's output and SwiGLU's inputs are
# kept as codes.  Of an MTP module also what goes into its block, and comes out.
_SELECTIVE = (
  'wq_a',
  'wkv_a',
  'attn_out',
  'attn_lse',
  'wo',
  'routing',
  'dispatched',
  'ffn_up',
  'eh_proj',
  'mtp_out',
)

# Keeps every matmul's result and computes the cheap rest again, which is faster
# than to store it and to read it back.  In FP8, also the codes of operands.
_NO_MATMUL_TWICE = (
  *_SELECTIVE,
  'wq',
  'wq_b',
  'wkv_b',
  'wk',
  'wv',
  'w2',
  'linear_in',
)


def init_stacked(layer: nn.Module, rng: jax.Array, n_layers: int, *args) -> Any:
  """Variables of `n_layers` independent `layer`s, stacked [L, ...].

  Partitioning metadata gain a leading axis 'layers'.
  """

  def init(key):
    with dispatch.told(lambda _: None):  # It never runs.
      return layer.init(key, *args)

  stacked = jax.vmap(init)(jax.random.split(rng, n_layers))
  return nn.meta.add_axis(stacked, 0, {nn.PARTITION_NAME: 'layers'})


def rematerialised(
  apply,
  policy: str,
  index: int = 0,
  in_scan: bool = False,
  collect=None,
  parts: int = 1,
  streams: int = 1,
):
  """`apply` under a policy; `index` is a layer's place in its group.

  For `collect`, which is computed again as well, and `parts` see
  `apply_stacked`; `streams` of the arguments, the first, have gradients.
  """

  def run(variables, *args):
    return apply(collect(variables) if collect else variables, *args)

  if policy == 'alternate':
    policy = 'none' if index else 'full'
  names = {'none': _NO_MATMUL_TWICE, 'selective': _SELECTIVE, 'full': ()}
  saveable = jax.checkpoint_policies.save_only_these_names(*names[policy])
  # Only a loop keeps XLA from merging the two computations back into one.
  how = {'policy': saveable, 'prevent_cse': not in_scan}
  if parts > 1:
    one = jax.checkpoint(apply, **how)
    return halves.in_turns(one, parts, streams, collect)
  return jax.checkpoint(run, **how)


def apply_stacked(
  layer: nn.Module,
  variables: Any,
  x_BTD: jax.Array,
  *args: Any,
  remat: str = 'none',
  scan: bool = True,
  collect: Callable[[Any], Any] | None = None,
  parts: int = 1,
) -> tuple[jax.Array, Any]:
  """Runs the layers in turn; each takes `x` and `args`, gives `(x, stats)`.

  Args:
    layer: unbound module of one layer.
    variables: its collections, every leaf with a leading [L].
    x_BTD: input of the first layer.
    *args: the same for every layer.
    remat: 'none': no matmul is computed again; 'full': keep only each layer's
      input; 'alternate': full for every other layer; 'selective': the paper's.
    scan: compile one layer and loop, rather than L copies; the same result.
    collect: what makes one layer's variables whole, where devices share them;
      always done again in the backward pass.
    parts: of the batch, whose exchanges and computation take turns; see
      `parallel.halves`.

  Returns:
    The last layer's output and the stacked statistics.
  """
  n_layers = jax.tree.leaves(variables)[0].shape[0]
  group = 2 if remat == 'alternate' else 1

  def run(x, variables, index, in_scan, collect=collect):
    how = remat, index, in_scan, collect, parts
    return rematerialised(layer.apply, *how)(variables, x, *args)

  def member(i):
    """Takes a layer out of its group, within what is computed again.

    Taken before, it would be a residual of the backward pass: all weights once
    more.  As inputs of the loop of their own, every other layer of all would be
    a copy, too.
    """

    def take(group_variables):
      one = jax.tree.map(lambda v: v[i], group_variables)
      return collect(one) if collect else one

    return take

  def run_group(x, group_variables):
    if group == 1:
      return run(x, group_variables, 0, True)
    stats = []
    for i in range(group):
      x, s = run(x, group_variables, i, True, member(i))
      stats.append(s)
    return x, jax.tree.map(lambda *s: jnp.stack(s), *stats)

  scanned = n_layers // group * group if scan and n_layers > group else 0
  collected = []
  if scanned:
    groups = variables
    if group > 1:
      groups = jax.tree.map(
        lambda v: v[:scanned].reshape(-1, group, *v.shape[1:]), variables
      )
    x_BTD, stats = jax.lax.scan(run_group, x_BTD, groups)
    if group > 1:
      stats = jax.tree.map(lambda s: s.reshape(-1, *s.shape[2:]), stats)
    collected.append(stats)
  for i in range(scanned, n_layers):
    one = jax.tree.map(lambda v: v[i], variables)  # noqa: B023
    x_BTD, stats = run(x_BTD, one, i % group, in_scan=False)
    collected.append(jax.tree.map(lambda s: s[None], stats))
  return x_BTD, jax.tree.map(lambda *s: jnp.concatenate(s), *collected)
