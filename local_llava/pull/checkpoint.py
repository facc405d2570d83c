"""Pulls a checkpoint and converts it, if it can be while its files arrive.

Knows which files of a repository a conversion needs, in which order, and how much room that takes. Safetensors files of
one directory are converted as they come; of other checkpoints (PyTorch's .bin, parts in directories of their own, parts
in other repositories) all is downloaded first, since what is in them can be told only then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from local_llava import model_sizes, store
from local_llava.convert import Conversion, prepare, weights
from local_llava.convert.plan import GGUFPlan
from local_llava.convert.resume import safe_tensors, write_resumable
from local_llava.convert.source import SourceTensor
from local_llava.convert.write import human_size
from local_llava.errors import CheckpointError
from local_llava.model_list import ModelEntry
from local_llava.pull import arriving, download
from local_llava.pull.arriving import AHEAD, Arrivals, HollowTensor, Shard
from local_llava.pull.files import Content, directory_of, find_beside, total_size
from local_llava.pull.hub_api import Listing
from local_llava.pull.target import Report, Target, Work, check_room, room
from local_llava.store.origin import Origin
from local_llava.types import ModelFiles


@dataclass(frozen=True)
class CheckpointPull:
    """A checkpoint that can be downloaded and converted."""

    contents: tuple[Content, ...]
    """The checkpoint itself, then what it needs beside it."""
    quant: str
    mmproj_quant: str
    target: Target
    entry: ModelEntry | None
    low_disk: bool
    shards: tuple[Shard, ...] = ()
    """The files, if they can be converted as they arrive."""
    planned: Conversion | None = field(default=None, repr=False)
    """The conversion with zeros in place of all weights, if they can."""

    @classmethod
    def prepare(
        cls,
        listing: Listing,
        quant: str,
        mmproj_quant: str,
        target: Target,
        entry: ModelEntry | None,
        low_disk: bool,
    ) -> CheckpointPull:
        """Read the small files and the headers, and check what they tell; errors as of `prepare_pull`."""
        content = Content.of(listing)
        shards: tuple[Shard, ...] = ()
        if all(file.name.endswith(".safetensors") and not directory_of(file) for file in content.weights):
            shards = tuple(arriving.read_shard(listing, file) for file in content.weights)
            _check_names(listing, shards)
        beside = find_beside(content, entry, {name for shard in shards for name in shard.tensors})
        pull = cls((content, *beside), quant, mmproj_quant, target, entry, low_disk)
        if beside or not shards:
            return pull
        hollow = {name: HollowTensor(**vars(tensor)) for shard in shards for name, tensor in shard.tensors.items()}
        planned = pull._conversion(target.work(pull.key), lambda directory: hollow)
        return replace(pull, shards=shards, planned=planned)

    @property
    def listing(self) -> Listing:
        return self.contents[0].listing

    @property
    def key(self) -> str:
        from local_llava import __version__

        commits = [part for content in self.contents for part in (content.listing.repository, content.listing.commit)]
        return store.key_of(*commits, self.quant, self.mmproj_quant, __version__)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user may not expect."""
        if self.planned:
            return self.planned.notes
        return ("--low-disk saves no room with this checkpoint: all of it is needed at once",) if self.low_disk else ()

    def lines(self) -> list[str]:
        """What would be done, for people."""
        how = "as it arrives" if self.planned else "when all of it is here"
        types = f"{self.quant}, mmproj {self.mmproj_quant}"
        lines = [f"{self.listing.url} at {self.listing.commit[:12]}: a checkpoint, converted {how} ({types})"]
        for content in self.contents:
            total, missing = total_size(content.weights), total_size(content.missing())
            lines.append(
                f"{content.listing.repository}: {human_size(missing)} of {human_size(total)} of weights to download"
            )
        where = self.target.where(self.key)
        if self.planned:
            for path, size in zip(
                (self.planned.files.model, self.planned.files.mmproj), self.planned.sizes, strict=True
            ):
                lines.append(f"{where / path.name}: {human_size(size)}")
        else:
            lines.append(f"{where}: about {human_size(sum(self._output_sizes()))}")
        for directory, needed, free in room(self._needs()):
            at_most = "at most " if self.low_disk else ""
            lines.append(
                f"room on the disk of {directory}: {at_most}{human_size(needed)} needed, {human_size(free)} free"
            )
        return lines

    def run(self, report: Report) -> ModelFiles:
        """Download and convert what is missing; gives the pair. Errors as of `prepare_pull`."""
        if self.planned:
            self.target.check_free(self.key, [self.planned.files.model.name, self.planned.files.mmproj.name])
        check_room(self._needs())
        with self.target.making(self.key, report) as work:
            if work.done is not None:
                return work.done
            files = self._convert_arriving(work, report) if self.planned else self._convert_whole(work, report)
            return work.publish(self._origin(), files)

    def _convert_whole(self, work: Work, report: Report) -> ModelFiles:
        missing = [(content.listing, file) for content in self.contents for file in content.missing()]
        progress = report.download(total_size([file for _, file in missing])) if missing else download.no_progress
        for content in self.contents:
            for file in content.weights:
                if (content.listing, file) in missing:
                    report.note(f"Downloading {content.listing.repository}/{file.name} ({human_size(file.size)})")
                download.to_cache(content.listing, file, progress)
        conversion = self._conversion(work.directory)
        self.target.check_free(self.key, [conversion.files.model.name, conversion.files.mmproj.name])
        check_room([(work.directory, sum(conversion.sizes))])
        progress = report.convert(sum(conversion.sizes))
        write_resumable(conversion.mmproj, conversion.files.mmproj, progress=progress)
        write_resumable(conversion.model, conversion.files.model, progress=progress)
        return conversion.files

    def _convert_arriving(self, work: Work, report: Report) -> ModelFiles:
        assert self.planned is not None
        order = _Order(self.planned, self.shards)
        arrivals = Arrivals(self.listing, self.shards, work.directory, self.low_disk)
        needed = order.needed(self._safe_tensors())
        first = [shard for shard in needed if order.always_needed(shard)]
        missing = [shard.file for shard in needed if not arrivals.is_here(shard)]
        arrivals.start(
            [*first, *(shard for shard in needed if shard not in first)],
            report.download(total_size(missing)) if missing else download.no_progress,
        )
        try:
            conversion = self._conversion(work.directory, lambda _: arrivals.tensors())
            count = report.convert(sum(conversion.sizes))

            def progress(size: int) -> None:
                arrivals.check()
                count(size)

            def safe(done: int) -> None:
                arrivals.drop(order.used_up(before + done))

            before = 0
            for plan, path in (
                (conversion.mmproj, conversion.files.mmproj),
                (conversion.model, conversion.files.model),
            ):
                write_resumable(plan, path, progress=progress, on_safe=safe, on_stop=arrivals.stop)
                before += len(plan.tensors)
        finally:
            arrivals.stop()
        return conversion.files

    def _conversion(
        self, out: Path, read_weights: Callable[[Path], Mapping[str, SourceTensor]] = weights.read_weights
    ) -> Conversion:
        return prepare(
            self.listing.directory,
            out,
            quant=self.quant,
            mmproj_quant=self.mmproj_quant,
            overwrite=True,
            read_weights=read_weights,
        )

    def _safe_tensors(self) -> int:
        """How many tensors an earlier go left, counted over both files."""
        if self.planned is None:
            return 0
        plans = ((self.planned.mmproj, self.planned.files.mmproj), (self.planned.model, self.planned.files.model))
        return sum(safe_tensors(plan, path) for plan, path in plans)

    def _output_sizes(self) -> tuple[int, int]:
        if self.planned:
            return self.planned.sizes
        if self.entry:
            size = model_sizes.size(self.entry, self.quant, self.mmproj_quant)
            return size.model, size.mmproj
        # Weights are stored in 16 bits or more; F32 of 16 takes twice as much.
        return total_size(self.contents[0].weights) * (2 if self.quant == "F32" else 1), 0

    def _needs(self) -> list[tuple[Path, int]]:
        """Directories, and what will be written there."""
        work = self.target.work(self.key)
        output = sum(self._output_sizes())
        if self.planned:
            for path in (self.planned.files.model, self.planned.files.mmproj):
                for here in (path, path.with_name(path.name + ".partial")):
                    output -= here.stat().st_size if here.is_file() else 0
        needs = [(work, max(0, output))]
        if self.planned and self.low_disk:
            order = _Order(self.planned, self.shards)
            uncached = [shard for shard in self.shards if self.listing.cached(shard.file) is None]
            return [*needs, (work, order.most_bytes(self._safe_tensors(), uncached))]
        for content in self.contents:
            for file in content.missing():
                blob = content.listing.blob(file)
                partial = blob.with_name(blob.name + ".incomplete")
                begun = partial.stat().st_size if partial.is_file() else 0
                needs.append((content.listing.cache, max(0, file.size - begun)))
        return needs

    def _origin(self) -> Origin:
        return Origin(
            kind="converted",
            name=self.target.name,
            quant=self.quant,
            mmproj_quant=self.mmproj_quant,
            source=self.listing.url,
            repository=self.listing.repository,
            revision=self.listing.commit,
        )


