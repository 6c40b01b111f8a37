"""Validation loss, bits per byte and how often an MTP draft is accepted."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import Config
from deepseek_jax.models import deepseek
from deepseek_jax.ops import losses
from deepseek_jax.training import step
from deepseek_jax.training.layout import Layout


def make_eval_step(
  model: deepseek.Transformer, config: Config, layout: Layout | None = None
) -> Callable[..., dict[str, jax.Array]]:
  """Compiles `(params, router_state, batch, bytes_V) -> sums` of a batch.

  `batch` holds `tokens` and `segments`, int32 [B, T + 1], with a layout this
  process's share of the B rows; `bytes_V` is the number of UTF-8 bytes of each
  token.  Only targets within the document of the token before them count.  With
  `data.mask_documents` the result does not depend on what else a row holds;
  without it, the paper's setting, documents before are part of the context.
  The sums: 'nll'
  (nats), 'tokens', 'bytes', and per MTP depth 'mtp_{k}_nll',
  'mtp_{k}_accepted' and 'mtp_{k}_drafts'.
  """

  if layout:
    model = layout.whole(model)

  def eval_step(params, router_state, batch, bytes_V):
    tokens, segments = batch['tokens'], batch['segments']
    output = model.apply(
      {'params': params, 'router_state': router_state},
      tokens[:, :-1],
      segments[:, :-1],
    )
    head = step.head_weight(params, model.dtype)
    weights = step.target_weights(segments, 0, crosses=False)
    main = losses.cross_entropy(output.hidden_BTD, head, tokens[:, 1:], weights)
    sums = {
      'nll': main.nll,
      'tokens': weights.sum(),
      'bytes': jnp.sum(weights * bytes_V[tokens[:, 1:]]),
    }
    chosen_BT = losses.greedy(output.hidden_BTD, head)
    for k, hidden_BTD in enumerate(output.mtp_hidden, start=1):
      weights = step.target_weights(segments, k, crosses=False)
      targets = deepseek.shift(tokens[:, 1:], k)
      draft_BT = losses.greedy(hidden_BTD, head)
      # The main model's choice for the same token, made k positions later.
      same = draft_BT == deepseek.shift(chosen_BT, k)
      depth = losses.cross_entropy(hidden_BTD, head, targets, weights)
      sums[f'mtp_{k}_nll'] = depth.nll
      sums[f'mtp_{k}_accepted'] = jnp.sum(weights * same)
      sums[f'mtp_{k}_drafts'] = weights.sum()
    return sums

  if layout is None:
    return jax.jit(eval_step)
  batch_sums = jax.jit(layout.batch_sums(eval_step))

  def placed(params, router_state, batch, bytes_V):
    batch = layout.put_batch(jax.tree.map(lambda x: x[None], batch))
    return batch_sums(params, router_state, batch, bytes_V)

  return placed


def evaluate(
  eval_step: Callable[..., dict[str, jax.Array]],
  params: Any,
  router_state: Any,
  batches: Iterable[dict[str, np.ndarray]],
  bytes_V: np.ndarray,
) -> dict[str, float]:
  """Averages over `batches`: what a run reports as its validation result.

  Returns:
    'val_loss' in nats per token, 'val_bpb' in bits per byte of text, and per
    MTP depth 'val_mtp_{k}_loss' and 'val_mtp_{k}_acceptance': the share of
    drafts that equal the main model's greedy choice, given the true prefix.
  """
  bytes_V = jnp.asarray(bytes_V, jnp.float32)
  totals: dict[str, float] = {}
  for batch in batches:
    sums = jax.device_get(eval_step(params, router_state, batch, bytes_V))
    for name, value in sums.items():
      totals[name] = totals.get(name, 0.0) + float(value)
  if not totals.get('tokens'):
    raise ValueError(
      'validation has no target tokens: no batch, or all padding'
    )
  result = {
    'val_loss': totals['nll'] / totals['tokens'],
    'val_bpb': totals['nll'] / math.log(2) / max(totals['bytes'], 1.0),
  }
  k = 1
  while f'mtp_{k}_nll' in totals:
    drafts = max(totals[f'mtp_{k}_drafts'], 1.0)
    result[f'val_mtp_{k}_loss'] = totals[f'mtp_{k}_nll'] / drafts
    result[f'val_mtp_{k}_acceptance'] = totals[f'mtp_{k}_accepted'] / drafts
    k += 1
  return result
