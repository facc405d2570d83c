"""`local-llava pull`: a model of the Hugging Face Hub becomes a pair of GGUF files here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from local_llava.commands import console
from local_llava.commands.convert import LLM_TYPES, MMPROJ_TYPES

if TYPE_CHECKING:
    from collections.abc import Callable

    from local_llava.pull.target import Report


def pull(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME[:QUANT]", help="A model that `local-llava models` lists, or owner/repository on the Hub."
        ),
    ],
    quant: Annotated[
        str | None,
        typer.Option(help=f"Type of the language model. Default: Q4_K_M. From a checkpoint: {LLM_TYPES}."),
    ] = None,
    mmproj_quant: Annotated[
        str | None,
        typer.Option(help=f"Type of tower and projector. Default: F16. From a checkpoint: {MMPROJ_TYPES}."),
    ] = None,
    source: Annotated[
        Literal["gguf", "checkpoint"] | None,
        typer.Option(
            "--from", help="Take published GGUF files, or convert a checkpoint. Default: GGUF where there is."
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit. Default: the main branch.")] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Directory for both files. Default: where `--model NAME` finds them."),
    ] = None,
    low_disk: Annotated[
        bool, typer.Option("--low-disk", help="Remove each file of a checkpoint as soon as it is converted.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show what would be downloaded and written. Reads the small files and headers."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Pull again, and replace what is there.")] = False,
) -> None:
    """Download a model: published GGUF files, or a checkpoint, which is converted as it arrives.

    What was cut goes on where it was when it is run again.
    """
    from local_llava.pull.prepare import prepare_pull

    pulled = prepare_pull(
        name,
        quant=quant,
        mmproj_quant=mmproj_quant,
        source=source,
        revision=revision,
        out=out,
        low_disk=low_disk,
        force=force,
    )
    if dry_run:
        for line in (*pulled.lines(), *pulled.notes):
            print(line)
        return
    for note in pulled.notes:
        console.note(f"Note: {note}")
    with PullProgress() as progress:
        files = pulled.run(progress.report())
    print(files.model)
    print(files.mmproj)


class PullProgress:
    """Two bars on a terminal's stderr, with bytes and time left: what arrives, and what is written."""

    def __enter__(self) -> PullProgress:
        self._bars: Any = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def report(self) -> Report:
        """What a pull tells its progress to."""
        from local_llava.pull.target import Report

        return Report(
            note=self._note,
            download=lambda total: self._start("Downloading", total),
            convert=lambda total: self._start("Converting", total),
        )

    def _note(self, message: str) -> None:
        # Above the bars, if there are some.
        if self._bars is not None:
            self._bars.console.print(message, markup=False, highlight=False)
        else:
            console.note(message)

    def _start(self, what: str, total: int) -> Callable[[int], None]:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        from local_llava.convert.write import human_size

        terminal = Console(stderr=True)
        if not terminal.is_terminal or console.is_quiet():
            console.note(f"{what} ({human_size(total)})")
            return lambda _: None
        if self._bars is None:
            columns = (TextColumn("{task.description:11}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
            self._bars = Progress(*columns, console=terminal, transient=True)
            self._bars.start()
        bars = self._bars
        task = bars.add_task(what, total=total)
        return lambda count: bars.advance(task, count)
