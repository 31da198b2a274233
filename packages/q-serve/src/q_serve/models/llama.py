"""The Llama family: Llama, Mistral, Qwen2. They differ in biases and in attention's reach, nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from q_serve.models.config import ConfigReader, ModelConfig, read_llama_config
from q_serve.models.layers import Attention, GatedMLP, KVCache, Linear, RMSNorm, RopeTables, Step


class DecoderLayer(nn.Module):
    """Attention, then the MLP, each behind a norm and beside the residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = GatedMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x_TK: Tensor, residual_TK: Tensor | None, step: Step, rope: RopeTables, cache: KVCache
    ) -> tuple[Tensor, Tensor]:
        """The layer's output, not yet added to the residual, and the residual."""
        if residual_TK is None:
            x_TK, residual_TK = self.input_layernorm(x_TK), x_TK
        else:
            x_TK, residual_TK = self.input_layernorm.add(x_TK, residual_TK)
        x_TK = self.self_attn(x_TK, step, rope, cache)
        x_TK, residual_TK = self.post_attention_layernorm.add(x_TK, residual_TK)
        return self.mlp(x_TK), residual_TK


class Decoder(nn.Module):
    """Embedding, layers, last norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, step: Step, rope: RopeTables, caches: Sequence[KVCache]) -> Tensor:
        """Hidden states [T, K] of the tokens, normed."""
        x_TK: Tensor = F.embedding(input_ids, self.embed_tokens.weight)
        residual_TK: Tensor | None = None
        for layer, cache in zip(self.layers, caches, strict=True):
            x_TK, residual_TK = layer(x_TK, residual_TK, step, rope, cache)
        assert residual_TK is not None, "a model has at least one layer"
        return self.norm.add(x_TK, residual_TK)[0]


class LlamaForCausalLM(nn.Module):
    """A decoder of the Llama family and its output layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, step: Step, rope: RopeTables, caches: Sequence[KVCache]) -> Tensor:
        """Compute a step's tokens.

        Args:
            input_ids: int64 [T], the tokens of all requests, one request after the other.
            step: where the tokens stand.
            rope: rotary tables, of at least as many positions as the longest sequence.
            caches: a cache a layer; mutated.

        Returns:
            Hidden states [T, K].
        """
        hidden: Tensor = self.model(input_ids, step, rope, caches)
        return hidden

    def logits(self, hidden_RK: Tensor) -> Tensor:
        """Logits [R, V] of some hidden states."""
        out: Tensor = self.lm_head(hidden_RK)
        return out


def llama_config(reader: ConfigReader) -> ModelConfig:
    """Llama: one flag for all of attention's biases, one for the MLP's."""
    bias = reader.flag("attention_bias")
    return read_llama_config(reader, qkv_bias=bias, output_bias=bias, mlp_bias=reader.flag("mlp_bias"), sliding_window=None)


def mistral_config(reader: ConfigReader) -> ModelConfig:
    """Mistral: no biases; attention may be limited to a window."""
    window = None if reader.raw.get("sliding_window") is None else reader.size("sliding_window")
    return read_llama_config(reader, qkv_bias=False, output_bias=False, mlp_bias=False, sliding_window=window)


def qwen2_config(reader: ConfigReader) -> ModelConfig:
    """Qwen2: biases on queries, keys and values; a window only where ``use_sliding_window`` says so."""
    window = None
    if reader.flag("use_sliding_window") and reader.raw.get("sliding_window") is not None:
        window = reader.size("sliding_window")
    return read_llama_config(reader, qkv_bias=True, output_bias=False, mlp_bias=False, sliding_window=window)
