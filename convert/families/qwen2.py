"""The Qwen2 decoder, which Qwen1.5 and Qwen2.5 share: its tensors and metadata in a GGUF.

A Llama with biases on q, k and v. llama.cpp rotates it as transformers does, so no rows change places.
"""

from __future__ import annotations

from local_llava.convert.config import Config
from local_llava.convert.families import Decoder, llama
from local_llava.errors import CheckpointError

_DEFAULTS = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
"""Qwen2Config's, where they differ from LlamaConfig's."""


def decoder(config: Config, tied: bool) -> Decoder:
    """What the GGUF holds; as `families.decoders.read_decoder`."""
    c = llama.read_config(config, _DEFAULTS, windowed=False)
    llama.check_width(config, c)
    _check_window(config)
    rows = llama.rows(c, tied, biases=("attn_q", "attn_k", "attn_v"), permuted={})
    return llama.whole_decoder("qwen2", c, rows)


def _check_window(config: Config) -> None:
    """Some layers may have a window; llama.cpp's model has none."""
    if config.flag("use_sliding_window", False):
        raise CheckpointError(f"{config.name('use_sliding_window')} is true; supported: false")
    kinds = config.values.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise CheckpointError(
            f"{config.name('layer_types')} is {kinds!a:.80}; supported: full_attention for all layers"
        )
