"""Chat templates: the model's own Jinja template, in a sandbox, with the user's special tokens marked.

Before rendering, a mark (a character that occurs nowhere in the chat) is put before every special token in a message, and before an
end of a message that could become one together with what follows. After rendering, the marks are taken out and their places kept: a
special token at such a place came from a user, every other one from the template.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from q_serve.errors import ModelError

Message = Mapping[str, str]
"""A message of a chat: its role, content, and perhaps name."""

_MARKS = [chr(0xF0000 + i) for i in range(64)]
"""Characters of a private-use plane; one of them is in no chat, or the chat is refused."""


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A rendered chat, and the places where a special token is a user's text."""

    text: str
    marks: frozenset[int]


class ChatTemplate:
    """A model's chat template.

    Args:
        source: the Jinja template.
        variables: what the template may use besides the messages, such as ``bos_token``.
    """

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag], autoescape=False
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
        try:
            self._template = environment.from_string(source)
        except (TemplateError, RecursionError) as error:
            raise ModelError(f"the chat template is not valid Jinja ({error})") from error
        self._source = source
        self._variables = dict(variables)

    @classmethod
    def from_directory(cls, directory: Path, tokenizer_config: Mapping[str, Any]) -> ChatTemplate | None:
        """Load chat_template.jinja, else tokenizer_config.json's ``chat_template``; ``None`` if the model has neither."""
        path = directory / "chat_template.jinja"
        try:
            source: Any = path.read_text(encoding="utf-8") if path.is_file() else tokenizer_config.get("chat_template")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{path}: can't be read ({error})") from error
        if isinstance(source, list):  # several named ones
            source = next(
                (entry.get("template") for entry in source if isinstance(entry, dict) and entry.get("name") == "default"), None
            )
        if source is None:
            return None
        if not isinstance(source, str):
            raise ModelError(f"{directory / 'tokenizer_config.json'}: chat_template is a {type(source).__name__}, expected text")
        variables = {}
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            value = tokenizer_config.get(name)
            if isinstance(value, dict):
                value = value.get("content")
            if isinstance(value, str):
                variables[name] = value
        return cls(source, variables)

    def render(self, messages: Sequence[Message], *, special_tokens: Sequence[str]) -> RenderedChat:
        """Render a chat up to where the assistant's answer begins.

        Raises:
            ValueError: the template refuses the messages, or fails on them.
        """
        everything = self._source + "".join(value for message in messages for value in message.values())
        mark = next((character for character in _MARKS if character not in everything), None)
        if mark is None:
            raise ValueError("messages hold every one of the private-use characters U+F0000…U+F003F; leave one out")
        marked = [
            {key: value if key == "role" else _mark(value, special_tokens, mark) for key, value in message.items()}
            for message in messages
        ]
        try:
            text = self._template.render(messages=marked, add_generation_prompt=True, **self._variables)
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
            raise ValueError(f"the model's chat template refuses these messages: {error}".replace(mark, "")) from error
        parts = text.split(mark)
        places, length = [], 0
        for part in parts[:-1]:
            length += len(part)
            places.append(length)
        return RenderedChat("".join(parts), frozenset(places))


def _mark(text: str, special_tokens: Sequence[str], mark: str) -> str:
    """Put the mark before every special token of ``text``, and before what could become one at its end (trimmed or not)."""
    if not special_tokens:
        return text
    pattern = "|".join(map(re.escape, special_tokens))
    places = {match.start() for match in re.finditer(f"(?={pattern})", text)}
    longest = max(map(len, special_tokens))
    for end in {len(text), len(text.rstrip())}:
        for start in range(max(0, end - longest), end):
            if any(token.startswith(text[start:end]) for token in special_tokens):
                places.add(start)
    for place in sorted(places, reverse=True):
        text = text[:place] + mark + text[place:]
    return text


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


class _GenerationTag(Extension):
    """``{% generation %} … {% endgeneration %}`` marks what an assistant said, for training; here it is just its contents."""

    tags = {"generation"}  # noqa: RUF012  # declared so by jinja

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)
