"""The models that local-llava knows by name: where they are published, under which license, how well they do.

Knows the list, which is data (`models/models.json`), its checks and its look-ups. Does not know what is on this
computer (`store`, `hub_cache`), how files are fetched, or how sizes follow from a configuration (`model_sizes`).
"""

from __future__ import annotations

import difflib
import functools
import importlib.resources
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, cast, get_args

from local_llava.errors import UsageError
from local_llava.types import DEFAULT_MMPROJ_QUANT

Format: TypeAlias = Literal["gguf", "transformers", "official", "xtuner"]

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*\w")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_MAX_BYTES = 1 << 42


@dataclass(frozen=True)
class PublishedPair:
    """Two GGUF files of a repository that belong together."""

    quant: str
    """Type of the language model, such as Q4_K_M."""
    mmproj_quant: str
    model: str
    """Name of the language model's file in the repository."""
    mmproj: str
    model_bytes: int | None = None
    """None where the exact size is not known."""
    mmproj_bytes: int | None = None


@dataclass(frozen=True)
class Repository:
    """A repository of the Hugging Face Hub that holds the model in one format."""

    name: str
    """owner/name."""
    format: Format
    pairs: tuple[PublishedPair, ...] = ()
    """The pairs of a repository of GGUF files; none for a checkpoint."""
    vision_tower: str | None = None
    """Repository of the tower that this checkpoint does not carry, or only an adapter of, and needs beside it."""
    llm: str | None = None
    """Repository of the language model that this checkpoint is an adapter of, and that it needs beside it."""
    bytes: int | None = None
    """Of the checkpoint's weights, to 2 %; None if not known."""


@dataclass(frozen=True)
class ModelEntry:
    """One model of the list."""

    name: str
    """The name that it is shown under, in lower case."""
    title: str
    repositories: tuple[Repository, ...]
    """In order of preference."""
    license: str
    text_config: Mapping[str, Any]
    """The language model's configuration, as in the checkpoint's config.json."""
    vision_config: Mapping[str, Any]
    """The tower's."""
    vocabulary_bytes: int
    """What the vocabulary takes in a GGUF, to 10 %."""
    aliases: tuple[str, ...] = ()
    """Other names that users may give."""
    license_note: str = ""
    """Where the license does not stand in the repository: whose it is."""
    grid: tuple[tuple[int, int], ...] = ()
    """Of LLaVA-NeXT: heights and widths, pixels, that a picture is cut into tiles at (image_grid_pinpoints)."""
    scores: Mapping[str, str] = field(default_factory=dict)
    """Published scores by benchmark."""

    def published(self, quant: str, mmproj_quant: str | None = None) -> tuple[Repository, PublishedPair] | None:
        """The published GGUF pair of these types, if there is one.

        Args:
            quant: Type of the language model, in upper case.
            mmproj_quant: Type of the mmproj; None for F16, as they are published.
        """
        for repository in self.repositories:
            for pair in repository.pairs:
                if pair.quant == quant and pair.mmproj_quant == (mmproj_quant or DEFAULT_MMPROJ_QUANT):
                    return repository, pair
        return None

    @property
    def checkpoint(self) -> Repository:
        """The preferred repository to convert from."""
        return next(r for r in self.repositories if r.format != "gguf")

    def repository(self, name: str) -> Repository | None:
        """That of a name (owner/name), in any case of letters."""
        return next((r for r in self.repositories if r.name.lower() == name.lower()), None)


def entries() -> tuple[ModelEntry, ...]:
    """All models, in the order in which they are shown."""
    return _load()


def find(name: str) -> ModelEntry | None:
    """The model that a name, an alias or one of its repositories (owner/name) means, in any case of letters."""
    return _names().get(name.lower())


def get(name: str) -> ModelEntry:
    """As `find`.

    Raises:
        UsageError: No model of the list is called that; the message has near matches.
    """
    entry = find(name)
    if entry is None:
        raise UsageError(f"no model is called {name!a:.80}{suggestion(name)}; `local-llava models` lists them")
    return entry


def suggestion(name: str) -> str:
    """ "; did you mean ...?" for a name that is nearly one of the list's; "" for others."""
    # Whoever writes owner/name nearly right should see a repository, others a name.
    known = [n for n in _names() if ("/" in n) == ("/" in name)]
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.6)
    names = dict.fromkeys(n if "/" in n else _names()[n].name for n in near)
    return f"; did you mean {' or '.join(names)}?" if names else ""


def split_name(name: str) -> tuple[str, str | None]:
    """The two parts of NAME:QUANT; the type in upper case, None where none is named."""
    base, colon, quant = name.rpartition(":")
    return (base, quant.upper()) if colon and base else (name, None)


