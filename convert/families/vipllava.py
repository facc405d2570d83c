"""ViP-LLaVA (https://arxiv.org/abs/2312.00784) as transformers saves it: LLaVA with several layers of the tower side
by side, and a LayerNorm before the projector.

Knows what differs from `llava`.
"""

from __future__ import annotations

from local_llava.convert.checkpoint import Checkpoint
from local_llava.convert.families import Parts, llava

DEFAULTS = {"vision_feature_layer": [-2, -5, -8, -11, 6], "projector_layernorm_eps": 1e-5}
"""VipLlavaConfig's."""

_NORM = "multi_modal_projector.projector_layernorm."


def take_apart(checkpoint: Checkpoint) -> Parts:
    """Sort the tensors by part, and read what the top level of the configuration says.

    Raises:
        CheckpointError: A part has no tensors, two names mean the same tensor, or a setting is not supported.
    """
    given = {key: value for key, value in checkpoint.values.items() if value is not None}
    if "vision_feature_layers" in given:  # its name before transformers 5
        given.setdefault("vision_feature_layer", given["vision_feature_layers"])
    # VipLlavaModel drops the class token, always has biases, and reads no setting for either.
    fixed = {"vision_feature_select_strategy": "default", "multimodal_projector_bias": True}
    tensors = {_as_in_llava(name): tensor for name, tensor in checkpoint.tensors.items()}
    return llava.take_apart(Checkpoint(checkpoint.directory, {**DEFAULTS, **given, **fixed}, tensors))


def _as_in_llava(name: str) -> str:
    """Its name among LLaVA's, whose projector has no norm."""
    prefix, found, rest = name.partition(_NORM)
    return f"{prefix}multi_modal_projector.layernorm.{rest}" if found and prefix in ("", "model.") else name
