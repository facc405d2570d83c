"""The place where local-llava keeps models, shared between processes.

    models_dir()/                   $LOCAL_LLAVA_HOME, or the platform's directory for a user's data
        pairs/KEY/                  a kept pair
            origin.json             what it is and where it comes from; written last, so it says that all is there
            NAME-Q4_K_M.gguf, NAME-mmproj-F16.gguf
            unfinished.json         in place of origin.json while the pair is being made
        locks/KEY.lock              held by the process that makes or removes the pair
        converted/                  conversions of local-llava 0.1.0, which no later one uses

Knows what is kept, how it appears all at once, and how it goes. Does not know how files are made (`convert`) or
fetched, or which of them is meant (`hub`). Pairs are read without a lock, so that a store on a read-only disk can be
used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from local_llava import model_list
from local_llava.errors import ModelFileError, OutputError
from local_llava.store.digest import source_digest
from local_llava.store.origin import ORIGIN, DamagedError, Origin, Pair, read_json, read_pair, write_json, write_origin
from local_llava.store.process_lock import LockedError, locked
from local_llava.types import ModelFiles

__all__ = [
    "Leftover",
    "NewPair",
    "Origin",
    "Pair",
    "find",
    "get",
    "key_of",
    "leftovers",
    "models_dir",
    "new_pair",
    "pairs",
    "remove",
    "source_digest",
]

_UNFINISHED = "unfinished.json"
_KEY = re.compile(r"[A-Za-z0-9][\w.-]{0,99}")
_MIN_KEY_PREFIX = 6

log = logging.getLogger("local_llava")


@dataclass(frozen=True)
class Leftover:
    """Something in the store that is no complete pair."""

    directory: Path
    name: str
    """Of the model; the directory's where it is not known."""
    state: str
    """What is the matter with it, for people."""
    size: int
    """Bytes."""
    resumable: bool = False
    """Whether it can be completed: a download that was cut."""

    @property
    def key(self) -> str:
        return self.directory.name


class NewPair:
    """A pair that is being made, under its lock: what `new_pair` gives."""

    def __init__(self, directory: Path, pair: Pair | None) -> None:
        self.directory = directory
        """Where to write the two files and whatever else is needed on the way."""
        self.pair = pair
        """The complete pair: at once where it was there, or another process was faster; else after `publish`."""

    def publish(self, origin: Origin, files: ModelFiles) -> Pair:
        """Declare both files complete. Everything else in the directory is removed.

        Args:
            origin: What the pair is.
            files: Both in `directory` itself, under names that end with .gguf.

        Raises:
            OutputError: A file is not there, or origin.json cannot be written.
        """
        write_origin(self.directory, origin, files)
        try:
            self.pair = read_pair(self.directory)
        except DamagedError as e:
            raise OutputError(f"{self.directory}: {e}") from e
        for path in self.directory.iterdir():
            if path.name not in (ORIGIN, files.model.name, files.mmproj.name):
                _delete(path)
        return self.pair


def models_dir() -> Path:
    """Where models are kept: $LOCAL_LLAVA_HOME, or the platform's directory for a user's data."""
    home = os.environ.get("LOCAL_LLAVA_HOME")
    return Path(home) if home else Path(platformdirs.user_data_dir("local-llava", appauthor=False))


def key_of(*parts: str) -> str:
    """The key of a pair: 24 hex digits of a digest over what it is made from, and how.

    Such as `key_of(source_digest(checkpoint), quant, mmproj_quant)` for a conversion, or
    `key_of(repository, revision, model_file, mmproj_file)` for a download.
    """
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def pairs() -> list[Pair]:
    """All complete pairs, newest first. What is damaged or not ours is passed over, with a line in the log.

    Raises:
        ModelFileError: The store cannot be read.
    """
    found = [pair for directory in _directories() if (pair := _read(directory)) is not None]
    return sorted(found, key=lambda pair: pair.created, reverse=True)


def get(key: str) -> Pair | None:
    """The complete pair of a key."""
    directory = _directory(key)
    return _read(directory) if (directory / ORIGIN).is_file() else None


