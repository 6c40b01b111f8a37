"""Parameters as decoding reads them: one tree per layer, in compute dtype."""

import functools
from typing import Any

import jax

from deepseek_jax.models import deepseek

_STACKS = ('dense_layers', 'moe_layers', 'mtp')
_FLOAT32 = ('gate', 'bias')  # The router; norms, which are vectors, as well.


def unstack(
  model: deepseek.Transformer, variables: dict[str, Any]
) -> dict[str, Any]:
  """A copy whose stacks [L, ...] are lists of L layers.

  A compiled program reads an array of its own where it lies, but copies a slice
  of a stack before it multiplies with it.  Matrices are rounded to the model's
  compute dtype here, once, rather than at every token.

  Args:
    model: for its dtype.
    variables: `params` and `router_state`.  Unstacked ones are returned as
      they are: do it once to generate often.
  """
  stacks = [v[n] for v in variables.values() for n in _STACKS if n in v]
  if not stacks or isinstance(stacks[0], list):
    return variables
  return _unstack(model.dtype, variables)


@functools.partial(jax.jit, static_argnums=0)
def _unstack(dtype, variables):
  def cast(path, x):
    is_matrix = x.ndim > 1 and path[-1].key not in _FLOAT32
    return x.astype(dtype) if is_matrix else x

  def layers(stacked):
    count = jax.tree.leaves(stacked)[0].shape[0]
    return [
      jax.tree_util.tree_map_with_path(
        cast,
        jax.tree.map(lambda x: x[i], stacked),  # noqa: B023
      )
      for i in range(count)
    ]

  return {
    collection: {
      name: layers(tree)
      if name in _STACKS
      else cast((jax.tree_util.DictKey(name),), tree)
      for name, tree in trees.items()
    }
    for collection, trees in variables.items()
  }
