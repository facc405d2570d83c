"""From what a user names to the files of a pair.

Knows which two files belong together, and where to look for a name: in the store, then in the Hugging Face cache.
Converts a checkpoint that is named where a pair is needed, once, and keeps the result in the store. Never downloads.
"""

from __future__ import annotations

import errno
import importlib.resources
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from local_llava import model_list, store
from local_llava.corrections import architecture
from local_llava.errors import ModelFileError, UsageError
from local_llava.gguf_file import GGUFFile
from local_llava.llm_file import quant_of
from local_llava.model_list import ModelEntry
from local_llava.store import hub_cache
from local_llava.store.origin import Origin, Pair
from local_llava.types import DEFAULT_MMPROJ_QUANT, DEFAULT_QUANT, PAIR_KEY, ModelFiles

OnConvert: TypeAlias = Callable[[Path, int], Callable[[int], None]]

_CONVERSION = "1"
"""To be raised when the same checkpoint gives other files than before, so that those kept are made anew."""

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:\w+)?")
"""What may be NAME, owner/name or a key, with :QUANT or not. Anything else can only be a path."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that a pair has to be made of, or was made of before."""

    directory: Path
    quant: str = DEFAULT_QUANT
    """Type of the language model, in upper case."""
    repository: str | None = None
    """That the directory is a snapshot of; None for a user's own."""
    mmproj: Path | None = None
    """To be taken in place of the one that is made."""


def builtin_checkpoint() -> Path:
    """The built-in model, as it was trained. It comes with the package."""
    return Path(str(importlib.resources.files("local_llava.tiny_llava")))


def resolve(
    model: str | os.PathLike[str] | None,
    mmproj: str | os.PathLike[str] | None = None,
    on_convert: OnConvert | None = None,
    on_wait: Callable[[], None] | None = None,
    other_mmproj: Path | None = None,
) -> ModelFiles:
    """Find the pair that a user means, and make it if need be.

    Args:
        model: A language model's GGUF, a directory with one pair, or a checkpoint; else a name of the model list or a
            repository of the Hub, with :QUANT or not, that is in the store or in the Hugging Face cache; else the key
            of a kept pair. None for the built-in model. What exists as a path is taken for one.
        mmproj: The other file; None to find it.
        on_convert: Called with the checkpoint and the bytes to be written when one has to be converted first; gives
            what to call with the bytes written.
        on_wait: Called when another process is converting the same checkpoint, before waiting for it; None to log it.
        other_mmproj: Taken for a language model's GGUF that has no mmproj beside it.

    Raises:
        ModelFileError: Nothing usable is there, or more than one pair.
        CheckpointError: The checkpoint cannot be converted.
        UsageError: An mmproj was named without its model, or a type that there is not.
        OutputError: A conversion cannot be kept.
    """
    found = locate(model, mmproj, other_mmproj)
    return found if isinstance(found, ModelFiles) else make(found, on_convert, on_wait)


def locate(
    model: str | os.PathLike[str] | None,
    mmproj: str | os.PathLike[str] | None = None,
    other_mmproj: Path | None = None,
) -> ModelFiles | Checkpoint:
    """As `resolve`, but makes nothing: gives the checkpoint that has to be converted first."""
    if model is None:
        if mmproj is not None:
            raise UsageError("an mmproj needs its language model: name both")
        return Checkpoint(builtin_checkpoint())
    path = Path(model)
    own = None if mmproj is None else Path(mmproj)
    kind = _what(path)
    if kind == "directory":
        # Repositories of GGUF files often carry the config.json, too.
        if _is_checkpoint(path):
            if mmproj is not None:
                raise UsageError(f"{path} is a checkpoint, which brings its own tower: name no mmproj")
            return Checkpoint(path)
        return _pair_in(path, own, other_mmproj)
    if kind == "file":
        return ModelFiles(path, own or _mmproj_beside(path, other_mmproj))
    if not _NAME.fullmatch(str(model)) or path.suffix == ".gguf":
        raise ModelFileError(f"{path}: no such file or directory; a GGUF, or a directory with a pair or a checkpoint")
    found = locate_name(str(model))
    return replace(found, mmproj=own) if own else found


