"""LLaVA as transformers saves it, under all the names that its releases have given the parts.

Knows prefixes and the top level of config.json; the parts themselves are `llama`'s and `clip`'s.
"""

from __future__ import annotations

from local_llava.convert.checkpoint import Checkpoint, SourceTensor
from local_llava.convert.config import Config
from local_llava.convert.families import Parts
from local_llava.errors import CheckpointError

PREFIXES = {
    # transformers 4.52 and later in memory; found in files of other tools
    "model.language_model.": ("text", "model."),
    "model.vision_tower.vision_model.": ("vision", ""),
    "model.vision_tower.": ("vision", ""),
    "model.multi_modal_projector.": ("projector", ""),
    "lm_head.": ("text", "lm_head."),
    # transformers up to 4.51
    "language_model.model.": ("text", "model."),
    "language_model.lm_head.": ("text", "lm_head."),
    "vision_tower.vision_model.": ("vision", ""),
    # transformers 5, which names the rest as 4.51 did
    "vision_tower.": ("vision", ""),
    "multi_modal_projector.": ("projector", ""),
}
"""Prefix in the checkpoint -> the part, and the prefix there."""

DEFAULT_VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "image_size": 336,
    "patch_size": 14,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
"""The tower that LlavaConfig means when it has no vision_config at all: CLIP-L/14 at 336 pixels."""


def take_apart(checkpoint: Checkpoint) -> Parts:
    """Sort the tensors by part, and read what the top level of the configuration says.

    Raises:
        CheckpointError: A part has no tensors, two names mean the same tensor, or a setting is not supported.
    """
    config = Config(checkpoint.directory / "config.json", checkpoint.config)
    parts: dict[str, dict[str, SourceTensor]] = {"text": {}, "vision": {}, "projector": {}}
    unknown: list[str] = []
    by_length = sorted(PREFIXES, key=len, reverse=True)
    for name, tensor in checkpoint.tensors.items():
        prefix = next((p for p in by_length if name.startswith(p)), None)
        if prefix is None:
            unknown.append(name)
            continue
        part, inner = PREFIXES[prefix]
        own = inner + name[len(prefix) :]
        if own in parts[part]:
            raise CheckpointError(f"{tensor}: means the same tensor as {parts[part][own].name}")
        parts[part][own] = tensor
    for part, what in (
        ("vision", "vision tower (vision_tower.*): this checkpoint holds only the language model"),
        ("projector", "projector (multi_modal_projector.*)"),
        ("text", "language model (language_model.*)"),
    ):
        if not parts[part]:
            raise CheckpointError(f"{checkpoint.directory}: no tensors of the {what}")
    config.choice("vision_feature_select_strategy", "default", ("default",))
    # Published projectors use the exact (erf) GELU; the runtime computes no other.
    config.choice("projector_hidden_act", "gelu", ("gelu",))
    vision = config.sub("vision_config")
    if not vision.values:
        vision = Config(vision.path, DEFAULT_VISION, "vision_config")
    text = config.sub("text_config")
    return Parts(
        text=text,
        text_tensors=parts["text"],
        vision=vision,
        vision_tensors=parts["vision"],
        projector_tensors=parts["projector"],
        projector_bias=config.flag("multimodal_projector_bias", True),
        feature_layer=_feature_layer(config),
        tied=config.flag("tie_word_embeddings", False) or text.flag("tie_word_embeddings", False),
        unknown=unknown,
    )


def _feature_layer(config: Config) -> int:
    value = config.values.get("vision_feature_layer")
    if isinstance(value, list):
        if len(value) != 1:
            raise CheckpointError(
                f"{config.name('vision_feature_layer')} must be one layer, not {value!a:.80}: several are not supported"
            )
        config = Config(config.path, {"vision_feature_layer": value[0]}, config.section)
    return config.integer("vision_feature_layer", -2, -1000, 1000)
