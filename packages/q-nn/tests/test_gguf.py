"""GGUF files: written by the gguf package, against what it decodes; damaged ones are refused, whatever they say."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from q_nn import (
    AffineGroups,
    FourBit,
    LinearNF4,
    QConfig,
    QuantizedTensor,
    SuperGroups,
    load_foreign,
    prepare,
    quantize,
    read_weights,
)
from q_nn.readers.gguf_file import GGUFFile

gguf = pytest.importorskip("gguf", reason="the peer that GGUF files are compared with is in the dependency group «tests»")
Kind = gguf.GGMLQuantizationType

Bytes = NDArray[np.uint8]
NEAR = 2.0**-22
HELD = {
    "Q4_0": FourBit("int4", 32),
    "Q8_0": AffineGroups(8, 32, zeros=False),
    "Q4_K": SuperGroups(),
}


def encode(weight: Tensor, kind: str) -> Bytes:
    """A weight as the file holds it. The package decodes Q4_K only, so its blocks are made of random bits with sensible scales."""
    dense = weight.detach().float().numpy()
    if kind != "Q4_K":
        return np.asarray(gguf.quants.quantize(dense, Kind[kind]), dtype=np.uint8)
    random = np.random.default_rng(dense.shape[0])
    blocks = random.integers(0, 256, (*dense.shape[:-1], dense.shape[-1] // 256, 144), dtype=np.uint8)
    for start, scale in ((0, 2e-4), (2, 1e-3)):
        scales = (scale * random.uniform(-1, 1, blocks.shape[:-1])).astype(np.float16)
        blocks[..., start : start + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(*dense.shape[:-1], -1)


def decode(encoded: Bytes, kind: str) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(encoded, Kind[kind]))


class Writer:
    """A small file, tensor by tensor."""

    def __init__(self, path: Path, architecture: str = "other") -> None:
        self._writer = gguf.GGUFWriter(path, architecture)
        self.path = path

    def value(self, add: str, *arguments: Any) -> None:
        getattr(self._writer, f"add_{add}")(*arguments)

    def plain(self, name: str, tensor: Tensor) -> None:
        if tensor.dtype is torch.bfloat16:
            self._writer.add_tensor(name, tensor.view(torch.uint8).numpy(), raw_dtype=Kind.BF16)
        else:
            self._writer.add_tensor(name, tensor.numpy())

    def encoded(self, name: str, content: Bytes, kind: str) -> None:
        self._writer.add_tensor(name, content, raw_dtype=Kind[kind])

    def close(self) -> Path:
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_tensors_to_file()
        self._writer.close()
        return self.path


@pytest.mark.parametrize("kind", HELD)
@pytest.mark.parametrize("N", [1, 7])
def test_weights_decode_as_the_package_does(tmp_path: Path, kind: str, N: int) -> None:
    encoded = encode(torch.randn(N, 512), kind)
    file = Writer(tmp_path / "x.gguf")
    file.encoded("some.weight", encoded, kind)
    file.plain("plain", torch.arange(6.0).view(2, 3))
    file.plain("half", torch.arange(5).half())
    file.plain("brain", torch.arange(8).bfloat16().view(4, 2))
    weights = read_weights(file.close(), dtype=torch.float32)

    weight, expected = weights["some.weight"], decode(encoded, kind)
    assert isinstance(weight, QuantizedTensor) and weight.format == HELD[kind]
    if kind == "Q4_0":
        assert ((weight.dequantize() - expected).abs() <= NEAR * expected.abs()).all()
    else:
        assert torch.equal(weight.dequantize(), expected)
    assert torch.equal(weights["plain"], torch.arange(6.0).view(2, 3))
    assert torch.equal(weights["half"], torch.arange(5).half())
    assert torch.equal(weights["brain"], torch.arange(8).bfloat16().view(4, 2))

    assert read_weights(file.path)["some.weight"].dtype == torch.float16
    nf4 = read_weights(file.path, dtype=torch.bfloat16, requantize=FourBit())["some.weight"]
    assert isinstance(nf4, QuantizedTensor) and (nf4.format, nf4.dtype) == (FourBit(), torch.bfloat16)
    wanted = QuantizedTensor.quantize(expected, FourBit())
    assert torch.equal(nf4.components["packed"], wanted.components["packed"])


# --- whole models -------------------------------------------------------------------------------------------------------


def llama(tied: bool = False) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
    ).eval()


def qwen3() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=64,
            hidden_size=256,
            intermediate_size=256,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            tie_word_embeddings=False,
        )
    ).eval()


def write(model: Any, path: Path, architecture: str, kind: str) -> None:
    """Write a model as llama.cpp's converter does, and put into it what its weights decode to."""
    config = model.config
    file = Writer(path, architecture)
    file.value("block_count", config.num_hidden_layers)
    file.value("head_count", config.num_attention_heads)
    file.value("head_count_kv", config.num_key_value_heads)
    file.value("layer_norm_rms_eps", config.rms_norm_eps)
    file.value("rope_freq_base", config.rope_parameters["rope_theta"])
    file.value("token_list", [f"<{i}>" for i in range(config.vocab_size)])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    for key, parameter in list(model.named_parameters()):
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        tensor = parameter.detach()
        if architecture == "llama" and re.search(r"[qk]_proj", key):
            heads = config.num_key_value_heads if "k_proj" in key else config.num_attention_heads
            tensor = tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
        if tensor.ndim == 1:
            file.plain(name, tensor.contiguous())
            continue
        encoded = encode(tensor.contiguous(), kind)
        file.encoded(name, encoded, kind)
        decoded = decode(encoded, kind)
        if architecture == "llama" and re.search(r"[qk]_proj", key):
            decoded = decoded.reshape(heads, -1, 2, decoded.shape[1]).swapaxes(1, 2).reshape(decoded.shape)
        with torch.no_grad():
            parameter.copy_(decoded)
    file.close()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model(torch.arange(24).view(2, 12) * 5 % 64).logits
    return out