def find_checkpoint(name: str) -> Path:
    """The directory of a checkpoint that a user means, by its path, or by a name that the Hub's cache has it under.

    Raises:
        ModelFileError: A name of which no whole checkpoint is there. What a path leads to is not looked at.
    """
    path = Path(name)
    if _what(path) != "nothing" or not _NAME.fullmatch(name):
        return path
    entry = model_list.find(name)
    if entry is None and not model_list.is_repository(name):
        return path
    for repository in _repositories(name, entry):
        for snapshot in filter(hub_cache.is_complete, hub_cache.snapshots(repository)):
            if _is_checkpoint(snapshot):
                return snapshot
    raise ModelFileError(
        f"{name}: neither a directory, nor a checkpoint in the Hugging Face cache; `{_pull(name, None)}` downloads and "
        "converts it"
    )


def _repositories(name: str, entry: ModelEntry | None) -> list[str]:
    """A repository itself; of a name of the list all of the model's, the preferred one first."""
    if "/" in name:
        return [name]
    return [repository.name for repository in entry.repositories] if entry else []


def _what(path: Path) -> Literal["directory", "file", "nothing"]:
    try:
        return "directory" if path.is_dir() else "file" if path.exists() else "nothing"
    except OSError as e:
        if e.errno == errno.ENAMETOOLONG:
            return "nothing"
        raise ModelFileError(f"{path}: cannot be read: {e.strerror}") from e


def converted(
    checkpoint: Path,
    on_convert: OnConvert | None = None,
    on_wait: Callable[[], None] | None = None,
    *,
    quant: str = DEFAULT_QUANT,
    mmproj_quant: str = DEFAULT_MMPROJ_QUANT,
    repository: str | None = None,
) -> ModelFiles:
    """The pair made of a checkpoint, converted now if it was not before or has changed since.

    Args:
        checkpoint: Its directory.
        on_convert: As of `resolve`, as is the next.
        on_wait: Several processes that want the same conversion make it once; this is called by those that wait.
        quant: Type of the language model, in upper case.
        mmproj_quant: Type of the mmproj.
        repository: That the directory is a snapshot of; None for a user's own.

    Raises:
        CheckpointError: The checkpoint cannot be converted.
        OutputError: The result cannot be kept.
    """
    from local_llava.convert import prepare

    digest = _digest(checkpoint)
    key = store.key_of(_CONVERSION, digest, quant, mmproj_quant)
    pair = store.get(key)
    if pair is not None:
        return pair.files
    name = name_of(Checkpoint(checkpoint, repository=repository))
    with store.new_pair(key, name, on_wait=on_wait) as new:
        if new.pair is not None:
            return new.pair.files
        conversion = prepare(checkpoint, new.directory, quant=quant, mmproj_quant=mmproj_quant)
        progress = on_convert(checkpoint, sum(conversion.sizes)) if on_convert else None
        files = conversion.write(progress=progress)
        origin = Origin(
            kind="converted",
            name=name,
            quant=quant,
            mmproj_quant=mmproj_quant,
            source=str(checkpoint.resolve()),
            repository=repository,
            revision=checkpoint.name if repository else None,
            digest=digest,
        )
        return new.publish(origin, files).files


def make(
    checkpoint: Checkpoint, on_convert: OnConvert | None = None, on_wait: Callable[[], None] | None = None
) -> ModelFiles:
    """The pair of a checkpoint, as `converted`."""
    directory, quant, repository = checkpoint.directory, checkpoint.quant, checkpoint.repository
    files = converted(directory, on_convert, on_wait, quant=quant, repository=repository)
    return ModelFiles(files.model, checkpoint.mmproj or files.mmproj)


