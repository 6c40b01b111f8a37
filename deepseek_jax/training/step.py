"""One optimizer step: losses, gradient accumulation, AdamW, router bias.

The objective is V3's: cross-entropy, plus lambda times the mean MTP loss
(equation 25), plus alpha times the balance loss (equation 17).  Every term is
a sum over the whole batch divided by a count of the whole batch, so that it
does not depend on how the batch is cut into micro-batches or shards.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from deepseek_jax.config import Config
from deepseek_jax.layers import params as params_lib
from deepseek_jax.models import deepseek
from deepseek_jax.ops import losses, routing
from deepseek_jax.training import optimizer
from deepseek_jax.training.schedules import Hyper
from deepseek_jax.training.state import TrainState

Batch = dict[str, jax.Array]


class Totals(NamedTuple):
  """Denominators of the whole batch, float32 scalars."""

  tokens: jax.Array
  sequences: jax.Array


def build_model(config: Config) -> deepseek.Transformer:
  """The Transformer that a run trains."""
  return deepseek.Transformer(
    config.model,
    precision=config.precision,
    mask_documents=config.data.mask_documents,
    remat=config.train.remat,
    scan_layers=config.train.scan_layers,
  )


def declare(model: deepseek.Transformer) -> dict[str, Any]:
  """The collections as shapes, with their axis names and initialisers."""

  def init(rng):  # `setup` declares everything; nothing need be called.
    return model.init(rng, method=lambda module: module.embed)

  return {'router_state': {}, **jax.eval_shape(init, jax.random.key(0))}


def init_variables(model: deepseek.Transformer, seed: int) -> dict[str, Any]:
  """Fresh `params` and `router_state` (empty without routed experts)."""
  return params_lib.materialise(declare(model), seed)


def _state(variables, opt_state) -> TrainState:
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=variables['params'],
    router_state=variables['router_state'],
    opt_state=opt_state,
  )


def abstract_state(
  model: deepseek.Transformer, tx: optax.GradientTransformationExtraArgs
) -> TrainState:
  """The shapes and dtypes of `init_state`."""
  variables = nn.meta.unbox(declare(model))
  opt_state = jax.eval_shape(tx.init, variables['params'])
  state = _state(variables, opt_state)
  return state.replace(step=jax.ShapeDtypeStruct((), jnp.int32))


def init_state(
  model: deepseek.Transformer,
  tx: optax.GradientTransformationExtraArgs,
  seed: int,
) -> TrainState:
  """The state before the first step."""
  variables = init_variables(model, seed)
  # AdamW's state is zeros; to compile that costs more than the zeros.
  opt_state = jax.tree.map(
    lambda x: jnp.asarray(np.zeros(x.shape, x.dtype)),
    jax.eval_shape(tx.init, variables['params']),
  )
  return _state(variables, opt_state)


def target_weights(segments: jax.Array, k: int, crosses: bool) -> jax.Array:
  """Which predictions count: float32 [..., T] from segments [..., T + 1].

  Position i predicts token i + 1 + k, where k is the MTP depth and 0 the main
  head.  Padding never counts; a token of another document only if `crosses`.
  """
  here = segments[..., :-1]
  widths = [(0, 0)] * (segments.ndim - 1) + [(0, k)]
  target = jnp.pad(segments[..., k + 1 :], widths)
  counts = (here > 0) & (target > 0)
  if not crosses:
    counts &= here == target
  return counts.astype(jnp.float32)


def _main_weights(segments: jax.Array, config: Config) -> jax.Array:
  # Packed without a document mask, the paper's setting, the first token of the
  # next document is a target like any other.
  return target_weights(segments, 0, crosses=not config.data.mask_documents)


def batch_totals(batch: Batch, config: Config) -> Totals:
  """The denominators of a batch with any leading dimensions.

  MTP losses too are divided by the number of main targets: equation 24 divides
  by T, not by the T - k terms of its sum.
  """
  segments = batch['segments']
  rows = jnp.any(segments > 0, -1).sum(dtype=jnp.float32)
  tokens = _main_weights(segments, config).sum()
  return Totals(jnp.maximum(tokens, 1), jnp.maximum(rows, 1))


def head_weight(params: Any, dtype: Any) -> jax.Array:
  """The output head [V, D] in the compute dtype; the embedding if tied."""
  return params.get('head', params['embed']).astype(dtype)


def pretrain_loss(
  model: deepseek.Transformer,
  config: Config,
  params: Any,
  router_state: Any,
  batch: Batch,
  hyper: Hyper,
  totals: Totals,
) -> tuple[jax.Array, dict[str, Any]]:
  """A micro-batch's share of the objective, and what to report of it.

  Args:
    model: see `build_model`.
    config: the run's.
    params: float32 master weights; differentiated.
    router_state: biases; no gradient.
    batch: `tokens` and `segments`, int32 [B, T + 1].
    hyper: alpha and lambda of this step.
    totals: of the whole batch.

  Returns:
    The loss, and sums that may be added over micro-batches: 'loss',
    'mtp_{k}_loss', 'balance_loss', and 'stats' (see `deepseek.Output`).
  """
  tokens, segments = batch['tokens'], batch['segments']
  output = model.apply(
    {'params': params, 'router_state': router_state},
    tokens[:, :-1],
    segments[:, :-1],
  )
  head = head_weight(params, model.dtype)
  z_loss = config.optim.z_loss
  main = losses.cross_entropy(
    output.hidden_BTD,
    head,
    tokens[:, 1:],
    _main_weights(segments, config),
    z_loss,
  )
  loss = main.loss / totals.tokens
  aux = {'loss': main.nll / totals.tokens}
  for k, hidden_BTD in enumerate(output.mtp_hidden, start=1):
    depth = losses.cross_entropy(
      hidden_BTD,
      head,
      deepseek.shift(tokens[:, 1:], k),
      target_weights(segments, k, crosses=False),
      z_loss,
    )
    weight = hyper.mtp_weight / len(output.mtp_hidden)
    loss += weight * depth.loss / totals.tokens
    aux[f'mtp_{k}_loss'] = depth.nll / totals.tokens
  balance = sum(s.balance_loss.sum() for s in output.stats.values())
  balance = jnp.asarray(balance / totals.sequences, jnp.float32)
  loss += hyper.alpha * balance
  return loss, {**aux, 'balance_loss': balance, 'stats': output.stats}


def _accumulate(
  loss_fn: Callable[[Any, Batch], Any], params: Any, batch: Batch
):
  """Sums `loss_fn`'s gradients and reports over the leading axis of `batch`."""
  grad_fn = jax.grad(loss_fn, has_aux=True)
  first = jax.tree.map(lambda x: x[0], batch)
  if jax.tree.leaves(batch)[0].shape[0] == 1:
    return grad_fn(params, first)

  def body(total, micro_batch):
    return jax.tree.map(jnp.add, total, grad_fn(params, micro_batch)), None

  shapes = jax.eval_shape(grad_fn, params, first)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  return jax.lax.scan(body, zeros, batch)[0]


