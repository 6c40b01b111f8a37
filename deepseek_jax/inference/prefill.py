"""Prompts into the cache, chunk by chunk, in the expanded form."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.inference import cache as cache_lib
from deepseek_jax.models import deepseek

_CHUNK = 256  # Tokens of each prompt in one pass, at most.


class Prefilled(NamedTuple):
  """What the prompts leave behind.

  Attributes:
    cache: with all of them, `lengths_B` tokens each.
    last_BWD: final hidden states of each prompt's last W tokens; arbitrary
      where the prompt is shorter.
    load_LE: float32 tokens per expert of each MoE layer, then of each MTP
      module if the cache has any; None without MoE.
  """

  cache: cache_lib.Cache
  last_BWD: jax.Array
  load_LE: jax.Array | None


def chunk_length(longest: int, chunk: int = 0) -> int:
  """Tokens per pass: `chunk`, or a default, of few different ones."""
  return chunk or min(_CHUNK, cache_lib.round_up(longest, 16))


def prefill(
  model: deepseek.Transformer,
  weights: dict[str, Any],
  cache: cache_lib.Cache,
  prompts: Sequence[Sequence[int]],
  window: int = 1,
  chunk: int = 0,
) -> Prefilled:
  """Runs all prompts, padded on the right to whole chunks.

  Padding is computed and written behind a prompt's end, where no query looks
  before a generated token has replaced it.

  Args:
    model: the Transformer.
    weights: of `weights.unstack`.
    cache: empty, with room for the prompts in whole chunks; it is donated.
    prompts: token ids, at least one each; lengths may differ.
    window: W, hidden states to keep.
    chunk: tokens per pass; 0: a default.
  """
  lengths = np.array([len(p) for p in prompts], np.int32)
  T = chunk_length(int(lengths.max()), chunk)
  n_chunks, M = -(-lengths.max() // T), len(cache.mtp)
  assert n_chunks * T <= cache.capacity, (n_chunks, T, cache.capacity)
  tokens = np.zeros((len(prompts), n_chunks * T + M), np.int32)
  for row, prompt in zip(tokens, prompts):
    row[: len(prompt)] = prompt
  cache = cache._replace(lengths_B=jnp.asarray(lengths))
  done = nothing(model, cache, window)
  for start in range(0, n_chunks * T, T):
    part = tokens[:, start : start + T + M]
    done = run_chunk(model, weights, done, part, np.int32(start))
  return done


def nothing(
  model: deepseek.Transformer, cache: cache_lib.Cache, window: int
) -> Prefilled:
  """What there is before the first chunk."""
  c, E = model.config, model.config.moe.n_routed_experts
  last = jnp.zeros((cache.lengths_B.shape[0], window, c.dim), model.dtype)
  layers = c.n_moe_layers + (c.n_mtp_layers if cache.mtp and E else 0)
  load = jnp.zeros((layers, E), jnp.float32) if layers else None
  return Prefilled(cache, last, load)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def run_chunk(model, weights, done, tokens, start):
  """One chunk; `tokens` [B, T + M] reaches as far ahead as MTP looks."""
  cache, last_BWD, load_LE = done
  M, W = len(cache.mtp), last_BWD.shape[1]
  B, T = tokens.shape[0], tokens.shape[1] - M
  positions_BT = jnp.broadcast_to(start + jnp.arange(T), (B, T))
  mask_BT = (positions_BT < cache.lengths_B[:, None]).astype(jnp.float32)
  hidden_BTD, layers, load = model.apply(
    weights,
    tokens[:, :T],
    positions_BT,
    mask_BT,
    cache.layers,
    prefill=True,
    method='extend',
  )
  ahead_BTD, mtp, counts = hidden_BTD, [], []
  for k in range(1, M + 1):
    ahead_BTD, mtp_cache, counts_E = model.apply(
      weights,
      k,
      ahead_BTD,
      tokens[:, k : k + T],
      positions_BT,
      mask_BT,
      cache.mtp[k - 1],
      prefill=True,
      method='extend_ahead',
    )
    mtp.append(mtp_cache)
    counts.append(counts_E)
  index_BW = cache.lengths_B[:, None] - W + jnp.arange(W) - start
  inside = (index_BW >= 0) & (index_BW < T)
  picked = jnp.take_along_axis(
    hidden_BTD, jnp.clip(index_BW, 0, T - 1)[..., None], 1
  )
  return Prefilled(
    cache._replace(layers=layers, mtp=tuple(mtp)),
    jnp.where(inside[..., None], picked, last_BWD),
    add_load(load_LE, load, counts),
  )


def add_load(
  load_LE: jax.Array | None,
  main_LE: jax.Array | None,
  mtp: Sequence[jax.Array | None],
) -> jax.Array | None:
  """`load_LE` and what the main model and the first MTP modules counted."""
  if main_LE is not None:
    load_LE = load_LE.at[: len(main_LE)].add(main_LE)
  if mtp and mtp[0] is not None:
    start = 0 if main_LE is None else len(main_LE)
    load_LE = load_LE.at[start : start + len(mtp)].add(jnp.stack(mtp))
  return load_LE
