"""One optimizer step: losses, gradient accumulation, AdamW, router bias.

The objective is V3's: cross-entropy, plus lambda times the mean MTP loss
(equation 25), plus alpha times the balance loss (equation 17).  Every term is
a sum over the whole batch divided by a count of the whole batch, so that it
does not depend on how the batch is cut into micro-batches or shards.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from deepseek_jax.config import Config
from deepseek_jax.layers import params as params_lib
from deepseek_jax.models import deepseek
from deepseek_jax.ops import losses, routing
from deepseek_jax.parallel import mesh as mesh_lib
from deepseek_jax.parallel import sharding
from deepseek_jax.training import delayed, optimizer, pipelined
from deepseek_jax.training import layout as layout_lib
from deepseek_jax.training.layout import Layout
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
    parallel=config.parallel,
    mask_documents=config.data.mask_documents,
    remat=config.train.remat,
    scan_layers=config.train.scan_layers,
  )


def declare(model: deepseek.Transformer) -> dict[str, Any]:
  """The collections as shapes, with their axis names and initialisers."""
  return jax.tree.map(lambda x: x, _declare(model.config))  # The caller's own.


@functools.lru_cache(64)
def _declare(config):
  """Whatever computes with parameters, how they are declared is the same.

  Each layer is traced for it, which takes a second, and several with FP8.
  """
  model = deepseek.Transformer(config)

  def init(rng):  # `setup` declares everything; nothing need be called.
    return model.init(rng, method=lambda module: module.embed)

  return {'router_state': {}, **jax.eval_shape(init, jax.random.key(0))}


def make_layout(model: deepseek.Transformer, config: Config) -> Layout | None:
  """Where a run's arrays lie; see `layout.make`."""
  return layout_lib.make(declare(model), config)


def init_variables(
  model: deepseek.Transformer, seed: int, shardings: Any = None
) -> dict[str, Any]:
  """Fresh `params` and `router_state` (empty without routed experts)."""
  return params_lib.materialise(declare(model), seed, shardings)


def abstract_state(
  model: deepseek.Transformer,
  tx: optax.GradientTransformationExtraArgs,
  layout: Layout | None = None,
) -> TrainState:
  """The shapes, dtypes and shardings of `init_state`."""
  return _abstract_state(declare(model), model.precision.fp8, tx, layout)


def _abstract_state(declared, fp8, tx, layout):
  variables = nn.meta.unbox(declared)
  params = variables['params']
  state = TrainState(
    step=jax.ShapeDtypeStruct((), jnp.int32),
    opt_state=jax.eval_shape(tx.init, params),
    amax=jax.eval_shape(lambda tree: delayed.histories(tree, fp8), params),
    **variables,
  )
  if layout is None:
    return state
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    state,
    layout.state(state),
  )


def init_state(
  model: deepseek.Transformer,
  tx: optax.GradientTransformationExtraArgs,
  seed: int,
  layout: Layout | None = None,
) -> TrainState:
  """The state before the first step."""
  declared = declare(model)
  like = _abstract_state(declared, model.precision.fp8, tx, layout)
  shardings = jax.tree.map(lambda x: x.sharding, like)
  placed = {'params': shardings.params, 'router_state': shardings.router_state}
  variables = params_lib.materialise(declared, seed, placed if layout else None)
  # All else is zeros; to compile AdamW's `init` costs more than they do.
  rest = like.replace(params=None, router_state=None)
  zeros = jax.tree.map(lambda x: params_lib.constant(x, 0, x.sharding), rest)
  return zeros.replace(**variables)


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
  output = model.apply(
    {'params': params, 'router_state': router_state},
    batch['tokens'][:, :-1],
    batch['segments'][:, :-1],
  )
  return objective(model, config, params, output, batch, hyper, totals)


