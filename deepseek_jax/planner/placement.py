"""Which layers a pipeline stage holds, and how many parameters that is."""

from typing import NamedTuple

from deepseek_jax.config import Config, ModelConfig, stage_sizes
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


def stages(
  model: ModelConfig, n: int, sizes: tuple[int, ...] = ()
) -> list[Stage]:
  """Cuts the model into `n` stages, as a pipelined step does.

  Args:
    model: the architecture.
    n: stages.
    sizes: layers of each; none: see `config.stage_sizes`.  MTP modules are not
      counted: they are with the output head on the last.

  Raises:
    ValueError: the sizes do not fit.
  """
  result, start = [], 0
  for i, count in enumerate(stage_sizes(model.n_layers, n, sizes)):
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
  config: Config, schedule: Schedule | None, rank: int
) -> dict[int, Stage]:
  """The stages of one rank of a pipeline, by its chunks.

  Without a pipeline, the whole model as chunk 0.
  """
  if schedule is None:
    return {0: stages(config.model, 1)[0]}
  sizes = config.parallel.stage_sizes
  cut = stages(config.model, schedule.stages, sizes)
  return {
    chunk: cut[stage]
    for (where, chunk), (_, stage) in schedule.places.items()
    if where == rank
  }


def of_program(config: Config, schedule: Schedule) -> tuple[Stage, Stage]:
  """What one program for all ranks has room for: (on a rank, in a stage).

  Of each kind of layer as many as any rank, or any stage, has.  MTP, embedding
  and head are outside the stages.
  """
  ranks = range(schedule.ranks)
  own = [list(hosted(config, schedule, r).values()) for r in ranks]
  kinds = range(2)  # Of layers: dense and MoE.
  rank = [max(sum(s[k] for s in held) for held in own) for k in kinds]
  stage = [max(s[k] for held in own for s in held) for k in kinds]
  mtp = config.model.n_mtp_layers
  return Stage(*rank, mtp, True, True), Stage(*stage, 0, False, False)
