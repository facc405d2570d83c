"""Where a pulled pair goes: the store, or a directory of the user's; and whether there is room.

Knows how a pair is made alone among all processes, kept through cuts, and published whole.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from local_llava import store
from local_llava.convert.write import Pending, human_size
from local_llava.errors import OutputError
from local_llava.store.origin import Origin, write_json
from local_llava.store.process_lock import locked
from local_llava.types import ModelFiles

_PUBLISHING = "publishing.json"
"""In the directory of a pair in the making: its complete files are getting their names elsewhere."""


@dataclass(frozen=True)
class Report:
    """What is told while a pair is pulled. The callables given back are called from any thread."""

    note: Callable[[str], None] = lambda _: None
    """A line for people."""
    download: Callable[[int], Callable[[int], None]] = lambda _: lambda _: None
    """Told the bytes to be downloaded; gives what is called with those that arrived."""
    convert: Callable[[int], Callable[[int], None]] = lambda _: lambda _: None
    """Told the bytes to be written; gives what is called with those written."""


@dataclass
class Work:
    """A pair in the making."""

    directory: Path
    """For whatever is needed on the way; it outlives a cut."""
    publish_files: Callable[[Origin, ModelFiles], ModelFiles]
    done: ModelFiles | None = None
    """The pair, where another process was faster."""

    def publish(self, origin: Origin, files: ModelFiles) -> ModelFiles:
        """Makes the pair of two complete files in `directory`, and removes all that was needed on the way."""
        # Before and not after: nobody would come back for it.
        for ending in ("safetensors", "incomplete", "kept"):
            for path in self.directory.glob(f"*.{ending}"):
                with contextlib.suppress(OSError):
                    path.unlink()
        return self.publish_files(origin, files)


@dataclass(frozen=True)
class KeptPair:
    """A pair that is here already, in place of a pull."""

    files: ModelFiles
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """What would be done, for people."""
        return [f"{path}: is here already" for path in (self.files.model, self.files.mmproj)]

    def run(self, report: Report) -> ModelFiles:
        """The pair; nothing is downloaded."""
        report.note("It is here already; --force pulls it again.")
        return self.files


@dataclass(frozen=True)
class Target:
    """Where a pair goes."""

    out: Path | None
    """A directory; None for the store."""
    name: str
    """What the model is called."""
    force: bool
    """Replace what is there."""

    def where(self, key: str) -> Path:
        """The directory that the files will be in."""
        return self.out if self.out is not None else store.models_dir() / "pairs" / key

    def work(self, key: str) -> Path:
        """The directory that they are made in; what is there comes from an earlier go."""
        return self.out / f".pull-{key}" if self.out is not None else self.where(key)

    def kept(self, repository: str, commit: str | None, quant: str, mmproj_quant: str) -> KeptPair | None:
        """The pair in the store that was made of this commit (None: of any), if that will do."""
        if self.out is not None or self.force:
            return None
        pairs = store.find(repository, quant, mmproj_quant)
        return next((KeptPair(pair.files) for pair in pairs if commit in (None, pair.origin.revision)), None)

    def check_free(self, key: str, names: Sequence[str]) -> None:
        """Raises OutputError where files of these names would replace others."""
        if self.out is None or self.force or (self.work(key) / _PUBLISHING).is_file():
            return
        for name in names:
            if (self.out / name).exists():
                raise OutputError(f"{self.out / name} already exists; --force replaces it")

    @contextlib.contextmanager
    def making(self, key: str, report: Report) -> Iterator[Work]:
        """Make the pair, alone among all processes."""
        waiting = f"Another process is pulling {self.name}; waiting for it"
        if self.out is not None:
            with self._making_in(self.out, key, lambda: report.note(waiting)) as work:
                yield work
            return
        existing = store.get(key)
        if existing is not None and self.force:
            store.remove(existing)
        with store.new_pair(key, self.name, resumable=True, on_wait=lambda: report.note(waiting)) as new:
            yield Work(
                new.directory,
                lambda origin, files: new.publish(origin, files).files,
                None if new.pair is None else new.pair.files,
            )

    @contextlib.contextmanager
    def _making_in(self, out: Path, key: str, on_wait: Callable[[], None]) -> Iterator[Work]:
        directory = self.work(key)

        def publish(_: Origin, files: ModelFiles) -> ModelFiles:
            names = [files.model.name, files.mmproj.name]
            self.check_free(key, names)
            write_json(directory / _PUBLISHING, {"names": names})
            with Pending(overwrite=self.force) as pending:
                for path in (files.model, files.mmproj):
                    pending.adopt(path, out / path.name)
            return ModelFiles(out / files.model.name, out / files.mmproj.name)

        with locked(store.models_dir() / "locks" / f"{store.key_of(str(out.resolve()), key)}.lock", on_wait):
            try:
                directory.mkdir(parents=True, exist_ok=True)
            except OSError as e:
                raise OutputError(f"{directory}: the directory cannot be made: {e.strerror}") from e
            _take_back(directory, out)
            yield Work(directory, publish)
            shutil.rmtree(directory, ignore_errors=True)


def _take_back(directory: Path, out: Path) -> None:
    """Undo a publication that was cut, so that it can be done again."""
    try:
        names = json.loads((directory / _PUBLISHING).read_text(encoding="utf-8"))["names"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    try:
        for name in map(str, names):
            here, there = directory / name, out / name
            if there.exists() and not here.exists():
                there.replace(here)
            elif there.exists() and there.samefile(here):
                there.unlink()
        (directory / _PUBLISHING).unlink()
    except OSError as e:
        raise OutputError(f"cannot write in {directory}: {e.strerror or e}") from e


def check_room(needs: Sequence[tuple[Path, int]]) -> None:
    """Check that there is room for what is to come.

    Args:
        needs: Directories, which need not exist, and the bytes that will be written there.

    Raises:
        OutputError: There is not.
    """
    for directory, needed, free in room(needs):
        if free < needed:
            raise OutputError(
                f"not enough room on the disk of {directory}: {human_size(needed)} needed, {human_size(free)} free"
            )


def room(needs: Sequence[tuple[Path, int]]) -> list[tuple[Path, int, int]]:
    """By file system: a directory, the bytes needed and the bytes free."""
    sums: dict[int, tuple[Path, int]] = {}
    for directory, size in needs:
        existing = next(path for path in (directory, *directory.resolve().parents) if path.exists())
        device = existing.stat().st_dev
        first, before = sums.get(device, (existing, 0))
        sums[device] = (first, before + size)
    return [(path, needed, shutil.disk_usage(path).free) for path, needed in sums.values()]
