"""A model's process without a model, for tests of what happens around it. It does what the files in a directory say.

python fake_engine_child.py DIRECTORY

dies        while it is there, the process aborts when it is to load a model
lies        it sends what is no frame
hangs       it does not end when it is told to
room        how many models the computer has room for; one weighs a byte
loads       one line is added for each model that is loaded: the path of its file
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import BinaryIO

from local_llava import errors
from local_llava.hub import Checkpoint
from local_llava.server.engine_child import _messages, _write_all
from local_llava.server.engine_messages import (
    Ask,
    Cancel,
    Close,
    Failed,
    Load,
    Loaded,
    Message,
    Prepare,
    Prepared,
    Said,
    pack,
)
from local_llava.types import Chunk, ModelFiles, Reply, Timings


def main() -> None:
    directory, out = Path(sys.argv[1]), os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    files = ModelFiles(Path("?"), Path("?"))
    for message in _messages(sys.stdin.buffer):
        match message:
            case Prepare(source):
                files = ModelFiles(source.directory, source.directory) if isinstance(source, Checkpoint) else source
                send(out, Prepared(files))
            case Load():
                load(directory, files, message, out)
            case Ask():
                answer(message, out)
            case Cancel():
                pass
            case Close():
                while (directory / "hangs").exists():
                    time.sleep(0.01)
                return


def load(directory: Path, files: ModelFiles, message: Load, out: BinaryIO) -> None:
    if (directory / "dies").exists():
        os.abort()
    if (directory / "lies").exists():
        _write_all(out, b"\x05" + bytes(7) + b"hello")
    room = int((directory / "room").read_text()) if (directory / "room").exists() else 99
    if message.reserved >= room:
        send(out, Failed.of(None, errors.NotEnoughMemoryError("1 byte is needed, 0 are free")))
        return
    with (directory / "loads").open("a") as log:
        log.write(f"{files.model}\n")
    # What is half loaded can be told from what is whole by the memory that it would have liked.
    send(out, Loaded(n_ctx=512, parallel=8, weights=1, short=(directory / "short").exists() and message.reserved > 0))


def answer(ask: Ask, out: BinaryIO) -> None:
    """What was said, word for word, each after as many seconds as the temperature; an empty text is refused."""
    words = ask.job.messages[-1].text.split()
    if not words:
        send(out, Failed.of(ask.number, errors.PromptError("there is nothing to say")))
        return
    for word in words:
        time.sleep(float(ask.job.options.get("temperature", 0)))
        send(out, Said(ask.number, Chunk(word)))
    timings = Timings(0, 0, 0, 0, 1, 0, 0, 0, len(words))
    send(out, Said(ask.number, Chunk("", reply=Reply(" ".join(words), (), "stop", timings))))


def send(out: BinaryIO, message: Message) -> None:
    _write_all(out, pack([message]))


if __name__ == "__main__":
    main()
