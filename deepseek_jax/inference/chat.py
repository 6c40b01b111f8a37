"""Turns of a conversation as text: the chat template of a tokenizer."""

import json
import os
import pathlib
from collections.abc import Sequence


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


def render(
  template: str,
  messages: Sequence[dict[str, str]],
  bos_token: str = '',
  eos_token: str = '',
) -> str:
  """The text of a conversation, up to where the assistant's answer begins.

  Args:
    template: Jinja2, rendered in its sandbox with `transformers`' settings.
    messages: each with a 'role' (system, user, assistant) and a 'content'.
    bos_token: text of the tokenizer's own token.
    eos_token: likewise.

  Raises:
    ValueError: if the template refuses the messages, or is broken.
  """
  import jinja2
  from jinja2 import sandbox

  def refuse(message):
    raise jinja2.TemplateError(message)

  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True
  )
  environment.globals['raise_exception'] = refuse
  try:
    return environment.from_string(template).render(
      messages=list(messages),
      bos_token=bos_token,
      eos_token=eos_token,
      add_generation_prompt=True,
    )
  except jinja2.TemplateError as error:
    raise ValueError(f'chat template: {error}') from None


def _settings(folder: pathlib.Path) -> dict:
  path = folder / 'tokenizer_config.json'
  if not path.is_file():
    return {}
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except json.JSONDecodeError as error:
    raise ValueError(f'{path} is not JSON: {error}') from None