@pytest.mark.parametrize("kind", HELD)
@pytest.mark.parametrize("tied", [False, True])
def test_a_llama(tmp_path: Path, kind: str, tied: bool) -> None:
    torch.manual_seed(0)
    model = llama(tied)
    write(model, tmp_path / "model.gguf", "llama", kind)
    torch.manual_seed(1)
    other = llama(tied)
    load_foreign(other, tmp_path / "model.gguf")
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-4, atol=1e-5)
    assert all(isinstance(m.weight, QuantizedTensor) for m in other.modules() if isinstance(m, (nn.Linear, nn.Embedding)))
    assert (other.lm_head.weight is other.model.embed_tokens.weight) == tied

    third = prepare(llama(tied))
    third.load_state_dict(other.state_dict())
    assert torch.equal(logits(third), logits(other))


def test_a_qwen3(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = qwen3()
    write(model, tmp_path / "model.gguf", "qwen3", "Q8_0")
    with torch.device("meta"):
        other = qwen3()
    other.model.rotary_emb = model.model.rotary_emb
    load_foreign(other, tmp_path / "model.gguf")
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-4, atol=1e-5)


def test_a_model_that_does_not_fit_is_left_as_it_was(tmp_path: Path) -> None:
    write(llama(), tmp_path / "model.gguf", "llama", "Q8_0")
    other = llama()
    other.model.layers[1].mlp.up_proj = nn.Linear(256, 256, bias=False)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight has shape \[512, 256\], expected \[256, 256\]"):
        load_foreign(other, tmp_path / "model.gguf")
    other = llama()
    del other.model.layers[1]
    before = dict(other.named_parameters())
    with pytest.raises(ValueError, match=r"unexpected keys: model\.layers\.1\.input_layernorm\.weight, .* and 4 more"):
        load_foreign(other, tmp_path / "model.gguf")
    assert {key: id(value) for key, value in other.named_parameters()} == {key: id(value) for key, value in before.items()}

    quantized = llama()
    quantize(quantized, QConfig("nf4", skip=()))
    load_foreign(quantized, tmp_path / "model.gguf")  # what is quantized is replaced
    assert not any(isinstance(module, LinearNF4) for module in quantized.modules())


