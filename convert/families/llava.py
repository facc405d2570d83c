"""LLaVA and LLaVA-NeXT as transformers saves them, under all the names that its releases have given the parts.

Knows prefixes and the top level of config.json; the parts themselves are `llama`'s and `clip`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from local_llava.convert.checkpoint import Checkpoint
from local_llava.convert.config import Config
from local_llava.convert.families import Parts, Strategy
from local_llava.convert.source import SourceTensor
from local_llava.errors import CheckpointError

PREFIXES = {
    # transformers 4.52 and later in memory; found in files of other tools
    "model.language_model.": ("text", "model."),
    "model.vision_tower.vision_model.": ("vision", ""),
    "model.vision_tower.": ("vision", ""),
    "model.multi_modal_projector.": ("projector", ""),
    "model.image_newline": ("projector", "image_newline"),
    "lm_head.": ("text", "lm_head."),
    # transformers up to 4.51
    "language_model.model.": ("text", "model."),
    "language_model.lm_head.": ("text", "lm_head."),
    "vision_tower.vision_model.": ("vision", ""),
    # transformers 5, which names the rest as 4.51 did
    "vision_tower.": ("vision", ""),
    "multi_modal_projector.": ("projector", ""),
    "image_newline": ("projector", "image_newline"),
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


DEFAULT_GRID = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
"""LlavaNextConfig's `image_grid_pinpoints`."""

MAX_GRID = 64
"""Resolutions; the runtime takes no more."""


def take_apart(checkpoint: Checkpoint) -> Parts:
    """Sort the tensors by part, and read what the top level of the configuration says.

    Raises:
        CheckpointError: A part has no tensors, two names mean the same tensor, or a setting is not supported.
    """
    config = checkpoint.config
    parts, unknown = sort_tensors(checkpoint, PREFIXES)
    require(
        parts,
        checkpoint.directory,
        vision="vision tower (vision_tower.*): this checkpoint holds only the language model",
        projector="projector (multi_modal_projector.*)",
        text="language model (language_model.*)",
    )
    # Published projectors use the exact (erf) GELU; the runtime computes no other.
    config.choice("projector_hidden_act", "gelu", ("gelu",))
    vision = config.sub("vision_config")
    if not vision.values:
        vision = Config(vision.path, DEFAULT_VISION, "vision_config")
    text = config.sub("text_config")
    strategy = config.choice("vision_feature_select_strategy", "default", ("default", "full"))
    return Parts(
        directory=checkpoint.directory,
        text=text,
        text_tensors=parts["text"],
        tied=config.flag("tie_word_embeddings", False) or text.flag("tie_word_embeddings", False),
        vision=vision,
        vision_tensors=parts["vision"],
        projector_tensors=parts["projector"],
        projector_bias=config.flag("multimodal_projector_bias", True),
        feature_layers=_feature_layers(config),
        strategy=cast("Strategy", strategy),
        tokenizer=checkpoint.directory,
        top=checkpoint.values,
        processor=checkpoint.directory,
        grid=read_grid(config, config.values.get("image_grid_pinpoints") or DEFAULT_GRID) if _is_next(config) else (),
        unknown=unknown,
    )


def sort_tensors(
    checkpoint: Checkpoint, prefixes: dict[str, tuple[str, str]]
) -> tuple[dict[str, dict[str, SourceTensor]], list[str]]:
    """Sort a checkpoint's tensors by part; of the prefixes that fit a name, the longest counts.

    Args:
        checkpoint: Where they are.
        prefixes: As `PREFIXES`.

    Returns:
        The tensors of "text", "vision" and "projector" by their own names, and the names that belong to none.

    Raises:
        CheckpointError: Two names mean the same tensor.
    """
    parts: dict[str, dict[str, SourceTensor]] = {"text": {}, "vision": {}, "projector": {}}
    unknown: list[str] = []
    by_length = sorted(prefixes, key=len, reverse=True)
    for name, tensor in checkpoint.tensors.items():
        prefix = next((p for p in by_length if name.startswith(p)), None)
        if prefix is None:
            unknown.append(name)
            continue
        part, inner = prefixes[prefix]
        own = inner + name[len(prefix) :]
        if own in parts[part]:
            raise CheckpointError(f"{tensor}: means the same tensor as {parts[part][own].name}")
        parts[part][own] = tensor
    return parts, unknown


def require(parts: Mapping[str, Mapping[str, SourceTensor]], directory: Path, **names: str) -> None:
    """Check that parts have tensors; `names` says of each how a message calls it.

    Raises:
        CheckpointError: One has none.
    """
    for part, what in names.items():
        if not parts[part]:
            raise CheckpointError(f"{directory}: no tensors of the {what}")


def _is_next(config: Config) -> bool:
    return config.values.get("model_type") == "llava_next" or config.values.get("architectures") == [
        "LlavaNextForConditionalGeneration"
    ]


def read_grid(config: Config, value: Any, order: str = "heights and widths") -> tuple[tuple[int, int], ...]:
    """The pairs of `image_grid_pinpoints`. Their bounds are checked where they are written (`Preprocessing`).

    Args:
        config: The top level.
        value: The field's, or what stands for it.
        order: Of the two numbers of a pair, for the message.

    Raises:
        CheckpointError: It is no list of pairs.
    """
    if (
        not isinstance(value, list)
        or not 1 <= len(value) <= MAX_GRID
        or not all(
            isinstance(size, list) and len(size) == 2 and all(type(v) is int and 0 < v <= 1 << 14 for v in size)
            for size in value
        )
    ):
        raise CheckpointError(
            f"{config.name('image_grid_pinpoints')} must be a list of 1 to {MAX_GRID} {order}, not {value!a:.80}"
        )
    return tuple((first, second) for first, second in value)


def _feature_layers(config: Config) -> tuple[int, ...]:
    value = config.values.get("vision_feature_layer")
    layers = value if isinstance(value, list) else [value]
    if not 1 <= len(layers) <= 16:
        raise CheckpointError(f"{config.name('vision_feature_layer')} must be 1 to 16 layers, not {value!a:.80}")
    return tuple(
        Config(config.path, {"vision_feature_layer": layer}, config.section).integer(
            "vision_feature_layer", -2, -1000, 1000
        )
        for layer in layers
    )