def made(checkpoint: Checkpoint) -> ModelFiles | None:
    """The pair of a checkpoint, if it was made before and the checkpoint has not changed since.

    Raises:
        CheckpointError: The checkpoint cannot be read.
    """
    digest = _digest(checkpoint.directory)
    pair = store.get(store.key_of(_CONVERSION, digest, checkpoint.quant, DEFAULT_MMPROJ_QUANT))
    return ModelFiles(pair.files.model, checkpoint.mmproj or pair.files.mmproj) if pair else None


def _digest(checkpoint: Path) -> str:
    from local_llava.convert.families import open_checkpoint

    outside = [part.directory for part in open_checkpoint(checkpoint).outside]
    return store.source_digest(checkpoint, *outside)


def name_of(checkpoint: Checkpoint) -> str:
    """What a pair that is made of it is called, without its type."""
    if checkpoint.repository is not None:
        entry = model_list.find(checkpoint.repository)
        return entry.name if entry else checkpoint.repository
    from local_llava.convert.conversion import model_name

    return model_name(checkpoint.directory)


def _is_checkpoint(path: Path) -> bool:
    from local_llava.convert.families import is_checkpoint

    return is_checkpoint(path) and not any(path.glob("*.gguf"))


def locate_name(name: str) -> ModelFiles | Checkpoint:
    """What a name with or without a type means: from the store, else from the Hugging Face cache. Never a path.

    Raises:
        ModelFileError: Nothing of that name is there, or several types of it.
        UsageError: There is no such type.
    """
    if not _NAME.fullmatch(name):
        raise ModelFileError(f"{name[:80]!a}: no model is called that; `local-llava models` lists them")
    base, quant = model_list.split_name(name)
    entry = model_list.find(base)
    kept = store.find(base)
    pair = _chosen(kept, quant)
    if pair is not None:
        return pair.files
    if quant is not None:
        _check_quant(quant)
    for repository in _repositories(base, entry):
        for snapshot in filter(hub_cache.is_complete, hub_cache.snapshots(repository)):
            if _is_checkpoint(snapshot):
                return Checkpoint(snapshot, quant or DEFAULT_QUANT, repository)
            published = _published(entry, repository, snapshot, quant) or _pair_of_type(snapshot, quant)
            if published is not None:
                return published
    raise ModelFileError(_absent(name, base, quant, kept))


def _chosen(kept: list[Pair], quant: str | None) -> Pair | None:
    """The pair of the type that is wanted; where none is, of the default type, or else the only one."""
    of_type = [pair for pair in kept if pair.origin.quant == (quant or DEFAULT_QUANT)]
    if not of_type and quant is None and len({pair.origin.quant for pair in kept}) == 1:
        of_type = kept
    # The tower of the default type first, and then the newest, as they come.
    return min(of_type, key=lambda pair: pair.origin.mmproj_quant != DEFAULT_MMPROJ_QUANT, default=None)


def _absent(name: str, base: str, quant: str | None, kept: list[Pair]) -> str:
    """Why a name cannot be used, and what can be done."""
    if kept:
        there = ", ".join(sorted({f"{base}:{pair.origin.quant}" for pair in kept}))
        wanted = f"{name} is not on this computer" if quant else f"{name}: say which"
        return f"{wanted}; there are {there}" + (f"; `{_pull(base, quant)}` adds it" if quant else "")
    entry = model_list.find(base)
    if entry is not None:
        return (
            f"{name} is not on this computer: `{_pull(base, quant)}` downloads it{_download_size(entry, base, quant)}"
        )
    if model_list.is_repository(base):
        return (
            f"{name}: no such file or directory, nor a repository that is on this computer: "
            f"`{_pull(base, quant)}` downloads it from the Hugging Face Hub{model_list.suggestion(base)}"
        )
    return (
        f"{name}: no such file or directory, and no model is called that{model_list.suggestion(base)}; "
        "`local-llava models` lists them"
    )


def _pull(base: str, quant: str | None) -> str:
    return f"local-llava pull {base}" + (f" --quant {quant}" if quant else "")


def _download_size(entry: ModelEntry, base: str, quant: str | None) -> str:
    from local_llava.convert.write import human_size
    from local_llava.model_sizes import download_bytes

    size = download_bytes(entry, quant or DEFAULT_QUANT, repository=base if "/" in base else None)
    return f" ({human_size(size)})" if size else ""