def objective(
  model: deepseek.Transformer,
  config: Config,
  params: Any,
  output: deepseek.Output,
  batch: Batch,
  hyper: Hyper,
  totals: Totals,
) -> tuple[jax.Array, dict[str, Any]]:
  """`pretrain_loss` of what the model gave."""
  tokens, segments = batch['tokens'], batch['segments']
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
  """Sums `loss_fn`'s float32 gradients, and reports, over micro-batches."""
  grad_fn = jax.grad(loss_fn, has_aux=True)
  first = jax.tree.map(lambda x: x[0], batch)
  if jax.tree.leaves(batch)[0].shape[0] == 1:
    return grad_fn(params, first)

  def body(total, micro_batch):
    grads, aux = grad_fn(params, micro_batch)
    both = delayed.add(total[0], grads), jax.tree.map(jnp.add, total[1], aux)
    return both, None

  shapes = jax.eval_shape(grad_fn, params, first)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  return jax.lax.scan(body, zeros, batch)[0]


def make_gradients(model, config, loss_fn, layout):
  """The function (params, router state, batch, hyper, totals) -> (grads, aux).

  Both are sums over the whole batch, on one device or under a layout.
  """

  def sums(params, router_state, batch, hyper, totals):
    def loss_of(own, micro_batch):
      if layout:
        own = layout.collect_top(jax.tree.map(sharding.Copy, params, own))
      return loss_fn(
        model, config, own, router_state, micro_batch, hyper, totals
      )

    own = sharding.slots(params) if layout else params
    return _accumulate(loss_of, own, batch)

  if layout is None:
    return sums
  if config.parallel.stage > 1:
    if loss_fn is not pretrain_loss:
      raise ValueError(
        f'parallel.stage={config.parallel.stage}: a pipeline knows the '
        'objective of pre-training only; use 1'
      )
    return pipelined.make_gradients(model, config, layout, objective)
  model = layout.whole(model)

  def per_device(params, *args):
    grads, aux = sums(layout.step_copy(params), *args)
    return layout.reduce(grads), sharding.batch_sum(aux)

  whole, batch = layout_lib.WHOLE, layout.batch_spec
  return layout.per_device(
    per_device,
    in_specs=(layout.stored, whole, batch, whole, whole),
    out_specs=(layout.stored, whole),
  )


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
  layout: Layout | None = None,
) -> Callable[[TrainState, Batch, Hyper], tuple[TrainState, dict[str, Any]]]:
  """The compiled step `(state, batch, hyper) -> (state, metrics)`.

  `state` is donated.  `batch` holds `tokens` and `segments`, int32
  [A, b, T + 1]: A micro-batches of b sequences.  With a layout, `state` and
  `batch` lie as it says.  `metrics` are device scalars:
  the losses of `loss_fn`, 'grad_norm' before clipping, 'update_norm',
  'param_norm', 'counts' float32 [layers, E], 'dropped', 'bias_min', 'bias_max'
  and 'finite', which is False when the loss, a gradient or a new parameter is
  not.

  With `train.nonfinite=skip` such a step changes nothing but the step count;
  'param_norm' and the biases are then of what was kept.

  Raises:
    ValueError: in float16, where gradients of a mean over a batch are 0.
  """
  if config.precision.compute_dtype == 'float16':
    raise ValueError(
      "precision.compute_dtype='float16': reads converted models, but its "
      'smallest number is 6e-8, below most gradients; train in bfloat16'
    )
  gradients = make_gradients(model, config, loss_fn, layout)

  def train_step(state, batch, hyper):
    totals = batch_totals(batch, config)
    params = delayed.attach(state.params, state.amax)
    grads, aux = gradients(params, state.router_state, batch, hyper, totals)
    grads, amax = delayed.detach(grads, state.amax)
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
      amax=amax,
    )
    norm = optimizer.global_norm(grads)
    finite = jnp.isfinite(
      aux['loss'] + norm + optimizer.global_norm(new.params)
    )
    if config.train.nonfinite == 'skip':
      kept = state.replace(step=new.step)
      new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, kept)
    metrics = {
      **aux,
      'grad_norm': norm,
      'update_norm': optimizer.global_norm(updates),
      'param_norm': optimizer.global_norm(new.params),
      **_router_metrics(new.router_state, stats),
    }
    return new, {**metrics, 'finite': finite}

  if layout is None:
    return jax.jit(train_step, donate_argnums=0)
  placed = layout.state(abstract_state(model, tx))
  return jax.jit(
    train_step,
    donate_argnums=0,
    out_shardings=(placed, layout.replicated),
    compiler_options=mesh_lib.compiler_options(layout.mesh),
  )
