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
  specials = chat.load_specials(folder)
  assert specials == {
    'bos_token': tokenizer_lib.BOS, 'eos_token': tokenizer_lib.EOS
  }  # fmt: skip
  text = chat.render(chat.load_template(folder), _TURNS, specials)
  assert text == theirs.apply_chat_template(
    _TURNS, tokenize=False, add_generation_prompt=True
  )
  ours = tokenizer_lib.Tokenizer.load(folder / 'tokenizer.json')
  ids = ours.encode_marked(text)
  assert ids.tolist() == theirs(text, add_special_tokens=False)['input_ids']
  assert (ids == ours.bos_id).sum() == (ids == ours.eos_id).sum() == 1
  # In a document the same characters stay characters.
  assert not np.isin([ours.bos_id, ours.eos_id], ours.encode(text)).any()


@pytest.mark.parametrize(
  'template',
  [
    # R1's: what was thought is not said again.
    "{{bos_token}}{% for m in messages %}{{'<｜' + m['role'] + '｜>'}}"
    "{{m['content'].split('</think>')|last}}{% endfor %}<think>\n",
    # V3.1's: are there tools, are there documents?
    '{% if tools is not none %}{{ tools }}{% endif %}'
    '{% if not documents is none %}x{% endif %}{{ messages|length }}',
    '{% for m in messages %}{% if m.role == "assistant" %}{% continue %}'
    '{% endif %}{{ m.content }}{% if loop.index > 2 %}{% break %}{% endif %}'
    '{% endfor %}',
    '{{ messages|tojson }}{{ {"ü": "<b>&\'"}|tojson(indent=2) }}',
    "{{ strftime_now('%Y') }}{{ eos_token }}{{ unk_token }}{{ pad_token }}"
    '{% set ns = namespace(n=0) %}{% for m in messages %}'
    '{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}',
  ],
)
def test_templates_are_rendered_as_transformers_does(folder, template):
  theirs = transformers.PreTrainedTokenizerFast.from_pretrained(
    folder, unk_token='<unk>', pad_token='<pad>'
  )
  specials = chat.load_specials(folder) | {
    'unk_token': '<unk>', 'pad_token': '<pad>'
  }  # fmt: skip
  assert chat.render(template, _TURNS, specials) == theirs.apply_chat_template(
    _TURNS, chat_template=template, tokenize=False, add_generation_prompt=True
  )


def test_thoughts_are_shown_and_markup_is_not(folder, tmp_path):
  parts = json.loads((folder / 'tokenizer.json').read_text())
  names = ('<think>', '</think>', '<|EOT|>')
  start = 1 + max(parts['model']['vocab'].values())
  plain = dict.fromkeys(
    ('single_word', 'lstrip', 'rstrip', 'normalized'), False
  )
  parts['added_tokens'] += [
    {'id': start + i, 'content': name, 'special': name == '<|EOT|>', **plain}
    for i, name in enumerate(names)
  ]
  tokenizer_lib.Tokenizer(json.dumps(parts)).save(tmp_path / 'own.json')
  ours = tokenizer_lib.Tokenizer.load(tmp_path / 'own.json')
  text = '<think>Two.</think>4<|EOT|>' + tokenizer_lib.EOS
  ids = ours.encode_marked(text)
  assert {start, start + 1, start + 2, ours.eos_id} <= {*ids.tolist()}
  assert ours.decode(ids) == '<think>Two.</think>4'
  assert ours.decode(ids, skip_specials=False) == text
  # A document cannot think, or end itself.
  assert not {start, start + 1} & {*ours.encode(text).tolist()}


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
