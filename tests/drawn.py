"""Random variables of a model, big enough that every path matters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.models import deepseek


def draw(config, bias, seed=0):
  """Random `params` and `router_state` of `config`.

  Norms are far from 1, matrices have std 0.1, and the router's bias is drawn
  from `bias`, its (mean, std), or is 0.
  """
  shapes = nn.meta.unbox(
    jax.eval_shape(
      deepseek.Transformer(config).init,
      jax.random.key(0),
      jnp.zeros((1, 4), jnp.int32),
    )
  )
  rng = np.random.default_rng(seed)

  def leaf(path, x):
    if path[-1].key == 'bias':
      mean, std = bias or (0.0, 0.0)
    else:
      is_norm = path[-1].key.endswith('norm')
      mean, std = (1.0, 0.3) if is_norm else (0.0, 0.1)
    return (mean + std * rng.standard_normal(x.shape)).astype(np.float32)

  variables = jax.tree_util.tree_map_with_path(leaf, shapes)
  return variables['params'], variables.get('router_state', {})
