"""From what a user names to the files of a pair.

Knows the directories where models live, and which two files belong together. Converts a checkpoint that is named where
a pair is needed, once, and keeps the result in `models_dir()`.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import platformdirs

from local_llava.errors import CheckpointError, ModelFileError, OutputError, UsageError
from local_llava.gguf_file import GGUFFile
from local_llava.types import DEFAULT_MMPROJ_QUANT, DEFAULT_QUANT, PAIR_KEY, ModelFiles

OnConvert: TypeAlias = Callable[[Path, int], Callable[[int], None]]

log = logging.getLogger("local_llava")


def models_dir() -> Path:
    """Where conversions are kept: $LOCAL_LLAVA_HOME, or the platform's directory for a user's data."""
    home = os.environ.get("LOCAL_LLAVA_HOME")
    return Path(home) if home else Path(platformdirs.user_data_dir("local-llava", appauthor=False))


def builtin_checkpoint() -> Path:
    """The built-in model, as it was trained. It comes with the package."""
    return Path(str(importlib.resources.files("local_llava.tiny_llava")))


def resolve(
    model: str | os.PathLike[str] | None,
    mmproj: str | os.PathLike[str] | None = None,
    on_convert: OnConvert | None = None,
) -> ModelFiles:
    """Find the pair that a user means.

    Args:
        model: A language model's GGUF, a directory with one pair, or a checkpoint; None for the built-in model.
        mmproj: The other file; None to find it.
        on_convert: Called with the checkpoint and the bytes to be written when one has to be converted first; gives
            what to call with the bytes written.

    Raises:
        ModelFileError: Nothing usable is there, or more than one pair.
        CheckpointError: The checkpoint cannot be converted.
        UsageError: An mmproj was named without its model.
    """
    if model is None:
        if mmproj is not None:
            raise UsageError("an mmproj needs its language model: name both")
        return converted(builtin_checkpoint(), on_convert)
    path = Path(model)
    if path.is_dir():
        # Repositories of GGUF files often carry the config.json, too.
        if (path / "config.json").is_file() and not any(path.glob("*.gguf")):
            if mmproj is not None:
                raise UsageError(f"{path} is a checkpoint, which brings its own tower: name no mmproj")
            return converted(path, on_convert)
        return _pair_in(path, None if mmproj is None else Path(mmproj))
    if not path.exists():
        raise ModelFileError(f"{path}: no such file or directory; a GGUF, or a directory with a pair or a checkpoint")
    return ModelFiles(path, Path(mmproj) if mmproj is not None else _mmproj_beside(path))


def converted(checkpoint: Path, on_convert: OnConvert | None = None) -> ModelFiles:
    """The pair made of a checkpoint, converted now if it was not before or has changed since.

    Raises:
        CheckpointError: The checkpoint cannot be converted.
        OutputError: The result cannot be kept.
    """
    from local_llava.convert import prepare

    directory = models_dir() / "converted" / _digest(checkpoint)
    files = _kept(directory)
    if files is not None:
        return files
    conversion = prepare(checkpoint, directory, quant=DEFAULT_QUANT, mmproj_quant=DEFAULT_MMPROJ_QUANT)
    progress = on_convert(checkpoint, sum(conversion.sizes)) if on_convert else None
    try:
        return conversion.write(progress=progress)
    except OutputError:
        # Another process may have been faster with the same conversion.
        files = _kept(directory)
        if files is not None:
            return files
        raise


def _kept(directory: Path) -> ModelFiles | None:
    """The pair in a directory of ours. Files appear there only when complete, the mmproj last."""
    found = sorted(directory.glob("*.gguf")) if directory.is_dir() else []
    mmproj = [p for p in found if "-mmproj-" in p.name]
    model = [p for p in found if p not in mmproj]
    return ModelFiles(model[0], mmproj[0]) if len(model) == len(mmproj) == 1 else None


def _digest(checkpoint: Path) -> str:
    """Changes when a file of the checkpoint does, or what is made of it."""
    from local_llava import __version__

    try:
        files = sorted(p for p in checkpoint.iterdir() if p.suffix in (".json", ".safetensors", ".jinja"))
        state = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    except OSError as e:
        raise CheckpointError(f"{checkpoint}: cannot be read: {e.strerror}") from e
    key = json.dumps([str(checkpoint.resolve()), state, DEFAULT_QUANT, DEFAULT_MMPROJ_QUANT, __version__])
    return hashlib.sha256(key.encode()).hexdigest()[:24]


def _kind(path: Path) -> str:
    """The `general.architecture` of a GGUF."""
    return str(GGUFFile.open(path).metadata.get("general.architecture"))


def _pair_in(directory: Path, mmproj: Path | None) -> ModelFiles:
    kinds = {p: _kind(p) for p in sorted(directory.glob("*.gguf"))}
    models = [p for p, kind in kinds.items() if kind != "clip"]
    projectors = [p for p, kind in kinds.items() if kind == "clip"]
    if not kinds:
        raise ModelFileError(f"{directory}: neither GGUF files nor a checkpoint (config.json) are there")
    if len(models) != 1:
        names = ", ".join(p.name for p in models) or "none"
        raise ModelFileError(f"{directory}: one language model is needed; there are {names}: name the file you mean")
    return ModelFiles(models[0], mmproj or _only(projectors, models[0]))


def _mmproj_beside(model: Path) -> Path:
    return _only([p for p in sorted(model.parent.glob("*.gguf")) if p != model and _kind(p) == "clip"], model)


def _only(projectors: list[Path], model: Path) -> Path:
    """The mmproj of a model among those in its directory: the only one, or the only one made together with it."""
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
