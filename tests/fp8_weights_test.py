"""FP8 weights of a converted checkpoint, used as they are for inference."""

import functools
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import config as config_lib
from deepseek_jax import convert, presets
from deepseek_jax.convert import names, run
from deepseek_jax.evaluation import perplexity
from deepseek_jax.inference import cache as cache_lib
from deepseek_jax.inference import generate, load_balance, weights
from deepseek_jax.kernels import fp8
from deepseek_jax.ops import fp8_matmul, quantize
from deepseek_jax.ops.fp8_recipe import Steps
from deepseek_jax.training import checkpoint, trained
from deepseek_jax.training import layout as layout_lib
from deepseek_jax.training import step as step_lib
from tests import tolerances
from tests.drawn import draw

_PROMPTS = [[5, 9, 2], [7, 1, 2, 3, 4]]
_NEW = 6


@functools.cache
def _workdirs():
  """A released-style FP8 checkpoint, converted as it is, and to float32."""
  model = config_lib.replace(
    presets.tiny().model,
    {
      'dim': 136,  # Ragged blocks; heads of 12 and 8 share them.
      'inter_dim': 160,
      'n_layers': 2,
      'n_heads': 5,
      'moe.moe_inter_dim': 130,
      'mla.q_lora_rank': 24,
    },
  )
  params, state = draw(model, (0.0, 0.1))
  folder = tempfile.TemporaryDirectory()
  convert.save_hf(
    f'{folder.name}/hf',
    config_lib.Config(model=model),
    {'params': params, 'router_state': state},
    'fp8',
  )
  for name, dtype in (('codes', 'keep'), ('f32', 'f32')):
    run.convert(f'{folder.name}/hf', f'{folder.name}/{name}', 'jax', dtype)
  return folder


@functools.cache
def _load(name, fp8=False):
  """(model in float32, variables) of a workdir."""
  workdir = f'{_workdirs().name}/{name}'
  config, variables, _ = checkpoint.load_for_inference(workdir)
  assert config.precision.fp8.enabled == (name == 'codes')
  changes = {
    'precision.compute_dtype': 'float32', 'precision.fp8.enabled': fp8
  }  # fmt: skip
  return step_lib.build_model(config_lib.replace(config, changes)), variables


def _leaf(tree, path):
  for key in path:
    tree = tree[key]
  return tree


def _nbytes(tree):
  return sum(x.nbytes for x in jax.tree.leaves(tree))


def test_codes_are_loaded_as_codes():
  """A byte a weight and four a block: half of BF16, plain or unstacked."""
  model, variables = _load('codes')
  linear, rest, loaded = 0, 0, 0
  for leaf, tensor in names.last_of_leaves(model.config, ()).items():
    value = _leaf(variables, leaf)
    assert isinstance(value, quantize.Quantized) == tensor.is_linear, leaf
    assert value.shape == tensor.leaf_shape, leaf
    if tensor.is_linear:
      stack = int(np.prod(value.shape)) // int(np.prod(tensor.shape_jax))
      blocks = int(np.prod(tensor.scale.shape))
      assert _nbytes(value) == value.codes.size + 4 * stack * blocks
      linear += value.codes.size
      loaded += _nbytes(value)
    else:
      rest += _nbytes(value)
  assert loaded < 1.02 * linear
  assert _nbytes(variables) == loaded + rest
  absorbed = (
    4
    * _leaf(variables, ('params', 'dense_layers', 'attn'))['wkv_b'].codes.size
    * (model.config.n_layers + model.config.n_mtp_layers)
  )
  unstacked = weights.unstack(model, variables)
  # `embed`, `head` and `eh_proj` become float32 here, the compute dtype.
  wider = sum(
    x.size * 4 - x.nbytes
    for x in jax.tree.leaves(variables)
    if x.dtype == jnp.bfloat16 and x.ndim > 1
  )
  assert _nbytes(unstacked) <= _nbytes(variables) + absorbed + wider


def _logits(name, fp8):
  model, variables = _load(name, fp8)
  tokens = np.arange(48).reshape(2, 24)
  return jax.jit(lambda v: model.apply(v, tokens, method='logits'))(variables)


def _decoded(name, fp8):
  """Logits after a prefill of 8 tokens, and after another, from the cache."""
  model, variables = _load(name, fp8)
  variables = weights.unstack(model, variables)
  tokens = np.arange(18).reshape(2, 9)
  mask = jnp.ones((2, 9))
  positions = jnp.broadcast_to(jnp.arange(9), (2, 9))

  @jax.jit
  def run(variables):
    layers = cache_lib.init(model.config, 2, 16, jnp.float32, 0).layers
    outputs = []
    for part, prefill in ((slice(8), True), (slice(8, 9), False)):
      hidden, layers, _ = model.apply(
        variables, tokens[:, part], positions[:, part], mask[:, part], layers,
        prefill, method='extend',
      )  # fmt: skip
      outputs.append(model.apply(variables, hidden, method='unembed'))
    return outputs

  return run(variables)


def test_without_activations_in_fp8_they_are_the_dequantised_weights():
  logits = _logits('f32', False)
  tolerances.assert_close(
    _logits('codes', False), logits, tolerances.COMPONENT_PARITY
  )
  tolerances.assert_close(
    _decoded('codes', False), _decoded('f32', False),
    tolerances.COMPONENT_PARITY,
  )  # fmt: skip