def find(name: str, quant: str | None = None, mmproj_quant: str | None = None) -> list[Pair]:
    """The complete pairs that a name means, newest first.

    Args:
        name: A name of the model list; a repository (owner/name), which means just what was made from that one; a key,
            or its beginning; or the name of a converted checkpoint, where no model of the list is called that.
        quant: Type of the language model, in upper case; None for any.
        mmproj_quant: Type of the mmproj; None for any.

    Raises:
        ModelFileError: The store cannot be read.
    """
    return [
        pair
        for pair in pairs()
        if _means(name, pair)
        and quant in (None, pair.origin.quant)
        and mmproj_quant in (None, pair.origin.mmproj_quant)
    ]


def _means(name: str, pair: Pair) -> bool:
    if is_key(name, pair.key):
        return True
    origin, wanted = pair.origin, name.lower()
    if "/" in name:
        return (origin.repository or "").lower() == wanted
    entry = model_list.find(name)
    if entry is None:
        return origin.name.lower() == wanted
    # A checkpoint of a user's own may lie in a directory of any name, such as that of a model that it was tuned from.
    return origin.repository is not None and entry in (model_list.find(origin.name), model_list.find(origin.repository))


def is_key(text: str, key: str) -> bool:
    """Whether a text is a key, or enough of its beginning to be meant."""
    return len(text) >= _MIN_KEY_PREFIX and key.startswith(text.lower())


def leftovers() -> list[Leftover]:
    """What takes room in the store without being a pair: unfinished, damaged, or of an older local-llava.

    Raises:
        ModelFileError: The store cannot be read.
    """
    found = []
    for directory in _directories():
        if (directory / ORIGIN).is_file():
            try:
                read_pair(directory)
            except DamagedError as e:
                found.append(Leftover(directory, directory.name, f"damaged: {e}", _size(directory)))
        elif (directory / _UNFINISHED).is_file():
            name, resumable = _unfinished(directory)
            state = "being made now" if _is_locked(directory.name) else "unfinished"
            found.append(Leftover(directory, name, state, _size(directory), resumable))
    for directory in _directories("converted"):
        models = [path.stem for path in directory.glob("*.gguf") if "-mmproj-" not in path.name]
        name = models[0] if models else directory.name
        found.append(Leftover(directory, name, "of local-llava 0.1.0, no longer used", _size(directory)))
    return found


@contextmanager
def new_pair(
    key: str, name: str, *, resumable: bool = False, on_wait: Callable[[], None] | None = None
) -> Iterator[NewPair]:
    """Make a pair, alone among all processes.

        with store.new_pair(key, "llava-1.5-7b") as new:
            if new.pair is None:
                ...  # write two files into new.directory
                new.publish(origin, files)
        use(new.pair)

    Whoever comes second waits, and then finds `new.pair`. If the block ends or raises without `publish`, the directory
    is removed, or kept as it is for the next `new_pair` of this key if it is resumable. What a killed process leaves
    behind looks unfinished, and is removed or resumed by the next `new_pair`.

    Args:
        key: See `key_of`.
        name: What to call it while it is unfinished.
        resumable: Keep what is there after a failure, and find it again.
        on_wait: Called once if another process is at it; None to log a line.

    Raises:
        OutputError: The place cannot be written or locked.
    """
    directory = _directory(key)
    with _locked(key, on_wait or (lambda: log.warning("Waiting for another process, which is making %s", name))):
        new = NewPair(directory, get(key))
        if new.pair is None:
            _remove_abandoned()
            _begin(directory, name, resumable)
        try:
            yield new
        finally:
            if new.pair is None and not (resumable and _has_content(directory)):
                _delete(directory)


def remove(item: Pair | Leftover) -> int:
    """Remove a pair or a left-over; gives the bytes freed. Files that are not local-llava's stay.

    A process that runs the pair keeps running; on Windows the pair is not removed then.

    Raises:
        OutputError: A file cannot be removed, or another process is making this pair now.
    """
    directory = item.directory
    with _locked(directory.name, None):
        try:
            if (directory / _UNFINISHED).is_file():
                names = list(directory.iterdir())
            else:
                # The description goes last: without it, what remains would be nobody's.
                names = [p for p in directory.iterdir() if p.suffix in (".gguf", ".partial", ".previous")]
                names += [p for p in (directory / ORIGIN,) if p.is_file()]
            size = sum(_size(path) for path in names)
            # Of the rest the largest first: if it is in use on Windows, the pair stays whole.
            for path in sorted(names, key=lambda p: (p.name in (ORIGIN, _UNFINISHED), -_size(p))):
                _delete(path, strictly=True)
        except OSError as e:
            raise OutputError(f"{e.filename or directory}: cannot be removed: {e.strerror}") from e
        with contextlib.suppress(OSError):  # not empty
            directory.rmdir()
    return size


