"""Logits, every gradient, MTP and a trajectory against `transformers`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl.testing import parameterized

from deepseek_jax import config as config_lib
from deepseek_jax import presets
from deepseek_jax.models import deepseek
from deepseek_jax.ops import losses
from deepseek_jax.training import optimizer, schedules, step
from deepseek_jax.training.state import TrainState
from tests import hf, tolerances
from tests.drawn import draw

_LENGTH = 48  # Three times YaRN's original context below.
_YARN = {'rope.factor': 40.0, 'rope.original_seq_len': 16}
_V2 = {
  'moe.score_func': 'softmax',
  'moe.group_score': 'max',
  'moe.norm_topk': False,
}
# `bias`: (mean, spread) of the router bias.  With a mean of -3 every biased
# score is negative, and masking with 0 would let the closed groups win.
_CASES = (
  ('v3', _YARN, (-3.0, 0.3)),
  ('v3_full_rank_ungrouped',
   {'mla.q_lora_rank': 0, 'moe.n_expert_groups': 1, 'moe.n_limited_groups': 1,
    'moe.n_shared_experts': 2, 'moe.norm_topk': False, 'moe.route_scale': 1.0},
   (0.0, 0.3)),
  ('v3_tied_two_dense',
   {'tie_embeddings': True, 'n_layers': 4, 'n_dense_layers': 2,
    'moe.n_routed_experts': 12, 'moe.n_activated_experts': 5,
    'moe.n_expert_groups': 6, 'moe.n_limited_groups': 3, 'n_heads': 3,
    'mla.v_head_dim': 5, 'rope.mscale': 0.707, **_YARN},
   (2.0, 0.3)),
  ('v2', {**_V2, **_YARN, 'moe.route_scale': 16.0, 'moe.n_shared_experts': 2,
          'rope.mscale': 0.707}, None),
  ('v2_lite', {**_V2, 'mla.q_lora_rank': 0, 'moe.route_scale': 1.0,
               'moe.n_expert_groups': 1, 'moe.n_limited_groups': 1}, None),
)  # fmt: skip


def make(changes, bias, seed=0):
  """A tiny config and its random variables; see `draw`."""
  base = dataclasses.replace(presets.tiny().model, n_mtp_layers=0)
  config = config_lib.replace(base, changes)
  return config, *draw(config, bias, seed)


def batch(config, seed=1, size=2, length=_LENGTH):
  """Tokens [B, T], targets and weights of a loss that sees every position."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(config.vocab_size, size=(size, length + 1))
  weights = rng.uniform(size=(size, length)).astype(np.float32)
  tokens = tokens.astype(np.int32)
  return tokens[:, :-1], tokens[:, 1:], weights


def our_loss(config, params, state, tokens, targets, weights):
  """Mean cross-entropy by the product's chunked loss, and the logits."""
  model = deepseek.Transformer(config)
  variables = {'params': params, 'router_state': state}
  hidden = model.apply(variables, tokens).hidden_BTD
  head = params['embed' if config.tie_embeddings else 'head']
  sums = losses.cross_entropy(hidden, head, targets, weights)
  return sums.loss / weights.sum(), losses.logits(hidden, head)


def their_loss(model, tokens, targets, weights):
  """The same with torch's own cross-entropy."""
  logits = model(torch.tensor(tokens).long(), use_cache=False).logits
  nll = torch.nn.functional.cross_entropy(
    logits.flatten(0, 1), torch.tensor(targets).long().flatten(),
    reduction='none',
  )  # fmt: skip
  weights = torch.tensor(weights)
  return (nll * weights.flatten()).sum() / weights.sum(), logits


class ParityTest(parameterized.TestCase):
  @parameterized.named_parameters(*_CASES)
  def test_logits_and_every_gradient(self, changes, bias):
    config, params, state = make(changes, bias)
    data = batch(config)
    theirs = hf.build(config, params, state)
    expected_loss, expected_logits = their_loss(theirs, *data)
    expected_loss.backward()
    step = jax.jit(
      jax.value_and_grad(
        lambda p: our_loss(config, p, state, *data), has_aux=True
      )
    )
    (loss, logits), grads = step(params)
    tolerances.assert_close(
      logits, expected_logits.detach(), tolerances.COMPONENT_PARITY, 'logits'
    )
    tolerances.assert_close(
      loss, expected_loss.detach(), tolerances.COMPONENT_PARITY, 'loss'
    )
    expected = {n: p.grad.numpy() for n, p in theirs.named_parameters()}
    actual = hf.to_names(config, grads)
    self.assertEqual(set(actual), set(expected))
    for name, grad in expected.items():
      self.assertGreater(np.abs(grad).max(), 0, name)
      tolerances.assert_close(actual[name], grad, tolerances.DEEP_MODEL, name)

  def test_mtp_of_depth_two(self):
    config, params, state = make({'n_mtp_layers': 2, **_YARN}, (-3.0, 0.3))
    tokens, _, _ = batch(config)
    theirs = hf.build(config, params, state)
    mtp = hf.build_mtp(config, theirs, params, state)
    ids = torch.tensor(tokens).long()
    weights = np.random.default_rng(2).uniform(size=(2, _LENGTH, config.dim))
    weights = weights.astype(np.float32)

    def loss(p):
      model = deepseek.Transformer(config)
      output = model.apply({'params': p, 'router_state': state}, tokens)
      # Depth k has no embedding for the last k positions.
      kept = [
        h[:, : _LENGTH - k] for k, h in enumerate(output.mtp_hidden, start=1)
      ]
      return sum((h * weights[:, : h.shape[1]]).sum() for h in kept), kept

    (_, actual), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    hidden = theirs.model(ids, use_cache=False).last_hidden_state
    expected_loss = 0.0
    for k, ours in enumerate(actual, start=1):
      positions = torch.arange(_LENGTH - k)[None]
      hidden = mtp.forward_layer(
        k - 1, hidden[:, : _LENGTH - k], positions, None, input_ids=ids[:, k:]
      )
      tolerances.assert_close(
        ours, hidden.detach(), tolerances.COMPONENT_PARITY, f'depth {k}'
      )
      part = torch.tensor(weights[:, : _LENGTH - k])
      expected_loss += (hidden * part).sum()
    expected_loss.backward()
    grads = hf.to_names(config, grads)
    parameters = [*theirs.named_parameters(), *mtp.named_parameters()]
    expected = {n: p.grad.numpy() for n, p in parameters if p.grad is not None}
    self.assertEqual(set(grads) - set(expected), {'lm_head.weight'})
    for name in set(grads) & set(expected):
      tolerances.assert_close(
        grads[name], expected[name], tolerances.DEEP_MODEL, name
      )


