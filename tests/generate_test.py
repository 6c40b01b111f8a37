"""Plain decoding against the model itself, one token at a time."""

import jax
import numpy as np
import pytest

from deepseek_jax import config as config_lib
from deepseek_jax import presets
from deepseek_jax.inference import generate
from deepseek_jax.training import step as step_lib

_PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5]]
_NEW = 6


@pytest.fixture(scope='module')
def trained():
  """One dense layer whose random weights are large: it prefers some token."""
  config = config_lib.replace(
    presets.tiny(),
    {
      'model.n_layers': 1,
      'model.n_mtp_layers': 0,
      'model.moe.n_routed_experts': 0,
      'model.init_std': 0.3,
    },
  )
  model = step_lib.build_model(config)
  return model, step_lib.init_variables(model, 0)


@pytest.fixture(scope='module')
def greedy(trained):
  return generate.generate(*trained, _PROMPTS, _NEW)


def test_greedy_is_the_argmax_of_the_text_so_far(trained, greedy):
  model, variables = trained
  texts = np.zeros((len(_PROMPTS), 5 + _NEW), np.int32)
  for text, prompt, output in zip(texts, _PROMPTS, greedy):
    text[: len(prompt) + _NEW] = prompt + output
  # Causal: one pass over the whole text shows what each prefix would say.
  logits = jax.jit(lambda t: model.apply(variables, t, method='logits'))(texts)
  for row, prompt, output in zip(logits.argmax(-1), _PROMPTS, greedy):
    assert output == row[len(prompt) - 1 :][:_NEW].tolist()
  assert len({tuple(output) for output in greedy}) == len(_PROMPTS)


def test_a_prompt_does_not_see_the_others(trained, greedy):
  # As many and as long as before, so that nothing is compiled again.
  for i, prompt in enumerate(_PROMPTS):
    others = [prompt, [3, 1, 4, 1, 5], [9, 2]]
    assert generate.generate(*trained, others, _NEW)[0] == greedy[i]


def test_ends_before_the_stop_token(trained, greedy):
  stop = greedy[0][2]
  outputs = generate.generate(*trained, _PROMPTS, _NEW, stop_id=stop)
  for output, full in zip(outputs, greedy):
    end = full.index(stop) if stop in full else _NEW
    assert output == full[:end]
  assert len(outputs[0]) < _NEW


def test_a_seed_is_a_text(trained, greedy):
  def draw(seed, temperature):
    return generate.generate(
      *trained, _PROMPTS, _NEW, temperature=temperature, seed=seed
    )

  assert draw(0, 1.0) == draw(0, 1.0)
  assert draw(0, 1.0) != draw(1, 1.0)
  assert draw(0, 1e-6) == greedy  # The limit of a low temperature.
  drawn = np.concatenate(draw(0, 1e6))
  assert len(set(drawn.tolist())) > 12  # Of 18 tokens, nearly uniform.


@pytest.mark.parametrize(
  'prompts, message',
  [
    ([[1], []], r'prompts\[1\] is empty'),
    ([[1, 512]], r'prompts\[0\] has a token outside \[0, vocab_size=512\)'),
    ([[-1]], 'outside'),
  ],
)
def test_mistakes(trained, prompts, message):
  with pytest.raises(ValueError, match=message):
    generate.generate(*trained, prompts, _NEW)


def test_sampling_follows_the_probabilities():
  logits = np.log(np.array([[0.1, 0.2, 0.7]], np.float32)).repeat(20_000, 0)
  drawn = generate.sample_token(logits, 1.0, jax.random.key(0))
  shares = np.bincount(np.asarray(drawn), minlength=3) / len(drawn)
  # Three standard deviations of a share are 0.01.
  np.testing.assert_allclose(shares, [0.1, 0.2, 0.7], atol=0.01)
  cold = generate.sample_token(logits, 0.0, jax.random.key(0))
  assert (np.asarray(cold) == 2).all()
