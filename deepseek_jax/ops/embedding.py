"""The embedding of tokens, whose gradient is summed in float32."""

import functools
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(table_VD: jax.Array, tokens: jax.Array, dtype: Any) -> jax.Array:
  """Rows of `table_VD` in `dtype`: [..., D].

  The gradient of a row is a sum over all places of its token, thousands for a
  frequent one: in BF16 it would stop at 256 times what is added.  Here it is
  rounded once, to the dtype of the table.

  Args:
    table_VD: float32 master weights, or a step's copy in the compute dtype.
    tokens: int32 [...].
    dtype: the compute dtype.
  """
  return table_VD[tokens].astype(dtype)


def _fwd(table_VD, tokens, dtype):
  return lookup(table_VD, tokens, dtype), (table_VD, tokens)


def _bwd(dtype, residuals, dx):
  table_VD, tokens = residuals
  total = jnp.zeros(table_VD.shape, jnp.float32)
  total = total.at[tokens].add(dx.astype(jnp.float32))
  return total.astype(table_VD.dtype), None


lookup.defvjp(_fwd, _bwd)
