"""What a traced function computes."""

from collections.abc import Iterator

import jax.extend.core as jex


def equations(
  jaxpr: jex.Jaxpr, around: tuple[str, ...] = ()
) -> Iterator[tuple[jex.JaxprEqn, tuple[str, ...]]]:
  """Every equation, inner programs' too, with the primitives it lies in."""
  for eqn in jaxpr.eqns:
    yield eqn, around
    for inner in jex.jaxprs_in_params(eqn.params):
      yield from equations(inner, (*around, eqn.primitive.name))
