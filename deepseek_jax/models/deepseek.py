"""The DeepSeek Transformer (V3 section 2)."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig, ParallelConfig, PrecisionConfig
from deepseek_jax.kernels import dispatch, few_rows
from deepseek_jax.layers import params, stack
from deepseek_jax.layers.block import Block
from deepseek_jax.models.mtp import MTP
from deepseek_jax.ops import embedding, losses, norms


class Output(NamedTuple):
  """What one forward pass gives.

  Attributes:
    hidden_BTD: after the final norm, input of the output head.
    mtp_hidden: per MTP depth, [B, T, D], likewise.
    stats: `MoEStats` with a leading [layers] for the keys 'moe_layers' and
      'mtp', where there are such layers; the tree of `router_state`.
  """

  hidden_BTD: jax.Array
  mtp_hidden: tuple[jax.Array, ...]
  stats: dict[str, Any]


class Transformer(nn.Module):
  """Embedding, dense layers, MoE layers, norm, and the MTP modules.

  Parameters (float32): `embed` and `head` [V, D] (no `head` if tied), `norm`
  [D], and the stacked trees `dense_layers`, `moe_layers`, `mtp` [L, ...].
  Collection `router_state`: the biases of `moe_layers` and `mtp`, float32.

  Attributes:
    config: the architecture.
    precision: number formats; float32 by default.
    parallel: how experts are shared, where a mesh is ambient.
    mask_documents: attention stays within a segment.
    remat: recomputation policy; see `stack.apply_stacked`.
    scan_layers: loop over layers in the compiled program.
    collect: (stack, variables of one of its layers) -> the same, whole, where
      devices share them.
  """

  config: ModelConfig
  precision: PrecisionConfig = PrecisionConfig(compute_dtype='float32')
  parallel: ParallelConfig = ParallelConfig()
  mask_documents: bool = False
  remat: str = 'none'
  scan_layers: bool = True
  collect: Callable[[str, Any], Any] | None = None

  @property
  def dtype(self) -> jnp.dtype:
    """Of activations and of matmul operands that are not FP8."""
    return jnp.dtype(self.precision.compute_dtype)

  def setup(self):
    """Declares every parameter."""
    c = self.config
    init = params.normal(c.init_std, 'vocab', 'dim')
    shape = (c.vocab_size, c.dim)
    self.embed = self.param('embed', init, shape, jnp.float32)
    if not c.tie_embeddings:
      self.head = self.param('head', init, shape, jnp.float32)
    self.norm = params.norm_scale(self, 'norm', c.dim)
    self.stacks = {
      name: self._declare(name, layer, count)
      for name, (layer, count) in self._layers().items()
      if count
    }

  @property
  def _parts(self) -> int:
    return 2 if self.parallel.interleave else 1

  def _layers(self) -> dict[str, tuple[nn.Module, int]]:
    c, how = self.config, (self.precision, self.parallel)
    # parent=None: these are applied to slices of the stacked parameters.
    return {
      'dense_layers': (Block(c, False, *how, parent=None), c.n_first_dense),
      'moe_layers': (Block(c, True, *how, parent=None), c.n_moe_layers),
      'mtp': (MTP(c, *how, parent=None), c.n_mtp_layers),
    }

  def _declare(self, name: str, layer: nn.Module, count: int) -> Any:
    """The stacked collections of `count` layers."""
    is_routed = name != 'dense_layers' and self.config.moe.n_routed_experts
    collections = ('params', 'router_state') if is_routed else ('params',)
    if not self.is_initializing():
      # `param` would trace the initialiser again, only to compare shapes.
      return {c: self.get_variable(c, name) for c in collections}
    x = jnp.zeros((1, 1, self.config.dim), self.dtype)
    ids, mask = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.float32)
    args = (x, x, ids, None, mask) if name == 'mtp' else (x, ids, None, mask)
    rng = self.make_rng('params')
    variables = stack.init_stacked(layer, rng, count, *args)
    result = {'params': self.param(name, lambda _: variables['params'])}
    if is_routed:
      biases = variables['router_state']
      state = self.variable('router_state', name, lambda: biases)
      result['router_state'] = state.value
    return result

  def __call__(
    self, tokens_BT: jax.Array, segments_BT: jax.Array | None = None
  ) -> Output:
    """Hidden states for every position and head.

    Args:
      tokens_BT: int32.
      segments_BT: int32, the document of each token in its row, 0 for padding
        at the end of a row; None: one document.
    """
    if segments_BT is None:
      segments_BT = jnp.ones_like(tokens_BT)
    embeddings_BTD = embedding.lookup(self.embed, tokens_BT, self.dtype)
    args = self._layer_args(segments_BT)
    hidden_BTD, stats = self._encode(embeddings_BTD, args)
    mtp_hidden, stats['mtp'] = self._predict_ahead(
      hidden_BTD, embeddings_BTD, segments_BT, args
    )
    stats = {k: s for k, s in stats.items() if jax.tree.leaves(s)}
    return Output(hidden_BTD, mtp_hidden, stats)

  def run_layer(
    self,
    name: str,
    variables: Any,
    x_BTD: jax.Array,
    segments_BT: jax.Array,
  ) -> tuple[jax.Array, Any]:
    """One layer of the stack `name`, on its own; needs no bound variables.

    For a pipeline, whose stages are made of such; see `stack.apply_stacked`.
    """
    apply = stack.rematerialised(self._layers()[name][0].apply, self.remat)
    return apply(variables, x_BTD, *self._layer_args(segments_BT))

  def finish(
    self, x_BTD: jax.Array, tokens_BT: jax.Array, segments_BT: jax.Array
  ) -> Output:
    """What follows the last layer: the final norm and MTP.

    It needs no variables of `dense_layers` and `moe_layers`, and gives no
    statistics of them.
    """
    hidden_BTD = norms.rms_norm(x_BTD, self.norm, self.config.norm_eps)
    embeddings_BTD = embedding.lookup(self.embed, tokens_BT, self.dtype)
    args = self._layer_args(segments_BT)
    mtp_hidden, stats = self._predict_ahead(
      hidden_BTD, embeddings_BTD, segments_BT, args
    )
    stats = {'mtp': stats} if jax.tree.leaves(stats) else {}
    return Output(hidden_BTD, mtp_hidden, stats)

  def encode(
    self, tokens_BT: jax.Array, segments_BT: jax.Array | None = None
  ) -> jax.Array:
    """The main model alone: `Output.hidden_BTD`."""
    if segments_BT is None:
      segments_BT = jnp.ones_like(tokens_BT)
    embeddings_BTD = embedding.lookup(self.embed, tokens_BT, self.dtype)
    return self._encode(embeddings_BTD, self._layer_args(segments_BT))[0]

  def unembed(self, hidden: jax.Array) -> jax.Array:
    """Float32 logits [..., V] of hidden states [..., D], for inference."""
    chosen = dispatch.requested(self.precision.kernels)
    how = {'transposed': True, 'dtype': jnp.float32, 'implementation': chosen}
    return few_rows.multiply(hidden, self._head(), **how)

  def logits(
    self, tokens_BT: jax.Array, segments_BT: jax.Array | None = None
  ) -> jax.Array:
    """The main head's float32 logits [B, T, V].

    Training never makes them: see `losses.cross_entropy`.
    """
    return losses.logits(self.encode(tokens_BT, segments_BT), self._head())

  def _head(self):
    head = self.embed if self.config.tie_embeddings else self.head
    return head.astype(self.dtype)

  def extend(
    self,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    mask_BT: jax.Array,
    caches: Sequence[Any],
    prefill: bool = False,
  ) -> tuple[jax.Array, tuple[Any, ...], jax.Array | None]:
    """The main model on new tokens, after those in the caches of its layers.

    Layers are unrolled: a loop over stacked parameters copies each layer's on
    every pass, and their matrices are nearly all that a decoded token reads.
    So the stacks are best given as lists of layers: `inference/weights.py`.

    Args:
      tokens_BT: int32.
      positions_BT: int32, where they lie.
      mask_BT: float32, 0 for what is not counted in the load.
      caches: one per layer; see `MLA` and `GQA`.
      prefill: likewise.

    Returns:
      `Output.hidden_BTD`; the caches; float32 tokens per MoE layer and expert,
      [layers, E], None without an MoE layer.
    """
    x_BTD = embedding.lookup(self.embed, tokens_BT, self.dtype)
    layers, counts, new_caches = self._layers(), [], []
    for name in ('dense_layers', 'moe_layers'):
      layer, count = layers[name]
      for i in range(count):
        x_BTD, stats, cache = layer.apply(
          self._one(name, i),
          x_BTD,
          positions_BT,
          None,
          mask_BT,
          caches[len(new_caches)],
          prefill,
        )
        new_caches.append(cache)
        counts += [stats.counts_E] if stats else []
    hidden_BTD = norms.rms_norm(x_BTD, self.norm, self.config.norm_eps)
    load_LE = jnp.stack(counts) if counts else None
    return hidden_BTD, tuple(new_caches), load_LE

  def extend_ahead(
    self,
    depth: int,
    hidden_BTD: jax.Array,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    mask_BT: jax.Array,
    cache: Any,
    prefill: bool = False,
  ) -> tuple[jax.Array, Any, jax.Array | None]:
    """MTP module `depth`, from 1, on new tokens; the others as for `extend`.

    Args:
      depth: k.
      hidden_BTD: h^{k-1} at `positions_BT`.
      tokens_BT: t_{i+k} for position i.
      positions_BT: int32.
      mask_BT: float32, 0 for what is not counted in the load.
      cache: of this module.
      prefill: see `MLA`.

    Returns:
      h^k; the cache; float32 tokens per expert, [E], None without experts.
    """
    embeddings_BTD = embedding.lookup(self.embed, tokens_BT, self.dtype)
    hidden_BTD, stats, cache = self._layers()['mtp'][0].apply(
      self._one('mtp', depth - 1),
      hidden_BTD,
      embeddings_BTD,
      positions_BT,
      None,
      mask_BT,
      cache,
      prefill,
    )
    return hidden_BTD, cache, stats.counts_E if stats else None

  def _one(self, name: str, i: int) -> Any:
    """The collections of one layer, of stacked arrays or lists of layers."""
    return {
      collection: stacked[i]
      if isinstance(stacked, (list, tuple))
      else jax.tree.map(lambda v: v[i], stacked)
      for collection, stacked in self.stacks[name].items()
    }

  def _collector(self, name: str) -> Callable[[Any], Any] | None:
    return self.collect and functools.partial(self.collect, name)

  def _layer_args(self, segments_BT):
    """(positions, segments for attention, padding mask) of every layer."""
    positions_BT = jnp.broadcast_to(
      jnp.arange(segments_BT.shape[1], dtype=jnp.int32), segments_BT.shape
    )
    mask_BT = (segments_BT > 0).astype(jnp.float32)
    return positions_BT, segments_BT if self.mask_documents else None, mask_BT

  def _encode(self, x_BTD, args):
    """All layers and the final norm; the statistics of each stack."""
    layers, stats = self._layers(), {}
    for name in ('dense_layers', 'moe_layers'):
      if name in self.stacks:
        x_BTD, stats[name] = stack.apply_stacked(
          layers[name][0],
          self.stacks[name],
          x_BTD,
          *args,
          remat=self.remat,
          scan=self.scan_layers,
          collect=self._collector(name),
          parts=1 if name == 'dense_layers' else self._parts,
        )
    return norms.rms_norm(x_BTD, self.norm, self.config.norm_eps), stats

  def _predict_ahead(self, hidden_BTD, embeddings_BTD, segments_BT, args):
    """Every MTP depth in turn: its head inputs and stacked statistics."""
    positions_BT, attention_segments, _ = args
    outputs, stats = [], []
    for k in range(1, self.config.n_mtp_layers + 1):
      variables = jax.tree.map(lambda v: v[k - 1], self.stacks['mtp'])  # noqa: B023
      mask_BT = mtp_mask(segments_BT, k)
      module = self._layers()['mtp'][0]
      apply = stack.rematerialised(
        module.apply,
        self.remat,
        collect=self._collector('mtp'),
        parts=self._parts,
        streams=2,
      )
      hidden_BTD, s = apply(
        variables,
        hidden_BTD,
        shift(embeddings_BTD, k),
        positions_BT,
        attention_segments,
        mask_BT,
      )
      outputs.append(hidden_BTD)
      stats.append(s)
    stats = jax.tree.map(lambda *s: jnp.stack(s), *stats) if stats else None
    return tuple(outputs), stats


def shift(x_BT: jax.Array, k: int) -> jax.Array:
  """Position i holds what was at i + k; zeros at the end."""
  widths = [(0, 0), (0, k)] + [(0, 0)] * (x_BT.ndim - 2)
  return jnp.pad(x_BT, widths)[:, k:]  # In this order also for k above T.


def mtp_mask(segments_BT: jax.Array, k: int) -> jax.Array:
  """1.0 where position i + k exists and belongs to the document of i."""
  same = segments_BT == shift(segments_BT, k)
  return (same & (segments_BT > 0)).astype(jnp.float32)
