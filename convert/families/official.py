"""LLaVA as its own code saves it (github.com/haotian-liu/LLaVA), and XTuner's exports to that format.

Knows its prefixes, and config.json, which is the language model's with LLaVA's settings among it. Knows also what is
left of a training that did not touch the whole model: the projector (mm_projector.bin), or an adapter of the language
model and the projector (non_lora_trainables.bin).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from local_llava.convert.checkpoint import Checkpoint, ReadWeights
from local_llava.convert.companions import LLM, TOWER, Companions, Outside, find, find_known, refuse
from local_llava.convert.config import Config, read_json
from local_llava.convert.families import Parts, Strategy, outside
from local_llava.convert.families.llava import DEFAULT_VISION, read_grid, require, sort_tensors
from local_llava.convert.lora import LoraAdapter
from local_llava.convert.pickle_file import read_pickle
from local_llava.convert.source import SourceTensor
from local_llava.convert.weights import has_weights
from local_llava.errors import CheckpointError

DECODERS = {
    "LlavaLlamaForCausalLM": "llama",
    "LlavaMistralForCausalLM": "mistral",
    "LlavaQwenForCausalLM": "qwen2",
}
"""Supported architectures -> the `model_type` of the language model in them."""

PREFIXES = {
    "model.vision_tower.vision_tower.vision_model.": ("vision", ""),
    "model.vision_tower.vision_tower.": ("vision", ""),
    "model.mm_projector.0.": ("projector", "linear_1."),
    "model.mm_projector.2.": ("projector", "linear_2."),
    "model.image_newline": ("projector", "image_newline"),
    "model.": ("text", "model."),
    "lm_head.": ("text", "lm_head."),
}
"""As `llava.PREFIXES`."""

STOCK = {
    "clip-vit-large-patch14-336": DEFAULT_VISION,
    "clip-vit-large-patch14": {**DEFAULT_VISION, "image_size": 224},
}
"""Configurations of OpenAI's towers, by the last name of their path: a checkpoint with a tower inside names it only."""

LORA, PROJECTOR = "non_lora_trainables.bin", "mm_projector.bin"


@dataclass(frozen=True)
class _Source:
    """The tensors of a LLaVA under the official names, wherever they lie."""

    checkpoint: Checkpoint
    tokenizer: Path
    outside: tuple[Outside, ...] = ()


@dataclass(frozen=True)
class _Tower:
    config: Config
    tensors: Mapping[str, SourceTensor]
    processor: Path | None
    outside: tuple[Outside, ...] = ()
    notes: tuple[str, ...] = ()


def take_apart(directory: Path, companions: Companions, read: ReadWeights, model_type: str) -> Parts:
    """Sort the tensors by part, find the tower, and read LLaVA's settings.

    Args:
        directory: The checkpoint.
        companions: Where the tower is, and the language model under an adapter.
        read: What reads the headers of weight files.
        model_type: Of the language model.

    Raises:
        CheckpointError: A part is missing and cannot be found, or a setting is not supported.
    """
    path = directory / "config.json"
    config = Config(path, read_json(path))
    _check_settings(config)
    source = _source(directory, config, companions, read)
    parts, unknown = sort_tensors(source.checkpoint, PREFIXES)
    require(parts, directory, text="language model (model.*)", projector="projector (model.mm_projector.*)")
    tower = _tower(config, parts["vision"], companions, read)
    grid = _grid(config)
    if not grid:  # `spatial_unpad` brings one along, whether pictures are cut into tiles or not
        parts["projector"].pop("image_newline", None)
    text = Config(path, {**config.values, "model_type": model_type})
    return Parts(
        directory=directory,
        text=text,
        text_tensors=parts["text"],
        tied=text.flag("tie_word_embeddings", False),
        vision=tower.config,
        vision_tensors=tower.tensors,
        projector_tensors=parts["projector"],
        projector_bias=True,
        feature_layers=(config.integer("mm_vision_select_layer", None, -1000, 1000),),
        strategy=_strategy(config, tower.config),
        tokenizer=source.tokenizer,
        top=config.values,
        processor=tower.processor,
        mode="pad" if config.values.get("image_aspect_ratio") == "pad" else None,
        grid=grid,
        unknown=unknown,
        outside=(*source.outside, *tower.outside),
        notes=tower.notes,
    )


def _check_settings(config: Config) -> None:
    """Refuse what changes the prompt, the pictures or the projector in a way that the runtime does not know."""
    config.choice("mm_projector_type", "linear", ("mlp2x_gelu",))
    config.choice("image_aspect_ratio", "square", ("square", "pad", "anyres"))
    for key in ("mm_use_im_start_end", "s2"):
        if config.flag(key, False):
            raise CheckpointError(f"{config.name(key)} is true; only models without it are supported")
    if config.values.get("mm_resampler_type") is not None:
        raise CheckpointError(
            f"{config.name('mm_resampler_type')} is {config.values['mm_resampler_type']!a:.80}; "
            "only models without a resampler are supported"
        )


