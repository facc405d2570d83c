"""The registry of language models behind a projector, by the `model_type` of their configuration."""

from __future__ import annotations

from collections.abc import Callable

from local_llava.convert.config import Config
from local_llava.convert.families import Decoder, llama, phi3, qwen2

_KINDS: dict[str, Callable[[Config, bool], Decoder]] = {
    "llama": llama.decoder,
    "mistral": llama.decoder,
    "phi3": phi3.decoder,
    "qwen2": qwen2.decoder,
}


def read_decoder(config: Config, tied: bool) -> Decoder:
    """Read text_config, and say what the GGUF holds.

    Args:
        config: Of the language model.
        tied: Whether the output layer is the embedding.

    Raises:
        CheckpointError: The decoder is not supported (the message lists those that are), a value makes no sense, or a
            setting is not supported.
    """
    return _KINDS[config.choice("model_type", "llama", tuple(_KINDS))](config, tied)
