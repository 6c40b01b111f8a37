"""EPLB against its published vector, and the properties of any placement."""

from unittest import mock

import chex
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from deepseek_jax.inference import load_balance

_LOADS = np.array(
  [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
  ]
)
# FACTS 5.3.
_EXPECTED = [
  [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
  [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def _imbalance(load_LE, placement, n_devices):
  """Load of the busiest device over the mean, if copies share evenly."""
  share = load_LE / placement.counts_LE
  replicas = np.take_along_axis(share, placement.experts_LP, 1)
  devices = replicas.reshape(len(share), n_devices, -1).sum(-1)
  return devices.max(-1) / devices.mean(-1)


class PlaceTest(parameterized.TestCase):
  def test_published_vector(self):
    placement = load_balance.place(_LOADS, 16, 4, 2, 8)
    np.testing.assert_array_equal(placement.experts_LP, _EXPECTED)

  @parameterized.parameters(
    (16, 4, 2, 8), (24, 4, 3, 6), (24, 3, 4, 8), (12, 4, 2, 4),
    (40, 1, 1, 8), (12, 12, 12, 12),
  )  # fmt: skip
  def test_every_expert_has_its_replicas(self, P, groups, nodes, devices):
    placement = load_balance.place(_LOADS, P, groups, nodes, devices)
    chex.assert_shape(placement.experts_LP, (2, P))
    for layer in range(2):
      experts = placement.experts_LP[layer]
      counts = placement.counts_LE[layer]
      np.testing.assert_array_equal(np.bincount(experts, minlength=12), counts)
      self.assertGreaterEqual(counts.min(), 1)
      for e in range(12):
        listed = placement.replicas_LEX[layer, e]
        np.testing.assert_array_equal(
          listed[listed >= 0], np.flatnonzero(experts == e)
        )

  def test_hierarchical_keeps_a_group_on_one_node(self):
    experts = load_balance.place(_LOADS, 16, 4, 2, 8).experts_LP
    for row in experts:
      first, second = (set((half // 3).tolist()) for half in np.split(row, 2))
      self.assertEmpty(first & second)
      self.assertLen(first, 2)

  def test_balances_a_skewed_load(self):
    rng = np.random.default_rng(0)
    load = rng.zipf(1.5, (3, 64)).clip(max=1000).astype(np.float64)
    one_each = load_balance.Placement(
      np.arange(64)[None].repeat(3, 0),
      np.arange(64)[None, :, None].repeat(3, 0),
      np.ones((3, 64), np.int64),
    )
    before = _imbalance(load, one_each, 16)
    balanced = load_balance.place(load, 128, 8, 1, 16)
    after = _imbalance(load, balanced, 16)
    self.assertTrue((after < before).all(), (before, after))
    self.assertLess(after.max(), 1.25)

  def test_a_copy_goes_to_whom_it_serves_most(self):
    experts, counts = load_balance.replicate(np.array([8.0, 3.0, 5.0]), 6)
    # 8 | 8/2 5 | 8/2 5/2 3 -> then 8 again, at 4 a copy.
    np.testing.assert_array_equal(experts, [0, 1, 2, 0, 2, 0])
    np.testing.assert_array_equal(counts, [3, 1, 2])


def test_loads_of_several_texts_add_up(tmp_path):
  assert load_balance.recall(tmp_path) is None
  load_balance.remember(tmp_path, _LOADS[:1])
  load_balance.remember(tmp_path, _LOADS)  # With drafts: a row of MTP, too.
  load_balance.remember(tmp_path, _LOADS[:1])
  np.testing.assert_array_equal(
    load_balance.recall(tmp_path), _LOADS * [[3], [1]]
  )
  path = tmp_path / load_balance.FILE
  assert list(tmp_path.iterdir()) == [path]  # Nothing half-written.
  load_balance.remember(tmp_path, _LOADS[:, :4])  # Of another model.
  np.testing.assert_array_equal(load_balance.recall(tmp_path), _LOADS[:, :4])
  for text in ('[1, 2]', '[[1], [2, 3]]', '{'):
    path.write_text(text)
    with pytest.raises(ValueError, match='expert_load.json is damaged'):
      load_balance.recall(tmp_path)
    _is_not_kept(tmp_path, 'expert_load.json is damaged, remove it')
    assert path.read_text() == text
  path.unlink()
  path.mkdir()
  with pytest.raises(ValueError, match='expert_load.json: Is a directory'):
    load_balance.recall(tmp_path)
  _is_not_kept(tmp_path, 'expert_load.json: Is a directory')


def _is_not_kept(workdir, why):
  """The texts are there: nothing fails."""
  with mock.patch.object(load_balance.logging, 'warning') as warning:
    load_balance.remember(workdir, _LOADS)
  [(text, error)] = [call.args for call in warning.call_args_list]
  assert why in text % error


@pytest.mark.parametrize(
  'arguments, message',
  [
    ((_LOADS, 8, 4, 2, 8), 'n_replicas=8: use at least one each of 12'),
    ((_LOADS, 16, 5, 2, 8), 'n_groups=5: must divide the 12'),
    ((_LOADS, 16, 4, 3, 8), 'n_nodes=3: must divide n_devices=8'),
    ((_LOADS, 17, 4, 2, 8), 'n_replicas=17: must be a multiple'),
    ((-_LOADS, 16, 4, 2, 8), 'negative'),
  ],
)
def test_mistakes(arguments, message):
  with pytest.raises(ValueError, match=message):
    load_balance.place(*arguments)


if __name__ == '__main__':
  absltest.main()
