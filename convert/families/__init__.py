"""One family of checkpoints a file, and the registry that finds it.

A family (`llava`) takes a checkpoint apart into decoder, tower and projector, whatever its tensors are called there.
The architectures of those parts (`llama`, `clip`) say which tensors and metadata a GGUF of each has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from local_llava.convert.checkpoint import Checkpoint, SourceTensor
from local_llava.convert.config import Config
from local_llava.convert.plan import Load
from local_llava.errors import CheckpointError


@dataclass(frozen=True)
class Row:
    """One row of a name table: a tensor that the GGUF needs."""

    target: str
    source: str | None
    """Its name in the part's own naming, without the checkpoint's prefixes; None for a tensor of zeros."""
    shape: tuple[int, ...]
    """The shape that the configuration calls for, in numpy's order."""
    load: Callable[[SourceTensor], Load] = lambda tensor: tensor.rows
    """How its rows are read; by default as they are."""


@dataclass(frozen=True)
class Parts:
    """A LLaVA taken apart. Tensors are named as in the part's own checkpoint would be."""

    text: Config
    text_tensors: Mapping[str, SourceTensor]
    """`model.*` and `lm_head.weight`, as in LlamaForCausalLM."""
    vision: Config
    vision_tensors: Mapping[str, SourceTensor]
    """`embeddings.*`, `encoder.*`, ..., as in CLIPVisionModel without its `vision_model` prefix."""
    projector_tensors: Mapping[str, SourceTensor]
    """`linear_1.*` and `linear_2.*`."""
    projector_bias: bool
    feature_layer: int
    """As in the configuration: negative numbers count from the end."""
    tied: bool
    """The decoder's output layer is its embedding."""
    unknown: Sequence[str]
    """Names of tensors that belong to no part."""


def take_apart(checkpoint: Checkpoint) -> Parts:
    """Find the checkpoint's family by its architecture and let it take the checkpoint apart.

    Raises:
        CheckpointError: The architecture is not supported (the message lists those that are), or a part is missing.
    """
    from local_llava.convert.families import llava

    families: dict[str, Callable[[Checkpoint], Parts]] = {"LlavaForConditionalGeneration": llava.take_apart}
    config = Config(checkpoint.directory / "config.json", checkpoint.config)
    architectures = checkpoint.config.get("architectures")
    if architectures is None and checkpoint.config.get("model_type") == "llava":
        architectures = ["LlavaForConditionalGeneration"]
    name = architectures[0] if isinstance(architectures, list) and architectures else architectures
    if not isinstance(name, str) or name not in families:
        note = ""
        if (
            isinstance(name, str)
            and name.endswith("ForCausalLM")
            and not any("vision" in t for t in checkpoint.tensors)
        ):
            note = " (a language model without a vision tower)"
        raise CheckpointError(
            f"{config.name('architectures')}: {name!a:.80}{note} is not supported; supported: {', '.join(families)}"
        )
    return families[name](checkpoint)