def update_router_state(
  router_state: Any, stats: dict[str, Any], hyper: Hyper, config: Config
) -> Any:
  """One auxiliary-loss-free bias update from the whole batch's counts."""
  if config.model.moe.balance != 'aux_free':
    return router_state
  return {
    name: jax.tree.map(
      lambda bias: routing.update_bias(bias, stats[name].counts_E, hyper.gamma),  # noqa: B023
      state,
    )
    for name, state in router_state.items()
  }


def _norms(grads, updates, params) -> dict[str, jax.Array]:
  trees = {'grad_norm': grads, 'update_norm': updates, 'param_norm': params}
  return {name: optimizer.global_norm(tree) for name, tree in trees.items()}


def _router_metrics(router_state, stats) -> dict[str, jax.Array]:
  if not stats:
    return {}
  biases = jnp.concatenate([b.ravel() for b in jax.tree.leaves(router_state)])
  return {
    'counts': jnp.concatenate([s.counts_E for s in stats.values()]),
    'dropped': sum(s.dropped.sum() for s in stats.values()),
    'bias_min': biases.min(),
    'bias_max': biases.max(),
  }


def make_train_step(
  model: deepseek.Transformer,
  config: Config,
  tx: optax.GradientTransformationExtraArgs,
  loss_fn: Callable[..., Any] = pretrain_loss,
) -> Callable[[TrainState, Batch, Hyper], tuple[TrainState, dict[str, Any]]]:
  """The compiled step `(state, batch, hyper) -> (state, metrics)`.

  `state` is donated.  `batch` holds `tokens` and `segments`, int32
  [A, b, T + 1]: A micro-batches of b sequences.  `metrics` are device scalars:
  the losses of `loss_fn`, 'grad_norm' before clipping, 'update_norm',
  'param_norm', 'counts' float32 [layers, E], 'dropped', 'bias_min', 'bias_max'
  and 'finite', which is False when the loss or a gradient is not.

  With `train.nonfinite=skip` such a step changes nothing but the step count.
  """

  def train_step(state, batch, hyper):
    totals = batch_totals(batch, config)

    def loss_of(params, micro_batch):
      return loss_fn(
        model, config, params, state.router_state, micro_batch, hyper, totals
      )

    grads, aux = _accumulate(loss_of, state.params, batch)
    stats = aux.pop('stats')
    updates, opt_state = tx.update(
      grads, state.opt_state, state.params, lr=hyper.lr
    )
    new = TrainState(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      router_state=update_router_state(
        state.router_state, stats, hyper, config
      ),
      opt_state=opt_state,
    )
    metrics = {
      **aux,
      **_norms(grads, updates, new.params),
      **_router_metrics(new.router_state, stats),
    }
    finite = jnp.isfinite(metrics['loss']) & jnp.isfinite(metrics['grad_norm'])
    if config.train.nonfinite == 'skip':
      kept = state.replace(step=new.step)
      new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, kept)
    return new, {**metrics, 'finite': finite}

  return jax.jit(train_step, donate_argnums=0)
