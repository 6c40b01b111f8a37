"""Generation on several devices, with and without redundant experts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import config as config_lib
from deepseek_jax import presets
from deepseek_jax.config import ParallelConfig
from deepseek_jax.inference import generate, load_balance, weights
from deepseek_jax.ops import routing
from deepseek_jax.parallel import mesh as mesh_lib
from deepseek_jax.training import step as step_lib

_PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5], [3, 1]]
_PARALLEL = ParallelConfig(node=2, expert=2)
_REPLICAS = 12  # Of 8 experts, three on each of four devices.


@functools.cache
def _trained():
  """Large random weights prefer some token; half of the layers are MoE."""
  config = config_lib.replace(
    presets.tiny(),
    {
      'model.n_layers': 2,
      'model.n_mtp_layers': 0,
      'model.init_std': 0.3,
      'model.moe.n_routed_experts': 8,
      'model.moe.n_activated_experts': 2,
      'model.moe.n_expert_groups': 2,
      'model.moe.n_limited_groups': 1,
    },
  )
  model = step_lib.build_model(config)
  return model, weights.unstack(model, step_lib.init_variables(model, 0))


@functools.cache
def _single():
  return generate.generate(*_trained(), _PROMPTS, 5)


def _placement(load_LE):
  moe = _trained()[0].config.moe
  return load_balance.place(load_LE, _REPLICAS, moe.n_expert_groups, 2, 4)


def _divided(variables):
  model, _ = _trained()
  mesh = mesh_lib.build(_PARALLEL, jax.devices()[:4])
  with jax.set_mesh(mesh):
    shared = weights.share(variables, mesh)
    done = generate.generate(model, shared, _PROMPTS, 5)
  return shared, done


@pytest.mark.parametrize('redundant', [False, True])
def test_four_devices_write_what_one_does(redundant):
  """Each holds a quarter of the experts and a sequence of the four."""
  _, variables = _trained()
  single = _single()
  if redundant:
    placement = _placement(single.load_LE)
    assert placement.counts_LE.max() > 1
    variables = load_balance.add_replicas(variables, placement)
  shared, done = _divided(variables)
  w1 = shared['params']['moe_layers'][0]['ffn']['w1']
  assert w1.shape[0] == (_REPLICAS if redundant else 8)
  assert {s.data.shape[0] for s in w1.addressable_shards} == {w1.shape[0] // 4}
  assert done.tokens == single.tokens
  np.testing.assert_array_equal(done.load_LE, single.load_LE)


def test_copies_take_turns_and_are_of_their_expert():
  load_LE = _single().load_LE
  placement = _placement(load_LE)
  replicas_EX = jnp.asarray(placement.replicas_LEX[0])
  ids = np.random.default_rng(0).integers(8, size=(64, 2))
  chosen = np.asarray(routing.choose_replicas(jnp.asarray(ids), replicas_EX))
  np.testing.assert_array_equal(placement.experts_LP[0][chosen], ids)
  busiest = int(placement.counts_LE[0].argmax())
  used = set(chosen[ids == busiest].tolist())
  assert used == {r for r in replicas_EX[busiest].tolist() if r >= 0}


def test_a_placement_of_other_layers_is_refused():
  placement = _placement(np.ones((2, 8)))
  with pytest.raises(ValueError, match='placement of 2 layers for 1'):
    load_balance.add_replicas(_trained()[1], placement)
