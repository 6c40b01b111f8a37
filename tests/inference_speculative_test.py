"""Drafting with MTP loses nothing, and drafts as the modules were trained."""

import functools

import jax
import numpy as np
import pytest

from deepseek_jax import config as config_lib
from deepseek_jax import presets
from deepseek_jax.inference import cache as cache_lib
from deepseek_jax.inference import (
  decode,
  generate,
  prefill,
  speculative,
  weights,
)
from deepseek_jax.training import step as step_lib

_PROMPTS = [[5, 3, 2], [7], [1, 2, 3, 4, 5, 6, 7, 0]]
_NEW = 24


@functools.cache
def _model(n_mtp_layers, vocab_size=8, std=0.2):
  """Of so few tokens that drafts stand now and then."""
  config = config_lib.replace(
    presets.tiny(),
    {
      'model.n_layers': 1,
      'model.vocab_size': vocab_size,
      'model.n_mtp_layers': n_mtp_layers,
      'model.n_dense_layers': 0,
      'model.init_std': std,
    },
  )
  model = step_lib.build_model(config)
  variables = step_lib.init_variables(model, 3)
  return model, variables, weights.unstack(model, variables)


@functools.cache
def _plain(n_mtp_layers):
  model, _, unstacked = _model(n_mtp_layers)
  return generate.generate(model, unstacked, _PROMPTS, _NEW).tokens


@pytest.mark.parametrize('n_mtp_layers, drafts', [(1, 1), (1, 3), (2, 2)])
def test_greedy_text_is_that_of_plain_decoding(n_mtp_layers, drafts):
  model, _, unstacked = _model(n_mtp_layers)
  result = generate.generate(model, unstacked, _PROMPTS, _NEW, drafts=drafts)
  assert result.tokens == _plain(n_mtp_layers)
  assert len(result.acceptance) == drafts
  assert 0 < result.acceptance[0] < 1  # Both cases were met.
  assert 1 < result.tokens_per_pass <= drafts + 1
  # Ends of texts, too, within a pass or not.
  stop = result.tokens[0][7]
  stopped = generate.generate(
    model, unstacked, _PROMPTS, _NEW, drafts=drafts, stop_ids=[stop]
  )
  for output, full in zip(stopped.tokens, result.tokens):
    assert output == (full[: full.index(stop)] if stop in full else full)
  # The token after a prompt came of no pass; a stop token did.
  taken = sum(len(new) - 1 + (len(new) < _NEW) for new in stopped.tokens if new)
  assert round(stopped.tokens_per_pass * stopped.passes) == taken


def test_few_programs_for_many_lengths():
  programs = (
    speculative.decode, decode.decode, decode.first, prefill.run_chunk
  )  # fmt: skip
  model, _, unstacked = _model(1)
  before = [p._cache_size() for p in programs]
  for length in (5, 9, 14, 20, 27, 40):  # In chunks of 16, 32 and 48.
    for drafts in (0, 1):
      prompts = [[1] * length] * len(_PROMPTS)
      generate.generate(model, unstacked, prompts, 20, drafts=drafts)
  new = [p._cache_size() - n for p, n in zip(programs, before)]
  assert all(n <= most for n, most in zip(new, (1, 1, 1, 2 * 3))), new


def test_lengths_of_caches_and_chunks():
  rooms = [cache_lib.round_up(n, 64) for n in range(1, 65_537)]
  assert sorted({*rooms})[:8] == [64, 128, 192, 256, 384, 512, 768, 1024]
  assert len({*rooms}) == 20
  assert all(n <= room for n, room in enumerate(rooms, 1))
  assert max(room / n for n, room in enumerate(rooms, 1) if n > 128) <= 1.5
  chunks = {prefill.chunk_length(n) for n in range(1, 65_537)}
  assert chunks == {16, 32, 48, 64, 96, 128, 192, 256}


