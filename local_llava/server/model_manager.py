"""The models of the server: found by name, loaded when they are asked, unloaded when nobody asks or memory is short.

Knows all that are in memory, and how many requests there may be. What a name means is `catalog`'s, what becomes of one
model `supervised_engine`'s, its process `engine_process`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Collection, Iterator
from contextlib import aclosing
from dataclasses import replace

from local_llava.errors import BusyError, NotEnoughMemoryError
from local_llava.server.backend import Health, Job, ModelInfo, StoppingError
from local_llava.server.catalog import Catalog, Model
from local_llava.server.engine_messages import Source
from local_llava.server.engine_process import EngineProcess
from local_llava.server.settings import ServerSettings
from local_llava.server.supervised_engine import SupervisedEngine
from local_llava.types import Chunk

log = logging.getLogger("local_llava")

_WORST_FIRST = ("failing", "restarting", "ok")


class ModelManager:
    """All models: the one implementation of `backend.Backend`. Belongs to one event loop.

    `models` and `info` read files, and may be called in threads.
    """

    def __init__(self, settings: ServerSettings) -> None:
        """
        Args:
            settings: Of the server.
        """
        self._keep_alive_s, self._max_requests = settings.keep_alive_s, settings.max_requests
        # How many may wait is decided here, over all models.
        self._options = {"max_waiting": settings.max_requests, **settings.options}
        self._catalog = Catalog(settings.model, settings.mmproj)
        self._engines: dict[Source, SupervisedEngine] = {}
        self._loading = asyncio.Lock()  # one model at a time: each sees what memory the others have left
        self._n_requests = 0
        self._nobody = asyncio.Event()
        self._nobody.set()
        self._stopping = False

    async def start(self) -> None:
        """Find the default model, and read what is known of all. Loads none.

        Raises:
            LocalLlavaError: The default model is not there, or cannot be used.
        """
        await asyncio.to_thread(self._catalog.find, None)
        await asyncio.to_thread(self._catalog.models)

    async def stop(self, drain_s: float) -> None:
        """Take no more requests, wait for those that are answered, and end all processes.

        Args:
            drain_s: Seconds to wait at most.
        """
        self._stopping = True
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._nobody.wait(), drain_s)
        await asyncio.gather(*(engine.stop() for engine in set(self._engines.values())))

    def models(self) -> list[ModelInfo]:
        """As of `Backend`."""
        return [self._with_state(model) for model in self._catalog.models()]

    def info(self, name: str | None) -> ModelInfo:
        """As of `Backend`."""
        return self._with_state(self._catalog.find(name))

    async def stream(
        self, name: str | None, job: Job, *, keep_alive_s: float | None = None
    ) -> AsyncGenerator[Chunk, None]:
        """As of `Backend`."""
        with self._admitted():
            engine = await self._engine(name)
            async with (
                engine.use(self._keep_alive_s if keep_alive_s is None else keep_alive_s) as process,
                aclosing(process.stream(job)) as chunks,
            ):
                async for chunk in chunks:
                    yield chunk

    async def load(self, name: str | None, *, keep_alive_s: float | None = None) -> None:
        """As of `Backend`."""
        with self._admitted():
            engine = await self._engine(name)
            if keep_alive_s == 0:
                engine.expire()
                return
            async with engine.use(self._keep_alive_s if keep_alive_s is None else keep_alive_s):
                pass

    def health(self) -> Health:
        """As of `Backend`."""
        engines = set(self._engines.values())
        states = {engine.state for engine in engines}
        died = max((engine for engine in engines if engine.detail), key=lambda engine: engine.died_at, default=None)
        return Health(
            status=next((state for state in _WORST_FIRST if state in states), "ok"),
            loaded=tuple(sorted(engine.name for engine in engines if engine.process is not None)),
            answering=self._n_requests,
            restarts=sum(engine.restarts for engine in engines),
            detail=died.detail if died else "",
        )

    def _with_state(self, model: Model) -> ModelInfo:
        engine = self._engines.get(model.source)
        process = engine.process if engine is not None else None
        if engine is None or process is None or process.loaded is None:
            return model.info
        return replace(model.info, loaded=True, expires=engine.expires, n_ctx=process.loaded.n_ctx)

    @contextlib.contextmanager
    def _admitted(self) -> Iterator[None]:
        """One of the requests that there may be."""
        if self._stopping:
            raise StoppingError("the server is being stopped, and takes no new requests")
        if self._n_requests >= self._max_requests:
            raise BusyError(f"busy: {self._n_requests} requests wait or are answered, as many as may; try again later")
        self._n_requests += 1
        self._nobody.clear()
        try:
            yield
        finally:
            self._n_requests -= 1
            if not self._n_requests:
                self._nobody.set()

    async def _engine(self, name: str | None) -> SupervisedEngine:
        model = await asyncio.to_thread(self._catalog.find, name)
        if model.source not in self._engines:
            self._engines[model.source] = SupervisedEngine(model.source, model.info.name, self._load)
        return self._engines[model.source]

    async def _load(self, engine: SupervisedEngine) -> EngineProcess:
        """A process that has a model in memory."""
        process = await EngineProcess.start()
        try:
            files = await process.prepare(engine.source)
            self._catalog.note_made(engine.source, files)
            self._engines.setdefault(files, engine)
            async with self._loading:
                await self._fit(engine, process)
        except BaseException:
            await process.kill()
            raise
        return process

    async def _fit(self, engine: SupervisedEngine, process: EngineProcess) -> None:
        """Load a model, and unload others for it while memory is short."""
        while True:
            others = {e: e.process for e in set(self._engines.values()) if e is not engine and e.process is not None}
            weights = sum(other.loaded.weights for other in others.values() if other.loaded is not None)
            try:
                loaded = await process.load(self._options, reserved=weights)
                # What nobody uses must not cost this one a part of its context, or of its layers on a GPU.
                if not loaded.short or not any(other.unused.is_set() for other in others):
                    log.info("%s is loaded, for %d tokens and %d answers", engine.name, loaded.n_ctx, loaded.parallel)
                    return
            except NotEnoughMemoryError:
                if not others:
                    raise
            await self._make_room(others)

    async def _make_room(self, engines: Collection[SupervisedEngine]) -> None:
        """Unload the one that was not used for the longest time; where all are used, the first that is not any more."""
        with contextlib.ExitStack() as stack:
            # Or a model that is always asked would never leave.
            for engine in engines:
                stack.enter_context(engine.closed())
            waiting = [asyncio.create_task(engine.unused.wait()) for engine in engines]
            try:
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in waiting:
                    task.cancel()
            unused = [engine for engine in engines if engine.unused.is_set()]
            await min(unused, key=lambda engine: engine.last_used).unload()
