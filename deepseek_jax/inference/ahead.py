"""Prefill and decoding, lowered for devices that are not here.

They are the programs of `generate`, for arrays of which only shapes and places
are known; within `jax.set_mesh`, for the devices of that mesh.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from deepseek_jax.inference import cache as cache_lib
from deepseek_jax.inference import (
  decode,
  generate,
  prefill,
  speculative,
  weights,
)
from deepseek_jax.models import deepseek
from deepseek_jax.ops import sampling
from deepseek_jax.parallel import sharding


class Served(NamedTuple):
  """A model that generates; arrays are shapes and places.

  Attributes:
    model: as `generate` has it.
    variables: of `weights.unstack`.
    prefilled: what a chunk of the prompts adds to.
    tokens: int32 [B, T], a chunk and what MTP sees beyond it.
    carry: what decoding goes on from.
    drafts: of MTP, per pass.
    everywhere: the place of what is whole on every device.
  """

  model: deepseek.Transformer
  variables: dict[str, Any]
  prefilled: prefill.Prefilled
  tokens: jax.ShapeDtypeStruct
  carry: Any
  drafts: int
  everywhere: Sharding


def serve(
  model: deepseek.Transformer,
  variables: dict[str, Any],
  count: int,
  length: int,
  drafts: int,
  everywhere: Sharding,
) -> Served:
  """What `generate` makes of a model, and of texts that are half prompt.

  Args:
    model: as trained.
    variables: shapes and places of `params` and `router_state`.
    count: B, texts.
    length: of each, tokens, at least 2.
    drafts: of MTP, per pass.
    everywhere: the place of what is whole on every device.
  """
  unstack = functools.partial(weights.unstack, model)
  places = jax.jit(unstack).lower(variables).compile().output_shardings
  variables = jax.tree.map(_at, jax.eval_shape(unstack, variables), places)
  model = generate.serving(model, variables)
  new, M = length // 2, min(drafts, model.config.n_mtp_layers)
  T = prefill.chunk_length(length - new)

  def begin():
    cache = generate.empty_cache(model, count, length - new, new, drafts, T)
    done = prefill.nothing(model, cache, max(M, 1))
    rows = generate.first_rows(count, new, np.uint32(0))
    carry = decode.Carry(cache, rows, done.load_LE)
    if drafts:
      tails = np.zeros((count, M - 1), np.int32)
      carry = speculative.init_carry(carry, done.last_BWD, tails, drafts)
    return done, carry

  done, carry = _place(jax.eval_shape(begin), count, everywhere)
  tokens = jax.ShapeDtypeStruct((count, T + M), jnp.int32, sharding=everywhere)
  return Served(model, variables, done, tokens, carry, drafts, everywhere)


def lower_prefill(served: Served) -> jax.stages.Lowered:
  """One chunk of every prompt."""
  start = jax.ShapeDtypeStruct((), jnp.int32, sharding=served.everywhere)
  return prefill.run_chunk.lower(*served[:4], start)


def lower_decode(served: Served) -> jax.stages.Lowered:
  """The passes of one call, greedy."""
  how = _place(jax.eval_shape(sampling.sampling), 0, served.everywhere)
  stops = jax.ShapeDtypeStruct((0,), jnp.int32, sharding=served.everywhere)
  run = generate.decoding(served.model, served.drafts)
  return run.func.lower(*run.args, served.variables, served.carry, how, stops)


def _at(x, place):
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


def _place(tree, count, everywhere):
  """Caches of `count` texts as `cache.divide` has them, all else whole."""

  over = everywhere
  if isinstance(everywhere, NamedSharding):
    axes = sharding.sequence_axes(count)
    over = NamedSharding(everywhere.mesh, PartitionSpec(axes))

  def is_cache(x):
    return isinstance(x, cache_lib.Cache)

  def place(x):
    where = over if is_cache(x) else everywhere
    return jax.tree.map(lambda leaf: _at(leaf, where), x)

  return jax.tree.map(place, tree, is_leaf=is_cache)