def test_architectures_and_types_that_are_not_read(tmp_path: Path) -> None:
    file = Writer(tmp_path / "a.gguf", "llama")
    file.value("head_count", 4)
    file.plain("blk.0.ffn_gate_inp.weight", torch.zeros(2, 32))
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_gate_inp\.weight isn't a tensor of a dense decoder of the llama family"):
        read_weights(file.close())

    file = Writer(tmp_path / "b.gguf", "llama")
    file.plain("blk.0.attn_q.weight", torch.zeros(2, 32))
    with pytest.raises(ValueError, match="head_count and head_count_kv say None, expected numbers of heads"):
        read_weights(file.close())

    file = Writer(tmp_path / "c.gguf")
    file.encoded("x", np.zeros((2, 210), dtype=np.uint8), "Q6_K")
    with pytest.raises(ValueError, match="a tensor 'x' of the type Q6_K, expected one of F32, F16, Q4_0, Q8_0, Q4_K, BF16"):
        read_weights(file.close())

    file = Writer(tmp_path / "d.gguf")
    file.encoded("experts", np.zeros((2, 3, 34), dtype=np.uint8), "Q8_0")
    with pytest.raises(ValueError, match=r"d\.gguf: experts is Q8_0 \[2, 3, 32\], expected two axes"):
        read_weights(file.close())

    for kind in HELD:
        encoded = encode(torch.randn(2, 256), kind)
        encoded[1, :2] = np.array([np.nan], dtype=np.float16).view(np.uint8)
        file = Writer(tmp_path / f"{kind}.gguf")
        file.encoded("x", encoded, kind)
        with pytest.raises(ValueError, match=rf"{kind}\.gguf: x has .*scales that are NaN or infinite"):
            read_weights(file.close())

    with pytest.raises(FileNotFoundError, match="expected a GGUF file"):
        read_weights(tmp_path / "none.gguf")


# --- damage -------------------------------------------------------------------------------------------------------------


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def header(tensors: int = 0, values: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values)


