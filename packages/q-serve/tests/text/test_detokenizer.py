"""Streaming text equals whole text; no half characters; no piece of a stop string gets out."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from q_serve.text.detokenizer import Detokenizer, StopStrings


def byte_fallback_tokenizer() -> Tokenizer:
    """As SentencePiece models are converted: words begin with ▁, and what the vocabulary lacks is bytes."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghij", "▁a", "ab"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        BPE(vocab=vocabulary, merges=[("▁", "a"), ("a", "b")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


BYTE_FALLBACK = byte_fallback_tokenizer()


def stream(tokenizer: Tokenizer, prompt: Sequence[int], output: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True), prompt)
    return [*(detokenizer.push(token) for token in output), detokenizer.flush()]


texts = st.text(
    st.one_of(st.sampled_from("abc  "), st.characters(exclude_categories=("Cs",), exclude_characters="▁�")), max_size=40
)


@given(text=texts)
def test_bytes_of_sentencepiece(text: str) -> None:
    prompt = BYTE_FALLBACK.encode("ab").ids
    pieces = stream(BYTE_FALLBACK, prompt, BYTE_FALLBACK.encode("ab" + text).ids[len(prompt) :])
    if BYTE_FALLBACK.encode("ab" + text).ids[: len(prompt)] == prompt:
        assert "".join(pieces) == text
    assert not any("�" in piece for piece in pieces)


@pytest.mark.parametrize("cut", [0, 1, 7])
def test_byte_level(tokenizer: PreTrainedTokenizerFast, cut: int) -> None:
    @given(text=texts)
    def check(text: str) -> None:
        backend = tokenizer.backend_tokenizer
        ids = backend.encode(text).ids
        cut_text = backend.decode(ids[:cut])
        pieces = stream(backend, ids[:cut], ids[cut:])
        if "�" not in cut_text:
            assert cut_text + "".join(pieces) == text
            assert not any("�" in piece for piece in pieces)

    check()


def test_a_space_after_the_prompt_is_kept() -> None:
    prompt, output = BYTE_FALLBACK.encode("b").ids, [BYTE_FALLBACK.token_to_id("▁a"), BYTE_FALLBACK.token_to_id("▁a")]
    assert stream(BYTE_FALLBACK, prompt, output) == [" a", " a", ""]


def test_bytes_that_never_become_a_character_come_out() -> None:
    junk = [BYTE_FALLBACK.token_to_id("<0xFF>")] * 40
    pieces = stream(BYTE_FALLBACK, BYTE_FALLBACK.encode("a").ids, [*junk, BYTE_FALLBACK.token_to_id("b")])
    assert "".join(pieces) == "�" * 40 + "b"
    assert any(pieces[:20]), "junk is held back for ever"
    assert "".join(stream(BYTE_FALLBACK, [], junk[:2])) == "��"


def reference_stop(text: str, stops: Sequence[str]) -> str:
    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(found)] if found else text


@given(
    chunks=st.lists(st.text("ab\n", max_size=4), max_size=12),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_across_chunks(chunks: list[str], stops: list[str]) -> None:
    checker = StopStrings(stops)
    shown = ""
    for chunk in chunks:
        shown += checker.push(chunk)
        # What is shown is final: no later text may turn it into a piece of a stop string.
        assert reference_stop("".join(chunks), stops).startswith(shown)
    if not checker.hit:
        shown += checker.flush()
    whole = "".join(chunks)
    assert checker.hit == any(stop in whole for stop in stops)
    # With several stop strings the one that is complete first wins, as it would have ended the generation.
    first = next((n for n in range(len(chunks) + 1) if any(stop in "".join(chunks[:n]) for stop in stops)), len(chunks))
    assert shown == reference_stop("".join(chunks[:first]), stops)