def _strategy(config: Config, vision: Config) -> Strategy:
    feature = config.choice("mm_vision_select_feature", "patch", ("patch", "cls_patch"))
    return "full" if feature == "cls_patch" else outside.patches_alone(vision)


def _grid(config: Config) -> tuple[tuple[int, int], ...]:
    """The resolutions of LLaVA 1.6, which its code writes width first; its training saves them as a text."""
    if config.values.get("image_aspect_ratio") != "anyres":
        return ()
    config.choice("mm_patch_merge_type", "flat", ("spatial_unpad",))
    value: Any = config.values.get("image_grid_pinpoints")
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):  # it is refused as what it is
            value = json.loads(value.translate({ord("("): "[", ord(")"): "]"}))
    return tuple((height, width) for width, height in read_grid(config, value, "widths and heights"))


def _source(directory: Path, config: Config, companions: Companions, read: ReadWeights) -> _Source:
    if (directory / LORA).is_file():
        path = directory / "adapter_config.json"
        where, key = Config(path, read_json(path)), "base_model_name_or_path"
    elif _has_only_the_projector(directory):
        where, key = config, "_name_or_path"
    else:
        refuse(LLM, companions.llm)
        return _Source(Checkpoint.open(directory, read), directory)
    base = find(LLM, companions.llm, outside.name_in(where, key), directory, where.name(key))
    tensors: dict[str, SourceTensor] = dict(Checkpoint.open(base, read).tensors)
    if where is not config:
        tensors = LoraAdapter.open(directory, read).apply(tensors)
    for name, tensor in read_pickle(directory / (PROJECTOR if where is config else LORA)).items():
        tensors[_official_name(name)] = tensor
    tokenizer = outside.find_tokenizer(directory, base)
    return _Source(Checkpoint(directory, config.values, tensors), tokenizer, (Outside(LLM, base),))


def _has_only_the_projector(directory: Path) -> bool:
    files = {p.name for pattern in ("*.bin", "*.safetensors", "*.index.json") for p in directory.glob(pattern)}
    return files == {PROJECTOR}


def _official_name(name: str) -> str:
    """The name of a tensor that was saved with PEFT's wrapping around the model."""
    name = name.removeprefix("base_model.")
    return name.removeprefix("model.") if name.startswith("model.model.") else name


def _tower(config: Config, inside: Mapping[str, SourceTensor], companions: Companions, read: ReadWeights) -> _Tower:
    directory, named = config.path.parent, companions.vision_tower
    key = "mm_vision_tower" if "mm_vision_tower" in config.values else "vision_tower"
    known = outside.name_in(config, key)
    if inside:
        return _tower_inside(config.name(key), directory, inside, named, known)
    tuned = config.flag("unfreeze_mm_vision_tower", False)
    if tuned and named is None:
        raise CheckpointError(
            f"{config.name('unfreeze_mm_vision_tower')} is true, so the vision tower was tuned, but it is not in the "
            f"checkpoint (model.vision_tower.*), and a stock one would not fit; name the tuned one with {TOWER.option}"
        )
    found = find(TOWER, named, known, directory, config.name(key))
    vision, tensors = outside.read_tower(found, read)
    note = "config.json says that the vision tower was tuned: only that very one gives right answers"
    return _Tower(
        vision,
        outside.without_prefix(tensors),
        outside.find_processor(vision, found, directory),
        (Outside(TOWER, found),),
        (note,) if tuned else (),
    )


def _tower_inside(
    source: str, directory: Path, inside: Mapping[str, SourceTensor], named: str | None, known: str | None
) -> _Tower:
    """The tower inside counts, always; only its configuration is elsewhere."""
    if named is not None:
        found = find(TOWER, named, None, directory, source)
        if has_weights(found):
            refuse(TOWER, named)
    else:
        maybe = find_known(known, directory) if known is not None else None
        if maybe is None:
            stock = STOCK.get(PurePosixPath((known or "").replace("\\", "/")).name)
            if stock is None:
                raise CheckpointError(
                    f"{source} is {known!a:.200}, whose config.json is neither beside the checkpoint nor in the Hub's "
                    f"cache; name a directory with that file alone by {TOWER.option}: the tower itself is inside"
                )
            vision = Config(directory / "config.json", stock)
            return _Tower(vision, inside, outside.find_processor(vision, directory))
        found = maybe
    vision = outside.read_tower_config(found)
    return _Tower(vision, inside, outside.find_processor(vision, directory, found))
