"""Prompts as Jinja: what the folder of a result needs, so that plain transformers makes the prompts of training.

The functions of `data.templates` say what a prompt is; here is each of them as a chat template of transformers. A
model's own chat template is kept, with additions for what the spec sets. `data.saved_prompt` compares the tokens.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from itertools import product
from typing import Any

from betakd_ray.data.templates import VICUNA_SYSTEM

_MACROS = """\
{%- macro marks(content, mark) -%}
{%- if content is string -%}{{- mark * content.count(IMAGE) -}}
{%- else -%}{%- for part in content if part['type'] == 'image' -%}{{- mark -}}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- macro words(content) -%}
{%- if content is string -%}{{- content.replace(IMAGE, '') -}}
{%- else -%}{%- for part in content if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""
"""Macros that give a message's images and its text, whether it is a string or a list of parts."""
_VICUNA = """\
{%- if messages[0]['role'] == 'system' -%}
{%- set system = words(messages[0]['content']) -%}{%- set messages = messages[1:] -%}
{%- else -%}{%- set system = SYSTEM -%}
{%- endif -%}
{{- BOS -}}
{%- if system -%}{{- system + ' ' -}}{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- 'USER: ' + marks(message['content'], IMAGE + '\\n') + (words(message['content']) | trim) -}}
{%- elif message['role'] == 'assistant' -%}
{{- ' ASSISTANT: ' + words(message['content']) + eos_token -}}
{%- else -%}{{- raise_exception('a ' + message['role'] + ' message is only possible as the first one') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ' ASSISTANT:' -}}{%- endif -%}
"""
_PLAIN = """\
{{- BOS -}}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{- marks(message['content'], IMAGE) -}}
{%- elif message['role'] == 'assistant' -%}{{- words(message['content']) + '\\n' -}}
{%- endif -%}
{%- endfor -%}
"""
_AS_TEXT = """\
{%- set changed = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set text = marks(message['content'], IMAGE + '\\n') + (words(message['content']) | trim) -%}
{%- set kept = message['content'] if message['content'] is string or message['role'] != 'user' else text -%}
{%- set kept = kept if kept is string else words(kept) -%}
{%- set changed.messages = changed.messages + [{'role': message['role'], 'content': kept}] -%}
{%- endfor -%}
{%- set messages = changed.messages %}"""
"""Addition for templates that take a message only as a string: they get images and text of a list of parts as one."""
_WITH_SYSTEM = """\
{%- if messages[0]['role'] != 'system' -%}
{%- set messages = [{'role': 'system', 'content': SYSTEM}] + messages -%}
{%- endif %}"""
_CLOSED = """\
{%- set closed = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set content = message['content'] -%}
{%- if message['role'] == 'assistant' -%}
{%- set text = content if content is string else content[-1]['text'] -%}
{%- set text = text.rstrip() + eos_token + text[text.rstrip() | length:] -%}
{%- set content = text if content is string else content[:-1] + [{'type': 'text', 'text': text}] -%}
{%- endif -%}
{%- set closed.messages = closed.messages + [{'role': message['role'], 'content': content}] -%}
{%- endfor -%}
{%- set messages = closed.messages %}"""
"""Addition for templates that do not close an answer: earlier ones get the end-of-sequence token of training."""
_CLOCK = re.compile(r"""\bstrftime_now\(\s*("[^"\\]*"|'[^'\\]*')\s*\)""")
"""Pattern of a call for today's date with a literal format."""


def literal(text: str) -> str:
    """Return a text as a string of Jinja, in ASCII."""
    escaped = text.encode("unicode_escape").decode("ascii").replace("'", "\\'")
    return f"'{escaped}'"


def with_arguments(own: str, arguments: Mapping[str, Any]) -> str:
    """Return a model's own chat template with values for what it reads beside the messages.

    They are those of training when a caller of `apply_chat_template` gives none.
    """
    given = (
        f"{{%- set {name} = {_value(value)} if {name} is not defined else {name} %}}"
        for name, value in arguments.items()
    )
    return "".join(given) + own


def _value(value: Any) -> str:
    """Return a value of YAML as Jinja writes it."""
    if isinstance(value, str):
        return literal(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{literal(str(key))}: {_value(each)}" for key, each in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(map(_value, value)) + "]"
    return str(value)  # numbers, True, False and None, which Jinja writes as Python does


def templates_of(name: str, system: str | None, image: str, beginnings: tuple[str, ...]) -> Iterator[str]:
    """Yield the forms of `vicuna_v1` or `plain` as a chat template: one for each text that may come first.

    `image` is the text of an image; `system` replaces the default system prompt.
    """
    source = _MACROS + {"vicuna_v1": _VICUNA, "plain": _PLAIN}[name]
    words = {"SYSTEM": VICUNA_SYSTEM if system is None else system, "IMAGE": image}
    for beginning in beginnings:
        yield _filled(source, words | {"BOS": beginning})


def additions_to(own: str, system: str | None, day: date, image: str, beginnings: tuple[str, ...]) -> Iterator[str]:
    """Yield forms of a model's own chat template, with more and more additions; the first is the template itself.

    An addition gives it the system prompt, the day as today's date, parts as one string, a first text or an end of each
    answer, or takes spaces away from the end of a prompt.
    """
    dated = _CLOCK.sub(lambda call: literal(day.strftime(call[1][1:-1])), own)
    systems: tuple[str, ...] = ("",)
    if system:
        of_parts = f"[{{'type': 'text', 'text': {literal(system)}}}]"
        # The last one is for a template that has no system prompt.
        systems = (*(_filled(_WITH_SYSTEM, {"SYSTEM": each}, quoted=False) for each in (of_parts, literal(system))), "")
    either = (False, True)
    for closes, as_text, is_cut, first, default in product(either, either, either, beginnings, systems):
        head = _filled(_MACROS + _AS_TEXT, {"IMAGE": image}) if as_text else ""
        begun = f"{{{{- {literal(first)} }}}}" if first else ""
        head = _CLOSED + head if closes else head
        yield head + default + begun + (_cut(dated) if is_cut else dated)


def _cut(source: str) -> str:
    """Return a template that writes a prompt without the spaces at its end, as the prompts of an evaluation are."""
    body = source.removesuffix("\n")
    return f"{{% set whole %}}{body}{{% endset %}}{{{{- whole.rstrip(' ') if add_generation_prompt else whole -}}}}"


def _filled(source: str, words: dict[str, str], *, quoted: bool = True) -> str:
    """Return a template with its names in capitals replaced by strings."""
    pattern = re.compile(rf"\b({'|'.join(words)})\b")
    return pattern.sub(lambda found: literal(words[found[0]]) if quoted else words[found[0]], source)
