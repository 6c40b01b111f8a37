"""Chat templates, rendered as `transformers` renders them."""

import json

import numpy as np
import pytest
import transformers

from deepseek_jax.data import tokenizer as tokenizer_lib
from deepseek_jax.inference import chat

_TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
  {%- if message['role'] == 'system' %}
{{ message['content'] }}
  {%- elif message['role'] == 'user' %}
    {{- '<｜User｜>' + message['content'] }}
  {%- elif message['role'] == 'assistant' %}
    {{- '<｜Assistant｜>' + message['content'] + eos_token }}
  {%- else %}
    {{- raise_exception('no such role: ' + message['role']) }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"""
_TURNS = [
  {'role': 'system', 'content': 'Be brief.'},
  {'role': 'user', 'content': 'Two and two?'},
  {'role': 'assistant', 'content': '4'},
  {'role': 'user', 'content': 'And <b>two</b>\n'},
]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('chat')
  tokenizer = tokenizer_lib.Tokenizer.train(['Two and two is 4. ' * 9], 300)
  tokenizer.save(path / 'tokenizer.json')
  settings = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'bos_token': tokenizer_lib.BOS,
    'eos_token': tokenizer_lib.EOS,
    'chat_template': _TEMPLATE,
  }
  (path / 'tokenizer_config.json').write_text(json.dumps(settings))
  return path


def test_text_and_tokens_are_those_of_transformers(folder):
  theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
  text = chat.render(
    chat.load_template(folder), _TURNS, tokenizer_lib.BOS, tokenizer_lib.EOS
  )
  assert text == theirs.apply_chat_template(
    _TURNS, tokenize=False, add_generation_prompt=True
  )
  ours = tokenizer_lib.Tokenizer.load(folder / 'tokenizer.json')
  ids = ours.encode_marked(text)
  assert ids.tolist() == theirs(text, add_special_tokens=False)['input_ids']
  assert (ids == ours.bos_id).sum() == (ids == ours.eos_id).sum() == 1
  # In a document the same characters stay characters.
  assert not np.isin([ours.bos_id, ours.eos_id], ours.encode(text)).any()


def test_where_a_template_is_found(folder, tmp_path):
  assert chat.load_template(tmp_path) == ''
  config = tmp_path / 'tokenizer_config.json'
  named = [
    {'name': 'tool', 'template': 'x'},
    {'name': 'default', 'template': 'y'},
  ]
  config.write_text(json.dumps({'chat_template': named}))
  assert chat.load_template(tmp_path) == 'y'
  (tmp_path / 'chat_template.jinja').write_text('z')
  assert chat.load_template(tmp_path) == 'z'
  assert chat.load_template(folder) == _TEMPLATE


@pytest.mark.parametrize(
  'template, message',
  [
    (_TEMPLATE, 'chat template: no such role: narrator'),
    ('{% if %}', 'chat template: '),
    ("{{ ''.__class__.__mro__ }}{{ messages.clear() }}", 'chat template: '),
  ],
)
def test_a_template_that_refuses_or_is_broken(template, message):
  with pytest.raises(ValueError, match=message):
    chat.render(template, [{'role': 'narrator', 'content': ''}])


def test_bad_settings(tmp_path):
  (tmp_path / 'tokenizer_config.json').write_text('{')
  with pytest.raises(ValueError, match='tokenizer_config.json is not JSON'):
    chat.load_template(tmp_path)
