"""The Llama decoder, and Mistral's, which differs in defaults and a window: its tensors and metadata in a GGUF.

Names and keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and llama.cpp's converter.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from gguf import GGUFValueType
from numpy.typing import NDArray

from local_llava.convert.config import Config
from local_llava.convert.families import Decoder, Row
from local_llava.convert.plan import Field, Load
from local_llava.convert.source import SourceTensor
from local_llava.errors import CheckpointError

_DEFAULTS: dict[str, dict[str, int]] = {
    "llama": {},
    "mistral": {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
}
"""Supported kinds of text_config, with what transformers' class takes where it differs from LlamaConfig's."""


@dataclass(frozen=True)
class LlamaConfig:
    """Hyperparameters, with transformers' LlamaConfig defaults for what a configuration leaves out."""

    n_vocab: int
    n_embd: int
    n_ff: int
    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ctx: int
    rms_eps: float
    rope_base: float
    attention_bias: bool
    mlp_bias: bool


def decoder(config: Config, tied: bool) -> Decoder:
    """What the GGUF holds; as `families.decoders.read_decoder`."""
    c = read_config(config)
    return Decoder("llama", c.n_vocab, c.n_embd, c.n_layer, c.n_head, c.n_head_kv, rows(c, tied), fields(c))


def read_config(config: Config) -> LlamaConfig:
    """Read text_config.

    Raises:
        CheckpointError: Not a Llama decoder, a value makes no sense, or a setting is not supported.
    """
    kind = config.choice("model_type", "llama", tuple(_DEFAULTS))
    config = Config(config.path, {**_DEFAULTS[kind], **config.values}, config.section)
    config.choice("hidden_act", "silu", ("silu",))
    n_embd = config.integer("hidden_size", 4096, 1, 1 << 17)
    n_head = config.integer("num_attention_heads", 32, 1, 1 << 10)
    n_head_kv = config.integer("num_key_value_heads", n_head, 1, n_head)
    if n_head % n_head_kv:
        raise CheckpointError(
            f"{config.name('num_key_value_heads')}: {n_head_kv} does not divide num_attention_heads {n_head}"
        )
    if config.values.get("head_dim") is None and n_embd % n_head:
        raise CheckpointError(f"{config.name('num_attention_heads')}: {n_head} does not divide hidden_size {n_embd}")
    head_dim = config.integer("head_dim", max(1, n_embd // n_head), 1, 1 << 12)
    if head_dim % 2:
        raise CheckpointError(f"{config.name('head_dim')} must be even, not {head_dim}")
    return LlamaConfig(
        n_vocab=config.integer("vocab_size", 32000, 1, 1 << 22),
        n_embd=n_embd,
        n_ff=config.integer("intermediate_size", 11008, 1, 1 << 20),
        n_layer=config.integer("num_hidden_layers", 32, 1, 512),
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_ctx=_n_ctx(config, kind),
        rms_eps=config.number("rms_norm_eps", 1e-6, 1e-12, 1),
        rope_base=_rope_base(config),
        attention_bias=config.flag("attention_bias", False),
        mlp_bias=config.flag("mlp_bias", False),
    )


def _n_ctx(config: Config, kind: str) -> int:
    """The context length; Mistral's at most its window, since llama.cpp's `llama` attends to all of the context."""
    trained = config.integer("max_position_embeddings", 2048, 1, 1 << 27)
    if kind != "mistral" or config.values.get("sliding_window") is None:
        return trained
    return min(trained, config.integer("sliding_window", None, 1, 1 << 30))


def _rope_base(config: Config) -> float:
    """transformers 5 keeps theta and scaling in `rope_parameters`; before, in `rope_theta` and `rope_scaling`."""
    rope = config.sub("rope_parameters")
    scaling = config.sub("rope_scaling")
    for where in (rope, scaling):
        key = "type" if "type" in where.values and "rope_type" not in where.values else "rope_type"
        where.choice(key, "default", ("default",))
    old = config.number("rope_theta", 10000.0, 1, 1e12)
    return rope.number("rope_theta", old, 1, 1e12)


def rows(c: LlamaConfig, tied: bool) -> list[Row]:
    """Every tensor of the decoder, in the order of the file."""
    q, kv = c.n_head * c.head_dim, c.n_head_kv * c.head_dim
    layer = {
        "attn_norm.weight": ("input_layernorm.weight", (c.n_embd,)),
        "attn_q.weight": ("self_attn.q_proj.weight", (q, c.n_embd)),
        "attn_k.weight": ("self_attn.k_proj.weight", (kv, c.n_embd)),
        "attn_v.weight": ("self_attn.v_proj.weight", (kv, c.n_embd)),
        "attn_output.weight": ("self_attn.o_proj.weight", (c.n_embd, q)),
        "ffn_norm.weight": ("post_attention_layernorm.weight", (c.n_embd,)),
        "ffn_gate.weight": ("mlp.gate_proj.weight", (c.n_ff, c.n_embd)),
        "ffn_up.weight": ("mlp.up_proj.weight", (c.n_ff, c.n_embd)),
        "ffn_down.weight": ("mlp.down_proj.weight", (c.n_embd, c.n_ff)),
    }
    for has_bias, part in ((c.attention_bias, "attn_"), (c.mlp_bias, "ffn_")):
        for target, (source, shape) in list(layer.items()) if has_bias else ():
            if target.startswith(part) and "norm" not in target:
                layer[target.replace(".weight", ".bias")] = (source.replace(".weight", ".bias"), shape[:1])
    heads = {"attn_q": c.n_head, "attn_k": c.n_head_kv}
    table = [Row("token_embd.weight", "model.embed_tokens.weight", (c.n_vocab, c.n_embd))]
    for i in range(c.n_layer):
        for target, (source, shape) in layer.items():
            n_head = heads.get(target.partition(".")[0])
            row = Row(f"blk.{i}.{target}", f"model.layers.{i}.{source}", shape)
            table.append(row if n_head is None else Row(row.target, row.source, shape, _permuted(n_head)))
    table.append(Row("output_norm.weight", "model.norm.weight", (c.n_embd,)))
    if not tied:
        table.append(Row("output.weight", "lm_head.weight", (c.n_vocab, c.n_embd)))
    return table


class _permuted:  # noqa: N801 - used as a function
    """Rows of q or k in the order of llama.cpp's rotary embedding.

    transformers rotates the first half of a head against the second; llama.cpp rotates neighbours. So row
    `2 j + s` of a head is taken from row `s * head_dim / 2 + j` (permute() in llama.cpp's converter).
    """

    def __init__(self, n_head: int) -> None:
        self.n_head = n_head

    def __call__(self, tensor: SourceTensor) -> Load:
        n_rows = tensor.shape[0]
        dim = n_rows // self.n_head
        is_bias = len(tensor.shape) == 1

        def load(start: int, stop: int) -> NDArray[np.float32]:
            if is_bias:  # one row of all heads
                whole = tensor.rows(0, 1).reshape(self.n_head, 2, dim // 2)
                return np.ascontiguousarray(whole.swapaxes(1, 2).reshape(1, -1)[start:stop])
            first, last = start // dim, -(-stop // dim)
            heads = tensor.rows(first * dim, last * dim).reshape(last - first, 2, dim // 2, -1)
            mixed = heads.swapaxes(1, 2).reshape((last - first) * dim, -1)
            return np.ascontiguousarray(mixed[start - first * dim : stop - first * dim])

        return load


def fields(c: LlamaConfig) -> list[Field]:
    """The architecture's metadata."""
    u32, f32 = GGUFValueType.UINT32, GGUFValueType.FLOAT32
    entries: list[tuple[str, float, GGUFValueType]] = [
        ("vocab_size", c.n_vocab, u32),
        ("context_length", c.n_ctx, u32),
        ("embedding_length", c.n_embd, u32),
        ("block_count", c.n_layer, u32),
        ("feed_forward_length", c.n_ff, u32),
        ("attention.head_count", c.n_head, u32),
        ("attention.head_count_kv", c.n_head_kv, u32),
        ("attention.layer_norm_rms_epsilon", c.rms_eps, f32),
        ("attention.key_length", c.head_dim, u32),
        ("attention.value_length", c.head_dim, u32),
        ("rope.dimension_count", c.head_dim, u32),
        ("rope.freq_base", c.rope_base, f32),
    ]
    return [Field(f"llama.{key}", value, kind) for key, value, kind in entries]
