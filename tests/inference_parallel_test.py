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
      'model.n_mtp_layers': 1,
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


def _divided(variables, drafts=0, prompts=_PROMPTS):
  model, _ = _trained()
  mesh = mesh_lib.build(_PARALLEL, jax.devices()[:4])
  with jax.set_mesh(mesh):
    shared = weights.share(variables, mesh)
    done = generate.generate(model, shared, prompts, 5, drafts=drafts)
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


def test_texts_that_devices_cannot_share():
  """Three on four devices: each computes all of them."""
  _, done = _divided(_trained()[1], prompts=_PROMPTS[:3])
  assert done.tokens == _single().tokens[:3]


def test_experts_of_mtp_have_copies_too():
  """A draft changes no token, so the text is that of plain decoding."""
  model, variables = _trained()
  alone = generate.generate(model, variables, _PROMPTS, 5, drafts=1)
  # Other loads, so that a layer with its neighbour's copies would be wrong.
  placement = _placement(alone.load_LE)
  assert (placement.experts_LP[0] != placement.experts_LP[1]).any()
  variables = load_balance.add_replicas(variables, placement)
  shared, done = _divided(variables, drafts=1)
  for layer, state, experts_P in zip(
    (shared['params'][n][0] for n in ('moe_layers', 'mtp')),
    (shared['router_state'][n][0] for n in ('moe_layers', 'mtp')),
    placement.experts_LP,
    strict=True,
  ):
    layer, state = layer.get('block', layer), state.get('block', state)
    assert layer['ffn']['w1'].shape[0] == _REPLICAS
    assert {s.data.shape[0] for s in layer['ffn']['w1'].addressable_shards} == {
      _REPLICAS // 4
    }
    chosen = state['ffn']['replicas'][:, 0]
    np.testing.assert_array_equal(experts_P[chosen], np.arange(8))
  assert done.tokens == _single().tokens
  # What its copies draft is what its experts do.
  assert done.acceptance == alone.acceptance
  np.testing.assert_array_equal(done.load_LE, alone.load_LE)


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
  placement = _placement(np.ones((3, 8)))
  with pytest.raises(ValueError, match='placement of 3 layers for 1 and 1 MTP'):
    load_balance.add_replicas(_trained()[1], placement)
