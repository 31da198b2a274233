"""Prompts and chats: as transformers encodes them, but a user's special tokens are text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from q_serve.errors import ModelError
from q_serve.text.chat_template import ChatTemplate
from q_serve.text.tokenizer import Tokenizer, stop_token_ids

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def ours(tiny_directory: Path) -> Tokenizer:
    return Tokenizer.from_directory(tiny_directory)


def special_ids(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    return {tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}


def test_prompts_and_chats_equal_transformers(ours: Tokenizer, tokenizer: PreTrainedTokenizerFast) -> None:
    for text in ("The quick brown fox", "  two  spaces\n", "naïve 世界 🌍"):
        assert ours.encode(text) == tokenizer(text)["input_ids"]
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": text},
            {"role": "assistant", "content": "a < b | c >"},
            {"role": "user", "content": "go on"},
        ]
        theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert ours.encode_chat(messages) == theirs


def test_special_tokens_in_a_prompt_are_text(ours: Tokenizer, tokenizer: PreTrainedTokenizerFast) -> None:
    text = "a<|im_end|>b<|endoftext|>"
    assert not special_ids(tokenizer) & set(ours.encode(text))
    assert ours.decode(ours.encode(text)) == text


contents = st.lists(st.sampled_from([*SPECIAL, "<|im_", "end|>", "<", " ", "\n", "hi", "end"]), max_size=6).map("".join)


@given(st.lists(contents, min_size=1, max_size=3))
def test_no_content_makes_a_special_token(contents: list[str]) -> None:
    # The worst of templates: nothing stands between messages, so that a special token may come together from two of them.
    template = ChatTemplate("{% for m in messages %}{{ m.content | trim }}{% endfor %}<|im_end|>", {})
    tokenizer = Tokenizer(_BACKEND, chat_template=template)
    ids = tokenizer.encode_chat([{"role": "user", "content": content} for content in contents])
    parsed = tokenizer._parsing
    special = {parsed.token_to_id(token) for token in SPECIAL}
    assert [token for token in ids if token in special] == [parsed.token_to_id("<|im_end|>")]
    assert parsed.decode(ids, skip_special_tokens=False) == "".join(content.strip() for content in contents) + "<|im_end|>"


def _backend_json() -> str:
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    vocabulary = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return str(backend.to_str())


_BACKEND = _backend_json()


def test_templates_run_in_a_sandbox() -> None:
    for source in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"):
        with pytest.raises(ValueError, match="refuses these messages"):
            ChatTemplate(source, {}).render([{"role": "user", "content": "x"}], special_tokens=[])


def test_a_template_s_own_refusal_is_told() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(ValueError, match="roles must alternate"):
        template.render([{"role": "user", "content": "x"}], special_tokens=[])


def test_what_templates_use() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}"
        "{% generation %}!{% endgeneration %}{% endfor %}{{ strftime_now('%Y') | length }}"
    )
    template = ChatTemplate(source, {"bos_token": "<s>"})
    rendered = template.render([{"role": "user", "content": "ö<s>"}, {"role": "user", "content": "no"}], special_tokens=["<s>"])
    assert rendered.text == '<s>{"role": "user", "content": "ö<s>"}!4'
    assert rendered.marks == {rendered.text.rindex("<s>")}


def test_a_model_without_a_template(ours: Tokenizer) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        Tokenizer(_BACKEND, chat_template=None).encode_chat([{"role": "user", "content": "x"}])


def test_where_templates_are_found(tmp_path: Path) -> None:
    assert ChatTemplate.from_directory(tmp_path, {}) is None
    templates = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    config = {"chat_template": templates, "bos_token": {"content": "<s>"}}
    found = ChatTemplate.from_directory(tmp_path, config)
    assert found is not None and found.render([], special_tokens=[]).text == "d"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}j")
    found = ChatTemplate.from_directory(tmp_path, config)
    assert found is not None and found.render([], special_tokens=[]).text == "<s>j"
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(ModelError, match="not valid Jinja"):
        ChatTemplate.from_directory(tmp_path, config)


def test_broken_tokenizers_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json: missing"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [(None, {}, set()), (None, {"eos_token_id": 3}, {3}), ([1, 2], {"eos_token_id": 3}, {1, 2}), (5, {}, {5})],
)
def test_tokens_that_end_a_text(tmp_path: Path, generation: object, config: dict[str, object], expected: set[int]) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert stop_token_ids(tmp_path, config) == expected


def test_a_wrong_end_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="eos_token_id is '2'"):
        stop_token_ids(tmp_path, {"eos_token_id": "2"})
