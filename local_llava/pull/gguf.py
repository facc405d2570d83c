"""Pulls a pair of GGUF files that somebody published."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from local_llava import store
from local_llava.convert.write import human_size
from local_llava.errors import DownloadError, ModelFileError, OutputError
from local_llava.gguf_file import GGUFFile
from local_llava.model_list import PublishedPair
from local_llava.pull import download
from local_llava.pull.hub_api import Listing, RemoteFile
from local_llava.pull.target import Report, Target, check_room, room
from local_llava.store.origin import Origin
from local_llava.types import ModelFiles


@dataclass(frozen=True)
class GGUFPull:
    """A published pair that can be downloaded."""

    listing: Listing
    pair: PublishedPair
    files: tuple[RemoteFile, RemoteFile]
    """The language model and the mmproj."""
    target: Target

    @classmethod
    def prepare(cls, listing: Listing, pair: PublishedPair, target: Target) -> GGUFPull:
        """Check that both files are there, and that there is room for them; errors as of `prepare_pull`."""
        for name in (pair.model, pair.mmproj):
            if name not in listing.files:
                raise DownloadError(f"{listing.repository}: has no file {name} at revision {listing.revision}")
        files = (listing.files[pair.model], listing.files[pair.mmproj])
        names = [_base(file) for file in files]
        if len({name.lower() for name in names}) < 2:
            raise DownloadError(f"{listing.repository}: both files are called {names[0]}")
        return cls(listing, pair, files, target)

    @property
    def key(self) -> str:
        return store.key_of(self.listing.repository, self.listing.commit, self.pair.model, self.pair.mmproj)

    @property
    def notes(self) -> tuple[str, ...]:
        return ()

    def lines(self) -> list[str]:
        """What would be done, for people."""
        where = self.target.where(self.key)
        lines = [f"{self.listing.url} at {self.listing.commit[:12]}: published GGUF files"]
        for file in self.files:
            source = "in the Hub's cache" if self.listing.cached(file) else "to be downloaded"
            lines.append(f"{where / _base(file)}: {human_size(file.size)}, {source}")
        for directory, needed, free in room(self._needs()):
            lines.append(f"room on the disk of {directory}: {human_size(needed)} needed, {human_size(free)} free")
        return lines

    def run(self, report: Report) -> ModelFiles:
        """Download what is missing; gives the pair. Errors as of `prepare_pull`."""
        self.target.check_free(self.key, [_base(file) for file in self.files])
        check_room(self._needs())
        self.listing.remember_revision()
        with self.target.making(self.key, report) as work:
            if work.done is not None:
                return work.done
            missing = [file for file in self.files if self.listing.cached(file) is None]
            progress = report.download(sum(file.size for file in missing)) if missing else download.no_progress
            paths = [work.directory / _base(file) for file in self.files]
            for file, path in zip(self.files, paths, strict=True):
                if file in missing:
                    report.note(f"Downloading {self.listing.repository}/{file.name} ({human_size(file.size)})")
                    download.to_path(self.listing, file, path, progress)
                else:
                    _link(download.to_cache(self.listing, file), path)
            files = ModelFiles(*paths)
            self._check(files)
            return work.publish(self._origin(), files)

    def _needs(self) -> list[tuple[Path, int]]:
        directory = self.target.work(self.key)
        needed = 0
        for file in self.files:
            here = [directory / _base(file), directory / (_base(file) + ".incomplete")]
            needed += file.size - min(file.size, sum(path.stat().st_size for path in here if path.is_file()))
        return [(directory, needed)]

    def _check(self, files: ModelFiles) -> None:
        """A file under the wrong name is better found now than when a question was asked."""
        for path, file, tower in ((files.model, self.files[0], False), (files.mmproj, self.files[1], True)):
            try:
                kind = GGUFFile.open(path).metadata.get("general.architecture")
                if (kind == "clip") != tower:
                    what = "no mmproj" if tower else "no language model"
                    raise ModelFileError(f"{path}: is {what} (general.architecture {kind!a:.40})")
            except ModelFileError as e:
                path.unlink(missing_ok=True)
                message = str(e).replace(str(path), f"{self.listing.repository}/{file.name}")
                raise ModelFileError(message) from e

    def _origin(self) -> Origin:
        return Origin(
            kind="downloaded",
            name=self.target.name,
            quant=self.pair.quant,
            mmproj_quant=self.pair.mmproj_quant,
            source=self.listing.url,
            repository=self.listing.repository,
            revision=self.listing.commit,
            model_sha256=self.files[0].sha256,
            mmproj_sha256=self.files[1].sha256,
        )


def _base(file: RemoteFile) -> str:
    return PurePosixPath(file.name).name


def _link(source: Path, path: Path) -> None:
    """A file under a second name; a copy where the disk is another one."""
    source = source.resolve()
    try:
        path.unlink(missing_ok=True)
        try:
            os.link(source, path)
        except OSError:
            shutil.copyfile(source, path)
    except OSError as e:
        raise OutputError(f"cannot write {path}: {e.strerror or e}") from e
