"""The Llama decoder, and Mistral's, which differs in defaults and a window: its tensors and metadata in a GGUF.

Names and keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and llama.cpp's converter. Qwen2 shares the
table, Phi-3 the metadata.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from gguf import GGUFValueType
from numpy.typing import NDArray

from local_llava.convert.config import Config
from local_llava.convert.families import Decoder, Row
from local_llava.convert.families.rope import Rope, read_rope, trained
from local_llava.convert.plan import Field, Load
from local_llava.convert.source import SourceTensor
from local_llava.errors import CheckpointError

_DEFAULTS: dict[str, dict[str, float]] = {
    "llama": {},
    "mistral": {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
}
"""Supported kinds of text_config, with what transformers' class takes where it differs from LlamaConfig's."""

_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
_FEED_FORWARD = ("ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True)
class LlamaConfig:
    """Hyperparameters, with transformers' defaults for what a configuration leaves out."""

    n_vocab: int
    n_embd: int
    n_ff: int
    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_rot: int
    """Dimensions of a head that are rotated."""
    n_ctx: int
    """The longest context that llama.cpp computes as transformers does, tokens."""
    n_ctx_train: int
    """The longest that the model was made for."""
    rms_eps: float
    rope: Rope


def decoder(config: Config, tied: bool) -> Decoder:
    """What the GGUF holds; as `families.decoders.read_decoder`."""
    kind = config.choice("model_type", "llama", tuple(_DEFAULTS))
    c = read_config(config, _DEFAULTS[kind], windowed=kind == "mistral")
    biases = (*_ATTENTION * config.flag("attention_bias", False), *_FEED_FORWARD * config.flag("mlp_bias", False))
    table = rows(c, tied, biases, permuted={"attn_q": c.n_head, "attn_k": c.n_head_kv})
    return whole_decoder("llama", c, table)


def whole_decoder(architecture: str, c: LlamaConfig, table: list[Row], *entries: Field) -> Decoder:
    """A decoder of an architecture, with its tensors and what metadata it has besides `fields`."""
    notes: tuple[str, ...] = ()
    if c.n_ctx < c.n_ctx_train:
        notes = (
            f"contexts of up to {c.n_ctx} of {c.n_ctx_train} tokens are offered: in longer ones llama.cpp, with no "
            "sliding window and one set of rope factors here, differs from the model",
        )
    sizes = (c.n_vocab, c.n_embd, c.n_layer, c.n_head, c.n_head_kv)
    return Decoder(architecture, *sizes, table, [*fields(architecture, c), *entries], notes)


def read_config(
    config: Config,
    defaults: Mapping[str, float],
    *,
    windowed: bool,
    rotated: float = 1.0,
    read_rope: Callable[[Config, int], Rope] = read_rope,
) -> LlamaConfig:
    """Read what all decoders of this shape have.

    Args:
        config: Of the language model.
        defaults: What transformers' class takes where it differs from LlamaConfig's.
        windowed: Whether tokens see no further than `sliding_window`. llama.cpp's models see all of the context, so
            that none longer than the window is offered.
        rotated: The part of a head's dimensions that is rotated.
        read_rope: Reads the rotary embedding's settings, given the number of these dimensions.

    Raises:
        CheckpointError: A value makes no sense, or a setting is not supported.
    """
    config = Config(config.path, {**defaults, **config.values}, config.section)
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
    n_rot = int(head_dim * rotated)
    if head_dim % 2 or n_rot % 2 or not n_rot:
        part = f", and a part of {rotated:g} of it" if rotated != 1 else ""
        raise CheckpointError(f"{config.name('head_dim')} must be even{part}, not {head_dim}")
    rope = read_rope(config, n_rot)
    window = config.integer("sliding_window", 1 << 30, 1, 1 << 30) if windowed else 1 << 30
    return LlamaConfig(
        n_vocab=config.integer("vocab_size", 32000, 1, 1 << 22),
        n_embd=n_embd,
        n_ff=config.integer("intermediate_size", 11008, 1, 1 << 20),
        n_layer=config.integer("num_hidden_layers", 32, 1, 512),
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_rot=n_rot,
        n_ctx=min(rope.n_ctx, window),
        n_ctx_train=trained(config),
        rms_eps=config.number("rms_norm_eps", 1e-6, 1e-12, 1),
        rope=rope,
    )


def check_width(config: Config, c: LlamaConfig) -> None:
    """Check that the heads together are as wide as the model, which llama.cpp's other architectures take for granted.

    Raises:
        CheckpointError: They are not.
    """
    if c.n_head * c.head_dim != c.n_embd:
        raise CheckpointError(
            f"{config.name('head_dim')}: {c.n_head} heads of {c.head_dim} must make hidden_size {c.n_embd} here"
        )


def rows(c: LlamaConfig, tied: bool, biases: tuple[str, ...], permuted: Mapping[str, int]) -> list[Row]:
    """Every tensor of the decoder, in the order of the file.

    Args:
        c: Hyperparameters.
        tied: As of `decoder`.
        biases: Matrices that have one.
        permuted: Matrices whose rows get llama.cpp's order, with the heads in each.
    """
    q, kv = c.n_head * c.head_dim, c.n_head_kv * c.head_dim
    layer = {
        "attn_norm": ("input_layernorm", (c.n_embd,)),
        "attn_q": ("self_attn.q_proj", (q, c.n_embd)),
        "attn_k": ("self_attn.k_proj", (kv, c.n_embd)),
        "attn_v": ("self_attn.v_proj", (kv, c.n_embd)),
        "attn_output": ("self_attn.o_proj", (c.n_embd, q)),
        "ffn_norm": ("post_attention_layernorm", (c.n_embd,)),
        "ffn_gate": ("mlp.gate_proj", (c.n_ff, c.n_embd)),
        "ffn_up": ("mlp.up_proj", (c.n_ff, c.n_embd)),
        "ffn_down": ("mlp.down_proj", (c.n_embd, c.n_ff)),
    }
    table = []
    for target, (source, shape) in layer.items():
        parts = {"weight": shape, "bias": shape[:1]} if target in biases else {"weight": shape}
        for part, size in parts.items():
            row = Row(f"{target}.{part}", f"{source}.{part}", size)
            n_head = permuted.get(target)
            table.append(row if n_head is None else Row(row.target, row.source, size, _permuted(n_head)))
    return whole(c, tied, table)


def whole(c: LlamaConfig, tied: bool, layer: list[Row]) -> list[Row]:
    """The rows of a decoder of which `layer` are those of a layer, without its number."""
    table = [*c.rope.rows(), Row("token_embd.weight", "model.embed_tokens.weight", (c.n_vocab, c.n_embd))]
    for i in range(c.n_layer):
        table += [Row(f"blk.{i}.{row.target}", f"model.layers.{i}.{row.source}", row.shape, row.load) for row in layer]
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


def fields(architecture: str, c: LlamaConfig) -> list[Field]:
    """The architecture's metadata."""
    u32, f32 = GGUFValueType.UINT32, GGUFValueType.FLOAT32
    entries: list[tuple[str, float | str, GGUFValueType]] = [
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
        ("rope.dimension_count", c.n_rot, u32),
        ("rope.freq_base", c.rope.base, f32),
        *c.rope.entries,
    ]
    return [Field(f"{architecture}.{key}", value, kind) for key, value, kind in entries]
