"""A whole model in FP8: what is quantised, and what must not change it."""

import functools

import jax
import numpy as np
from absl.testing import parameterized

from tests import tolerances
from tests.invariance_test import _run, make_config


def _small(**changes):
  return make_config(model__n_layers=3, model__n_mtp_layers=0, **changes)


def _fp8(**changes):
  return _small(precision__fp8__enabled=True, **changes)


def _batch():
  """Rows of 128 inputs: tiles along the tokens end where rows do."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(512, size=(2, 129)).astype(np.int32)
  segments = np.ones_like(tokens)
  segments[1, 40:] = 2
  segments[1, 120:] = 0
  return {'tokens': tokens, 'segments': segments}


@functools.cache
def _baseline():
  return _run(_fp8(), _batch())


def _assert_same(actual, expected):
  for a, e, name in zip(actual, expected, ('losses', 'gradients', 'biases')):
    tolerances.assert_close(a, e, tolerances.FP8_REORDERED, name)


class InvarianceTest(parameterized.TestCase):
  def test_differs_from_the_plain_model(self):
    plain = _run(_small(), _batch())
    difference = abs(plain[0]['loss'] - _baseline()[0]['loss'])
    self.assertBetween(difference / plain[0]['loss'], 1e-5, 1e-2)
    for path, grad in jax.tree_util.tree_leaves_with_path(_baseline()[1]):
      self.assertGreater(np.abs(grad).max(), 0, path)

  @parameterized.parameters(
    ('none', False), ('full', True), ('alternate', True), ('selective', True)
  )
  def test_recomputation_and_scan(self, remat, scan):
    config = _fp8(train__remat=remat, train__scan_layers=scan)
    _assert_same(_run(config, _batch()), _baseline())

  def test_accumulation(self):
    config = _fp8(train__micro_batch_size=1)
    _assert_same(_run(config, _batch()), _baseline())
