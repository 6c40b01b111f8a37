"""The gradients of a step by a pipeline of stages (V3 section 3.2.1).

A pipelined step differs from any other in how it comes by its gradients, and in
nothing else: optimizer, router bias and metrics are those of `step.py`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax import config as config_lib
from deepseek_jax.config import Config, ModelConfig, ParallelConfig
from deepseek_jax.models import deepseek
from deepseek_jax.ops import embedding
from deepseek_jax.parallel import (
  pipeline,
  placement,
  rules,
  schedules,
  ticks,
)
from deepseek_jax.parallel.schedules import Schedule
from deepseek_jax.training.layout import Layout

# (model, config, params, output, batch, hyper, totals) -> (loss, report)
Objective = Callable[..., tuple[jax.Array, dict[str, Any]]]


def make_program(
  model: deepseek.Transformer, config: Config, objective: Objective
) -> pipeline.Program:
  """The model in the pieces that a pipeline runs; scalars: (hyper, totals)."""

  def embed(table, micro):
    return embedding.lookup(table, micro['tokens'][:, :-1], model.dtype)

  def layer(name):
    def run(params, state, x, aux):
      micro, (hyper, totals) = aux
      variables = {'params': params, 'router_state': state}
      x, stats = model.run_layer(name, variables, x, micro['segments'][:, :-1])
      if stats is None:
        return (x, jnp.zeros((), jnp.float32)), None
      return (x, hyper.alpha * stats.balance_loss / totals.sequences), stats

    return run

  def head(params, state, x, micro, scalars):
    output = model.apply(
      {'params': params, 'router_state': state},
      x,
      micro['tokens'][:, :-1],
      micro['segments'][:, :-1],
      method='finish',
    )
    return objective(model, config, params, output, micro, *scalars)

  layers = {name: layer(name) for name in ('dense_layers', 'moe_layers')}
  return pipeline.Program(embed, layers, head)


def stages(
  model: ModelConfig, parallel: ParallelConfig
) -> list[list[placement.Layer]]:
  """The layers of each stage: `parallel.stage_layers`, or equally many."""
  layers = [('dense_layers', i) for i in range(model.n_first_dense)]
  layers += [('moe_layers', i) for i in range(model.n_moe_layers)]
  asked = parallel.stage_sizes
  sizes = config_lib.stage_sizes(len(layers), parallel.n_stages, asked)
  return placement.cut(layers, sizes)


def make_schedule(parallel: ParallelConfig, microbatches: int) -> Schedule:
  """The schedule of a step; `Config` has refused what is none."""
  return schedules.make(parallel.schedule, parallel.stage, microbatches)


def slots(config: Config) -> dict[str, int]:
  """Layers of each stack for which a rank has room; of no pipeline, none."""
  parallel = config.parallel
  if parallel.stage == 1:
    return {}
  count = config.data.batch_size // config.micro_batch_size
  schedule = make_schedule(parallel, count)
  layout = placement.Layout(schedule, stages(config.model, parallel))
  return {kind: table.shape[1] for kind, table in layout.sources.items()}


def make_gradients(
  model: deepseek.Transformer,
  config: Config,
  layout: Layout,
  objective: Objective,
) -> Callable[..., tuple[Any, dict[str, Any]]]:
  """(params, router state, batch, hyper, totals) -> (gradients, report).

  Both are sums over the whole batch, [M, b, T + 1].
  """
  program, parallel = make_program(model, config, objective), config.parallel
  specs = pipeline.Specs(
    stored=layout.stored,
    used=layout.used,
    dtypes=layout.dtypes,
    batch=layout.batch_spec,
    batch_axes=rules.BATCH,
  )

  def gradients(params, router_state, batch, hyper, totals):
    schedule = make_schedule(parallel, batch['tokens'].shape[0])
    own = stages(config.model, parallel)
    run = pipeline.gradients(
      program,
      ticks.build(schedule),
      placement.Layout(schedule, own),
      layout.mesh,
      specs,
    )
    grads, stats, report = run(params, router_state, batch, (hyper, totals))
    stats = {k: s for k, s in stats.items() if s is not None}
    balance = sum(s.balance_loss.sum() for s in stats.values())
    report['balance_loss'] += balance / totals.sequences
    return grads, {**report, 'stats': {**stats, **report['stats']}}

  return gradients
