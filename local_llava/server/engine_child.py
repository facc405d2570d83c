"""The process that holds a model for the server, and dies alone if C code aborts.

Knows `Llava`, and what comes through its standard input and goes out through its standard output (`engine_messages`).
Ends when the server does: its input ends then, however the server ended. `engine_process` starts it.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from local_llava import hub
from local_llava.errors import EngineError, LocalLlavaError
from local_llava.server.engine_messages import (
    LENGTH_BYTES,
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
    length,
    pack,
    unpack,
)
from local_llava.types import ModelFiles

if TYPE_CHECKING:
    from local_llava.engine import Llava

log = logging.getLogger("local_llava")

_OOM_SCORE = 500
"""Where Linux runs out of memory, it is this process that ends, and not the server."""


def main(level: int) -> None:
    """Serve a model until the pipe ends.

    Args:
        level: Of the log, which goes to standard error.
    """
    incoming, outgoing = _own_pipes()
    _leave_signals_to_the_server()
    # Of the thread that died alone: CPython reads the frames of the others while they run, which can crash in its turn
    # (python/cpython#116008), and the server would then name the second signal as the cause.
    faulthandler.enable(all_threads=False)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    log.setLevel(level)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE))
    asyncio.run(_Child(incoming, outgoing).run())


def _own_pipes() -> tuple[BinaryIO, BinaryIO]:
    """The pipes, out of reach of whatever else reads standard input or prints."""
    incoming, outgoing = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return incoming, outgoing


def _leave_signals_to_the_server() -> None:
    """Terminals and service managers send these to all processes, but answers are to be finished first."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
        if (number := getattr(signal, name, None)) is not None:
            signal.signal(number, signal.SIG_IGN)


class _Child:
    """The model, and the answers that are being given."""

    def __init__(self, incoming: BinaryIO, outgoing: BinaryIO) -> None:
        self._incoming, self._outgoing = incoming, outgoing
        self._to_send: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._answers: dict[int, asyncio.Task[None]] = {}
        self._setting_up: set[asyncio.Task[None]] = set()
        self._files: ModelFiles | None = None
        self._llava: Llava | None = None

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for target in (lambda: self._read(loop), self._write):
            threading.Thread(target=target, daemon=True).start()
        await asyncio.Event().wait()  # the process ends in another way

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        """Thread: take what comes."""
        try:
            for message in _messages(self._incoming):
                loop.call_soon_threadsafe(self._take, message)
        finally:
            os._exit(1)  # the server is gone

    def _write(self) -> None:
        """Thread: send what is there, all of it in one frame."""
        while True:
            messages = [self._to_send.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    messages.append(self._to_send.get_nowait())
            try:
                _write_all(self._outgoing, pack(messages))
            except OSError:
                os._exit(1)

    def _take(self, message: Message) -> None:
        match message:
            case Prepare():
                self._set_up(lambda: self._prepare(message))
            case Load():
                self._set_up(lambda: self._load(message))
            case Ask():
                self._answers[message.number] = asyncio.create_task(self._answer(message))
            case Cancel():
                if message.number in self._answers:
                    self._answers[message.number].cancel()
            case Close():
                self._set_up(self._close)

    def _set_up(self, work: Callable[[], Message | None]) -> None:
        """Do what takes long in a thread, and send what it gives."""

        async def run() -> None:
            try:
                message = await asyncio.to_thread(work)
            except Exception as e:
                message = self._failed(None, e)
            if message is not None:
                self._to_send.put(message)

        task = asyncio.create_task(run())
        self._setting_up.add(task)
        task.add_done_callback(self._setting_up.discard)

    def _prepare(self, message: Prepare) -> Message:
        source = message.source
        self._files = source if isinstance(source, ModelFiles) else hub.make(source)
        return Prepared(self._files)

    def _load(self, message: Load) -> Message:
        from local_llava import memory
        from local_llava.engine import Llava

        if self._files is None:
            raise EngineError("the pair was not prepared")
        if self._llava is not None:
            self._llava.close()
            self._llava = None
        memory.reserve(message.reserved)
        self._llava = llava = Llava.load(self._files.model, self._files.mmproj, **message.options)
        placed = llava.placement
        return Loaded(placed.n_ctx, placed.parallel, placed.cpu.weights, placed.short)

    def _close(self) -> None:
        """Ends the process: there may be threads that do not end."""
        if self._llava is not None:
            self._llava.close()
        os._exit(0)

    async def _answer(self, message: Ask) -> None:
        number, job = message.number, message.job
        try:
            if self._llava is None:
                raise EngineError("the model is not loaded")
            answer = self._llava.astream(list(job.messages), raw=job.raw, **job.options)
            async with aclosing(answer) as chunks:
                async for chunk in chunks:
                    self._to_send.put(Said(number, chunk))
        except Exception as e:
            self._to_send.put(self._failed(number, e))
        finally:
            del self._answers[number]

    def _failed(self, number: int | None, error: Exception) -> Failed:
        if not isinstance(error, (LocalLlavaError, MemoryError)):
            log.exception("a defect of local-llava, in the model's process")
        return Failed.of(number, error)


def _messages(incoming: BinaryIO) -> Iterator[Message]:
    """What comes, until the pipe ends."""
    while len(head := incoming.read(LENGTH_BYTES)) == LENGTH_BYTES:
        content = incoming.read(length(head))
        if len(content) < length(head):
            return
        yield from unpack(content)


def _write_all(outgoing: BinaryIO, frame: bytes) -> None:
    rest = memoryview(frame)
    while rest:
        rest = rest[outgoing.write(rest) :]
