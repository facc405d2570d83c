"""One model of the server: when it is in memory, and what is done when its process dies.

Knows who uses it, how long it stays after, and how often its process died. Does not know how it is loaded
(`model_manager` says so) and what is asked.

A process that dies is started again at once; one that dies again soon after, after a pause that doubles each time. As
long as a pause is short, requests wait for its end; in a longer one they are told when to come again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from local_llava.server.backend import EngineDiedError, RestartingError
from local_llava.server.engine_messages import Source
from local_llava.server.engine_process import EngineProcess

log = logging.getLogger("local_llava")

STABLE_S = 60.0
"""A process that lived longer did not die of being started."""
FIRST_PAUSE_S, MAX_PAUSE_S = 0.5, 60.0
"""Before the second start in a row; at most."""
WAIT_S = 1.0
"""The longest pause that requests wait for."""
_SETTLE_S = 0.05
"""Until those whose answers were lost have gone."""
MANY_DEATHS = 3
"""In a row, from which on a model is said to fail."""


class SupervisedEngine:
    """A model, in memory or not. Belongs to one event loop.

    Attributes:
        source: What is loaded.
        name: As people and requests call it.
        process: The one with the model, loaded; None where there is none.
        users: Requests that are answered or wait for the process.
        unused: Set while nobody uses the process, or there is none.
        last_used: When the last one ended, by `time.monotonic`.
        restarts: Times that the process was started again after it died.
        died_at: When it died last, by `time.monotonic`.
        detail: How it died last, in words.
    """

    def __init__(self, source: Source, name: str, load: Callable[[SupervisedEngine], Awaitable[EngineProcess]]) -> None:
        """
        Args:
            source: What is loaded.
            name: As people and requests call it.
            load: Gives a process that has it in memory.
        """
        self.source, self.name, self._load = source, name, load
        self.process: EngineProcess | None = None
        self.users, self.last_used = 0, 0.0
        self.restarts, self.died_at, self.detail = 0, 0.0, ""
        self._keep_alive_s, self._idle_since = 0.0, time.time()
        self._deaths, self._not_before = 0, 0.0  # in a row; the next start
        self._is_down = False  # it died and is not started again
        self._starting: asyncio.Task[EngineProcess] | None = None
        self._restarting: asyncio.Task[None] | None = None
        self._unloading: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._changing = asyncio.Lock()  # held while the process is made or ended
        self._open, self.unused = asyncio.Event(), asyncio.Event()
        self._open.set()
        self.unused.set()

    @property
    def state(self) -> str:
        """As `Health.status`."""
        if not self._is_down:
            return "ok"
        if self._deaths >= MANY_DEATHS:
            return "failing"
        return "restarting" if self._restarting is not None else "ok"

    @property
    def expires(self) -> float | None:
        """When it is unloaded if nobody asks, seconds since 1970; None for never, or where it is not loaded."""
        if self.process is None or self._keep_alive_s < 0:
            return None
        return (time.time() if self.users else self._idle_since) + self._keep_alive_s

    @asynccontextmanager
    async def use(self, keep_alive_s: float) -> AsyncIterator[EngineProcess]:
        """The process, loaded first if need be. It stays at least as long as it is used.

        Args:
            keep_alive_s: Seconds that it stays after; negative for ever.

        Raises:
            RestartingError: It died several times in a row, and is not started again yet.
            EngineDiedError: It died while it was loaded.
            LocalLlavaError: It cannot be loaded.
        """
        while not self._open.is_set():
            await self._open.wait()
        self.users += 1
        self._keep_alive_s = keep_alive_s
        self._update()
        try:
            yield await self._ready()
        finally:
            self.users -= 1
            self.last_used, self._idle_since = time.monotonic(), time.time()
            self._update()

    def expire(self) -> None:
        """Unload it as soon as nobody uses it, unless somebody else comes meanwhile."""
        self._keep_alive_s = 0.0
        self._update()

    @contextmanager
    def closed(self) -> Iterator[None]:
        """While this is open, whoever comes to use it waits. One at a time may have it open."""
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    async def unload(self, only_unused: bool = False) -> None:
        """Out of memory with it.

        Args:
            only_unused: Leave it where somebody uses it.
        """
        if self.process is None:
            return  # without waiting for one that is being loaded, which may wait for room itself
        async with self._changing:
            if self.process is None or (only_unused and self.users):
                return
            process, self.process = self.process, None
            self._update()
            log.info("%s is unloaded", self.name)
            await process.close()

    async def stop(self) -> None:
        """End everything at once."""
        self._keep_alive_s = 0.0
        tasks = [task for task in (self._restarting, self._starting, self._unloading) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.unload()
        if self._timer is not None:
            self._timer.cancel()

    def _update(self) -> None:
        """After a change of who uses it, or of whether there is a process."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.process is None or not self.users:
            self.unused.set()
        else:
            self.unused.clear()
        if self.process is not None and not self.users and self._keep_alive_s >= 0:
            left = max(0.0, self._idle_since + self._keep_alive_s - time.time())
            self._timer = asyncio.get_running_loop().call_later(left, self._expired)

    def _expired(self) -> None:
        self._timer = None
        if self._unloading is None:
            self._unloading = asyncio.create_task(self.unload(only_unused=True))
            self._unloading.add_done_callback(self._unloaded)

    def _unloaded(self, task: asyncio.Task[None]) -> None:
        self._unloading = None
        self._update()  # somebody may have come and gone meanwhile

    async def _ready(self) -> EngineProcess:
        """The process; all who ask before there is one wait for the same."""
        if self.process is not None:
            return self.process
        pause = self._not_before - time.monotonic()
        if pause > WAIT_S:
            raise RestartingError(
                f"{self.name}: its process died {self._deaths} times in a row, and is started again in {pause:.0f} "
                f"seconds ({self.detail})",
                pause,
            )
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
            self._starting.add_done_callback(self._started)
        return await asyncio.shield(self._starting)

    async def _start(self) -> EngineProcess:
        async with self._changing:
            await asyncio.sleep(max(0.0, self._not_before - time.monotonic()))
            try:
                process = await self._load(self)
            except EngineDiedError as e:
                self._died(e, lived_s=0.0)
                raise
            self.restarts += self._is_down
            self.process, self._is_down = process, False
            started = time.monotonic()
            process.ended.add_done_callback(lambda ended: self._ended(process, ended.result(), started))
            self._update()
            return process

    def _started(self, task: asyncio.Task[EngineProcess]) -> None:
        self._starting = None
        if not task.cancelled():
            task.exception()  # seen, also where all who waited have gone

    def _ended(self, process: EngineProcess, died: EngineDiedError | None, started: float) -> None:
        if self.process is process:
            self.process = None
            self._update()
        lived_s = time.monotonic() - started
        if died is not None:
            self._died(died, lived_s)
        elif lived_s >= STABLE_S:
            self._deaths = 0

    def _died(self, error: EngineDiedError, lived_s: float) -> None:
        self._deaths = 1 if lived_s >= STABLE_S else self._deaths + 1
        pause = 0.0 if self._deaths == 1 else min(MAX_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(self._deaths - 2, 20))
        self.died_at, self._is_down = time.monotonic(), True
        self._not_before = self.died_at + pause
        self.detail = f"{self.name}: {error}"
        log.error("%s: %s%s", self.name, error, f"; it is started again in {pause:g} s" if pause else "")
        if self._restarting is None:
            self._restarting = asyncio.create_task(self._restart())
            self._restarting.add_done_callback(self._restarted)

    async def _restart(self) -> None:
        """Start it again, until that succeeds, or it would have been unloaded anyway."""
        while self.process is None:
            await asyncio.sleep(max(_SETTLE_S, self._not_before - time.monotonic()))
            if not self._is_wanted():
                return
            with contextlib.suppress(EngineDiedError, RestartingError):
                await self._ready()

    def _restarted(self, task: asyncio.Task[None]) -> None:
        self._restarting = None
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s cannot be started again: %s", self.name, error)

    def _is_wanted(self) -> bool:
        return self.users > 0 or self._keep_alive_s < 0 or time.time() < self._idle_since + self._keep_alive_s
