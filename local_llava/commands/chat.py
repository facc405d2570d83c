"""`local-llava chat`: a conversation about pictures, at the terminal or through a pipe."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from local_llava.commands import console
from local_llava.commands.options import MmprojOption, ModelOption, loaded, takes_options
from local_llava.errors import LocalLlavaError
from local_llava.types import Message

if TYPE_CHECKING:
    from local_llava.engine import Llava

HELP = {
    "/image PATH": "show a picture (a file, a URL, or clipboard:) with the next question",
    "/clear": "forget the conversation and its pictures",
    "/system TEXT": "set the system prompt; without TEXT, remove it",
    "/help": "show this",
    "/exit": "leave, as Ctrl-D does; Ctrl-C stops an answer",
}

_HISTORY_LINES = 1000


@takes_options("logprobs", "json_schema", image_cache="kv")
def chat(
    images: Annotated[
        list[str] | None, typer.Argument(metavar="IMAGE", help="Pictures to begin with.", show_default=False)
    ] = None,
    model: ModelOption = None,
    mmproj: MmprojOption = None,
    *,
    options: dict[str, Any],
) -> None:
    """Talk about pictures. /help lists what can be typed besides questions."""
    from local_llava.images import load_image

    pictures = [load_image(image) for image in images or ()]
    with loaded(model, mmproj, options) as llava:
        session = Session(llava, pictures)
        interactive = sys.stdin.isatty()
        if interactive:
            console.note("Type a question; /image PATH shows a picture, /help lists the rest.")
        with _line_editing(interactive):
            for line in _lines(interactive):
                try:
                    if not session.handle(line):
                        break
                except LocalLlavaError as e:
                    session.failed = True
                    print(f"local-llava: {' '.join(str(e).split())}", file=sys.stderr)
    if session.failed and not interactive:
        raise typer.Exit(1)


class Session:
    """A conversation at the terminal.

    Attributes:
        failed: Whether something went wrong so far.
    """

    def __init__(self, llava: Llava, pictures: list[Any]) -> None:
        self._llava, self._pictures = llava, pictures
        self._system = llava.options.system
        self._turns: list[Message] = []
        self.failed = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": self._image,
            "/clear": self._clear,
            "/system": self._set_system,
            "/help": self._help,
        }

    def handle(self, line: str) -> bool:
        """Do what a line asks for. Returns whether the conversation goes on."""
        text = line.strip()
        name, _, rest = text.partition(" ")
        if not text:
            return True
        if name in ("/exit", "/quit"):
            return False
        if name in self._commands:
            self._commands[name](rest.strip())
        elif name.startswith("/") and name[1:].isalpha():
            console.note(f"{name} is no command; /help lists them")
        else:
            self._ask(line.rstrip("\r\n"))
        return True

    def _ask(self, question: str) -> None:
        turn = Message("user", question, tuple(self._pictures))
        messages = [Message("system", self._system)] if self._system is not None else []
        messages += [*self._turns, turn]
        pieces: list[str] = []
        dropped = 0
        try:
            with (
                console.PrefillProgress() as prefill,
                closing(self._llava.stream(messages, on_prefill=prefill.update)) as chunks,
            ):
                for chunk in chunks:
                    pieces.append(chunk.text)
                    print(chunk.text, end="", flush=True)
                    dropped = chunk.reply.dropped if chunk.reply else 0
            print()
        except KeyboardInterrupt:
            print()
            console.note("(stopped)")
        if dropped:
            console.note(f"(the oldest {dropped} messages do not fit the context any more, and were left out)")
        answer = "".join(pieces)
        if answer:
            # What was said so far stays, as it stands on the screen.
            self._turns += [turn, Message("assistant", answer)]
            self._pictures = []

    def _image(self, path: str) -> None:
        from local_llava.images import load_image

        if not path:
            console.note("/image needs a path, a URL, or clipboard:")
            return
        picture = load_image(_unquoted(path))
        self._pictures.append(picture)
        console.note(f"({picture.width} x {picture.height} pixels, shown with the next question)")

    def _clear(self, _: str) -> None:
        self._turns, self._pictures = [], []
        console.note("(forgotten)")

    def _set_system(self, text: str) -> None:
        self._system = text or None
        console.note("(system prompt set)" if text else "(no system prompt)")

    def _help(self, _: str) -> None:
        for command, what in HELP.items():
            console.note(f"{command:14} {what}")


def _unquoted(path: str) -> str:
    """A path as terminals paste it when a file is dropped: quoted, or with escaped blanks."""
    if path[0] in "'\"" or (os.name != "nt" and "\\" in path and not Path(path).exists()):
        with contextlib.suppress(ValueError):
            words = shlex.split(path)
            if len(words) == 1:
                path = words[0]
    return str(Path(path).expanduser()) if path.startswith("~") else path


def _lines(interactive: bool) -> Iterator[str]:
    """What the user types, line by line, up to the end of input."""
    hinted = False
    while True:
        try:
            line = input("> ") if interactive else sys.stdin.readline()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            if not interactive:
                raise
            if not hinted:
                console.note("(Ctrl-D or /exit leaves)")
            hinted = True
            continue
        if not interactive and not line:
            return
        yield line


@contextlib.contextmanager
def _line_editing(interactive: bool) -> Iterator[None]:
    """Arrow keys, Tab and a history, where Python has readline. Windows consoles bring their own."""
    try:
        import readline
    except ImportError:
        interactive = False
    if not interactive:
        yield
        return
    import platformdirs

    path = Path(platformdirs.user_state_dir("local-llava", appauthor=False)) / "chat-history"
    # A history that cannot be read or kept is no reason not to chat.
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(_HISTORY_LINES)
    readline.set_completer_delims(" \t\n")
    readline.set_completer(_completion)
    readline.parse_and_bind("tab: complete")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
            path.chmod(0o600)


def _completion(text: str, index: int) -> str | None:
    """The index-th completion of a command or a path, as readline asks for them."""
    found = [c.split()[0] for c in HELP if text and c.startswith(text)]
    if not found and text:
        path = Path(text).expanduser()
        parent, start = (path, "") if text.endswith(os.sep) else (path.parent, path.name)
        with contextlib.suppress(OSError):
            matches = sorted(p for p in parent.iterdir() if p.name.startswith(start))
            found = [f"{p}{os.sep if p.is_dir() else ''}" for p in matches]
    return found[index] if index < len(found) else None
