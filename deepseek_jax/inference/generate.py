"""Continues prompts: prefill, then plain or speculative decoding."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.config import FP8Config
from deepseek_jax.inference import cache as cache_lib
from deepseek_jax.inference import decode as decode_lib
from deepseek_jax.inference import prefill as prefill_lib
from deepseek_jax.inference import speculative, weights
from deepseek_jax.models import deepseek
from deepseek_jax.ops import quantize, sampling

_PASSES = 16  # Of the model, per compiled call; tokens are streamed so often.
_ROOM = 64  # Positions in a cache, at least; see `cache.round_up`.


class Generation(NamedTuple):
  """What came of it.

  Attributes:
    tokens: the new tokens of each prompt, without the stop token.
    load_LE: float32 [L, E], tokens that each expert of each MoE layer worked on
      (rejected drafts included), then of each MTP module if there were drafts;
      for `load_balance`; None without MoE.
    passes: of the main model after the first token, summed over prompts.
    acceptance: per draft of a pass, the share that stood of those tested.
    tokens_per_pass: 1 for plain decoding, at most D + 1 for D drafts, stop
      tokens included; 0 without a pass.
  """

  tokens: list[list[int]]
  load_LE: np.ndarray | None
  passes: float
  acceptance: tuple[float, ...]
  tokens_per_pass: float


def generate(
  model: deepseek.Transformer,
  variables: dict[str, Any],
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  *,
  temperature: float = 0.0,
  top_k: int = 0,
  top_p: float = 1.0,
  seed: int = 0,
  stop_ids: Sequence[int] = (),
  drafts: int = 0,
  chunk: int = 0,
  on_tokens: Callable[[list[list[int]]], None] | None = None,
) -> Generation:
  """Continues every prompt.

  On an ambient mesh (`jax.set_mesh`) devices divide the sequences, if they can,
  and the experts; `weights.share` puts them there.

  Programs are compiled per number of prompts, and for every length to which
  `cache.round_up` rounds the longest prompt and the longest text: two for each
  doubling, so that a conversation meets a new one ever more seldom.

  Args:
    model: the Transformer.
    variables: its `params` and `router_state`; `weights.unstack` them once to
      generate often.
    prompts: token ids, at least one each; lengths may differ.
    max_new_tokens: at most so many are added.
    temperature: 0 is greedy.
    top_k: only the k likeliest tokens; 0: all.
    top_p: of those, the likeliest that first sum to it.
    seed: a prompt and its place among the prompts give the same text again.
    stop_ids: a text ends before any of these.
    drafts: tokens that MTP proposes per pass; 0: plain decoding.
    chunk: prompt tokens per pass; 0: a default.
    on_tokens: is given the new tokens of each prompt as they come.

  Raises:
    ValueError: on an empty prompt, a token outside the vocabulary, a bad
      setting, or drafts without an MTP module.
  """
  _check(model.config, prompts, max_new_tokens, drafts, chunk)
  how = sampling.sampling(temperature, top_k, top_p)
  variables = weights.unstack(model, variables)
  model = serving(model, variables)
  stops = np.asarray(list(stop_ids), np.int32)
  carry, tokens = _begin(
    model, variables, prompts, max_new_tokens, drafts, chunk, seed, how, stops
  )
  texts = [[] for _ in prompts]
  _hand_out(texts, tokens, on_tokens)
  while np.any(_to_host(_plain(carry).rows.budget_B) > 0):
    carry, tokens = decoding(model, drafts)(variables, carry, how, stops)
    _hand_out(texts, tokens, on_tokens)
  return _result(texts, carry, prompts)


def serving(
  model: deepseek.Transformer, variables: dict[str, Any]
) -> deepseek.Transformer:
  """The model that generates with `variables`, of `weights.unstack`."""
  precision = model.precision
  if not quantize.is_quantized(variables):
    # In compute dtype also after training in FP8: to quantise every weight for
    # every token would cost more than it saves.
    precision = dataclasses.replace(precision, fp8=FP8Config())
  return model.clone(
    precision=precision,
    remat='none',
    scan_layers=False,
    mask_documents=False,
  )


def decoding(model: deepseek.Transformer, drafts: int) -> Callable[..., Any]:
  """The compiled passes: (variables, carry, how, stop_ids) to carry, tokens."""
  if drafts:
    return functools.partial(speculative.decode, model, drafts, _PASSES)
  return functools.partial(decode_lib.decode, model, _PASSES)


def _plain(carry):
  return carry.plain if isinstance(carry, speculative.Carry) else carry


@functools.partial(jax.jit, static_argnums=0)
def first_rows(
  batch: int, max_new_tokens: int, seed: np.uint32
) -> decode_lib.Rows:
  """Of sequences that have no token yet; each has a key of its own."""
  keys = jax.vmap(jax.random.fold_in, (None, 0))(
    jax.random.key(seed), jnp.arange(batch)
  )
  budget = jnp.full(batch, max_new_tokens, jnp.int32)
  return decode_lib.Rows(jnp.zeros(batch, jnp.int32), budget, keys)


def empty_cache(
  model: deepseek.Transformer,
  batch: int,
  longest: int,
  max_new_tokens: int,
  drafts: int,
  chunk: int,
) -> cache_lib.Cache:
  """With room for prompts of `longest` tokens in whole chunks, and the rest."""
  room = max(longest + max_new_tokens + drafts, -(-longest // chunk) * chunk)
  empty = cache_lib.init(
    model.config,
    batch,
    cache_lib.round_up(room, _ROOM),
    model.dtype,
    min(drafts, model.config.n_mtp_layers),
  )
  return cache_lib.divide(empty)


def _begin(
  model, variables, prompts, max_new_tokens, drafts, chunk, seed, how, stops
):
  """Prefill and the first token of every prompt."""
  B, M = len(prompts), min(drafts, model.config.n_mtp_layers)
  longest = max(len(p) for p in prompts)
  T = prefill_lib.chunk_length(longest, chunk)
  empty = empty_cache(model, B, longest, max_new_tokens, drafts, T)
  done = prefill_lib.prefill(
    model, variables, empty, prompts, window=max(M, 1), chunk=T
  )
  # A traced Python integer would have to be an int32.
  rows = first_rows(B, max_new_tokens, np.uint32(seed))
  rows, tokens = decode_lib.first(
    model,
    variables,
    done.last_BWD[:, -1],
    done.cache.lengths_B,
    rows,
    how,
    stops,
  )
  carry = decode_lib.Carry(done.cache, rows, done.load_LE)
  if drafts:
    tails = np.zeros((B, M - 1), np.int32)
    for row, prompt in zip(tails, prompts):
      tail = list(prompt[max(len(prompt) - M + 1, 0) :])
      row[M - 1 - len(tail) :] = tail
    carry = speculative.init_carry(carry, done.last_BWD, tails, drafts)
  return carry, tokens


def _to_host(tree):
  """In numpy, also what other processes' devices have parts of."""
  if not all(x.is_fully_addressable for x in jax.tree.leaves(tree)):
    whole = NamedSharding(jax.sharding.get_mesh(), PartitionSpec())
    tree = jax.jit(lambda tree: tree, out_shardings=whole)(tree)
  return jax.device_get(tree)


