"""What a traced function computes."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp


def equations(
  jaxpr: jex.Jaxpr, around: tuple[str, ...] = ()
) -> Iterator[tuple[jex.JaxprEqn, tuple[str, ...]]]:
  """Every equation, inner programs' too, with the primitives it lies in."""
  for eqn in jaxpr.eqns:
    yield eqn, around
    for inner in jex.jaxprs_in_params(eqn.params):
      yield from equations(inner, (*around, eqn.primitive.name))


def rounded(jaxpr: jex.Jaxpr) -> set[tuple[int, ...]]:
  """Shapes of all that is rounded from float32 to bfloat16."""
  return {
    eqn.outvars[0].aval.shape
    for eqn, _ in equations(jaxpr)
    if eqn.primitive.name == 'convert_element_type'
    and eqn.invars[0].aval.dtype == jnp.float32
    and eqn.outvars[0].aval.dtype == jnp.bfloat16
  }


def weight_shapes(stacks: Any) -> set[tuple[int, ...]]:
  """Of one layer's weights in stacks [L, ...], with heads also as matrices."""
  shapes = set()
  for path, w in jax.tree_util.tree_leaves_with_path(stacks):
    if w.ndim > 2:
      shapes.add(w.shape[1:])
    if w.ndim == 4 and path[-1].key not in ('w1', 'w2', 'w3'):
      _, a, b, c = w.shape
      shapes |= {(a, b * c), (a * b, c)}
  return shapes
