"""LLaVA as XTuner saves it (github.com/InternLM/xtuner, `xtuner convert pth_to_hf`): each part in a directory.

Knows which directories there are: `projector/` always; the language model beside it or in `llm/`, and the tower in
`visual_encoder/`, where they were trained as a whole; `llm_adapter/` and `visual_encoder_adapter/`, LoRAs on models
that lie elsewhere; nothing of what was not trained. xtuner_config.py, the training's settings, is a program: it is
searched as text and never run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from local_llava.convert.checkpoint import Checkpoint, ReadWeights
from local_llava.convert.companions import LLM, TOWER, Companions, Outside, Part, find, refuse
from local_llava.convert.families import Parts, outside
from local_llava.convert.lora import CONFIG, LoraAdapter
from local_llava.convert.source import SourceTensor
from local_llava.errors import CheckpointError

SETTINGS = "xtuner_config.py"
STOCK_TOWER = "openai/clip-vit-large-patch14-336"
"""What all of XTuner's published LLaVA models were trained with."""

FEATURE_LAYER = -2
"""LLaVAModel's default."""

MAX_SETTINGS = 1 << 20
"""Bytes of xtuner_config.py that are searched; a real one has 10,000."""

_LAYERS = {"model.0.": "linear_1.", "model.2.": "linear_2."}
"""Of the projector: prefix there -> ours."""

_NAME = re.compile(r"""^(\w+_name_or_path)\s*=\s*["']([^"'\n]{1,1000})["']""", re.MULTILINE)
_LAYER = re.compile(r"^[^#\n]*?\bvisual_select_layer\s*=([^,)#\n]{1,200})", re.MULTILINE)


@dataclass(frozen=True)
class _Settings:
    """What xtuner_config.py says."""

    path: Path
    text: str
    """Empty where there is no such file."""
    names: Mapping[str, str]
    """The models that the training began with."""
    feature_layer: int

    def trains(self, part: str) -> bool:
        """Whether a part is said to be trained, so that it must be in the checkpoint."""
        lora = re.search(rf"^[^#\n]*\b{part}_lora\s*=\s*(?!None\b)\S", self.text, re.MULTILINE)
        frozen = re.search(rf"^[^#\n]*\bfreeze_{part}\s*=\s*True\b", self.text, re.MULTILINE)
        return bool(self.text) and (lora is not None or frozen is None)


@dataclass(frozen=True)
class _Whole:
    """Where a part is as a whole, and the adapter that goes on it."""

    directory: Path
    adapter: LoraAdapter | None = None
    outside: tuple[Outside, ...] = ()

    def adapted(self, tensors: Mapping[str, SourceTensor]) -> Mapping[str, SourceTensor]:
        return tensors if self.adapter is None else self.adapter.apply(tensors)


@dataclass(frozen=True)
class _Layout:
    """How a part is called: what was trained of it, and what its training began with."""

    part: Part
    name: str
    """In xtuner_config.py, and of its directory."""
    default: str | None = None
    """What its training began with where nothing says it."""

    @property
    def key(self) -> str:
        """What xtuner_config.py calls the model that its training began with."""
        return f"{self.name}_name_or_path"

    @property
    def adapter(self) -> str:
        """The directory of its LoRA."""
        return f"{self.name}_adapter"


_LLM, _TOWER = _Layout(LLM, "llm"), _Layout(TOWER, "visual_encoder", STOCK_TOWER)


def is_xtuner(directory: Path) -> bool:
    """Whether a directory is laid out as XTuner's are."""
    return (directory / "projector").is_dir()


def take_apart(directory: Path, companions: Companions, read: ReadWeights) -> Parts:
    """Read the directories, find what lies outside of them, and put adapters on what they belong to.

    Raises:
        CheckpointError: A part is missing and cannot be found, or a setting is not supported.
    """
    settings = _read_settings(directory / SETTINGS)
    projector, bias, unknown = _read_projector(directory / "projector", read)
    llm = _find_whole(_LLM, directory, companions.llm, settings, read)
    tower = _find_whole(_TOWER, directory, companions.vision_tower, settings, read)
    language = Checkpoint.open(llm.directory, read)
    if not language.values:
        raise CheckpointError(f"{language.config.path}: is empty, and the language model beside it needs one")
    vision, vision_tensors = outside.read_tower(tower.directory, read)
    return Parts(
        directory=directory,
        text=language.config,
        text_tensors=llm.adapted(language.tensors),
        tied=language.config.flag("tie_word_embeddings", False),
        vision=vision,
        vision_tensors=outside.without_prefix(tower.adapted(vision_tensors)),
        projector_tensors=projector,
        projector_bias=bias,
        feature_layers=(settings.feature_layer,),
        strategy=outside.patches_alone(vision),
        tokenizer=outside.find_tokenizer(directory, llm.directory),
        top=language.values,
        processor=outside.find_processor(vision, tower.directory, directory),
        mode="pad",  # its training and its chat make every picture square
        unknown=unknown,
        outside=(*llm.outside, *tower.outside),
    )


