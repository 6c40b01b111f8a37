"""One two-way table of tensor names: ours, Hugging Face's, DeepSeek's own.

A `Tensor` is one tensor of a released checkpoint.  Here, layers and experts
are stacked, `leaf` is the path in the tree of variables and `index` the place
in the stack.  Released matrices are [out, in]; ours are [in, out] with the
heads split out of `in` (wo) or `out` (wq, wq_b, wkv_b): either way our array
is the transposed one in another shape.  RoPE pairs are interleaved in all
three, so that nothing is permuted.

`model.layers.<n_layers + k>` is MTP depth k + 1 in Hugging Face's layout
(README_WEIGHTS.md of DeepSeek-V3); the official inference repository has none.
"""

import dataclasses
import functools
from collections.abc import Container, Iterator
from typing import NamedTuple

import numpy as np

from deepseek_jax.config import ModelConfig

BLOCK = 128  # Rows and columns of a weight that share one FP8 scale.
SCALE = '_scale_inv'  # Hugging Face's ending of the name of the scales.


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor of a released checkpoint.

  Attributes:
    name: Hugging Face's.
    official: the official inference repository's; '' if it has no such tensor.
    shape: as released, [out, in] for a matrix.
    leaf: path in our variables, with the collection first; () for a copy.
    index: (layer,) or (layer, expert) within the leaf, or ().
    shape_jax: of one slice of the leaf.
    split: axis of `shape` that the official repository splits over its ranks;
      -1: none.  Experts are dealt out whole.
    is_linear: one of the matrices that are FP8 in DeepSeek-V3.
    copy_of: of an MTP layer's own embedding or head: the main one's name.
  """

  name: str
  official: str
  shape: tuple[int, ...]
  leaf: tuple[str, ...]
  index: tuple[int, ...] = ()
  shape_jax: tuple[int, ...] = ()
  split: int = -1
  is_linear: bool = False
  copy_of: str = ''

  @property
  def is_transposed(self) -> bool:
    """Whether our slice is the transposed matrix."""
    return len(self.shape) == 2 and len(self.leaf) > 2

  @property
  def leaf_shape(self) -> tuple[int, ...]:
    """Shape of the leaf, if this is the last tensor in it."""
    return (*(i + 1 for i in self.index), *self.shape_jax)

  @functools.cached_property
  def scale(self) -> 'Tensor':
    """The tensor of this matrix's FP8 block scales, float32.

    Ours are [in, out] without heads: a block may lie across two of them.
    """
    shape = tuple(-(-n // BLOCK) for n in self.shape)
    return dataclasses.replace(
      self,
      name=self.name + SCALE,
      official=self.official.removesuffix('weight') + 'scale',
      shape=shape,
      leaf=('scales', *self.leaf[1:]),
      shape_jax=shape[::-1],
      is_linear=False,
    )

  def to_jax(self, array: np.ndarray) -> np.ndarray:
    """A slice of our leaf from the released array; a view if it can be one."""
    array = array.T if self.is_transposed else array
    return array.reshape(self.shape_jax)

  def from_jax(self, array: np.ndarray) -> np.ndarray:
    """The released array from a slice of our leaf: the inverse of `to_jax`."""
    shape = self.shape[::-1] if self.is_transposed else self.shape
    array = array.reshape(shape)
    return array.T if self.is_transposed else array


def with_scales(
  config: ModelConfig, present: Container[str]
) -> Iterator[Tensor]:
  """`tensors`, and behind each matrix its scales if `present` has them."""
  for tensor in tensors(config):
    yield tensor
    if tensor.is_linear and tensor.scale.name in present:
      yield tensor.scale


def last_of_leaves(
  config: ModelConfig, present: Container[str]
) -> dict[tuple[str, ...], Tensor]:
  """Leaf -> its last tensor, whose `leaf_shape` is the stacked shape."""
  return {t.leaf: t for t in with_scales(config, present) if not t.copy_of}


def absent_leaves(
  config: ModelConfig,
) -> dict[tuple[str, ...], tuple[int, ...]]:
  """Our leaves that no released tensor fills, with their shapes: zeros.

  The router's biases of a softmax gate, which V2 does not have.
  """
  moe, leaves = config.moe, {}
  if moe.score_func == 'softmax':
    shapes = (
      (('moe_layers',), config.n_moe_layers),
      (
        ('mtp', 'block'),
        config.n_mtp_layers,
      ),
    )
    for path, count in shapes:
      if count:
        leaf = ('router_state', *path, 'ffn', 'bias')
        leaves[leaf] = (count, moe.n_routed_experts)
  return leaves


class _Row(NamedTuple):
  """A tensor within a layer: ours, both foreign names, shape, split axis."""

  path: str
  name: str
  official: str
  shape: tuple[int, ...]
  split: int = -1
  is_linear: bool = False
  heads: tuple[int, ...] = ()  # Our shape, where it is not just transposed.


@functools.lru_cache(maxsize=2)  # 46,183 for V3, which many steps go through.
def tensors(config: ModelConfig) -> tuple[Tensor, ...]:
  """Every tensor of a released checkpoint but FP8 scales, in layer order."""
  return tuple(_tensors(config))


def _tensors(c: ModelConfig) -> Iterator[Tensor]:
  shape = (c.vocab_size, c.dim)
  embed, head, norm = (
    'model.embed_tokens.weight',
    'lm_head.weight',
    'model.norm.weight',
  )
  yield _top(embed, 'embed.weight', shape, 'embed', split=0)
  for i in range(c.n_layers):
    is_moe = i >= c.n_first_dense
    yield from _layer(
      _block(c, is_moe),
      f'layers.{i}.',
      i,
      'moe_layers' if is_moe else 'dense_layers',
      i - c.n_first_dense if is_moe else i,
    )
  yield _top(norm, 'norm.weight', (c.dim,), 'norm')
  if not c.tie_embeddings:
    yield _top(head, 'head.weight', shape, 'head', split=0)
  for k in range(c.n_mtp_layers):
    number = c.n_layers + k
    block = (r._replace(path=f'block.{r.path}') for r in _block(c, True))
    yield from _layer([*_mtp(c), *block], '', number, 'mtp', k)
    prefix = f'model.layers.{number}.'
    main_head = embed if c.tie_embeddings else head
    yield Tensor(prefix + 'embed_tokens.weight', '', shape, (), copy_of=embed)
    yield Tensor(
      prefix + 'shared_head.head.weight', '', shape, (), copy_of=main_head
    )


def _top(name, official, shape, path, split=-1):
  return Tensor(
    name, official, shape, ('params', path), shape_jax=shape, split=split
  )


def _layer(rows, official, number, stack, layer):
  """The tensors of one layer; a name with {e} is one per expert.

  `official` is its prefix, '' for layers that the official repository lacks.
  """
  for row in rows:
    collection = 'router_state' if row.path.endswith('ffn.bias') else 'params'
    leaf = (collection, stack, *row.path.split('.'))
    n_experts = row.heads[0] if '{e}' in row.name else None
    shape_jax = row.shape[::-1] if n_experts else row.heads or row.shape[::-1]
    for e in [None] if n_experts is None else range(n_experts):
      yield Tensor(
        f'model.layers.{number}.{row.name.format(e=e)}',
        official and official + row.official.format(e=e),
        row.shape,
        leaf,
        (layer,) if e is None else (layer, e),
        shape_jax,
        row.split,
        row.is_linear,
      )


def _block(c: ModelConfig, is_moe: bool) -> list[_Row]:
  attn = _attention(c)
  if not is_moe:
    return [*attn, *_mlp('ffn.', 'mlp.', 'ffn.', c.dim, c.inter_dim)]
  moe, E = c.moe, c.moe.n_routed_experts
  rows = [
    *attn,
    _Row('ffn.gate', 'mlp.gate.weight', 'ffn.gate.weight', (E, c.dim)),
  ]
  if moe.score_func == 'sigmoid':
    name = 'mlp.gate.e_score_correction_bias'
    rows.append(_Row('ffn.bias', name, 'ffn.gate.bias', (E,)))
  experts = _mlp(
    'ffn.', 'mlp.experts.{e}.', 'ffn.experts.{e}.', c.dim, moe.moe_inter_dim
  )
  rows += [r._replace(split=-1, heads=(E,)) for r in experts]
  if moe.n_shared_experts:
    inter_dim = moe.n_shared_experts * moe.moe_inter_dim
    rows += _mlp(
      'ffn.shared.',
      'mlp.shared_experts.',
      'ffn.shared_experts.',
      c.dim,
      inter_dim,
    )
  return rows


def _attention(c: ModelConfig) -> list[_Row]:
  mla, D, N = c.mla, c.dim, c.n_heads
  C, head = mla.kv_lora_rank, mla.qk_nope_head_dim + mla.qk_rope_head_dim
  kv, U = mla.qk_nope_head_dim + mla.v_head_dim, mla.v_head_dim

  def linear(path, name, shape, split=-1, heads=()):
    return _Row(
      f'attn.{path}',
      f'self_attn.{name}.weight',
      f'attn.{path}.weight',
      shape,
      split,
      True,
      heads,
    )

  def norm(path, name, official, width):
    return _Row(path, f'{name}.weight', f'{official}.weight', (width,))

  Q = mla.q_lora_rank
  if Q:
    queries = [
      linear('wq_a', 'q_a_proj', (Q, D)),
      norm('attn.q_norm', 'self_attn.q_a_layernorm', 'attn.q_norm', Q),
      linear('wq_b', 'q_b_proj', (N * head, Q), 0, (Q, N, head)),
    ]
  else:
    queries = [linear('wq', 'q_proj', (N * head, D), 0, (D, N, head))]
  return [
    norm('attn_norm', 'input_layernorm', 'attn_norm', D),
    *queries,
    linear('wkv_a', 'kv_a_proj_with_mqa', (C + mla.qk_rope_head_dim, D)),
    norm('attn.kv_norm', 'self_attn.kv_a_layernorm', 'attn.kv_norm', C),
    linear('wkv_b', 'kv_b_proj', (N * kv, C), 0, (C, N, kv)),
    linear('wo', 'o_proj', (D, N * U), 1, (N, U, D)),
    norm('ffn_norm', 'post_attention_layernorm', 'ffn_norm', D),
  ]


def _mlp(path, name, official, D, F) -> list[_Row]:
  def linear(w, proj, shape, split):
    return _Row(
      path + w,
      f'{name}{proj}.weight',
      f'{official}{w}.weight',
      shape,
      split,
      True,
    )

  return [
    linear('w1', 'gate_proj', (F, D), 0),
    linear('w2', 'down_proj', (D, F), 1),
    linear('w3', 'up_proj', (F, D), 0),
  ]


def _mtp(c: ModelConfig) -> list[_Row]:
  D = c.dim
  return [
    _Row('enorm', 'enorm.weight', '', (D,)),
    _Row('hnorm', 'hnorm.weight', '', (D,)),
    _Row('eh_proj', 'eh_proj.weight', '', (D, 2 * D)),
    _Row('norm', 'shared_head.norm.weight', '', (D,)),
  ]
