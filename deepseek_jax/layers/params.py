"""How a parameter is declared, and how all of them get their first values."""

import collections
import functools
import zlib
from collections.abc import Callable
from concurrent import futures
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

_AHEAD = 2  # Parameters that are drawn before their turn.


@flax.struct.dataclass
class Parameter(nn.LogicallyPartitioned):
  """A float32 array with its logical axis names and its initialiser.

  Attributes:
    std: of the normal distribution it starts from; 0 stands for ones.
    is_float32: whether a layer computes with it in float32, not in the compute
      dtype: the gate and the norms (V3 section 3.3.1).
  """

  std: float = flax.struct.field(default=0.0, pytree_node=False)
  is_float32: bool = flax.struct.field(default=False, pytree_node=False)


def normal(
  std: float, *axes: str | None, is_float32: bool = False
) -> Callable[..., Parameter]:
  """N(0, std^2) with logical axis names, for `Module.param`."""

  def init(rng, shape, dtype):
    value = std * jax.random.normal(rng, shape, dtype)
    return Parameter(value, names=axes, std=std, is_float32=is_float32)

  return init


def norm_scale(module: nn.Module, name: str, dim: int) -> jax.Array:
  """Declares the float32 scale of an RMSNorm, [dim], which starts at one."""

  def init(_, shape, dtype):
    ones = jnp.ones(shape, dtype)
    return Parameter(ones, names=(None,), is_float32=True)

  return module.param(name, init, (dim,), jnp.float32)


def materialise(abstract: Any, seed: int, shardings: Any = None) -> Any:
  """Draws the declared parameters on the host, without compiling anything.

  Compiling `Module.init` takes longer than compiling the train step.  Each
  matrix, of each layer and expert, has a random stream of its own, named by
  seed, path and index: what it holds depends on nothing else.

  Args:
    abstract: `jax.eval_shape` of `Module.init`: `Parameter`s of shapes, and
      unboxed shapes (the router biases), which start at zero.
    seed: of the run.
    shardings: of each array; None: the default device.  A process draws only
      those matrices of which its devices hold a part.

  Returns:
    The tree of arrays, unboxed.
  """

  def begin(path, leaf, sharding):
    if not isinstance(leaf, Parameter):
      return functools.partial(constant, leaf, 0, sharding)
    if not leaf.std:
      return functools.partial(constant, leaf.value, 1, sharding)
    stacked = sum(name in ('layers', 'experts') for name in leaf.names)
    name = zlib.crc32(jax.tree_util.keystr(path).encode())
    return _draw(leaf, stacked, (seed, name), sharding, pool)

  leaves, tree = jax.tree_util.tree_flatten_with_path(
    abstract, is_leaf=lambda x: isinstance(x, Parameter)
  )
  if shardings is None:
    placed = [None] * len(leaves)
  else:
    placed = tree.flatten_up_to(shardings)
  with futures.ThreadPoolExecutor() as pool:
    # Threads draw the next ones while this one hands the first to JAX: few, as
    # the host may not have memory for all.
    begun, done = collections.deque(), []
    for leaf, where in zip(leaves, placed):
      begun.append(begin(*leaf, where))
      if len(begun) > _AHEAD:
        done.append(begun.popleft()())
    while begun:
      done.append(begun.popleft()())
    return tree.unflatten(done)


def constant(
  like: Any, value: float, sharding: jax.sharding.Sharding | None
) -> jax.Array:
  """A filled array of the shape and dtype of `like`."""
  whole = sharding is None
  shape = like.shape if whole else sharding.shard_shape(like.shape)
  local = np.zeros(shape, like.dtype)  # Memory that nothing has to write to.
  if value:
    local.fill(value)
  if whole:
    return _put(local)
  return jax.make_array_from_callback(like.shape, sharding, lambda _: local)


def _put(local):
  """On the default device; `jnp.asarray` would compile a copy of each shape."""
  return jax.device_put(local, may_alias=False)


def _draw(box, stacked, seed, sharding, pool):
  """Begins a parameter's matrices, or those of which a device here has a part.

  The result waits for them and gives the array.
  """
  shape = box.value.shape
  needed = np.full(shape[:stacked], sharding is None)
  if sharding is not None:
    for index in sharding.addressable_devices_indices_map(shape).values():
      needed[index[:stacked]] = True
  ids = np.flatnonzero(needed)
  drawn = np.empty((len(ids), *shape[stacked:]), np.float32)

  def fill(row):
    rng = np.random.default_rng([*seed, ids[row]])
    rng.standard_normal(out=drawn[row], dtype=np.float32)
    drawn[row] *= box.std

  filled = pool.map(fill, range(len(ids)))  # NumPy draws without the GIL.
  row_of = (np.cumsum(needed) - 1).reshape(needed.shape)

  def part(index):
    return drawn[(row_of[index[:stacked]], *index[stacked:])]

  def finish():
    list(filled)
    if sharding is None:
      return _put(drawn.reshape(shape))
    return jax.make_array_from_callback(shape, sharding, part)

  return finish
