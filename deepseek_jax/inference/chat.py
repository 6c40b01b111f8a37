"""Turns of a conversation as text: the chat template of a tokenizer."""

import datetime
import json
import os
import pathlib
from collections.abc import Mapping, Sequence


def load_template(folder: str | os.PathLike) -> str:
  """The template beside a tokenizer, or '' when it has none.

  Read as `transformers` does: chat_template.jinja, else `chat_template` in
  tokenizer_config.json, the one named 'default' of several.

  Raises:
    ValueError: if tokenizer_config.json is no JSON.
  """
  folder = pathlib.Path(folder)
  own = folder / 'chat_template.jinja'
  if own.is_file():
    return own.read_text(encoding='utf-8')
  template = _settings(folder).get('chat_template') or ''
  if isinstance(template, list):
    named = {entry['name']: entry['template'] for entry in template}
    template = named.get('default', '')
  return template


def load_specials(folder: str | os.PathLike) -> dict[str, str]:
  """The texts of `bos_token` and the like in tokenizer_config.json.

  Raises:
    ValueError: if that is no JSON.
  """
  found = {}
  for name, token in _settings(pathlib.Path(folder)).items():
    token = token.get('content') if isinstance(token, dict) else token
    if name.endswith('_token') and isinstance(token, str):
      found[name] = token
  return found


def render(
  template: str,
  messages: Sequence[dict[str, str]],
  specials: Mapping[str, str] | None = None,
) -> str:
  """The text of a conversation, up to where the assistant's answer begins.

  Args:
    template: Jinja2, rendered in its sandbox with `transformers`' settings,
      filters and functions; of tools and documents it sees that there are none.
    messages: each with a 'role' (system, user, assistant) and a 'content'.
    specials: texts of the tokenizer's own tokens, such as 'bos_token'.

  Raises:
    ValueError: if the template refuses the messages, or is broken.
  """
  import jinja2
  from jinja2 import sandbox

  def refuse(message):
    raise jinja2.TemplateError(message)

  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=['jinja2.ext.loopcontrols'],
  )
  environment.filters['tojson'] = _to_json
  environment.globals['raise_exception'] = refuse
  environment.globals['strftime_now'] = _now
  try:
    return environment.from_string(template).render(
      messages=list(messages),
      tools=None,
      documents=None,
      add_generation_prompt=True,
      **(specials or {}),
    )
  except jinja2.TemplateError as error:
    raise ValueError(f'chat template: {error}') from None


def _to_json(
  x, ensure_ascii=False, indent=None, separators=None, sort_keys=False
):
  """Jinja2's own filter escapes HTML."""
  return json.dumps(
    x,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )


def _now(form):
  return datetime.datetime.now().strftime(form)


def _settings(folder: pathlib.Path) -> dict:
  path = folder / 'tokenizer_config.json'
  if not path.is_file():
    return {}
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except json.JSONDecodeError as error:
    raise ValueError(f'{path} is not JSON: {error}') from None
