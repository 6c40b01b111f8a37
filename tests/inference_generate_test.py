"""Plain generation against the model itself, one token at a time."""

import jax
import numpy as np
import pytest

from deepseek_jax import config as config_lib
from deepseek_jax import presets
from deepseek_jax.inference import decode, generate, load_balance, weights
from deepseek_jax.training import step as step_lib

_PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5]]
_NEW = 6


@pytest.fixture(scope='module')
def trained():
  """Two layers whose random weights are large: it prefers some token.

  Texts soon leave YaRN's original context.
  """
  config = config_lib.replace(
    presets.tiny(),
    {
      'model.n_layers': 2,
      'model.n_mtp_layers': 0,
      'model.init_std': 0.3,
      'model.rope.factor': 4.0,
      'model.rope.original_seq_len': 4,
    },
  )
  model = step_lib.build_model(config)
  return model, weights.unstack(model, step_lib.init_variables(model, 0))


@pytest.fixture(scope='module')
def greedy(trained):
  return generate.generate(*trained, _PROMPTS, _NEW).tokens


def test_greedy_is_the_argmax_of_the_text_so_far(trained, greedy):
  model, _ = trained
  variables = step_lib.init_variables(model, 0)
  texts = np.zeros((len(_PROMPTS), 5 + _NEW), np.int32)
  for text, prompt, output in zip(texts, _PROMPTS, greedy):
    text[: len(prompt) + _NEW] = prompt + output
  # Causal: one pass over the whole text shows what each prefix would say.
  logits = jax.jit(lambda t: model.apply(variables, t, method='logits'))(texts)
  for row, prompt, output in zip(logits.argmax(-1), _PROMPTS, greedy):
    assert output == row[len(prompt) - 1 :][:_NEW].tolist()
  assert len({tuple(output) for output in greedy}) == len(_PROMPTS)


def test_a_prompt_does_not_see_the_others(trained, greedy):
  # As many as before, so that nothing is compiled again.
  for i, prompt in enumerate(_PROMPTS):
    others = [prompt, [3, 1, 4, 1, 5], [9, 2]]
    assert generate.generate(*trained, others, _NEW).tokens[0] == greedy[i]


def test_chunks_of_the_prompt_do_not_matter(trained, greedy):
  assert generate.generate(*trained, _PROMPTS, _NEW, chunk=2).tokens == greedy


def test_ends_before_a_stop_token(trained, greedy):
  stops = [greedy[0][2], greedy[1][0]]
  result = generate.generate(*trained, _PROMPTS, _NEW, stop_ids=stops)
  for output, full in zip(result.tokens, greedy):
    ends = [full.index(stop) for stop in stops if stop in full]
    assert output == full[: min([*ends, _NEW])]
  assert result.tokens[1] == [] and len(result.tokens[0]) < _NEW


def test_streams_what_it_returns_without_compiling_as_lengths_grow(trained):
  programs = decode.decode._cache_size()
  for n_new in (40, 17, 1):
    parts = []
    result = generate.generate(
      *trained, _PROMPTS, n_new, on_tokens=parts.append
    )
    joined = [sum((part[i] for part in parts), []) for i in range(3)]
    assert joined == result.tokens
    assert [len(tokens) for tokens in joined] == [n_new] * 3
    assert len(parts) == 1 + -(-(n_new - 1) // 16)
    assert result.passes == 3 * (n_new - 1)
  # Up to the 64 positions of one cache, the one that `greedy` compiled or not.
  assert decode.decode._cache_size() <= programs + 1


def test_counts_the_load_of_every_expert_for_eplb(trained):
  moe = trained[0].config.moe
  result = generate.generate(*trained, _PROMPTS, _NEW)
  # The last token of each text is never an input.
  inputs = sum(map(len, _PROMPTS)) + 3 * (_NEW - 1)
  np.testing.assert_array_equal(
    result.load_LE.sum(1), [inputs * moe.n_activated_experts]
  )
  load_balance.place(result.load_LE, 12, moe.n_expert_groups, 2, 4)


def test_a_seed_is_a_text(trained, greedy):
  def draw(seed, temperature, **filters):
    return generate.generate(
      *trained, _PROMPTS, _NEW, temperature=temperature, seed=seed, **filters
    ).tokens

  assert draw(0, 1.0) == draw(0, 1.0)
  assert draw(0, 1.0) != draw(1, 1.0) != draw(2**32 - 1, 1.0)
  assert draw(0, 1e-6) == greedy  # The limit of a low temperature.
  assert draw(0, 5.0, top_k=1) == greedy
  assert draw(3, 5.0, top_p=1e-6) == greedy
  drawn = np.concatenate(draw(0, 1e6))
  assert len(set(drawn.tolist())) > 12  # Of 18 tokens, nearly uniform.


@pytest.mark.parametrize(
  'prompts, options, message',
  [
    ([], {}, 'prompts is empty'),
    ([[1], []], {}, r'prompts\[1\] is empty'),
    ([[1, 512]], {}, r'prompts\[0\] has a token outside \[0, vocab_size=512\)'),
    ([[-1]], {}, 'outside'),
    ([[1]], {'max_new_tokens': 0}, 'max_new_tokens=0'),
    ([[1]], {'drafts': 1}, 'drafts=1 with model.n_mtp_layers=0'),
    ([[1]], {'chunk': -1}, 'chunk=-1'),
    ([[1]], {'temperature': -1}, 'temperature=-1'),
  ],
)
def test_mistakes(trained, prompts, options, message):
  with pytest.raises(ValueError, match=message):
    generate.generate(*trained, prompts, **{'max_new_tokens': 1} | options)
