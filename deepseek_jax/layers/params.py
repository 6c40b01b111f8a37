"""How a parameter is declared, and how all of them get their first values."""

import zlib
from collections.abc import Callable
from concurrent import futures
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


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

  def make(path, leaf, sharding):
    if not isinstance(leaf, Parameter):
      return constant(leaf, 0, sharding)
    if not leaf.std:
      return constant(leaf.value, 1, sharding)
    stacked = sum(name in ('layers', 'experts') for name in leaf.names)
    name = zlib.crc32(jax.tree_util.keystr(path).encode())
    return _draw(leaf, stacked, (seed, name), sharding, pool)

  if shardings is None:
    shardings = jax.tree.map(
      lambda _: None, abstract, is_leaf=lambda x: isinstance(x, Parameter)
    )
  with futures.ThreadPoolExecutor() as pool:
    return jax.tree_util.tree_map_with_path(
      make,
      abstract,
      shardings,
      is_leaf=lambda x: isinstance(x, Parameter),
    )


def constant(
  like: Any, value: float, sharding: jax.sharding.Sharding | None
) -> jax.Array:
  """A filled array of the shape and dtype of `like`."""
  if sharding is None:
    return jnp.asarray(np.full(like.shape, value, like.dtype))
  local = np.full(sharding.shard_shape(like.shape), value, like.dtype)
  return jax.make_array_from_callback(like.shape, sharding, lambda _: local)


def _draw(box, stacked, seed, sharding, pool):
  """One parameter: its matrices, or those of which a device here has a part."""
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

  list(pool.map(fill, range(len(ids))))  # NumPy draws without the GIL.
  if sharding is None:
    return jnp.asarray(drawn.reshape(shape))
  row_of = (np.cumsum(needed) - 1).reshape(needed.shape)

  def part(index):
    return drawn[(row_of[index[:stacked]], *index[stacked:])]

  return jax.make_array_from_callback(shape, sharding, part)
