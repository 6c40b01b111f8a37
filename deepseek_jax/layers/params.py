"""How a parameter is made: initialiser, logical axes, float32 storage."""

import flax.linen as nn
import jax.numpy as jnp


def normal(std: float, *axes: str | None):
  """N(0, std^2) with logical axis names, for `Module.param`."""
  return nn.with_logical_partitioning(nn.initializers.normal(std), axes)


def ones(*axes: str | None):
  """Ones with logical axis names: the scale of a norm."""
  return nn.with_logical_partitioning(nn.initializers.ones, axes)


def norm_scale(module: nn.Module, name: str, dim: int):
  """Declares the float32 scale of an RMSNorm: [dim]."""
  return module.param(name, ones(None), (dim,), jnp.float32)
