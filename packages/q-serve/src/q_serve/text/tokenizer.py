"""The model's tokenizer, over the ``tokenizers`` library.

Special tokens in a user's text are text: ``<|im_end|>`` typed by a user never ends a turn. A plain prompt is encoded with special
tokens switched off. A chat is rendered by the model's template, which does write special tokens, so there the user's are told from the
template's by marks (:mod:`q_serve.text.chat_template`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as TokenizersTokenizer

from q_serve.errors import ModelError
from q_serve.json_file import read_json
from q_serve.text.chat_template import ChatTemplate, Message


class Tokenizer:
    """Encodes prompts and chats, decodes tokens. Its methods may be called from any thread.

    Attributes:
        vocab_size: token ids are below this, as far as the tokenizer knows.
        chat_template: the model's, or ``None``.
    """

    def __init__(self, tokenizer_json: str, *, chat_template: ChatTemplate | None) -> None:
        # One object a mode: ``encode_special_tokens`` is a property of the whole tokenizer, so switching it would race.
        self._parsing = TokenizersTokenizer.from_str(tokenizer_json)
        self._literal = TokenizersTokenizer.from_str(tokenizer_json)
        self._literal.encode_special_tokens = True
        for tokenizer in (self._parsing, self._literal):
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self.vocab_size: int = self._parsing.get_vocab_size(with_added_tokens=True)
        self.chat_template = chat_template
        special = [token.content for token in self._parsing.get_added_tokens_decoder().values() if token.special]
        self._special = sorted(filter(None, special), key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, self._special)) if self._special else r"(?!)")

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer:
        """Load tokenizer.json, and of tokenizer_config.json what chat templates need.

        Raises:
            ModelError: a file is missing or broken; the message names it.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{path}: missing; q-serve reads tokenizers in this format (save one with tokenizer.save_pretrained)")
        config_path = directory / "tokenizer_config.json"
        config = read_json(config_path) if config_path.is_file() else {}
        template = ChatTemplate.from_directory(directory, config)
        try:
            return cls(path.read_text(encoding="utf-8"), chat_template=template)
        except Exception as error:  # the library raises plain Exception
            raise ModelError(f"{path}: not a tokenizer ({error})") from error

    def encode(self, text: str) -> list[int]:
        """Encode a prompt, with the tokens the model expects around one (such as BOS)."""
        return list(self._literal.encode(text).ids)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Render a chat with the model's template and encode it, ready for the assistant's answer.

        Raises:
            ValueError: the model has no template, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError("this model has no chat template; use /v1/completions, or add one to its tokenizer_config.json")
        rendered = self.chat_template.render(messages, special_tokens=self._special)
        ids: list[int] = []
        start = 0
        for match in self._special_pattern.finditer(rendered.text):
            if match.start() in rendered.marks:
                ids += self._encode_rendered(rendered.text[start : match.start()])
                ids += self._literal.encode(match.group(), add_special_tokens=False).ids
                start = match.end()
        return ids + self._encode_rendered(rendered.text[start:])

    def decode(self, ids: Sequence[int]) -> str:
        """Decode tokens, without special ones."""
        text: str = self._parsing.decode(list(ids), skip_special_tokens=True)
        return text

    def _encode_rendered(self, text: str) -> list[int]:
        return list(self._parsing.encode(text, add_special_tokens=False).ids) if text else []


def stop_token_ids(directory: Path, config: dict[str, Any]) -> frozenset[int]:
    """The tokens that end a text: generation_config.json's ``eos_token_id``, else config.json's."""
    path = directory / "generation_config.json"
    source, value = directory / "config.json", config.get("eos_token_id")
    if path.is_file() and (found := read_json(path).get("eos_token_id")) is not None:
        source, value = path, found
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise ModelError(f"{source}: eos_token_id is {value!r}, expected a token id or a list of them")
    return frozenset(ids)
