"""The parts of a LLaVA that lie outside its checkpoint: a stock vision tower, the language model under an adapter.

Knows where they are looked for: where the user says, beside the checkpoint, in the Hugging Face Hub's cache; never on
the network. Does not know what is in them (`families.outside`).
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from local_llava.errors import CheckpointError

log = logging.getLogger("local_llava")

_REPOSITORY = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
_CONFIG = "config.json"


@dataclass(frozen=True)
class Companions:
    """What the user named, a directory or a Hub name each; None for what the checkpoint itself names."""

    vision_tower: str | None = None
    """A CLIP or SigLIP checkpoint."""
    llm: str | None = None
    """The language model that an adapter or a projector belongs to."""


NO_COMPANIONS = Companions()


@dataclass(frozen=True)
class Part:
    """A kind of companion, as messages call it."""

    what: str
    option: str
    """Of the command; the field of `Companions` is called the same."""


@dataclass(frozen=True)
class Outside:
    """A part that was found outside of a checkpoint."""

    part: Part
    directory: Path

    def __str__(self) -> str:
        return f"the {self.part.what} is not in the checkpoint; taken from {self.directory}"


TOWER = Part("vision tower", "--vision-tower")
LLM = Part("language model", "--llm")


def find(part: Part, named: str | None, known: str | None, near: Path, source: str) -> Path:
    """The directory of a companion.

    Args:
        part: Which one.
        named: The user's word for it, which counts if there is one.
        known: What the checkpoint calls it; None where it does not say.
        near: Directory of the checkpoint.
        source: Where the checkpoint says so: a file and a field.

    Raises:
        CheckpointError: It is not there; the message says where it was looked for, and how to name it.
    """
    if named is not None:
        directory = _named(named)
        if directory is None:
            raise CheckpointError(
                f"{part.option} {named!a:.200}: neither a directory nor a repository in the Hub's cache ({_cache()})"
            )
    elif known is None:
        raise CheckpointError(
            f"{near}: the {part.what} is not in this checkpoint, and it does not say which one belongs to it; "
            f"name it with {part.option} DIR|NAME"
        )
    else:
        found = find_known(known, near)
        if found is None:
            raise CheckpointError(
                f"{source}: the {part.what} {known!a:.200} is neither beside the checkpoint nor in the Hub's cache "
                f"({_cache()}); download it, or name its directory with {part.option}"
            )
        directory = found
    log.info("%s: the %s is %s", near, part.what, directory)
    return directory


def refuse(part: Part, named: str | None) -> None:
    """Check that nobody named a companion for a checkpoint that has the part.

    Raises:
        CheckpointError: Somebody did.
    """
    if named is not None:
        raise CheckpointError(
            f"{part.option} {named!a:.200}: the checkpoint has its own {part.what}, which no other may replace; "
            "leave the option out"
        )


def find_known(name: str, near: Path) -> Path | None:
    """The directory that a checkpoint's own word for a companion means, or None.

    Looked for are the path itself, as it is and from the checkpoint, directories of its last name beside and inside the
    checkpoint, and the repository of that name in the Hub's cache.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    # `//server/share` would reach for the network on Windows.
    remote = PureWindowsPath(name).drive.startswith("\\\\")
    if not remote and name.isprintable() and len(name) <= 1024 and path.name not in ("", ".."):
        near = near.resolve()
        for candidate in (near.parent / path, near / path, near.parent / path.name, near / path.name):
            if _is_checkpoint(candidate) and candidate.resolve() != near:
                return candidate
    return _cached(name)


def _named(name: str) -> Path | None:
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # of a user whom the system does not know
        path = Path(name)
    return path if path.is_dir() else _cached(name)


def _is_checkpoint(path: Path) -> bool:
    try:
        return (path / _CONFIG).is_file()
    except OSError:  # a name that the system cannot have
        return False


def _cached(name: str) -> Path | None:
    """The snapshot of a repository that the Hub's cache has of its main branch. HF_HOME and its kin are honoured."""
    if not _REPOSITORY.fullmatch(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(name, _CONFIG)
    except (OSError, ValueError):  # no name for a repository, or a damaged cache
        return None
    return Path(config).parent if isinstance(config, str) else None


def _cache() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)