def is_repository(name: str) -> bool:
    """Whether a text has the form owner/name of a repository of the Hub."""
    return _REPOSITORY.fullmatch(name) is not None and len(name) <= 192 and ".." not in name and "--" not in name


@functools.cache
def _names() -> Mapping[str, ModelEntry]:
    """Models by everything that they are called, in lower case."""
    names: dict[str, ModelEntry] = {}
    for entry in _load():
        for name in (entry.name, *entry.aliases, *(r.name for r in entry.repositories)):
            if name.lower() in names:
                raise ValueError(f"models.json: {name} is named twice")
            names[name.lower()] = entry
    return names


@functools.cache
def _load() -> tuple[ModelEntry, ...]:
    text = importlib.resources.files("local_llava.models").joinpath("models.json").read_text(encoding="utf-8")
    return parse(json.loads(text))


def parse(document: Any) -> tuple[ModelEntry, ...]:
    """The models of a document such as models.json.

    Raises:
        ValueError: A defect of the list; the message names the entry and the field.
    """
    _check_keys(document, "models.json", {"about": str, "vision_config": dict, "models": list})
    return tuple(_entry(model, document["vision_config"]) for model in document["models"])


def _entry(model: Any, vision_config: Mapping[str, Any]) -> ModelEntry:
    required = {"name": str, "title": str, "license": str, "repositories": list, "text_config": dict}
    where = f"models.json: {model.get('name') if isinstance(model, dict) else model!a:.40}"
    optional = {"aliases": list, "license_note": str, "grid": list, "scores": dict}
    _check_keys(model, where, {**required, "vocabulary_bytes": int}, optional)
    for name in (model["name"], *model.get("aliases", ())):
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"{where}: {name!a:.40} is no name: lower-case letters, digits, '.', '_' and '-'")
    if not all(isinstance(score, str) for score in model.get("scores", {}).values()):
        raise ValueError(f"{where}: scores must be texts")
    repositories = tuple(_repository(r, where) for r in model["repositories"])
    if all(r.format == "gguf" for r in repositories):
        raise ValueError(f"{where}: there is no checkpoint to convert")
    values = {**model, "aliases": tuple(model.get("aliases", ())), "repositories": repositories}
    values["grid"] = tuple((int(height), int(width)) for height, width in model.get("grid", ()))
    return ModelEntry(**values, vision_config=vision_config)


def _repository(value: Any, where: str) -> Repository:
    optional = {"pairs": list, "vision_tower": str, "llm": str, "bytes": int}
    _check_keys(value, f"{where}: repositories", {"name": str, "format": str}, optional)
    name, form = value["name"], value["format"]
    where = f"{where}: {name}"
    if form not in get_args(Format):
        raise ValueError(f"{where}: format must be one of {', '.join(get_args(Format))}, not {form!a:.40}")
    for repository in (name, value.get("vision_tower", name), value.get("llm", name)):
        if not is_repository(repository):
            raise ValueError(f"{where}: {repository!a:.80} is not owner/name")
    pairs = tuple(_pair(pair, where) for pair in value.get("pairs", ()))
    if bool(pairs) != (form == "gguf"):
        raise ValueError(f"{where}: a repository of GGUF files has pairs, others have none")
    return Repository(**{**value, "format": cast(Format, form), "pairs": pairs})


def _pair(value: Any, where: str) -> PublishedPair:
    required = dict.fromkeys(("quant", "mmproj_quant", "model", "mmproj"), str)
    _check_keys(value, f"{where}: pairs", required, {"model_bytes": int, "mmproj_bytes": int})
    for name in (value["model"], value["mmproj"]):
        if not name.endswith(".gguf") or name.startswith("/") or "\\" in name or ".." in name:
            raise ValueError(f"{where}: {name!a:.80} is not the name of a GGUF file")
    return PublishedPair(**value)


def _check_keys(
    value: Any, where: str, required: Mapping[str, type], optional: Mapping[str, type] | None = None
) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object, not {value!a:.40}")
    known = {**required, **(optional or {})}
    for key in (*required, *value):
        if key not in value:
            raise ValueError(f"{where}: {key} is missing")
        if key not in known:
            raise ValueError(f"{where}: {key!a:.40} is unknown; there are {', '.join(known)}")
        if type(value[key]) is not known[key] or (known[key] is int and not 0 < value[key] < _MAX_BYTES):
            raise ValueError(f"{where}: {key} must be of type {known[key].__name__}, not {value[key]!a:.40}")
