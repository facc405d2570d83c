"""Parts of a LLaVA that are checkpoints of their own: a CLIP or SigLIP tower, and the files that come with one.

Knows how such checkpoints name their configuration and tensors. Where they lie is `companions`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from local_llava.convert.checkpoint import Checkpoint, ReadWeights
from local_llava.convert.config import Config, read_json
from local_llava.convert.families import Strategy
from local_llava.convert.source import SourceTensor
from local_llava.convert.weights import has_weights
from local_llava.errors import CheckpointError

_PREFIX = "vision_model."
"""Of a tower's tensors in its own checkpoint, but where transformers 5 saved a tower alone."""

_KINDS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
"""Models of two towers -> the `model_type` of the one that sees."""

_OTHER_TOWER = ("text_model.", "logit_scale", "logit_bias", "text_projection.", "visual_projection.")


def read_tower(directory: Path, read: ReadWeights) -> tuple[Config, dict[str, SourceTensor]]:
    """The configuration and the tensors of a tower, under the names that they have there.

    Args:
        directory: A checkpoint of the tower alone, or with the one for text, which is left aside.
        read: What reads the headers of weight files.

    Raises:
        CheckpointError: It is none, or a file is missing or damaged.
    """
    checkpoint = Checkpoint.open(directory, read)
    tensors = {name: t for name, t in checkpoint.tensors.items() if not name.startswith(_OTHER_TOWER)}
    return tower_config(checkpoint.config), tensors


def read_tower_config(directory: Path) -> Config:
    """The same of a directory whose weights do not count."""
    path = directory / "config.json"
    return tower_config(Config(path, read_json(path)))


def tower_config(config: Config) -> Config:
    """What `Parts.vision` holds, from a tower's config.json.

    Raises:
        CheckpointError: It is not a tower's.
    """
    kind = config.values.get("model_type")
    if isinstance(kind, str) and kind in _KINDS:
        vision = config.sub("vision_config")
        return Config(vision.path, {"model_type": _KINDS[kind], **vision.values}, vision.section)
    if kind not in _KINDS.values():
        raise CheckpointError(
            f"{config.name('model_type')} is {kind!a:.80}, which is no vision tower; supported: "
            f"{', '.join([*_KINDS, *_KINDS.values()])}"
        )
    return config


def without_prefix(tensors: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
    """A tower's tensors as `Parts` has them."""
    return {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}


def patches_alone(vision: Config) -> Strategy:
    """The strategy of official LLaVA and XTuner, which take every patch: SigLIP has no class token to leave out."""
    return "full" if vision.values.get("model_type") == "siglip_vision_model" else "default"


def find_processor(vision: Config, *directories: Path) -> Path | None:
    """The first directory with the configuration of an image processor; None where it is known to be CLIP's own.

    Args:
        vision: Of the tower.
        *directories: Where it may be.
    """
    for directory in directories:
        if any((directory / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
            return directory
    return None if vision.values.get("model_type", "clip_vision_model") == "clip_vision_model" else vision.path.parent


def find_tokenizer(*directories: Path) -> Path:
    """The first directory with a tokenizer's files, else the first."""
    for directory in directories:
        if any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
            return directory
    return directories[0]


def expects_weights(directory: Path) -> bool:
    """Whether weight files are there, or an index of some that may be missing."""
    return has_weights(directory) or any(directory.glob("*.index.json"))


def name_in(config: Config, key: str) -> str | None:
    """What a configuration calls a companion; None where it does not say.

    Raises:
        CheckpointError: It is not a text.
    """
    value = config.values.get(key)
    if value is not None and not isinstance(value, str):
        raise CheckpointError(f"{config.name(key)} must be a name or a path, not {value!a:.80}")
    return value or None
