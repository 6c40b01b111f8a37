"""Whole FP8 layers against V3's figure 6, written again in float64 numpy.

Nothing is shared with the package: rounding, tiles, the three products of each
linear layer, SwiGLU, norms, RoPE and attention, forwards and backwards, are
those of sections 2.1.1 and 3.3.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from deepseek_jax import config as config_lib
from deepseek_jax import presets
from deepseek_jax.layers import mla, mlp
from tests import conftest, reference, tolerances

_PRECISION = config_lib.PrecisionConfig(
  'float32', fp8=config_lib.FP8Config(enabled=True)
)
_E4M3 = 3, -6, 448.0  # Mantissa bits, smallest exponent, largest number.
_E5M6 = 6, -14, 65024.0


def _quantise(x, rows, columns, fmt=_E4M3, power=False):
  """Codes times scales of tiles; `power`: the power of two above amax / max."""
  mantissa, smallest, largest = fmt
  result = np.empty(x.shape)
  for i in range(0, x.shape[0], rows):
    for j in range(0, x.shape[1], columns):
      tile = np.s_[i : i + rows, j : j + columns]
      # In float32, since kept numbers often lie halfway between two codes.
      value = np.float32(x[tile])
      scale = max(np.abs(value).max(), np.float32(1e-4)) / np.float32(largest)
      scale = np.exp2(np.ceil(np.log2(scale))) if power else scale
      value = np.float64(value / scale)
      exponent = np.floor(np.log2(np.maximum(np.abs(value), 2.0**smallest)))
      unit = 2.0 ** (exponent - mantissa)
      value = np.clip(np.round(value / unit) * unit, -largest, largest)
      result[tile] = value * np.float64(scale)
  return result


class _Linear:
  """y = x w, and its gradients: each product quantises its own operands."""

  def __init__(self, w, gradient_rows=1, power=False):
    self._w, self._rows = _quantise(w, 128, 128), gradient_rows
    self._power = power  # Whether what is kept has powers of two as scales.

  def forward(self, x, kept=None):
    """With what is kept of x for the weight gradient, if that is not codes."""
    codes = _quantise(x, 1, 128)
    self._kept = codes if kept is None else kept
    return codes @ self._w

  def backward(self, dy):
    """dx and dw."""
    dx = _quantise(dy, self._rows, 128) @ self._w.T
    x = _quantise(self._kept, 128, 1, power=self._power)
    dy = _quantise(dy, 128, 1)
    return dx, x.T @ dy


def _silu(gate):
  return gate / (1 + np.exp(-gate))


def _mlp(p, x, dy, gradient_rows=1):
  """(y, dx, gradients) of a dense FFN (section 3.3.3 for what is kept)."""
  w1, w2, w3 = (_Linear(p[n], gradient_rows) for n in ('w1', 'w2', 'w3'))
  gate, up = w1.forward(x), w3.forward(x)
  kept = [_quantise(v, 1, 128) for v in (gate, up)]
  y = w2.forward(_silu(gate) * up, _silu(kept[0]) * kept[1])
  dhidden, dw2 = w2.backward(dy)
  gate, up = kept
  sigmoid = 1 / (1 + np.exp(-gate))
  dgate = dhidden * up * sigmoid * (1 + gate * (1 - sigmoid))
  dx1, dw1 = w1.backward(dgate)
  dx3, dw3 = w3.backward(dhidden * _silu(gate))
  return y, dx1 + dx3, {'w1': dw1, 'w2': dw2, 'w3': dw3}


class _Norm:
  """RMSNorm, which is not quantised."""

  def __init__(self, scale, eps):
    self._scale, self._eps = scale, eps

  def forward(self, x):
    self._x = x
    self._rms = np.sqrt(np.mean(x**2, -1, keepdims=True) + self._eps)
    return x / self._rms * self._scale

  def backward(self, dy):
    unit = self._x / self._rms
    du = dy * self._scale
    dx = (du - unit * np.mean(du * unit, -1, keepdims=True)) / self._rms
    return dx, np.sum(dy * unit, 0)


def _rope(x, rope, sign=1):
  """Turns [T, N, P] by its positions, or back: the gradient."""
  return np.stack(
    [reference.rotate(v, sign * t, rope) for t, v in enumerate(x)]
  )


def _mla(p, x, dy, config):
  """(y, dx, gradients) of MLA; attention's core is exact but for its output."""
  m, N, T = config.mla, config.n_heads, len(x)
  H, P, C, U = (
    m.qk_nope_head_dim, m.qk_rope_head_dim, m.kv_lora_rank, m.v_head_dim
  )  # fmt: skip
  w = {n: _Linear(p[n].reshape(len(p[n]), -1)) for n in _LATENT}
  w['wo'] = _Linear(p['wo'].reshape(N * U, -1), power=True)
  q_norm, kv_norm = (
    _Norm(p[n], config.norm_eps) for n in ('q_norm', 'kv_norm')
  )
  q = w['wq_b'].forward(q_norm.forward(w['wq_a'].forward(x)))
  q_nope, q_pe = np.split(q.reshape(T, N, H + P), [H], -1)
  c_kv, k_pe = np.split(w['wkv_a'].forward(x), [C], -1)
  kv = w['wkv_b'].forward(kv_norm.forward(c_kv)).reshape(T, N, H + U)
  k_nope, v = np.split(kv, [H], -1)
  k_pe = np.repeat(_rope(k_pe[:, None], config.rope), N, 1)
  q = np.concatenate([q_nope, _rope(q_pe, config.rope)], -1)
  k = np.concatenate([k_nope, k_pe], -1)
  scale = 1 / np.sqrt(H + P)
  scores = np.einsum('TNH,SNH->NTS', q, k) * scale
  scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
  probs = np.exp(scores - scores.max(-1, keepdims=True))
  probs /= probs.sum(-1, keepdims=True)
  out = np.einsum('NTS,SNU->TNU', probs, v).reshape(T, -1)
  kept = _quantise(out, 1, 128, _E5M6, power=True)
  y, g = w['wo'].forward(out, kept), {}

  dout, g['wo'] = w['wo'].backward(dy)
  delta = (dout * kept).reshape(T, N, U).sum(-1).T[:, :, None]
  dout = dout.reshape(T, N, U)
  dprobs = np.einsum('TNU,SNU->NTS', dout, v)
  dscores = probs * (dprobs - delta) * scale
  dq, dk = (
    np.einsum(s, dscores, v)
    for s, v in (('NTS,SNH->TNH', k), ('NTS,TNH->SNH', q))
  )
  dv = np.einsum('NTS,TNU->SNU', probs, dout)
  dq = np.concatenate([dq[..., :H], _rope(dq[..., H:], config.rope, -1)], -1)
  dk_pe = _rope(dk[..., H:].sum(1, keepdims=True), config.rope, -1)[:, 0]
  dkv = np.concatenate([dk[..., :H], dv], -1)
  dc_q, g['wq_b'] = w['wq_b'].backward(dq.reshape(T, -1))
  dc_kv, g['wkv_b'] = w['wkv_b'].backward(dkv.reshape(T, -1))
  dc_q, g['q_norm'] = q_norm.backward(dc_q)
  dc_kv, g['kv_norm'] = kv_norm.backward(dc_kv)
  dx_q, g['wq_a'] = w['wq_a'].backward(dc_q)
  dx_kv, g['wkv_a'] = w['wkv_a'].backward(np.concatenate([dc_kv, dk_pe], -1))
  return y, dx_q + dx_kv, {n: g[n].reshape(p[n].shape) for n in p}


