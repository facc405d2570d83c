"""A model in a process of its own: started, asked, cancelled, closed, and what is said when it dies.

Knows the process and the messages (`engine_messages`); the other end is `engine_child`. Does not know when a model is
loaded, or started again after its process died (`supervised_engine`).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from local_llava.errors import EngineError
from local_llava.server.backend import EngineDiedError, Job
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
    Source,
    length,
    pack,
    unpack,
)
from local_llava.types import Chunk, ModelFiles

log = logging.getLogger("local_llava")

CLOSE_S = 10.0
"""How long a process may take to free a model, before it is killed."""

_REAP_S = 5.0
"""How long a process whose pipe has ended may take to end."""


class EngineProcess:
    """A process with at most one model. Belongs to one event loop.

    Attributes:
        loaded: What is in memory; None before.
        ended: Done when the process has ended: with the reason, or None if it was closed.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        """Use `start`."""
        self._process = process
        self._numbers = itertools.count()
        self._answers: dict[int, asyncio.Queue[Chunk | Exception]] = {}
        self._setting_up: asyncio.Future[Message] | None = None
        self._sending = asyncio.Lock()
        self._closing = False
        self.loaded: Loaded | None = None
        self.ended: asyncio.Future[EngineDiedError | None] = asyncio.get_running_loop().create_future()
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def start(cls) -> EngineProcess:
        """Start a process, without a model.

        Raises:
            EngineError: The system starts none.
        """
        # Ctrl-C at the terminal is for the server.
        apart: dict[str, Any] = {"start_new_session": True}
        if sys.platform == "win32":
            apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        try:
            process = await asyncio.create_subprocess_exec(
                *child_command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, **apart
            )
        except OSError as e:
            raise EngineError(f"no process can be started for the model: {e.strerror}") from e
        return cls(process)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    async def prepare(self, source: Source) -> ModelFiles:
        """Have a pair on disk. What it is made from is converted first, which may take minutes.

        Raises:
            EngineDiedError: The process died of it.
            LocalLlavaError: As of `hub.resolve`.
        """
        reply = await self._set_up(Prepare(source))
        assert isinstance(reply, Prepared)
        return reply.files

    async def load(self, options: Mapping[str, Any], reserved: int = 0) -> Loaded:
        """Load the pair that was prepared, in place of one that is loaded.

        Args:
            options: Fields of `Options`.
            reserved: Bytes of the computer's memory that belong to other models.

        Raises:
            EngineDiedError: The process died of it.
            LocalLlavaError: As of `Llava.load`.
        """
        self.loaded = None
        reply = await self._set_up(Load(dict(options), reserved))
        assert isinstance(reply, Loaded)
        self.loaded = reply
        return reply

    async def stream(self, job: Job) -> AsyncGenerator[Chunk, None]:
        """An answer. Closing the generator stops the work.

        Raises:
            EngineDiedError: The process died, or was closed, before the answer was complete.
            LocalLlavaError: As of `Llava.astream`.
        """
        if self.ended.done():
            raise self._why_ended()
        number, box = next(self._numbers), asyncio.Queue[Chunk | Exception]()
        self._answers[number] = box
        try:
            await self._send(Ask(number, job))
            while True:
                item = await box.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.reply is not None:
                    return
        finally:
            # Where it has not ended by itself, nobody waits any more.
            if self._answers.pop(number, None) is not None and not self.ended.done():
                self._write(Cancel(number))

    async def close(self) -> None:
        """Free the model and end the process; answers that are being given fail."""
        self._closing = True
        try:
            self._write(Close())
            await asyncio.wait_for(asyncio.shield(self.ended), CLOSE_S)
        except asyncio.TimeoutError:
            log.warning("a model's process did not end within %g seconds, and was killed", CLOSE_S)
        finally:
            await self.kill()

    async def kill(self) -> None:
        """End the process at once, if it has not ended."""
        self._closing = True
        if not self.ended.done():
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        await asyncio.shield(self.ended)

    async def _set_up(self, message: Message) -> Message:
        if self.ended.done():
            raise self._why_ended()
        self._setting_up = asyncio.get_running_loop().create_future()
        try:
            await self._send(message)
            return await self._setting_up
        finally:
            self._setting_up = None

    async def _send(self, message: Message) -> None:
        frame = pack([message])
        stdin = self._process.stdin
        assert stdin is not None
        # A process that is gone is noticed where its answers are read.
        with contextlib.suppress(ConnectionError):
            async with self._sending:
                stdin.write(frame)
                await stdin.drain()

    def _write(self, message: Message) -> None:
        """Send something small without waiting."""
        stdin = self._process.stdin
        assert stdin is not None
        if not stdin.is_closing():
            stdin.write(pack([message]))

    async def _read(self) -> None:
        """Hand out what the process says, until it ends."""
        stdout = self._process.stdout
        assert stdout is not None
        try:
            while True:
                head = await stdout.readexactly(LENGTH_BYTES)
                for message in unpack(await stdout.readexactly(length(head))):
                    self._take(message)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except Exception:
            log.exception("a model's process says what cannot be read")
            self._process.kill()
        finally:
            await self._end()

    def _take(self, message: Message) -> None:
        match message:
            case Said(number, chunk) if number in self._answers:
                # Of an answer that is complete nothing need be cancelled.
                box = self._answers[number] if chunk.reply is None else self._answers.pop(number)
                box.put_nowait(chunk)
            case Failed(None):
                self._set_up_with(message.error())
            case Failed(number) if number in self._answers:
                self._answers.pop(number).put_nowait(message.error())
            case Prepared() | Loaded():
                self._set_up_with(message)

    def _set_up_with(self, result: Message | Exception) -> None:
        waiting = self._setting_up
        if waiting is None or waiting.done():
            return
        if isinstance(result, Exception):
            waiting.set_exception(result)
        else:
            waiting.set_result(result)

    async def _end(self) -> None:
        """The pipe has ended: tell all who wait."""
        try:
            await asyncio.wait_for(self._process.wait(), _REAP_S)
        except asyncio.TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        if (stdin := self._process.stdin) is not None:
            stdin.close()
        why = _why(self._process.returncode or 0)
        self.ended.set_result(None if self._closing else EngineDiedError(f"the model's process {why}"))
        self._set_up_with(self._why_ended())
        for box in self._answers.values():
            box.put_nowait(self._why_ended())
        self._answers.clear()

    def _why_ended(self) -> EngineError:
        """A new exception each time: one is raised in several tasks."""
        died = self.ended.result()
        return (
            EngineError("the model was unloaded before the answer was complete")
            if died is None
            else EngineDiedError(str(died))
        )


def child_command() -> list[str]:
    """What is run."""
    level = log.getEffectiveLevel()
    program = f"import sys; sys.path[:] = {sys.path!r}; from local_llava.server.engine_child import main; main({level})"
    return [sys.executable or "python3", "-c", program]


def _why(code: int) -> str:
    """How a process ended, by its exit code, in words that follow its name."""
    if code >= 0:
        shown = f"{code:#x}" if code > 255 else str(code)  # Windows: 0xc0000005 is an access violation
        return f"ended by itself, with exit code {shown}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return _SIGNALS.get(name, "was ended by {}").format(name)


_SIGNALS = {
    "SIGKILL": "was killed ({}): by somebody, or by the system for lack of memory",
    "SIGABRT": "aborted ({}): llama.cpp or ggml met something that it cannot handle",
    "SIGSEGV": "crashed ({})",
    "SIGBUS": "crashed ({}): a model's file may have been cut while it was in use, or its disk failed",
    "SIGILL": "crashed ({}): llama-cpp-python may have been built for another processor",
}
