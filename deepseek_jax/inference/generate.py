"""Continues token sequences, one forward pass of the whole text per token."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.models import deepseek


def sample_token(
  logits_BV: jax.Array, temperature: jax.Array, key: jax.Array
) -> jax.Array:
  """Draws from softmax(logits / temperature); argmax at 0: int32 [B]."""
  drawn = jax.random.categorical(
    key, logits_BV / jnp.maximum(temperature, 1e-6)
  )
  greedy = jnp.argmax(logits_BV, -1)
  return jnp.where(temperature > 0, drawn, greedy).astype(jnp.int32)


def generate(
  model: deepseek.Transformer,
  variables: dict[str, Any],
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  *,
  temperature: float = 0.0,
  seed: int = 0,
  stop_id: int = -1,
) -> list[list[int]]:
  """The new tokens of each prompt, without the stop token.

  Args:
    model: the Transformer.
    variables: its `params` and `router_state`.
    prompts: token ids, at least one each; lengths may differ.
    max_new_tokens: at most so many are added.
    temperature: 0 is greedy.
    seed: the same seed gives the same text.
    stop_id: a sequence ends before this token; -1: none does.

  Raises:
    ValueError: on an empty prompt or a token outside the vocabulary.
  """
  V = model.config.vocab_size
  for i, prompt in enumerate(prompts):
    if not len(prompt):
      raise ValueError(f'prompts[{i}] is empty: give at least one token')
    if not 0 <= min(prompt) <= max(prompt) < V:
      raise ValueError(f'prompts[{i}] has a token outside [0, vocab_size={V})')
  lengths = np.array([len(p) for p in prompts], np.int32)
  tokens = np.zeros((len(prompts), lengths.max() + max_new_tokens), np.int32)
  for row, prompt in zip(tokens, prompts):
    row[: len(prompt)] = prompt
  # Off the training policies: nothing is kept for a backward pass.
  model = model.clone(remat='none')
  tokens = _decode(
    model, variables, tokens, lengths, temperature, jax.random.key(seed)
  )
  return [
    _until(row[n : n + max_new_tokens].tolist(), stop_id)
    for row, n in zip(np.asarray(tokens), lengths)
  ]


@jax.jit(static_argnums=0)
def _decode(model, variables, tokens_BT, lengths_B, temperature, key):
  rows = jnp.arange(tokens_BT.shape[0])

  def body(i, tokens_BT):
    last_B = lengths_B + i - 1
    # What lies beyond `last` is in the future and cannot be seen.
    hidden_BTD = model.apply(variables, tokens_BT, method='encode')
    logits_BV = model.apply(
      variables, hidden_BTD[rows, last_B], method='unembed'
    )
    new_B = sample_token(logits_BV, temperature, jax.random.fold_in(key, i))
    return tokens_BT.at[rows, last_B + 1].set(new_B)

  n_new = tokens_BT.shape[1] - lengths_B.max()
  return jax.lax.fori_loop(0, n_new, body, tokens_BT)


def _until(tokens: list[int], stop_id: int) -> list[int]:
  return tokens[: tokens.index(stop_id)] if stop_id in tokens else tokens
