"""What the commands tell and ask on stderr besides their results: notes, questions and progress."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from local_llava.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable


class _State:
    quiet = False


_state = _State()


def set_quiet(quiet: bool) -> None:
    """No notes and no progress from now on."""
    _state.quiet = quiet


def is_quiet() -> bool:
    """Whether the user wants no notes and no progress."""
    return _state.quiet


def note(message: str) -> None:
    """A line on stderr, unless the user wants none."""
    if not _state.quiet:
        print(message, file=sys.stderr)


def confirmed(question: str, command: str) -> bool:
    """Whether the user says yes at the terminal.

    Raises:
        UsageError: There is no terminal; the message says that the command needs --yes then.
    """
    import typer

    if not sys.stdin.isatty():
        raise UsageError(f"without a terminal to ask at, {command} needs --yes")
    return typer.confirm(question, err=True)


class ConvertProgress:
    """A bar with bytes and time left, on a terminal's stderr."""

    def __enter__(self) -> ConvertProgress:
        self._bar: Any = None
        return self

    def start(self, source: Path, total: int) -> Callable[[int], None]:
        """Announce a conversion of `total` bytes; returns what to call with the bytes written."""
        if _state.quiet:
            return lambda _: None
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        if not console.is_terminal:
            note(f"Converting {source}")
            return lambda _: None
        columns = (TextColumn("Converting {task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        bar = self._bar = Progress(*columns, console=console, transient=True)
        task = bar.add_task(source.name, total=total)
        bar.start()
        return lambda count: bar.advance(task, count)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


class StepProgress:
    """A bar on a terminal's stderr for steps that are counted; elsewhere a line for each kind of step."""

    def __enter__(self) -> StepProgress:
        self._bar: Any = None
        self._task: Any = None
        self._description = ""
        return self

    def update(self, description: str, done: int, total: int) -> None:
        """So many steps of this kind are done."""
        if _state.quiet:
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}", markup=False),
                *(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            if self._bar.console.is_terminal:
                self._bar.start()
        if description != self._description:
            self._description = description
            if not self._bar.console.is_terminal:
                note(description)
            elif self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(description, total=total)
        self._bar.update(self._task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        # Elsewhere it was not started, and would print an empty line.
        if self._bar is not None and self._bar.console.is_terminal:
            self._bar.stop()


class PrefillProgress:
    """A line on a terminal's stderr that counts prompt tokens, where reading the prompt takes long."""

    DELAY_S = 1.0

    def __enter__(self) -> PrefillProgress:
        import time

        self._clock, self._started, self._shown = time.monotonic, time.monotonic(), False
        return self

    def update(self, done: int, total: int) -> None:
        if _state.quiet or not sys.stderr.isatty() or self._clock() - self._started < self.DELAY_S:
            return
        if done < total:
            print(f"\rReading the prompt: {done} of {total} tokens", end="", file=sys.stderr, flush=True)
            self._shown = True
        else:
            self.__exit__()

    def __exit__(self, *_: object) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._shown = False
