"""How a parameter is declared, and how all of them get their first values."""

import math
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
  """

  std: float = flax.struct.field(default=0.0, pytree_node=False)


def normal(std: float, *axes: str | None) -> Callable[..., Parameter]:
  """N(0, std^2) with logical axis names, for `Module.param`."""

  def init(rng, shape, dtype):
    value = std * jax.random.normal(rng, shape, dtype)
    return Parameter(value, names=axes, std=std)

  return init


def norm_scale(module: nn.Module, name: str, dim: int) -> jax.Array:
  """Declares the float32 scale of an RMSNorm, [dim], which starts at one."""

  def init(_, shape, dtype):
    return Parameter(jnp.ones(shape, dtype), names=(None,))

  return module.param(name, init, (dim,), jnp.float32)


def materialise(abstract: Any, seed: int) -> Any:
  """Draws the declared parameters on the host, without compiling anything.

  Compiling `Module.init` takes longer than compiling the train step.  Each
  matrix, of each layer and expert, has a random stream of its own, named by
  seed, path and index: what it holds depends on nothing else.

  Args:
    abstract: `jax.eval_shape` of `Module.init`: `Parameter`s of shapes, and
      unboxed shapes (the router biases), which start at zero.
    seed: of the run.

  Returns:
    The tree of arrays, unboxed.
  """

  def draw(path, leaf):
    if not isinstance(leaf, Parameter):
      return jnp.asarray(np.zeros(leaf.shape, leaf.dtype))
    shape = leaf.value.shape
    if not leaf.std:
      return jnp.asarray(np.ones(shape, np.float32))
    stacked = sum(name in ('layers', 'experts') for name in leaf.names)
    name = zlib.crc32(jax.tree_util.keystr(path).encode())
    flat = np.empty((math.prod(shape[:stacked]), *shape[stacked:]), np.float32)

    def fill(i):
      rng = np.random.default_rng([seed, name, i])
      rng.standard_normal(out=flat[i], dtype=np.float32)
      flat[i] *= leaf.std

    list(pool.map(fill, range(len(flat))))  # NumPy draws without the GIL.
    return jnp.asarray(flat.reshape(shape))

  with futures.ThreadPoolExecutor() as pool:
    return jax.tree_util.tree_map_with_path(
      draw, abstract, is_leaf=lambda x: isinstance(x, Parameter)
    )