_LATENT = ('wq_a', 'wq_b', 'wkv_a', 'wkv_b')


def _draw(layer, T, D, *args):
  """Parameters, and tokens and gradients of various sizes, float32."""
  rng = np.random.default_rng(0)
  x, dy = (
    rng.standard_normal((T, D)) * rng.uniform(0.5, 2, (T, 1)) for _ in range(2)
  )
  shapes = jax.eval_shape(layer.init, jax.random.key(0), x[None], *args)

  def leaf(box):  # Norms' scales lie around 1.
    [x] = jax.tree.leaves(box)
    return (x.ndim == 1) + 0.1 * rng.standard_normal(x.shape)

  params = {name: leaf(box) for name, box in shapes['params'].items()}
  return jax.tree.map(np.float32, (params, x, dy))


def _run(layer, params, x, dy, *args):
  """(y, dx, gradients) of one sequence."""

  def apply(params, x):
    return layer.apply({'params': params}, x[None], *args)[0]

  # Sums in the order of tests alone put more codes beside ties.
  @functools.partial(jax.jit, compiler_options=conftest.OPTIMISED)
  def run(params, x, dy):
    y, vjp = jax.vjp(apply, params, x)
    grads, dx = vjp(dy)
    return y, dx, grads

  return run(params, x, dy)


def _mismatch(actual, expected):
  """The largest share of a result's numbers that are not equal in float32."""

  def share(a, e):
    error = np.abs(np.asarray(a, np.float64) - e)
    return np.mean(error > tolerances.COMPONENT_PARITY * np.abs(e).max())

  return max(jax.tree.leaves(jax.tree.map(share, actual, expected)))


def _assert_same(actual, expected):
  actual = jax.tree.map(np.asarray, actual)
  tolerances.assert_close(actual, expected, tolerances.FP8_REORDERED)
  # But for few codes on the other side of a tie, which show most in a norm's
  # gradient: each of its numbers is a sum over all tokens.
  assert _mismatch(actual, expected) < 0.15


@functools.cache
def _dense():
  """What a dense FFN gives, and its arguments in float64."""
  layer = mlp.MLP(150, 0.1, _PRECISION)
  arguments = _draw(layer, 140, 200)
  return _run(layer, *arguments), jax.tree.map(np.float64, arguments)


class LayerTest(parameterized.TestCase):
  def test_dense_ffn(self):
    actual, doubles = _dense()
    _assert_same(actual, _mlp(*doubles))

  def test_another_tile_of_dgrad_would_show(self):
    """Blocks of 128 x 128, those that V3 saw diverge."""
    actual, doubles = _dense()
    y, dx, _ = _mlp(*doubles, gradient_rows=128)
    self.assertLess(_mismatch(actual[0], y), 0.05)
    self.assertGreater(_mismatch(actual[1], dx), 0.5)

  def test_mla(self):
    """Five linear layers, with ragged tiles in each."""
    config = config_lib.replace(
      presets.tiny().model,
      {
        'dim': 136, 'n_heads': 3, 'mla.q_lora_rank': 140,
        'mla.kv_lora_rank': 132, 'mla.qk_nope_head_dim': 40,
        'mla.qk_rope_head_dim': 8, 'mla.v_head_dim': 48,
      },
    )  # fmt: skip
    layer, positions = mla.MLA(config, _PRECISION), jnp.arange(140)[None]
    params, x, dy = _draw(layer, 140, 136, positions)
    actual = _run(layer, params, x, dy, positions)
    doubles = jax.tree.map(np.float64, (params, x, dy))
    _assert_same(actual, _mla(*doubles, config))
