"""Parameters as decoding reads them: one tree per layer, in compute dtype."""

import functools
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.models import deepseek
from deepseek_jax.ops import cached_attention, quantize
from deepseek_jax.parallel import rules

_STACKS = ('dense_layers', 'moe_layers', 'mtp')
_FLOAT32 = ('gate', 'bias')  # The router; norms, which are vectors, as well.


def unstack(
  model: deepseek.Transformer, variables: dict[str, Any]
) -> dict[str, Any]:
  """A copy whose stacks [L, ...] are lists of L layers.

  A compiled program reads an array of its own where it lies, but copies a slice
  of a stack before it multiplies with it.  Matrices are rounded to the model's
  compute dtype here, once, rather than at every token; and MLA gets the two
  halves of `wkv_b` in the order in which absorbed attention multiplies with
  them, `w_uk` [N, H, C] and `w_uv` [N, C, U].  The FP8 codes of a converted
  checkpoint (V3 section 3.3.2) stay codes, but for these two, which DeepSeek's
  own inference code dequantises as well.

  Args:
    model: for its dtype.
    variables: `params` and `router_state`.  Unstacked ones are returned as
      they are: do it once to generate often.
  """
  variables = quantize.join_scales(variables)
  stacks = [v[n] for v in variables.values() for n in _STACKS if n in v]
  if not stacks or isinstance(stacks[0], list):
    return variables
  return _unstack(model.dtype, model.config.mla.qk_nope_head_dim, variables)


def share(variables: dict[str, Any], mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """Puts each device's experts on it, and all else on every device.

  Args:
    variables: of `unstack`.
    mesh: whose `node` and `expert` axes divide the experts.
  """

  def put(path, x):
    is_experts = path[-1].key in ('w1', 'w2', 'w3') and len(x.shape) == 3
    spec = P(rules.EXPERTS) if is_experts else P()
    return jax.device_put(x, NamedSharding(mesh, spec))

  return jax.tree_util.tree_map_with_path(
    put, variables, is_leaf=quantize.is_leaf
  )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _unstack(dtype, nope, variables):
  def layers(stacked):
    count = jax.tree.leaves(stacked)[0].shape[0]
    layers = (jax.tree.map(lambda x: x[i], stacked) for i in range(count))  # noqa: B023
    return [_absorb(_cast(layer, dtype), dtype, nope) for layer in layers]

  return {
    collection: {
      name: layers(tree)
      if name in _STACKS
      else _cast({name: tree}, dtype)[name]
      for name, tree in trees.items()
    }
    for collection, trees in variables.items()
  }


def _cast(tree, dtype):
  def leaf(path, x):
    is_matrix = len(x.shape) > 1 and path[-1].key not in _FLOAT32
    return x.astype(dtype) if is_matrix and not quantize.is_leaf(x) else x

  return jax.tree_util.tree_map_with_path(leaf, tree, is_leaf=quantize.is_leaf)


def _absorb(tree, dtype, nope):
  """Adds `w_uk` and `w_uv` wherever there is a `wkv_b`."""
  if not isinstance(tree, dict):
    return tree
  tree = {name: _absorb(inner, dtype, nope) for name, inner in tree.items()}
  if 'wkv_b' in tree:
    wkv_b = quantize.dense(tree['wkv_b'], dtype)
    tree['w_uk'], tree['w_uv'] = cached_attention.absorbed(wkv_b, nope)
  return tree