class _Order:
    """Which file each tensor of a conversion comes from, in the order of writing: the mmproj, then the model."""

    def __init__(self, conversion: Conversion, shards: tuple[Shard, ...]) -> None:
        owners = {str(tensor): shard for shard in shards for tensor in shard.tensors.values()}
        plans: tuple[GGUFPlan, ...] = (conversion.mmproj, conversion.model)
        self._shards = shards
        self._sources = [owners.get(tensor.source) for plan in plans for tensor in plan.tensors]

    def always_needed(self, shard: Shard) -> bool:
        """Whether it has tensors that the planning reads."""
        return any(arriving.always_needed(name) for name in shard.tensors)

    def needed(self, done: int) -> list[Shard]:
        """The files that are still needed when the first `done` tensors are written, as they are needed."""
        found: list[Shard] = []
        for shard in self._sources[done:]:
            if shard is not None and shard not in found:
                found.append(shard)
        return found

    def used_up(self, done: int) -> list[Shard]:
        """The files that are not needed any more."""
        needed = self.needed(done)
        return [shard for shard in self._shards if shard not in needed]

    def most_bytes(self, done: int, shards: list[Shard]) -> int:
        """The most that lies on the disk of these files at once, if files are dropped when they are used up."""
        order = [shard for shard in self.needed(done) if shard in shards]
        most = 0
        for place in range(done, len(self._sources)):
            begun = [shard for shard in order if shard in self._sources[done : place + 1]]
            here = [shard for shard in begun if shard in self._sources[place:]]
            ahead = [shard for shard in order if shard not in begun][: max(0, AHEAD - len(here))]
            most = max(most, total_size([shard.file for shard in (*here, *ahead)]))
        return most


def _check_names(listing: Listing, shards: tuple[Shard, ...]) -> None:
    seen: dict[str, Shard] = {}
    for shard in shards:
        for name in shard.tensors:
            if name in seen:
                raise CheckpointError(
                    f"{listing.repository}/{shard.file.name}: {name} is also in {seen[name].file.name}"
                )
            seen[name] = shard
