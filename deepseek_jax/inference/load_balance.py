"""EPLB: where redundant copies of busy experts go (V3 section 3.4.1).

Deciding is arithmetic on the host, in numpy.  The loads are those that
`generate.Generation.load_LE` collected, or of any other period.
"""

import functools
import json
import os
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

FILE = 'expert_load.json'  # In a workdir: the load of all texts written there.
_MATRICES = ('w1', 'w2', 'w3')  # Of a layer's experts, each [E, ...].


class Placement(NamedTuple):
  """Replicas ("physical experts") of every layer's experts.

  Replica r of P lies on device r // (P / devices), so that P / devices
  neighbours share one.

  Attributes:
    experts_LP: int32, the expert that each replica is a copy of.
    replicas_LEX: int32, the replicas of each expert, padded with -1.
    counts_LE: int32, how many there are.
  """

  experts_LP: np.ndarray
  replicas_LEX: np.ndarray
  counts_LE: np.ndarray


def pack(weights: np.ndarray, n_bins: int) -> tuple[np.ndarray, np.ndarray]:
  """Spreads n items over bins of n / n_bins each, as evenly as greed gives.

  The heaviest item not yet placed goes into the lightest bin with room.

  Args:
    weights: [n].
    n_bins: divides n.

  Returns:
    int32 [n] each: the bin of every item, and its place in the bin.
  """
  n = len(weights)
  bins, places = np.zeros(n, np.int32), np.zeros(n, np.int32)
  if n == n_bins:  # One each: where is of no matter.
    return np.arange(n, dtype=np.int32), places
  load, filled = np.zeros(n_bins), np.zeros(n_bins, np.int32)
  for item in np.argsort(-weights, kind='stable'):
    b = np.where(filled < n // n_bins, load, np.inf).argmin()
    bins[item], places[item] = b, filled[b]
    load[b] += weights[item]
    filled[b] += 1
  return bins, places


def replicate(
  weights: np.ndarray, n_replicas: int
) -> tuple[np.ndarray, np.ndarray]:
  """Gives one more replica, time and again, to the busiest per replica.

  Args:
    weights: [n] loads.
    n_replicas: at least n.

  Returns:
    int32 [n_replicas], what each is a copy of, the first n of them one of each
    item; int32 [n], copies of each.
  """
  copies = np.ones(len(weights), np.int32)
  items = list(range(len(weights)))
  for _ in range(n_replicas - len(weights)):
    busiest = int((weights / copies).argmax())
    items.append(busiest)
    copies[busiest] += 1
  return np.array(items, np.int32), copies


def place(
  load_LE: np.ndarray,
  n_replicas: int,
  n_groups: int,
  n_nodes: int,
  n_devices: int,
) -> Placement:
  """Balances each layer's load over nodes, replicas and devices.

  Hierarchical if the groups can be shared out among the nodes: a group, to
  which routing is limited, then stays within one node.  Otherwise global, as if
  there were one group on one node.

  Args:
    load_LE: tokens per layer and expert.
    n_replicas: P, of all devices together.
    n_groups: of experts; `model.moe.n_expert_groups`.
    n_nodes: of the machine.
    n_devices: of all nodes together.

  Raises:
    ValueError: if something does not divide, or P is below the experts.
  """
  load_LE = np.asarray(load_LE, np.float64)
  E = load_LE.shape[1]
  _check(load_LE, n_replicas, n_groups, n_nodes, n_devices)
  if n_groups % n_nodes:
    n_groups = n_nodes = 1
  experts_LP = np.stack(
    [_place(w, n_replicas, n_groups, n_nodes, n_devices) for w in load_LE]
  )
  counts_LE = np.stack([np.bincount(row, minlength=E) for row in experts_LP])
  replicas = np.full((*load_LE.shape, counts_LE.max()), -1, np.int32)
  for row, experts in zip(replicas, experts_LP):
    for e in range(E):
      found = np.flatnonzero(experts == e)
      row[e, : len(found)] = found
  return Placement(experts_LP, replicas, counts_LE.astype(np.int32))


def _place(load_E, n_replicas, n_groups, n_nodes, n_devices):
  """One layer: the expert of each replica, int32 [P]."""
  size = len(load_E) // n_groups
  nodes, places = pack(load_E.reshape(n_groups, size).sum(1), n_nodes)
  # Groups in the order of the nodes they go to.
  order = np.argsort(nodes * n_groups + places)
  experts = (order[:, None] * size + np.arange(size)).reshape(n_nodes, -1)
  rows = []
  for own in experts:
    items, copies = replicate(load_E[own], n_replicas // n_nodes)
    devices, spots = pack((load_E[own] / copies)[items], n_devices // n_nodes)
    per_device = len(items) // (n_devices // n_nodes)
    row = np.zeros(len(items), np.int32)
    row[devices * per_device + spots] = own[items]
    rows.append(row)
  return np.concatenate(rows)


def add_replicas(
  variables: dict[str, Any], placement: Placement
) -> dict[str, Any]:
  """Variables of which each MoE layer holds its replicas, in their order.

  Routing, and the loads that come of it, remain those of the experts.  Replicas
  lie where their experts lay: devices that divide these divide those.

  Args:
    variables: of `weights.unstack`.
    placement: of `place`, one row per layer of `moe_layers`; then, if drafts
      are to be balanced as well, one per MTP module.

  Raises:
    ValueError: if it is of another number of layers.
  """
  params, states = (
    dict(variables[name]) for name in ('params', 'router_state')
  )
  n_main, n_mtp = (len(states.get(name, ())) for name in ('moe_layers', 'mtp'))
  given = len(placement.experts_LP)
  if given not in (n_main, n_main + n_mtp):
    raise ValueError(
      f'placement of {given} layers for {n_main} and {n_mtp} MTP modules: use '
      'the load of the main model, or of both'
    )
  rows = zip(placement.experts_LP, placement.replicas_LEX)
  for name in ('moe_layers', 'mtp') if given > n_main else ('moe_layers',):
    pairs = [
      _replicated(layer, state, *next(rows))
      for layer, state in zip(params[name], states[name])
    ]
    params[name], states[name] = ([pair[i] for pair in pairs] for i in (0, 1))
  return {'params': params, 'router_state': states}


def _replicated(layer, state, experts_P, replicas_EX):
  """One layer's two collections with its replicas."""
  if 'block' in layer:  # Of an MTP module.
    block = _replicated(layer['block'], state['block'], experts_P, replicas_EX)
    return {**layer, 'block': block[0]}, {**state, 'block': block[1]}
  matrices = {name: layer['ffn'][name] for name in _MATRICES}
  copies = jax.tree.map(lambda w: _take(w.sharding)(w, experts_P), matrices)
  replicas = {'replicas': jnp.asarray(replicas_EX)}
  return (
    {**layer, 'ffn': {**layer['ffn'], **copies}},
    {**state, 'ffn': {**state['ffn'], **replicas}},
  )


@functools.cache
def _take(sharding):
  """(x, index) -> x[index], on the devices that divide `x`."""
  return jax.jit(lambda x, index: x[index], out_shardings=sharding)


def remember(workdir: pathlib.Path, load_LE: np.ndarray) -> None:
  """Adds a load to that of earlier texts, in `workdir/expert_load.json`.

  Never raises, for the texts are there: nothing is kept, and a warning says so,
  if nothing can be written or what is there is damaged.

  Args:
    workdir: of the run.
    load_LE: of `generate.Generation`; with rows of MTP, or without.
  """
  partial = workdir / f'.{FILE}.{os.getpid()}'
  try:
    total_LE = recall(workdir)
    if total_LE is None or total_LE.shape[1] != load_LE.shape[1]:
      total_LE = load_LE[:0]
    rows = max(len(total_LE), len(load_LE))
    total_LE, load_LE = (
      np.pad(x, ((0, rows - len(x)), (0, 0))) for x in (total_LE, load_LE)
    )
    partial.write_text(json.dumps((total_LE + load_LE).tolist()))
    partial.replace(workdir / FILE)
  except (OSError, ValueError) as error:
    logging.warning('the load of experts is not kept: %s', error)


def recall(workdir: pathlib.Path) -> np.ndarray | None:
  """The sum of what `remember` was given, float64 [L, E]; None without it.

  Raises:
    ValueError: if the file is damaged, or cannot be read.
  """
  path = workdir / FILE
  if not path.exists():
    return None
  try:
    load_LE = np.array(json.loads(path.read_text()), np.float64)
    if load_LE.ndim != 2:
      raise ValueError('no matrix')
  except OSError as error:
    raise ValueError(f'{path}: {error.strerror}') from error
  except (ValueError, TypeError) as error:
    raise ValueError(f'{path} is damaged, remove it: {error}') from None
  return load_LE


def _check(load_LE, n_replicas, n_groups, n_nodes, n_devices):
  E = load_LE.shape[1]
  if not np.isfinite(load_LE).all() or (load_LE < 0).any():
    raise ValueError('load_LE has a negative or non-finite load: count tokens')
  if n_replicas < E:
    raise ValueError(f'n_replicas={n_replicas}: use at least one each of {E}')
  if E % n_groups:
    raise ValueError(f'n_groups={n_groups}: must divide the {E} experts')
  if n_devices % n_nodes:
    raise ValueError(f'n_nodes={n_nodes}: must divide n_devices={n_devices}')
  if n_replicas % n_devices:
    raise ValueError(
      f'n_replicas={n_replicas}: must be a multiple of n_devices={n_devices}'
    )
