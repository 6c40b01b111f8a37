"""Which layers a pipeline stage holds, and how many parameters that is."""

from typing import NamedTuple

from deepseek_jax.config import ModelConfig
from deepseek_jax.parallel.schedules import Schedule
from deepseek_jax.planner import parameters


class Stage(NamedTuple):
  """Layers of one stage of a pipeline, or of the whole model.

  Attributes:
    dense: layers with a dense FFN.
    moe: layers with experts.
    mtp: MTP modules.
    embeds: it begins with the embedding.
    heads: it ends with the output head.
  """

  dense: int
  moe: int
  mtp: int
  embeds: bool
  heads: bool


class Held(NamedTuple):
  """Parameters of a stage: those of routed experts, and all others."""

  routed: int
  other: int


def stages(model: ModelConfig, n: int) -> list[Stage]:
  """Cuts the model into `n` stages of equally many layers.

  Of unequal stages the first and the last are the smaller ones: they hold the
  embedding and the head as well.  MTP modules count as layers and are last.
  V3 in 16: three dense layers; 14 times four MoE layers; two and MTP.

  Raises:
    ValueError: if there are more stages than layers.
  """
  total = model.n_layers + model.n_mtp_layers
  size, extra = divmod(total, n)
  first = (n - extra) // 2
  sizes = [size + (first <= i < first + extra) for i in range(n)]
  sizes[-1] -= model.n_mtp_layers
  if min(sizes[:-1], default=1) < 1 or sizes[-1] < 0:
    raise ValueError(
      f'{n} stages are too many for model.n_layers={model.n_layers} and '
      f'{model.n_mtp_layers} of MTP, which are to be on the last stage: use '
      'fewer'
    )
  result, start = [], 0
  for i, count in enumerate(sizes):
    dense = min(max(model.n_first_dense - start, 0), count)
    last = i == n - 1
    mtp = model.n_mtp_layers if last else 0
    result.append(Stage(dense, count - dense, mtp, i == 0, last))
    start += count
  return result


def held(model: ModelConfig, hosted: list[Stage]) -> Held:
  """Parameters of one rank with these stages, before any sharding.

  Embedding and head exist once on a rank, also where MTP uses them too.
  """
  dense, moe, mtp = (sum(s[i] for s in hosted) for i in range(3))
  routed_layers = moe + (mtp if model.moe.n_routed_experts else 0)
  routed = routed_layers * parameters.routed_experts(model)
  heads = any(s.heads for s in hosted)
  embeds = any(s.embeds or s.mtp for s in hosted)
  tables = heads + embeds
  if model.tie_embeddings:
    tables = min(tables, 1)
  total = tables * parameters.embedding(model) + heads * model.dim
  total += dense * parameters.layer(model, is_moe=False)
  total += moe * parameters.layer(model, is_moe=True)
  if mtp:
    total += mtp * parameters.mtp(model) // model.n_mtp_layers
  return Held(routed, total - routed)


def hosted(
  model: ModelConfig, schedule: Schedule | None, rank: int
) -> dict[int, Stage]:
  """The stages of one rank of a pipeline, by its chunks.

  Without a pipeline, the whole model as chunk 0.
  """
  if schedule is None:
    return {0: stages(model, 1)[0]}
  cut = stages(model, schedule.stages)
  return {
    chunk: cut[stage]
    for (where, chunk), (_, stage) in schedule.places.items()
    if where == rank
  }
