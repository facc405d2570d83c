"""The thread that owns the models, and the jobs that other threads and event loops hand to it.

Knows threads. Does not know what the jobs do: a job is an iterator, and what it yields travels to whoever waits.
Between two items a job can be cancelled; an exception in it is raised where it is waited for.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from typing import Any, Generic, TypeVar

from local_llava.errors import UsageError

T = TypeVar("T")

_POLL_S = 0.2
"""How long a wait goes on before Python looks for signals; Windows does not interrupt a wait for Ctrl-C."""


class _End:
    """Follows the last item."""


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


class Job(Generic[T]):
    """An iterator that runs in the worker's thread."""

    def __init__(self, items: Iterator[T], deliver: Callable[[T | _End | _Failure], None]) -> None:
        self._items, self._deliver = items, deliver
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Stop before the next item. Whoever waits gets the end."""
        self._cancelled.set()

    def run(self) -> None:
        """Run to the end, in the worker's thread. Never raises."""
        try:
            while not self._cancelled.is_set():
                self._deliver(next(self._items))
            close = getattr(self._items, "close", None)
            if close is not None:
                close()
        except StopIteration:
            pass
        except BaseException as e:
            self._deliver(_Failure(e))
        self._deliver(_End())


class Worker:
    """A thread that runs one job after the other, in the order they came."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Job[Any] | None] = queue.SimpleQueue()
        self._current: Job[Any] | None = None
        self._closed = False
        self._lock = threading.Lock()  # between "is it closed?" and "put a job"
        # A daemon, so that a program that forgets to close does not hang at its end.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def iterate(self, items: Iterator[T]) -> Generator[T, None, None]:
        """Run an iterator in the worker's thread and yield its items here. Closing this one cancels that one.

        Raises:
            UsageError: The worker is closed.
        """
        box: queue.SimpleQueue[T | _End | _Failure] = queue.SimpleQueue()
        job = self._submit(Job(items, box.put))
        try:
            while True:
                try:
                    item = box.get(timeout=_POLL_S)
                except queue.Empty:
                    continue
                if isinstance(item, _End):
                    return
                if isinstance(item, _Failure):
                    raise item.error
                yield item
        finally:
            job.cancel()

    async def aiterate(self, items: Iterator[T]) -> AsyncGenerator[T, None]:
        """As `iterate`, for an event loop, which is not blocked."""
        loop = asyncio.get_running_loop()
        box: asyncio.Queue[T | _End | _Failure] = asyncio.Queue()

        def deliver(item: T | _End | _Failure) -> None:
            try:
                loop.call_soon_threadsafe(box.put_nowait, item)
            except RuntimeError:
                job.cancel()  # the loop is closed, and nobody waits

        job = Job(items, deliver)
        self._submit(job)
        try:
            while True:
                item = await box.get()
                if isinstance(item, _End):
                    return
                if isinstance(item, _Failure):
                    raise item.error
                yield item
        finally:
            job.cancel()

    def call(self, function: Callable[[], T]) -> T:
        """Run a function in the worker's thread and return what it returns."""
        for result in self.iterate(f() for f in (function,)):
            return result
        raise UsageError("the model was closed meanwhile")

    def close(self) -> None:
        """Cancel what runs and what waits, and end the thread. Waits for the step that is under way."""
        with self._lock:
            self._closed = True
            self._jobs.put(None)
        if (current := self._current) is not None:
            current.cancel()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _submit(self, job: Job[T]) -> Job[T]:
        with self._lock:
            if self._closed:
                raise UsageError("the model is closed")
            self._jobs.put(job)
        return job

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._current = job
            if self._closed:
                job.cancel()
            job.run()
            self._current = None