def _float_dot(a, b, accumulation=None, dtype=jnp.float32):
  return jnp.matmul(a.dequantize(), b.dequantize(), precision='highest').astype(
    dtype
  )


@pytest.mark.slow
@pytest.mark.parametrize('compute', (_logits, _decoded))
def test_with_fp8_activations_they_are_products_of_dequantised_operands(
  compute,
):
  actual = compute('codes', True)
  steps = Steps(quantize.quantize, quantize.requantize, _float_dot)
  with (
    mock.patch.object(fp8, 'steps', lambda _: steps),
    mock.patch.object(fp8_matmul, 'dot', _float_dot),
  ):
    expected = compute('codes', True)
  tolerances.assert_close(actual, expected, tolerances.FP8_REORDERED)
  # And not what quantising no activation gives.
  with pytest.raises(AssertionError):
    plain = compute('codes', False)
    tolerances.assert_close(actual, plain, tolerances.FP8_REORDERED)


def _text(name, fp8, **options):
  model, variables = _load(name, fp8)
  return generate.generate(model, variables, _PROMPTS, _NEW, **options).tokens


@pytest.mark.slow
def test_greedy_text_is_that_of_the_dequantised_weights():
  text = _text('f32', False)
  assert _text('codes', False) == text
  assert len({tuple(t) for t in text}) == len(_PROMPTS)


@pytest.mark.slow
def test_replicas_of_quantised_experts():
  model, variables = _load('codes', True)
  unstacked = weights.unstack(model, variables)
  moe = model.config.moe
  load = np.arange(model.config.n_moe_layers * moe.n_routed_experts)
  load = 1.0 + load.reshape(model.config.n_moe_layers, -1)
  placement = load_balance.place(load, 12, moe.n_expert_groups, 2, 4)
  replicated = load_balance.add_replicas(unstacked, placement)
  actual = generate.generate(model, replicated, _PROMPTS, _NEW).tokens
  assert actual == _text('codes', True)


@functools.cache
def _divided(fp8):
  """The codes, of 136 = 2 x 68 rows a matrix, on eight devices."""
  parallel = trained.start({'fsdp': 2, 'expert': 2})
  changes = {
    'precision.compute_dtype': 'float32',
    'precision.fp8.enabled': fp8,
    'data.batch_size': 8,
    'data.batch_size_start': 0,
    'train.micro_batch_size': 0,
  }
  workdir = f'{_workdirs().name}/codes'
  return trained.load(workdir, parallel=parallel, changes=changes)


def test_devices_divide_codes_as_weights_and_scales_as_experts():
  model, variables = _load('codes')
  read = _divided(False)
  checked = 0
  for leaf, tensor in names.last_of_leaves(model.config, ()).items():
    if not tensor.is_linear:
      continue
    value, whole = (_leaf(v, leaf) for v in (read.variables, variables))
    np.testing.assert_array_equal(value.codes, whole.codes)
    np.testing.assert_array_equal(value.scales, whole.scales)
    of_experts = 2 if len(tensor.index) > 1 else 1  # (layer, expert)
    codes, scales = (
      x.size // x.addressable_shards[0].data.size
      for x in (value.codes, value.scales)
    )
    assert (codes, scales) == (2 * of_experts, of_experts), leaf
    checked += 1
  assert checked > 10
  params = read.variables['params']
  kept = read.layout.for_inference(params)
  for actual, x in zip(jax.tree.leaves(kept), jax.tree.leaves(params)):
    assert actual.sharding == x.sharding
    np.testing.assert_array_equal(actual, x)


@pytest.mark.slow
def test_devices_evaluate_and_continue_as_one_does():
  """With inputs in FP8; without, two processes do in experiments_test.py."""
  read = _divided(True)
  model, variables = _load('codes', True)
  rng = np.random.default_rng(0)
  batch = {
    'tokens': rng.integers(0, model.config.vocab_size, (8, 17), np.int32),
    'segments': np.ones((8, 17), np.int32),
  }
  bytes_V = np.ones(model.config.vocab_size, np.float32)
  one, divided = (
    perplexity.make_eval_step(model, read.config, layout)(
      variables['params'], variables['router_state'], batch, bytes_V
    )
    for model, variables, layout in (
      (model, variables, None),
      (read.model, read.variables, read.layout.for_evaluation()),
    )
  )
  tolerances.assert_close(
    jax.device_get(divided), jax.device_get(one), tolerances.COMPONENT_PARITY
  )
  with layout_lib.ambient(read.layout):
    done = generate.generate(read.model, read.variables, _PROMPTS, _NEW)
  assert done.tokens == _text('codes', True)


def test_codes_without_scales_are_refused():
  _, variables = convert.load_hf(f'{_workdirs().name}/hf')
  model, _ = _load('codes')
  tokens = np.arange(8).reshape(1, 8)
  apply = functools.partial(model.apply, method='logits')
  bare = {k: variables[k] for k in ('params', 'router_state')}
  with pytest.raises(ValueError, match='has no scales: `quantize.join_scales`'):
    jax.eval_shape(apply, bare, tokens)
  jax.eval_shape(apply, quantize.join_scales(variables), tokens)
