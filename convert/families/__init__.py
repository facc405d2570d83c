"""One family of checkpoints a file, and the registry that finds it.

A family (`llava`, `official`, `xtuner`) takes a checkpoint apart into decoder, tower and projector, whatever its
tensors are called there. The architectures of those parts (`decoders`, `towers`) say which tensors and metadata a GGUF
of each has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from local_llava.convert.checkpoint import Checkpoint, ReadWeights, check_directory
from local_llava.convert.companions import LLM, NO_COMPANIONS, TOWER, Companions, Outside, refuse
from local_llava.convert.config import Config, read_json
from local_llava.convert.families import strangers
from local_llava.convert.plan import Field, Load
from local_llava.convert.source import SourceTensor
from local_llava.convert.weights import read_weights
from local_llava.errors import CheckpointError
from local_llava.preprocessing import Preprocessing, PreprocessMode

Strategy: TypeAlias = Literal["default", "full"]
"""Whether the projector gets the patches alone, or the class token as well."""


@dataclass(frozen=True)
class Row:
    """One row of a name table: a tensor that the GGUF needs."""

    target: str
    source: str | None
    """Its name in the part's own naming, without the checkpoint's prefixes; None for one that no checkpoint holds."""
    shape: tuple[int, ...]
    """The shape that the configuration calls for, in numpy's order."""
    load: Callable[[SourceTensor], Load] = lambda tensor: tensor.rows
    """How its rows are read; by default as they are."""
    value: NDArray[np.float32] | None = None
    """Its values where there is no source; None for zeros."""


@dataclass(frozen=True)
class Parts:
    """A LLaVA taken apart. Tensors are named as in the part's own checkpoint would be."""

    directory: Path
    """Of the checkpoint, for messages and its name."""
    text: Config
    text_tensors: Mapping[str, SourceTensor]
    """`model.*` and `lm_head.weight`, as in LlamaForCausalLM."""
    tied: bool
    """The decoder's output layer is its embedding."""
    vision: Config
    vision_tensors: Mapping[str, SourceTensor]
    """`embeddings.*`, `encoder.*`, ..., as in CLIPVisionModel without its `vision_model` prefix."""
    projector_tensors: Mapping[str, SourceTensor]
    """`linear_1.*` and `linear_2.*`; of LLaVA-NeXT also `image_newline`, of VipLlava `layernorm.*`."""
    projector_bias: bool
    feature_layers: tuple[int, ...]
    """As in the configuration: negative numbers count from the end."""
    strategy: Strategy
    tokenizer: Path
    """Directory of the tokenizer's files and chat template."""
    top: Mapping[str, Any]
    """The top level of the configuration, which names the image token."""
    processor: Path | None
    """Directory of the image processor's configuration; None where it is known to be CLIP's own."""
    mode: PreprocessMode | None = None
    """How pictures become square, where the family says so and not the image processor."""
    grid: tuple[tuple[int, int], ...] = ()
    """Of LLaVA-NeXT: the resolutions that pictures are cut into tiles from, height and width."""
    unknown: Sequence[str] = ()
    """Names of tensors that belong to no part."""
    outside: Sequence[Outside] = ()
    """The parts that come from elsewhere."""
    notes: Sequence[str] = ()
    """What else the user may not expect, one line each."""


@dataclass(frozen=True)
class Decoder:
    """What a language model's GGUF holds besides its tokenizer."""

    architecture: str
    """As GGUF names it."""
    n_vocab: int
    n_embd: int
    n_layer: int
    n_head: int
    n_head_kv: int
    rows: Sequence[Row]
    """Every tensor, in the order of the file."""
    fields: Sequence[Field]
    notes: tuple[str, ...] = ()
    """What the user may not expect, one line each."""


@dataclass(frozen=True)
class Tower:
    """What an mmproj holds: a vision tower and LLaVA's projector."""

    image_size: int
    """Width and height of its input, pixels."""
    rows: Sequence[Row]
    """Every tensor of the tower, in the order of the file."""
    projector_rows: Sequence[Row]
    fields: Callable[[Preprocessing], Sequence[Field]]
    """The metadata, for the preprocessing that the checkpoint asks for."""


def open_checkpoint(directory: Path, companions: Companions = NO_COMPANIONS, read: ReadWeights = read_weights) -> Parts:
    """Read a checkpoint of any supported format and take it apart. No weights are read.

    Args:
        directory: The checkpoint.
        companions: Where the parts are that it does not carry.
        read: What reads the headers of weight files.

    Raises:
        CheckpointError: The format or the architecture is not supported (the message lists what is), a file is missing
            or damaged, or a part is missing.
    """
    from local_llava.convert.families import llava, official, vipllava, xtuner  # which import what is defined here

    check_directory(directory)
    if xtuner.is_xtuner(directory):
        return xtuner.take_apart(directory, companions, read)
    transformers = {
        "LlavaForConditionalGeneration": llava.take_apart,
        "LlavaNextForConditionalGeneration": llava.take_apart,
        "VipLlavaForConditionalGeneration": vipllava.take_apart,
    }
    name = _architecture(directory, (*transformers, *official.DECODERS))
    if name in official.DECODERS:
        return official.take_apart(directory, companions, read, official.DECODERS[name])
    refuse(TOWER, companions.vision_tower)
    refuse(LLM, companions.llm)
    return transformers[name](Checkpoint.open(directory, read))


def _architecture(directory: Path, supported: Sequence[str]) -> str:
    """What config.json calls the model."""
    path = directory / "config.json"
    if not path.is_file():
        hint = strangers.without_config(directory)
        raise CheckpointError(f"{directory}: no config.json, so this is no checkpoint{'; ' if hint else ''}{hint}")
    config = Config(path, read_json(path))
    value = config.values.get("architectures")
    if value is None:
        value = _BY_MODEL_TYPE.get(str(config.values.get("model_type")))
    name = value[0] if isinstance(value, list) and value else value
    if not isinstance(name, str) or name not in supported:
        hint = strangers.with_config(str(name), config.values)
        raise CheckpointError(
            f"{config.name('architectures')}: {name!a:.80}{f' ({hint})' if hint else ''} is not supported; "
            f"supported: {', '.join(supported)}"
        )
    return name


_BY_MODEL_TYPE = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "vipllava": "VipLlavaForConditionalGeneration",
    "llava_llama": "LlavaLlamaForCausalLM",
    "llava_mistral": "LlavaMistralForCausalLM",
    "llava_qwen": "LlavaQwenForCausalLM",
}
"""Where a configuration names no architecture."""


def is_checkpoint(directory: Path) -> bool:
    """True for a directory that looks like a checkpoint."""
    return (directory / "config.json").is_file() or (directory / "projector").is_dir()
