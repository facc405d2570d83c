"""The Phi-3 decoder, with q, k and v in one matrix, and gate and up: its tensors and metadata in a GGUF.

llama.cpp's `phi3` keeps both as they are, and rotates as transformers does, so no rows change places. It has no sliding
window, and picks Phi-3's long factors by the size of the context: a GGUF's `context_length` is the longest context in
which both give the same, at most the window and the original context (see `rope.read_long_rope`).
"""

from __future__ import annotations

from gguf import GGUFValueType

from local_llava.convert.config import Config
from local_llava.convert.families import Decoder, Row, llama
from local_llava.convert.families.rope import read_long_rope
from local_llava.convert.plan import Field

_DEFAULTS = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
"""Phi3Config's, where they differ from LlamaConfig's."""


def decoder(config: Config, tied: bool) -> Decoder:
    """What the GGUF holds; as `families.decoders.read_decoder`."""
    config = Config(config.path, {**_DEFAULTS, **config.values}, config.section)
    c = llama.read_config(config, {}, windowed=True, rotated=_rotated(config), read_rope=read_long_rope)
    llama.check_width(config, c)
    # 0, and not nothing, says that a file is not one of the first, which llama.cpp asks to make anew.
    window = config.values.get("sliding_window") or 0
    field = Field("phi3.attention.sliding_window", window, GGUFValueType.UINT32)
    return llama.whole_decoder("phi3", c, _rows(c, tied), field)


def _rotated(config: Config) -> float:
    """The part of a head's dimensions that is rotated, wherever it is kept."""
    scaling = config.sub("rope_scaling")
    where = scaling if scaling.values else config.sub("rope_parameters")
    outer = config.number("partial_rotary_factor", 1.0, 0.01, 1)
    return where.number("partial_rotary_factor", outer, 0.01, 1)


def _rows(c: llama.LlamaConfig, tied: bool) -> list[Row]:
    q, kv = c.n_head * c.head_dim, c.n_head_kv * c.head_dim
    layer = {
        "attn_norm": ("input_layernorm", (c.n_embd,)),
        "attn_qkv": ("self_attn.qkv_proj", (q + 2 * kv, c.n_embd)),
        "attn_output": ("self_attn.o_proj", (c.n_embd, q)),
        "ffn_norm": ("post_attention_layernorm", (c.n_embd,)),
        "ffn_up": ("mlp.gate_up_proj", (2 * c.n_ff, c.n_embd)),
        "ffn_down": ("mlp.down_proj", (c.n_embd, c.n_ff)),
    }
    table = [Row(f"{target}.weight", f"{source}.weight", shape) for target, (source, shape) in layer.items()]
    return llama.whole(c, tied, table)
