"""Text from tokens as they come: never half a character, never a piece of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_CONTEXT = 6
"""Tokens of the prompt that are decoded along, so that the first new token is decoded as in the middle of a text."""

_REPLACEMENT = "�"

_MAX_REPLACEMENTS = 8
"""A character has at most four bytes; a longer run of replacement characters is not the beginning of one."""


class Detokenizer:
    """Decodes one request's tokens.

    A tokenizer's decoder depends on the neighbours (a leading space is dropped, bytes join to a character), so a window of tokens is
    decoded at each step and its new end is taken. The window moves on wherever its text ends with a whole character.

    Args:
        decode: decodes token ids to text.
        prompt: the request's prompt.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int]) -> None:
        self._decode = decode
        self._tokens = list(prompt[-_CONTEXT:])
        self._num_read = len(self._tokens)
        self._num_emitted = len(decode(self._tokens))

    def push(self, token: int) -> str:
        """Take a token; the text that it completes, perhaps none."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        whole = text.rstrip(_REPLACEMENT)
        if len(text) - len(whole) > _MAX_REPLACEMENTS:
            whole = text
        new = whole[self._num_emitted :]
        if whole == text and new:
            # What was read before this step's tokens is context now, and the context before it is dropped.
            del self._tokens[: self._num_read]
            self._num_read = len(self._tokens)
            self._num_emitted = len(self._decode(self._tokens))
        else:
            self._num_emitted = max(self._num_emitted, len(whole))
        return new

    def flush(self) -> str:
        """The rest, once no more tokens come: bytes that never became a character."""
        return self._decode(self._tokens)[self._num_emitted :]


class StopStrings:
    """Holds text back as long as it could be the beginning of a stop string.

    Args:
        stops: the stop strings, none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """Take new text; what can be shown for certain. After a hit, :attr:`hit` is set and nothing more is shown."""
        if self.hit:
            return ""
        text = self._held + text
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.hit = True
            self._held = ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back and is no stop string after all."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with."""
    return next((length for length in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:length])), 0)
