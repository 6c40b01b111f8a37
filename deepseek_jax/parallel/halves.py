"""A layer on parts of a micro-batch that hide each other's exchanges.

While one part's rows travel to the experts and back, another computes (V3
section 3.4.1 does so with two micro-batches).  Forwards and backwards the parts
take turns, as the two passes of a DualPipe pair do; see `turns.py`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.parallel import split_backward, turns


def in_turns(
  apply: Callable[..., tuple[jax.Array, Any]],
  parts: int,
  streams: int,
  collect: Callable[[Any], Any] | None = None,
) -> Callable[..., tuple[jax.Array, Any]]:
  """`apply(variables, *args)` on parts of the batch, in turns.

  It must give an array and statistics, which are summed over the parts.

  Args:
    apply: what is to be differentiated; see `layers.stack`.
    parts: how many.
    streams: only so many of `args`, the first, have gradients.
    collect: of all variables, see `layers.stack.apply_stacked`.
  """
  known = []

  def whole(variables):
    variables = dict(collect(variables) if collect else variables)
    return variables.pop('params'), variables

  def cut(params, state, xs, aux):
    if not known:

      def function(params, state, xs, aux):
        return apply({**state, 'params': params}, *xs, *aux), None

      known.append(split_backward.split(function, params, state, xs, aux))
    return known[0]

  def forward(variables, xs, aux):
    params, state = whole(variables)
    halves = list(zip(_cut(xs, parts), _cut(aux, parts)))
    split, order = cut(params, state, *halves[0]), turns.Order()
    prepared = split.prepare(params, state)
    results = turns.alternate(
      *(
        split.forward.in_turns(order, params, state, prepared, *half)
        for half in halves
      )
    )
    outputs, _, residuals = zip(*results)
    xs, stats = zip(*outputs)
    return (jnp.concatenate(xs), _sum(stats)), (variables, aux, residuals)

  def backward(kept, cotangents):
    variables, aux, residuals = kept
    dy, dstats = cotangents
    (params, state), give_back = jax.vjp(whole, variables)
    dys, split, order = _cut(dy, parts), known[0], turns.Order()
    prepared = split.prepare(params, state)
    results = turns.alternate(
      *(
        split.backward.in_turns(
          order, params, state, prepared, *part, (d, dstats)
        )
        for *part, d in zip(_cut(aux, parts), residuals, dys)
      )
    )
    dxs, dparams = zip(*results)
    zeros = jax.tree.map(jnp.zeros_like, state)
    (dvariables,) = give_back((_sum(dparams), zeros))
    return dvariables, jax.tree.map(lambda *d: jnp.concatenate(d), *dxs), None

  run = jax.custom_vjp(lambda *args: forward(*args)[0])
  run.defvjp(forward, backward)
  return lambda variables, *args: run(variables, args[:streams], args[streams:])


def _cut(tree, parts):
  leaves, treedef = jax.tree.flatten(tree)
  return [
    treedef.unflatten(part)
    for part in zip(*(jnp.split(v, parts) for v in leaves))
  ]


def _sum(trees):
  return jax.tree.map(lambda *values: sum(values), *trees)
