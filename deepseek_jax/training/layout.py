"""Where the arrays of a run lie and come together (V3 section 3.2).

A step's losses and gradients are computed device by device (`per_device`).  The
optimizer works on the stored parts, elementwise, and needs no collective but
for norms.  What crosses devices, per step:

- ZeRO-1: parameters are collected once in the compute dtype (`step_copy`), and
  gradients summed into their stored parts (`reduce`).
- FSDP: each layer's parameters are collected before its forward and its
  backward pass (`collect_layer`), the gradients summed into parts after it.
- a pipeline: whatever divides them, a rank collects the parameters of its
  layers once, whole, and gives their gradients back once (`placement.collect`).
- otherwise gradients are summed once, after the last micro-batch (`reduce`).

Gradients come back in float32 (`sharding.Copy`): nothing rounds those of FP8
products on the way.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax import config as config_lib
from deepseek_jax.config import Config
from deepseek_jax.layers.params import Parameter
from deepseek_jax.ops import quantize
from deepseek_jax.parallel import mesh as mesh_lib
from deepseek_jax.parallel import placement, rules, sharding
from deepseek_jax.training.state import TrainState

WHOLE = PartitionSpec()  # On every device.
_STACKS = ('dense_layers', 'moe_layers', 'mtp')


@dataclasses.dataclass(frozen=True)
class Layout:
  """The mesh of a run, and the places of its parameters on it.

  Attributes:
    mesh: of all devices.
    stored: `PartitionSpec`s of the parameters; see `rules.Placement`.
    step: likewise.
    used: likewise.
    dtypes: in which a layer computes with each parameter.
    batch_axes: that divide the sequences.
  """

  mesh: jax.sharding.Mesh
  stored: Any
  step: Any
  used: Any
  dtypes: Any
  batch_axes: tuple[str, ...] = rules.BATCH

  @property
  def replicated(self) -> NamedSharding:
    """Of what is whole on every device."""
    return NamedSharding(self.mesh, WHOLE)

  @property
  def batch_spec(self) -> PartitionSpec:
    """Of `[A, b, T + 1]`: devices share the sequences of a micro-batch."""
    return PartitionSpec(None, self.batch_axes, None)

  def for_evaluation(self) -> 'Layout':
    """The same places, for forward passes of a whole model on every device.

    Stages divide the sequences as `data` does, and a layer is collected when
    its turn comes: no device ever holds more than one whole.
    """
    axes = (placement.AXIS, *self.batch_axes)
    return dataclasses.replace(self, step=self.stored, batch_axes=axes)

  def params(self) -> Any:
    """The shardings of the stored parameters."""
    return jax.tree.map(lambda s: NamedSharding(self.mesh, s), self.stored)

  def scales(self) -> Any:
    """The shardings of FP8 weights' scales, at the places of the weights.

    They are whole but for experts: a block may lie on two devices, and a scale
    is 4 bytes for 16 KiB of codes.
    """

    def place(used):
      return NamedSharding(self.mesh, _of_scales(used))

    return jax.tree.map(place, self.used)

  def state(self, like: TrainState) -> TrainState:
    """The shardings of a state: moments lie with their parameters."""
    params, structure = self.params(), jax.tree.structure(like.params)

    def matches(tree):
      return jax.tree.structure(tree) == structure

    def place(tree):
      return params if matches(tree) else self.replicated

    return TrainState(
      step=self.replicated,
      params=params,
      router_state=jax.tree.map(lambda _: self.replicated, like.router_state),
      opt_state=jax.tree.map(place, like.opt_state, is_leaf=matches),
      amax=jax.tree.map(lambda _: self.replicated, like.amax),
    )

  def per_device(
    self, function: Callable[..., Any], in_specs: Any, out_specs: Any
  ) -> Callable[..., Any]:
    """`function` on every device's parts; collectives are its own affair."""
    # The types of check_vma would demand a cast at every loop's zeros.  Without
    # them a derivative is that of the sum of all devices' results, which is
    # what adding up shares needs; tests compare each layout with one device.
    return jax.shard_map(
      function,
      mesh=self.mesh,
      in_specs=in_specs,
      out_specs=out_specs,
      check_vma=False,
    )

  def step_copy(self, params: Any) -> Any:
    """Per device: stored parts to the compute dtype's parts for a step."""

    def copy(x, dtype, stored, step):
      return _gather(_cast(x, dtype), stored, step)

    return _map(copy, params, self.dtypes, self.stored, self.step)

  def reduce(self, gradients: Any) -> Any:
    """Per device: gradients of `step_copy` to stored parts of their sum."""
    return jax.tree.map(sharding.reduce, gradients, self.step, self.stored)

  def collect_top(self, params: Any) -> Any:
    """Per device: a step's parts, whole for all that is not in a stack.

    `sharding.Copy`s become float32, as they do in `collect_layer`.
    """
    top = {k: v for k, v in params.items() if k not in _STACKS}
    step, used = ({k: t[k] for k in top} for t in (self.step, self.used))
    return {**params, **_map(_gather, top, step, used)}

  def collect_layer(self, stack: str, variables: Any) -> Any:
    """Per device: the variables of one layer of a stack, made whole."""

    def gather(x, step, used):
      step, used = (PartitionSpec(*spec[1:]) for spec in (step, used))
      return _gather(x, step, used)

    specs = self.step[stack], self.used[stack]
    params = flax.core.unfreeze(variables['params'])  # As the specs are.
    params = _map(gather, params, *specs)
    return {**variables, 'params': params}

  def whole(self, model: nn.Module) -> nn.Module:
    """`model` for use within `per_device`, on a step's parts."""
    return model.clone(collect=self.collect_layer)

  def batch_sums(self, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(params, router_state, batch, rest)`, summed over all devices.

    Each calls it with whole parameters (but for experts), its own sequences of
    a `batch` `[1, b, T + 1]`, as `[b', T + 1]`, and `rest` as it is.
    """

    def per_device(params, router_state, batch, rest):
      params = self.collect_top(self.step_copy(params))
      own = jax.tree.map(lambda x: x[0], batch)
      sums = function(params, router_state, own, rest)
      return jax.lax.psum(sums, self.batch_axes)

    def summed(params, *args):
      specs = self._specs(params, self.stored), WHOLE, self.batch_spec, WHOLE
      return self.per_device(per_device, specs, WHOLE)(params, *args)

    return summed

  def share(self, count: int) -> tuple[int, int]:
    """(index, number) of this process's share of `count` sequences.

    Processes whose devices hold the same sequences have the same index.
    """
    placed = NamedSharding(self.mesh, PartitionSpec(self.batch_axes))
    parts = placed.addressable_devices_indices_map((count,)).values()
    starts = {part.indices(count)[0] for part in (p[0] for p in parts)}
    size = count // self._n_batch_shards() * len(starts)
    assert min(starts) % size == 0, (starts, size)
    return min(starts) // size, count // size

  def put_batch(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's share `[A, b, T + 1]` to global arrays."""
    placed = NamedSharding(self.mesh, self.batch_spec)

    def put(x):
      count = x.shape[1] * self._processes()
      shape = (x.shape[0], count, *x.shape[2:])
      return jax.make_array_from_process_local_data(placed, x, shape)

    return jax.tree.map(put, batch)

  def for_inference(self, params: Any) -> Any:
    """Stored parameters in the compute dtype, divided as during a step.

    Weights in FP8 stay so.  Those of a pipeline stay divided by its stages,
    too.
    """
    has_stages = self.mesh.shape['stage'] > 1
    specs = self.stored if has_stages else self.step

    def cast(params):
      return _map(_cast, params, self.dtypes)

    specs = self._specs(params, specs)
    places = jax.tree.map(lambda s: NamedSharding(self.mesh, s), specs)
    return jax.jit(cast, out_shardings=places)(params)

  def _specs(self, params, specs):
    """`specs`, and for a weight in FP8 those of its codes and scales."""

    def leaf(x, spec, used):
      if not quantize.is_leaf(x):
        return spec
      return dataclasses.replace(x, codes=spec, scales=_of_scales(used))

    return _map(leaf, params, specs, self.used)

  def _n_batch_shards(self) -> int:
    return int(np.prod([self.mesh.shape[axis] for axis in self.batch_axes]))

  def _processes(self) -> int:
    """Into how many shares processes divide a batch."""
    return self.share(self._n_batch_shards())[1]


def _map(function, params, *rest):
  """`jax.tree.map` for which a weight in FP8, or a `Copy`, is one leaf."""

  def is_leaf(x):
    return quantize.is_leaf(x) or isinstance(x, sharding.Copy)

  return jax.tree.map(function, params, *rest, is_leaf=is_leaf)


def _cast(x, dtype):
  """`x.astype(dtype)`; a weight in FP8 stays as it is."""
  return x if quantize.is_leaf(x) else x.astype(dtype)


def _gather(x, have, want):
  """`sharding.gather`, of a weight in FP8 as codes: its scales are whole."""
  if isinstance(x, sharding.Copy):
    return sharding.collect(x, have, want)
  if not quantize.is_leaf(x):
    return sharding.gather(x, have, want)
  return dataclasses.replace(x, codes=sharding.gather(x.codes, have, want))


def _of_scales(used):
  """`used` up to the last dimension that it divides, which is of experts."""
  entries = list(used)
  while entries and entries[-1] is None:
    entries.pop()
  return PartitionSpec(*entries)


def ambient(layout: Layout | None) -> contextlib.AbstractContextManager:
  """Within it, inference is divided over the layout's devices."""
  return jax.set_mesh(layout.mesh) if layout else contextlib.nullcontext()


def make(
  declared: Any,
  config: Config,
  devices: Sequence[jax.Device] | None = None,
) -> Layout | None:
  """The layout that `config.parallel` asks for; None: one device.

  Args:
    declared: the model's variables; see `step.declare`.
    config: of the run.
    devices: all of them; default: those of every process.

  Raises:
    ValueError: too many or too few devices, an axis that divides no size, or
      one that nothing here makes use of yet.
  """
  parallel = config.parallel
  if parallel.n_devices == 1 and jax.process_count() == 1:
    return None
  mesh = mesh_lib.build(parallel, devices)
  compute = jnp.dtype(config.precision.compute_dtype)
  dtypes = jax.tree.map(
    lambda box: jnp.dtype('float32') if box.is_float32 else compute,
    declared['params'],
    is_leaf=_is_box,
  )
  return Layout(mesh, *places(declared, config), dtypes)


def places(declared: Any, config: Config) -> tuple[Any, Any, Any]:
  """Where each parameter lies: trees of `rules.Placement`'s three states.

  Raises:
    ValueError: an axis that divides no size.
  """
  parallel = config.parallel
  sizes = {axis: getattr(parallel, axis) for axis in mesh_lib.AXES}
  boxes, tree = jax.tree_util.tree_flatten_with_path(
    declared['params'], is_leaf=_is_box
  )

  def place(box, stages):
    own, shape = sizes | {placement.AXIS: stages}, box.value.shape
    found = rules.place(box.names, shape, own, parallel.zero1)
    is_stack = box.names[0] == 'layers'
    stored = placement.divide(found.stored, shape, own, is_stack)
    return found._replace(stored=stored)

  def fits(stages):
    changes = {'parallel.stage': stages, 'parallel.stage_layers': ''}
    try:
      config_lib.replace(config, changes)
      return [place(box, stages) for _, box in boxes]
    except ValueError:
      return None

  found = []
  for path, box in boxes:
    rules.place(box.names, box.value.shape, sizes)  # Its errors are others.
    try:
      found.append(place(box, parallel.stage))
    except ValueError as error:
      others = [n for n in range(1, 2 * parallel.stage) if fits(n)]
      raise ValueError(
        f'parallel.stage={parallel.stage}: each rank stores a part of each '
        f'matrix, but of {jax.tree_util.keystr(path)} {error}; use one of '
        f'{", ".join(map(str, others))}'
      ) from None
  return tuple(map(tree.unflatten, zip(*found)))


def _is_box(x):
  return isinstance(x, Parameter)