def _read_settings(path: Path) -> _Settings:
    text = ""
    if path.is_file():
        try:
            with path.open("rb") as file:
                text = file.read(MAX_SETTINGS).decode("utf-8", errors="replace")
        except OSError as e:
            raise CheckpointError(f"{path}: cannot be read: {e.strerror}") from e
    values = {v.strip() for v in _LAYER.findall(text)} - {"visual_select_layer"}
    layer = values.pop() if values else str(FEATURE_LAYER)
    if values or not re.fullmatch(r"-?[0-9]{1,3}", layer):
        raise CheckpointError(f"{path}: visual_select_layer must be one whole number, not {layer!a:.80}")
    return _Settings(path, text, dict(_NAME.findall(text)), int(layer))


def _read_projector(directory: Path, read: ReadWeights) -> tuple[dict[str, SourceTensor], bool, list[str]]:
    """The projector's tensors by our names, whether it has biases, and the names that it should not have."""
    checkpoint = Checkpoint.open(directory, read)
    config = checkpoint.config
    depth = config.values.get("depth", 2)
    if depth != 2 or isinstance(depth, bool):
        raise CheckpointError(f"{config.name('depth')} is {depth!a:.80}; projectors of 2 linear layers are supported")
    config.choice("hidden_act", "gelu", ("gelu",))
    tensors: dict[str, SourceTensor] = {}
    unknown = []
    for name, tensor in checkpoint.tensors.items():
        prefix = next((p for p in _LAYERS if name.startswith(p)), None)
        if prefix is None:
            unknown.append(f"projector/: {name}")
        else:
            tensors[_LAYERS[prefix] + name.removeprefix(prefix)] = tensor
    return tensors, config.flag("bias", True), unknown


def _find_whole(layout: _Layout, directory: Path, named: str | None, settings: _Settings, read: ReadWeights) -> _Whole:
    """A part as a whole: from the checkpoint, or from where its adapter says, or else the training's settings."""
    part, adapter = layout.part, directory / layout.adapter
    inside = _inside(directory, layout)
    if inside is not None:
        refuse(part, named)
        if adapter.is_dir():  # where `xtuner convert merge` leaves it
            raise CheckpointError(
                f"{adapter}: the checkpoint has the {part.what} as a whole, too, in {inside}, which this adapter may "
                "be merged into already; remove the one that does not count"
            )
        return _Whole(inside)
    lora = LoraAdapter.open(adapter, read) if adapter.is_dir() else None
    if lora is None and named is None and settings.trains(layout.name):
        raise CheckpointError(
            f"{settings.path}: the {part.what} was trained, but neither {layout.name}/ nor {layout.adapter}/ is there, "
            f"and an untrained one would not fit; name the trained one with {part.option}"
        )
    source, known = f"{settings.path}: {layout.key}", settings.names.get(layout.key)
    if lora is not None and lora.base_model is not None:
        source, known = f"{adapter / CONFIG}: base_model_name_or_path", lora.base_model
    if known is None and layout.default is not None:
        source, known = str(directory), layout.default
    found = find(part, named, known, directory, source)
    return _Whole(found, lora, (Outside(part, found),))


def _inside(directory: Path, layout: _Layout) -> Path | None:
    """The directory in a checkpoint that has a part as a whole, or should have: nothing else may replace it."""
    if (directory / layout.name).is_dir():
        return directory / layout.name
    if layout is not _LLM:
        return None
    config = directory / "config.json"  # empty in old repositories that hold adapters
    has_config = config.is_file() and config.stat().st_size > 0
    return directory if has_config or outside.expects_weights(directory) else None