def _hand_out(texts, tokens, on_tokens):
  new = [row[row >= 0].tolist() for row in _to_host(tokens)]
  for text, tokens in zip(texts, new):
    text.extend(tokens)
  if on_tokens and any(new):
    on_tokens(new)


def _result(texts, carry, prompts):
  plain = _plain(carry)
  load = _to_host(plain.load_LE)
  if isinstance(carry, speculative.Carry):
    tried, accepted, passes, taken = _to_host(carry.tally)
    acceptance = tuple((accepted / np.maximum(tried, 1)).tolist())
    per_pass = float(taken / max(passes, 1))
    return Generation(texts, load, float(passes), acceptance, per_pass)
  grown = _to_host(plain.cache.lengths_B).sum() - sum(len(p) for p in prompts)
  return Generation(texts, load, float(grown), (), float(grown > 0))


def _check(config, prompts, max_new_tokens, drafts, chunk):
  V = config.vocab_size
  if not len(prompts):
    raise ValueError('prompts is empty: give at least one')
  for i, prompt in enumerate(prompts):
    if not len(prompt):
      raise ValueError(f'prompts[{i}] is empty: give at least one token')
    if not 0 <= min(prompt) <= max(prompt) < V:
      raise ValueError(f'prompts[{i}] has a token outside [0, vocab_size={V})')
  if max_new_tokens < 1:
    raise ValueError(f'max_new_tokens={max_new_tokens}: use at least 1')
  if chunk < 0:
    raise ValueError(f'chunk={chunk}: use 0 (a default) or above')
  if drafts < 0 or drafts and not config.n_mtp_layers:
    raise ValueError(
      f'drafts={drafts} with model.n_mtp_layers={config.n_mtp_layers}: use 0, '
      'or a model with MTP'
    )