def test_drafts_are_what_training_would_predict():
  """Passes and acceptance, from the training forward alone."""
  model, variables, unstacked = _model(2)
  forward = jax.jit(
    lambda text: [
      model.apply(variables, h, method='unembed').argmax(-1)
      for h in model.apply(variables, text).mtp_hidden
    ]
  )
  passes, tried, accepted = 0, np.zeros(2), np.zeros(2)
  for prompt, output in zip(_PROMPTS, _plain(2)):
    text, end = prompt + output, len(prompt) + _NEW
    n = len(prompt)  # In the cache; token n is pending.
    while n < end - 1:
      padded = np.zeros((1, 40), np.int32)
      padded[0, : n + 1] = text[: n + 1]
      drafts = [int(forward(padded)[0][0, n - 1])]
      padded[0, n + 1] = drafts[0]
      drafts.append(int(forward(padded)[1][0, n - 1]))
      # What the model says after each; behind the text's end nothing counts.
      stands = np.cumprod([d == s for d, s in zip(drafts, text[n + 1 : n + 3])])
      tried[: len(stands)] += [1, *stands][: len(stands)]
      accepted[: len(stands)] += stands
      passes, n = passes + 1, n + 1 + int(stands.sum())
  result = generate.generate(model, unstacked, _PROMPTS, _NEW, drafts=2)
  assert result.passes == passes
  np.testing.assert_array_equal(
    np.float32(result.acceptance), np.float32(accepted) / np.float32(tried)
  )
  taken = sum(len(tokens) - 1 for tokens in result.tokens)
  assert result.tokens_per_pass == np.float32(taken) / np.float32(passes)
  # A prompt's tokens, and at least one position of each pass, by each module.
  moe = model.config.moe
  assert result.load_LE.shape == (1 + 2, moe.n_routed_experts)
  seen = result.load_LE.sum(1) / moe.n_activated_experts
  inputs = sum(map(len, _PROMPTS))
  assert seen[0] == inputs + 3 * passes  # The pending token, and two drafts.
  assert (seen[1:] >= inputs + passes).all()
  assert (seen[1:] <= inputs + 3 * passes + len(_PROMPTS)).all()


@pytest.mark.slow
@pytest.mark.parametrize('n_mtp_layers, top_k', [(1, 0), (2, 3)])
def test_sampling_has_the_models_distribution(n_mtp_layers, top_k):
  """Of three tokens, over many texts that begin alike; with two drafts."""
  V, copies = 4, 4096
  model, variables, unstacked = _model(n_mtp_layers, V, 0.4)
  prompt = [1, 3, 0]
  result = generate.generate(
    model,
    unstacked,
    [prompt] * copies,
    3,
    temperature=1.3,
    top_k=top_k,
    drafts=2,
  )
  texts = np.array(result.tokens)
  counts = np.zeros((V, V, V))
  np.add.at(counts, tuple(texts.T), 1)
  every = np.indices((V, V, V)).reshape(3, -1).T
  full = np.concatenate([np.tile(prompt, (len(every), 1)), every], 1)
  logits = jax.jit(lambda t: model.apply(variables, t, method='logits'))(
    full.astype(np.int32)
  )
  if top_k:
    least = np.sort(logits, -1)[..., -top_k, None]
    logits = np.where(logits < least, -np.inf, logits)
  probs = np.asarray(jax.nn.softmax(logits[:, 2:5] / 1.3, -1), np.float64)
  chance = probs[np.arange(len(every))[:, None], np.arange(3), every].prod(1)
  chance = chance.reshape(V, V, V)
  expected = chance * copies
  # Pearson's statistic: its mean is the degrees of freedom.
  chi2 = ((counts - expected) ** 2 / np.maximum(expected, 1e-9))[expected > 1]
  limit = len(chi2) + 5 * np.sqrt(2 * len(chi2))
  assert chi2.sum() < limit, (chi2.sum(), limit)
  assert counts[expected <= 1].sum() < 60
  assert not counts[expected == 0].any()
  assert 0.05 < result.acceptance[0] < 0.95
