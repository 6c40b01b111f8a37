"""The papers' equations in float64 numpy, one token at a time, for the tests.

Nothing here is fast, and nothing is shared with the package but the configs and
the names of parameters.
"""

import math

import numpy as np


def rms_norm(x, scale, eps):
  """x / sqrt(mean(x^2) + eps) * scale over the last dimension."""
  return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps) * scale


def yarn_frequencies(rope, head_dim):
  """V3 section 4.3; arXiv 2309.00071 section 3.2, rounded as released."""
  freqs = []
  for j in range(head_dim // 2):
    freq = rope.theta ** (-2 * j / head_dim)
    if rope.factor > 1:
      bounds = [
        head_dim
        * math.log(rope.original_seq_len / (2 * math.pi * turns))
        / (2 * math.log(rope.theta))
        for turns in (rope.beta_fast, rope.beta_slow)
      ]
      low = max(math.floor(bounds[0]), 0)
      high = min(math.ceil(bounds[1]), head_dim - 1)
      ramp = min(max((j - low) / max(high - low, 1e-3), 0), 1)
      freq = freq / rope.factor * ramp + freq * (1 - ramp)
    freqs.append(freq)
  return np.array(freqs)


def rotate(x, position, rope):
  """Pairs (x[2j], x[2j+1]) as complex numbers, turned by position * freq_j."""
  turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(
    1j * position * yarn_frequencies(rope, x.shape[-1])
  )
  return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def attend(q, k, v, scale, segments=None):
  """Causal softmax attention of one row: q, k [T, N, H], v [T, N, U]."""
  out = np.zeros((*q.shape[:2], v.shape[-1]))
  for t in range(q.shape[0]):
    seen = [s for s in range(t + 1) if _same(segments, s, t)]
    for n in range(q.shape[1]):
      scores = scale * k[seen, n] @ q[t, n]
      probs = np.exp(scores - scores.max())
      out[t, n] = probs / probs.sum() @ v[seen, n]
  return out


def _same(segments, s, t):
  return segments is None or segments[s] == segments[t]


def mla(p, x, config, segments=None):
  """V3 equations 1 to 11, for one row x [T, D]."""
  c, eps = config.mla, config.norm_eps
  q, k, v = [], [], []
  for t, h in enumerate(x):
    c_q, wq = h, p.get('wq')
    if wq is None:
      c_q, wq = rms_norm(h @ p['wq_a'], p['q_norm'], eps), p['wq_b']
    q_t = np.einsum('q,qnh->nh', c_q, wq)
    q_c, q_r = np.split(q_t, [c.qk_nope_head_dim], -1)
    c_kv, k_r = np.split(h @ p['wkv_a'], [c.kv_lora_rank])
    kv = np.einsum('c,cnh->nh', rms_norm(c_kv, p['kv_norm'], eps), p['wkv_b'])
    k_c, v_t = np.split(kv, [c.qk_nope_head_dim], -1)
    k_r = np.tile(rotate(k_r, t, config.rope), (config.n_heads, 1))
    q.append(np.concatenate([q_c, rotate(q_r, t, config.rope)], -1))
    k.append(np.concatenate([k_c, k_r], -1))
    v.append(v_t)
  mscale = 0.1 * config.rope.mscale * math.log(config.rope.factor) + 1
  scale = mscale**2 / math.sqrt(c.qk_nope_head_dim + c.qk_rope_head_dim)
  out = attend(np.array(q), np.array(k), np.array(v), scale, segments)
  return np.einsum('tnu,nud->td', out, p['wo'])


def grouped_query(p, x, config, segments=None):
  """GQA, MHA and MQA (V2 section 2.1) for one row x [T, D]."""
  heads = range(config.n_heads)
  kv = [n * config.n_kv_heads // config.n_heads for n in heads]
  q, k, v = (np.einsum('td,dnh->tnh', x, p[w]) for w in ('wq', 'wk', 'wv'))
  for t in range(len(x)):
    q[t], k[t] = rotate(q[t], t, config.rope), rotate(k[t], t, config.rope)
  mscale = 0.1 * config.rope.mscale * math.log(config.rope.factor) + 1
  scale = mscale**2 / math.sqrt(config.gqa.head_dim)
  out = attend(q, k[:, kv], v[:, kv], scale, segments)
  return np.einsum('tnh,nhd->td', out, p['wo'])


def silu(x):
  return x / (1 + np.exp(-x))


def swiglu(p, x):
  return (silu(x @ p['w1']) * (x @ p['w3'])) @ p['w2']


def route(logits, bias, moe):
  """V3 equations 12 to 16 for one token: (experts, weights, scores)."""
  exp = np.exp(logits - logits.max())
  sigmoid = 1 / (1 + np.exp(-logits))
  scores = sigmoid if moe.score_func == 'sigmoid' else exp / exp.sum()
  biased = scores + bias
  size = len(logits) // moe.n_expert_groups
  best = 2 if moe.group_score == 'top2_sum' else 1
  group_scores = [
    np.sort(biased[g : g + size])[-best:].sum()
    for g in range(0, len(logits), size)
  ]
  opened = np.argsort(group_scores)[::-1][: moe.n_limited_groups]
  allowed = [e for e in range(len(logits)) if e // size in opened]
  allowed.sort(key=lambda e: -biased[e])
  chosen = allowed[: moe.n_activated_experts]
  total = sum(scores[chosen]) if moe.norm_topk else 1.0
  return chosen, moe.route_scale * scores[chosen] / total, scores


def over_capacity(chosen_of, mask, moe):
  """The choices (t, k) that one row's experts have no room for (GShard).

  First choices come before second ones, earlier tokens before later ones.
  """
  E, K = moe.n_routed_experts, moe.n_activated_experts
  room = [math.ceil(moe.capacity_factor * K * sum(mask) / E)] * E
  lost = set()
  for k in range(K) if moe.capacity_factor else ():
    for t, chosen in enumerate(chosen_of):
      if mask[t]:
        room[chosen[k]] -= 1
        if room[chosen[k]] < 0:
          lost.add((t, k))
  return lost


def moe_ffn(p, bias, x, config, mask):
  """One row x [T, D]: output, counts [E], the row's balance statistics."""
  moe = config.moe
  out, counts = np.zeros_like(x), np.zeros(moe.n_routed_experts)
  routed = [route(h @ p['gate'], bias, moe) for h in x]
  chosen_of, weights_of, scores_of = zip(*routed)
  lost = over_capacity(chosen_of, mask, moe)
  for t, h in enumerate(x):
    for k, (e, weight) in enumerate(zip(chosen_of[t], weights_of[t])):
      expert = {w: p[w][e] for w in ('w1', 'w2', 'w3')}
      out[t] += ((t, k) not in lost) * weight * swiglu(expert, h)
      counts[e] += mask[t]
    if moe.n_shared_experts:
      out[t] += swiglu(p['shared'], h)
  return out, counts, (chosen_of, scores_of)


def balance_loss(chosen_of, scores_of, mask, moe):
  """One sequence, or all tokens together for `batch`: a float.

  sequence, batch: V3 equations 17 to 20; expert: V2 equations 23 to 25;
  gshard: the mean-gate form of GShard's algorithm 1, times E as all others.
  """
  E, K = moe.n_routed_experts, moe.n_activated_experts
  tokens = [t for t in range(len(mask)) if mask[t]]
  total = 0.0
  for i in range(E):
    hits = affinity = 0.0
    for t in tokens:
      scores = scores_of[t]
      if moe.aux_loss in ('sequence', 'batch'):
        hits += i in np.argsort(scores)[::-1][:K]
        affinity += scores[i] / scores.sum()
      else:
        first = moe.aux_loss == 'gshard'
        hits += i in (chosen_of[t][:1] if first else chosen_of[t])
        affinity += scores[i]
    k = 1 if moe.aux_loss == 'gshard' else K
    total += E / (k * len(tokens)) * hits * affinity / len(tokens)
  return total


def block(p, bias, x, config, mask, segments=None):
  """One layer on one row: output and, with experts, counts and loss."""
  eps = config.norm_eps
  attention = mla if config.attention == 'mla' else grouped_query
  hidden = rms_norm(x, p['attn_norm'], eps)
  x = x + attention(p['attn'], hidden, config, segments)
  hidden = rms_norm(x, p['ffn_norm'], eps)
  if bias is None:
    return x + swiglu(p['ffn'], hidden), None, 0.0
  out, counts, routed = moe_ffn(p['ffn'], bias, hidden, config, mask)
  return x + out, counts, balance_loss(*routed, mask, config.moe)


def mtp_module(p, bias, hidden, embeddings, config, mask, segments=None):
  """V3 equations 21 to 23, embedding first as in the released weights."""
  eps = config.norm_eps
  both = [
    rms_norm(embeddings, p['enorm'], eps),
    rms_norm(hidden, p['hnorm'], eps),
  ]
  x = np.concatenate(both, -1) @ p['eh_proj']
  x, counts, loss = block(p['block'], bias, x, config, mask, segments)
  return rms_norm(x, p['norm'], eps), counts, loss