def _directory(key: str) -> Path:
    if not _KEY.fullmatch(key):
        raise ValueError(f"{key!a:.80} is no key")
    return models_dir() / "pairs" / key


def _directories(kind: str = "pairs") -> list[Path]:
    parent = models_dir() / kind
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir() and _KEY.fullmatch(path.name))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as e:
        raise ModelFileError(f"{parent}: cannot be read: {e.strerror}; LOCAL_LLAVA_HOME names another place") from e


def _read(directory: Path) -> Pair | None:
    try:
        return read_pair(directory)
    except DamagedError as e:
        log.info("%s: passed over: %s", directory, e)
        return None


def _unfinished(directory: Path) -> tuple[str, bool]:
    """The name of an unfinished pair, and whether it is kept to be resumed."""
    try:
        values = read_json(directory / _UNFINISHED)
    except DamagedError:
        values = {}
    name = values.get("name")
    return (name[:200] if isinstance(name, str) else directory.name), values.get("resumable") is True


def _begin(directory: Path, name: str, resumable: bool) -> None:
    """Make the directory of an unfinished pair, or find it again if both times it is resumable."""
    try:
        ours = any((directory / n).is_file() for n in (ORIGIN, _UNFINISHED))
        if ours and not (resumable and (directory / _UNFINISHED).is_file() and _unfinished(directory)[1]):
            shutil.rmtree(directory)
        directory.mkdir(parents=True, exist_ok=True)
        # A process that was killed may have come no further than the description's temporary file.
        if not ours and any(path.name != f".{_UNFINISHED}.partial" for path in directory.iterdir()):
            raise OutputError(f"{directory}: is in the way, and not of local-llava's making: move it away")
    except OSError as e:
        raise OutputError(f"cannot write {directory}: {e.strerror}; LOCAL_LLAVA_HOME names another place") from e
    write_json(directory / _UNFINISHED, {"name": name, "resumable": resumable})


def _has_content(directory: Path) -> bool:
    try:
        return any(path.name != _UNFINISHED for path in directory.iterdir())
    except OSError:
        return False


def _remove_abandoned() -> None:
    """Remove what processes that were killed left unfinished, unless it can be resumed."""
    for directory in _directories():
        if (directory / ORIGIN).is_file() or not (directory / _UNFINISHED).is_file() or _unfinished(directory)[1]:
            continue
        with contextlib.suppress(OutputError), _locked(directory.name, None):
            if not (directory / ORIGIN).is_file():
                _delete(directory)


def _is_locked(key: str) -> bool:
    if not (models_dir() / "locks" / f"{key}.lock").is_file():
        return False
    try:
        with _locked(key, None):
            return False
    except LockedError:
        return True
    except OutputError:  # a read-only store: whoever writes is on another computer
        return False


@contextmanager
def _locked(key: str, on_wait: Callable[[], None] | None) -> Iterator[None]:
    """Hold the lock of a key; without `on_wait`, do not wait for another process."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(models_dir() / "locks" / f"{key}.lock", on_wait))
        except LockedError as e:
            raise LockedError(f"{models_dir() / 'pairs' / key}: another process is at it now") from e
        except OutputError as e:
            raise OutputError(f"{e}; LOCAL_LLAVA_HOME names another place") from e
        yield


def _size(path: Path) -> int:
    """Bytes of a file, or of all in a directory; links count nothing."""
    try:
        if path.is_symlink():
            return 0
        if path.is_dir():
            return sum(_size(child) for child in path.iterdir())
        return path.stat().st_size
    except OSError:
        return 0


def _delete(path: Path, strictly: bool = False) -> None:
    """Delete a file or a whole directory; failures matter only if it is done strictly."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as e:
        if strictly:
            raise
        log.warning("%s: cannot be removed: %s", path, e.strerror)