def info(name: bytes = b"x", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


HUGE = 2**63
DAMAGED = [
    (b"GGML" + header()[4:], "doesn't begin with 'GGUF'"),
    (header(version=1), "is of version 1, expected one of (2, 3)"),
    (header(version=3 << 24), "expected one of (2, 3), little-endian"),
    (header(tensors=HUGE), f"says {HUGE} tensors, of which 0 bytes have no room"),
    (header(values=HUGE), f"says {HUGE} metadata values"),
    (header(values=1) + struct.pack("<Q", HUGE) + bytes(20), f"says {HUGE} bytes of a string"),
    (header(values=1) + string(b"\xff" * 9) + bytes(9), "has a string that isn't UTF-8"),
    (header(values=1) + string(b"a") + struct.pack("<I", 13) + bytes(20), "a value of 'a' of the type 13"),
    (header(values=1) + string(b"a") + struct.pack("<IIQ", 9, 4, HUGE), f"says {HUGE} elements of 'a'"),
    (header(values=1) + string(b"a") + struct.pack("<IIQ", 9, 8, 2**40) + bytes(99), f"says {2**40} elements of 'a'"),
    (header(values=1) + string(b"a") + struct.pack("<IIQ", 9, 99, 5) + bytes(99), "a value of 'a' of the type 99"),
    (header(values=1) + string(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9, "at most 2 arrays deep"),
    (header(values=1) + string(b"a") + struct.pack("<I", 10) + bytes(3), "ends at byte 40 in its header"),
    (header(values=2) + (string(b"a") + struct.pack("<IB", 0, 1)) * 2, "the metadata key 'a' twice"),
    (header(tensors=1) + info(shape=()) + bytes(64), "a tensor 'x' of 0 axes, expected 1 to 4"),
    (header(tensors=1) + info(shape=(1,) * 5) + bytes(64), "a tensor 'x' of 5 axes"),
    (header(tensors=1) + info(kind=3) + bytes(64), "a tensor 'x' of the type Q4_1"),
    (header(tensors=1) + info(kind=999) + bytes(64), "a tensor 'x' of the type 999"),
    (header(tensors=1) + info(kind=12) + bytes(64), "a tensor 'x' [32], expected rows of whole Q4_K blocks of 256"),
    (header(tensors=1) + info(shape=(HUGE, HUGE)) + bytes(64), f"a tensor 'x' [{HUGE}, {HUGE}], expected sizes that its "),
    (header(tensors=1) + info(shape=(HUGE, 0)) + bytes(64), f"a tensor 'x' [0, {HUGE}], expected sizes that its "),
    (header(tensors=1) + info(shape=(128, 128)) + bytes(64), "the tensor 'x' [128, 128] up to byte"),
    (header(tensors=1) + info(offset=2**62) + bytes(64), "the tensor 'x' [32] up to byte"),
    (header(tensors=1) + info(offset=3) + bytes(512), "the tensor 'x' at 3, expected a multiple of 32"),
    (header(tensors=2) + info() * 2 + bytes(512), "has the tensor 'x' twice"),
    (header(tensors=1) + info() + bytes(128), "which may be cut off"),
    (
        header(values=1) + string(b"general.alignment") + struct.pack("<IB", 0, 0),
        "has general.alignment 0, expected a multiple of 8",
    ),
    (b"GGUF", "has 4 bytes, expected a GGUF file"),
]


@pytest.mark.parametrize(("content", "message"), DAMAGED, ids=[message[:50] for _, message in DAMAGED])
def test_damaged_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        GGUFFile(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file with every kind of value and tensor."""
    file = Writer(tmp_path_factory.mktemp("gguf") / "x.gguf", "llama")
    file.value("head_count", 2)
    file.value("token_list", ["a", "bc", ""])
    file.value("array", "some.numbers", [1.5, 2.5])
    file.value("bool", "some.flag", True)
    file.plain("output_norm.weight", torch.ones(64))
    for kind, name in zip(HELD, ("attn_q", "attn_k", "ffn_up"), strict=True):
        file.encoded(f"blk.0.{name}.weight", encode(torch.randn(4, 256), kind), kind)
    return file.close().read_bytes()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    damage=st.lists(st.tuples(st.integers(0, 700), st.binary(min_size=1, max_size=8)), max_size=4),
    cut=st.none() | st.integers(0, 4000),
)
def test_whatever_is_damaged_is_refused_or_read(
    whole: bytes, tmp_path: Path, damage: list[tuple[int, bytes]], cut: int | None
) -> None:
    content = bytearray(whole)
    for start, patch in damage:
        content[start : start + len(patch)] = patch
    path = tmp_path / "x.gguf"
    path.write_bytes(content[:cut])
    try:
        weights = read_weights(path)
    except (ValueError, TypeError):
        return
    assert sum(tensor.numel() for tensor in weights.values()) <= 2 * len(content)


def test_a_config_that_the_file_contradicts(tmp_path: Path) -> None:
    write(llama(), tmp_path / "model.gguf", "llama", "Q8_0")
    other = llama()
    other.config.num_attention_heads = 4
    with pytest.raises(ValueError, match=r"llama\.attention\.head_count is 8, expected the config's num_attention_heads, 4"):
        load_foreign(other, tmp_path / "model.gguf")
    other = llama()
    other.config.rope_parameters["rope_theta"] = 5000.0
    with pytest.raises(ValueError, match=r"llama\.rope\.freq_base is 10000\.0, expected the config's rope_theta, 5000\.0"):
        load_foreign(other, tmp_path / "model.gguf")
