"""The registry of vision towers, by the `model_type` of their configuration."""

from __future__ import annotations

from collections.abc import Callable

from local_llava.convert.families import Parts, Tower, clip, siglip

_KINDS: dict[str, Callable[[Parts, int], Tower]] = {
    "clip_vision_model": clip.tower,
    "siglip_vision_model": siglip.tower,
}


def read_tower(parts: Parts, n_embd: int) -> Tower:
    """Read vision_config and what belongs to the projector, and say what the mmproj holds.

    Args:
        parts: The checkpoint.
        n_embd: Width of the language model.

    Raises:
        CheckpointError: The tower is not supported (the message lists those that are), a value makes no sense, or a
            setting is not supported.
    """
    return _KINDS[parts.vision.choice("model_type", "clip_vision_model", tuple(_KINDS))](parts, n_embd)
