"""What decoding keeps of the tokens it has seen (V3 section 2.1.1)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from deepseek_jax.config import ModelConfig
from deepseek_jax.parallel import sharding


class Cache(NamedTuple):
  """A value: every function that adds to it returns a new one.

  Attributes:
    layers: one entry per layer.  MLA: the normalised latent and the rotated
      shared key, [B, S, C + P]; else keys and values, [B, S, n_kv_heads, H].
    mtp: the same per MTP module; empty when nothing is drafted.
    lengths_B: int32, how many tokens of each sequence are in `layers`.
  """

  layers: tuple[Any, ...]
  mtp: tuple[Any, ...]
  lengths_B: jax.Array

  @property
  def capacity(self) -> int:
    """S, positions there is room for."""
    return jax.tree.leaves(self.layers)[0].shape[1]


def init(
  config: ModelConfig,
  batch: int,
  capacity: int,
  dtype: Any = jnp.bfloat16,
  n_mtp_layers: int = 0,
) -> Cache:
  """An empty cache.

  Args:
    config: the architecture.
    batch: B sequences.
    capacity: S positions of each.
    dtype: of its entries, the model's compute dtype.
    n_mtp_layers: modules that will draft.
  """

  def layer():
    if config.attention == 'mla':
      width = config.mla.kv_lora_rank + config.mla.qk_rope_head_dim
      return jnp.zeros((batch, capacity, width), dtype)
    shape = (batch, capacity, config.n_kv_heads, config.gqa.head_dim)
    return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

  return Cache(
    tuple(layer() for _ in range(config.n_layers)),
    tuple(layer() for _ in range(n_mtp_layers)),
    jnp.zeros(batch, jnp.int32),
  )


def round_up(count: int, unit: int) -> int:
  """The least of 1, 2, 3, 4, 6, 8, 12, ... units that holds `count`.

  A program is compiled for each length: two for every doubling are few, and
  attention reads, from two units on, at most half as much again as there is.
  """
  units = -(-count // unit)
  power = 1 << (units - 1).bit_length()
  between = power // 4 * 3
  return unit * (between if between >= units else power)


def divide(cache: Cache) -> Cache:
  """`cache`, its sequences divided over the ambient mesh as far as they can."""
  if jax.sharding.get_abstract_mesh().empty:
    return cache
  axes = sharding.sequence_axes(cache.lengths_B.shape[0])
  return jax.device_put(cache, PartitionSpec(axes))


def bytes_per_token(cache: Cache) -> int:
  """Bytes per token of one sequence, in all layers of the main model."""
  B = cache.lengths_B.shape[0]
  total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.layers))
  return total // (B * cache.capacity)