class TrajectoryTest(parameterized.TestCase):
  def test_thirty_steps_follow_torch(self):
    """AdamW, clipping and the router bias: the product's step against torch."""
    config, hyper = _run_config(), schedules.Hyper(
      lr=2e-3, gamma=1e-2, alpha=0.0, mtp_weight=0.0
    )  # fmt: skip
    params, state = draw(config.model, (0.0, 0.01))
    theirs = _Torch(config, hf.build(config.model, params, state), hyper)
    # Back from their names, so that both directions of the table are used.
    arrays = {n: x.numpy() for n, x in theirs.model.state_dict().items()}
    params = hf.to_tree(config.model, arrays, params)
    state = hf.to_tree(config.model, arrays, state)
    tx = optimizer.adamw(config.optim, config.precision)
    train_step = step.make_train_step(step.build_model(config), config, tx)
    now = TrainState(
      jnp.int32(0), *jax.tree.map(jnp.array, (params, state)), tx.init(params)
    )
    actual, expected = [], []
    for i in range(30):
      tokens, _, _ = batch(config.model, seed=i % 3, size=4, length=32)
      data = {'tokens': tokens, 'segments': np.ones_like(tokens)}
      data = jax.tree.map(lambda x: x.reshape(2, 2, -1), data)
      now, metrics = train_step(now, data, hyper)
      actual.append(metrics['loss'])
      expected.append(theirs.step(tokens))
    self.assertLess(expected[-1], expected[0] - 0.5)
    tolerances.assert_close(actual, expected, tolerances.DEEP_MODEL, 'losses')
    biases = hf.to_names(config.model, now.router_state)
    self.assertLen(biases, 2)
    for name, bias in biases.items():
      tolerances.assert_close(
        bias, theirs.model.state_dict()[name], tolerances.FLOAT32_MATH, name
      )


def _run_config():
  """Two micro-batches a step, no MTP and no balance loss."""
  base = presets.tiny()
  precision = dict.fromkeys(('mu_dtype', 'nu_dtype'), 'float32')
  return dataclasses.replace(
    base,
    model=dataclasses.replace(base.model, n_mtp_layers=0),
    precision=dataclasses.replace(base.precision, **precision),
    train=dataclasses.replace(base.train, micro_batch_size=2),
  )


class _Torch:
  """Their model trained by torch's optimizer; the bias rule of V3 2.1.2."""

  def __init__(self, config, model, hyper):
    self.model, self.gamma, self.clip = (
      model,
      hyper.gamma,
      config.optim.clip_norm,
    )
    self.counts = {}
    for gate in self._gates():
      gate.register_forward_hook(self._count)
    groups = [
      {'params': [p], 'weight_decay': config.optim.weight_decay * (p.ndim > 1)}
      for p in model.parameters()
    ]
    betas = (config.optim.b1, config.optim.b2)
    self.optimizer = torch.optim.AdamW(
      groups, lr=hyper.lr, betas=betas, eps=config.optim.eps
    )

  def _gates(self):
    return [layer.mlp.gate for layer in self.model.model.layers[1:]]

  def _count(self, gate, _, outputs):
    self.counts[gate] = torch.bincount(
      outputs[2].flatten(), minlength=gate.num_experts
    ).float()

  def step(self, tokens):
    """One optimizer step on tokens [B, T + 1]; the loss before it."""
    ones = np.ones_like(tokens[:, 1:], np.float32)
    loss, _ = their_loss(self.model, tokens[:, :-1], tokens[:, 1:], ones)
    self.optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
    self.optimizer.step()
    for gate in self._gates():
      counts = self.counts[gate]
      gate.e_score_correction_bias += self.gamma * torch.sign(
        counts.mean() - counts
      )
    return loss.item()