def _check_quant(quant: str) -> None:
    from local_llava.convert import mixes

    mixes.get_mix(quant, mixes.LLM_MIXES)


def _published(entry: ModelEntry | None, repository: str, snapshot: Path, quant: str | None) -> ModelFiles | None:
    """The pair of a repository of GGUF files that is in the model list, where both files are there."""
    listed = entry.repository(repository) if entry else None
    for pair in listed.pairs if listed else ():
        files = ModelFiles(snapshot / pair.model, snapshot / pair.mmproj)
        if pair.quant == (quant or DEFAULT_QUANT) and files.model.is_file() and files.mmproj.is_file():
            return files
    return None


def _pair_of_type(directory: Path, quant: str | None) -> ModelFiles | None:
    """The pair among GGUF files of any names whose language model has a type: the default one, or else the only one."""
    models, projectors = _by_kind(directory)
    types = {path: quant_of(GGUFFile.open(path)) for path in models}
    found = [path for path in models if types[path] == (quant or DEFAULT_QUANT)]
    if not found and quant is None:
        if len(models) > 1:
            there = ", ".join(f"{types[path]} ({path.name})" for path in models)
            raise ModelFileError(
                f"{directory}: name the type that you mean (NAME:TYPE), or the file; there are {there}"
            )
        found = models
    return ModelFiles(found[0], _only(projectors, found[0])) if found and projectors else None


def _kind(path: Path) -> str:
    """The `general.architecture` of a GGUF."""
    return str(architecture(GGUFFile.open(path)))


def _by_kind(directory: Path) -> tuple[list[Path], list[Path]]:
    """The language models and the mmproj files of a directory."""
    kinds = {path: _kind(path) for path in sorted(directory.glob("*.gguf"))}
    models = [path for path, kind in kinds.items() if kind != "clip"]
    return models, [path for path, kind in kinds.items() if kind == "clip"]


def _pair_in(directory: Path, mmproj: Path | None, other_mmproj: Path | None) -> ModelFiles:
    models, projectors = _by_kind(directory)
    if not models and not projectors:
        raise ModelFileError(f"{directory}: neither GGUF files nor a checkpoint (config.json) are there")
    if len(models) != 1:
        names = ", ".join(p.name for p in models) or "none"
        raise ModelFileError(f"{directory}: one language model is needed; there are {names}: name the file you mean")
    return ModelFiles(models[0], mmproj or _only(projectors, models[0], other_mmproj))


def _mmproj_beside(model: Path, other: Path | None) -> Path:
    projectors = [p for p in sorted(model.parent.glob("*.gguf")) if p != model and _kind(p) == "clip"]
    return _only(projectors, model, other)


def _only(projectors: list[Path], model: Path, other: Path | None = None) -> Path:
    """The mmproj of a model among those in its directory: the only one, or the only one made together with it."""
    if not projectors and other is not None:
        return other
    if len(projectors) > 1:
        own = GGUFFile.open(model).metadata.get(PAIR_KEY)
        same = [p for p in projectors if own is not None and GGUFFile.open(p).metadata.get(PAIR_KEY) == own]
        projectors = same or projectors
    if not projectors:
        raise ModelFileError(f"{model}: no mmproj is beside it; it is needed to see pictures: name it (--mmproj)")
    if len(projectors) > 1:
        names = ", ".join(p.name for p in projectors)
        raise ModelFileError(f"{model}: several mmproj files are beside it ({names}): name the one you mean (--mmproj)")
    return projectors[0]


def check_pair_ids(model: GGUFFile, mmproj: GGUFFile) -> None:
    """Check that two files of ours come from the same checkpoint; files of other tools do not say.

    Raises:
        ModelFileError: They do not.
    """
    ids = [f.metadata.get(PAIR_KEY) for f in (model, mmproj)]
    if None not in ids and ids[0] != ids[1]:
        raise ModelFileError(f"{mmproj.path} was not made from the same checkpoint as {model.path}")
