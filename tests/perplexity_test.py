"""Validation against a float64 log-softmax over the targets that count."""

import math

import numpy as np
import pytest

from deepseek_jax import presets
from deepseek_jax.evaluation import perplexity
from deepseek_jax.models import deepseek
from tests import tolerances


class _Bigrams:
  """What evaluation needs of a model: a hidden state for every token."""

  dtype = np.float32

  def apply(self, variables, tokens, segments):
    del segments
    tables = variables['params']
    return deepseek.Output(
      tables['embed'][tokens], (tables['ahead'][tokens],), {}
    )


@pytest.fixture(scope='module')
def case():
  """(parameters, compiled evaluation) of `_Bigrams`."""
  random = np.random.default_rng(0)
  params = {
    name: random.normal(size=(512, 8)).astype(np.float32)
    for name in ('embed', 'ahead', 'head')
  }
  return params, perplexity.make_eval_step(_Bigrams(), presets.tiny())


def _batch():
  """Two documents in a row, and a row with padding; int32 [2, T + 1]."""
  tokens = np.random.default_rng(0).integers(0, 512, (2, 13)).astype(np.int32)
  segments = np.ones_like(tokens)
  segments[0, 7:] = 2
  segments[1, 9:] = 0
  return {'tokens': tokens, 'segments': segments}


def _evaluate(case, batches, bytes_V):
  params, eval_step = case
  return perplexity.evaluate(eval_step, params, {}, batches, bytes_V)


def _log_probs(hidden, params):
  logits = hidden.astype(np.float64) @ params['head'].T.astype(np.float64)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_counts_every_target_within_its_document(case):
  params, _ = case
  batch, bytes_V = _batch(), np.arange(512) % 5 + 1
  tokens, segments = batch['tokens'], batch['segments']
  main = _log_probs(params['embed'][tokens[:, :-1]], params)
  ahead = _log_probs(params['ahead'][tokens[:, :-1]], params)
  nll, n_bytes, mtp_nll, accepted = [], 0, [], 0
  for b, (text, documents) in enumerate(zip(tokens, segments)):
    for i in range(len(text) - 1):
      if documents[i] and documents[i] == documents[i + 1]:
        nll.append(-main[b, i, text[i + 1]])
        n_bytes += bytes_V[text[i + 1]]
      if (
        i + 2 < len(text) and documents[i] and documents[i] == documents[i + 2]
      ):
        mtp_nll.append(-ahead[b, i, text[i + 2]])
        accepted += ahead[b, i].argmax() == main[b, i + 1].argmax()
  assert len(nll) == 6 + 5 + 8  # All but the first of each document.
  expected = {
    'val_loss': np.mean(nll),
    'val_bpb': np.sum(nll) / math.log(2) / n_bytes,
    'val_mtp_1_loss': np.mean(mtp_nll),
    'val_mtp_1_acceptance': accepted / len(mtp_nll),
  }
  actual = _evaluate(case, [batch], bytes_V)
  tolerances.assert_close(actual, expected, tolerances.COMPONENT_PARITY)


def test_does_not_depend_on_the_cut_into_batches(case):
  batch, bytes_V = _batch(), np.full(512, 3)
  halves = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(2)]
  whole = _evaluate(case, [batch], bytes_V)
  # The halves have 11 and 8 targets: a mean of means would differ.
  tolerances.assert_close(
    _evaluate(case, halves, bytes_V), whole, tolerances.COMPONENT_PARITY
  )


def test_a_draft_that_knows_the_next_token_is_always_accepted(case):
  class Oracle(_Bigrams):
    def apply(self, variables, tokens, segments):
      output = super().apply(variables, tokens, segments)
      return output._replace(mtp_hidden=(deepseek.shift(output.hidden_BTD, 1),))

  params, _ = case
  eval_step = perplexity.make_eval_step(Oracle(), presets.tiny())
  result = _evaluate((params, eval_step), [_batch()], np.ones(512))
  assert result['val_mtp_1_acceptance'] == 1.0
  assert _evaluate(case, [_batch()], np.ones(512))['val_mtp_1_acceptance'] < 0.5


def test_padding_alone_is_refused(case):
  batch = {k: np.zeros_like(v) for k, v in _batch().items()}
  for batches in ([], [batch]):
    with pytest.raises(ValueError, match='no target tokens'):
      _evaluate(case, batches, np.ones(512))
