"""The thread that owns the models, and what other threads and event loops hand to it.

Knows threads. Does not know what is done there: a function takes a ticket in the thread and sees to it that what is
asked for is put on the ticket, at once or in later steps; from there it travels to whoever waits. An exception is
raised where it is waited for.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any, Generic, Protocol, TypeVar

from local_llava.errors import BusyError, EngineError, UsageError

T = TypeVar("T")

_POLL_S = 0.2
"""How long a wait goes on before Python looks for signals; Windows does not interrupt a wait for Ctrl-C."""

CLOSED = "the model is closed"


class _End:
    """Follows the last item."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class Ticket(Generic[T]):
    """Where the results for one who waits are put. All but `cancel` is for the worker's thread."""

    def __init__(
        self, put: Callable[[T | _End], None], on_end: Callable[[], None], is_closed: Callable[[], bool]
    ) -> None:
        self._put, self._on_end, self._is_closed = put, on_end, is_closed
        self._ended = self._cancelled = False

    def cancel(self) -> None:
        """Nobody waits any more."""
        self._cancelled = True

    @property
    def cancelled(self) -> bool:
        """Whether the work is for nobody. Whoever works for the ticket looks at it between steps, or more often."""
        return self._cancelled or self._is_closed()

    def deliver(self, item: T) -> None:
        """Hand over a result."""
        self._put(item)

    def end(self, error: BaseException | None = None) -> None:
        """Nothing comes any more. Said twice, the second time is ignored."""
        if not self._ended:
            self._ended = True
            self._on_end()
            self._put(_End(error))

    def drop(self) -> None:
        """The work is left off, since it was cancelled, or the worker closes."""
        self.end(_closed_error() if self._is_closed() else None)


class Work(Protocol):
    """What the thread does besides taking orders."""

    def step(self) -> bool:
        """Go a short step on. Returns whether there is more to do."""
        ...

    def fail(self, error: BaseException) -> None:
        """End all tickets with an error; there is nothing to do then."""
        ...


class Worker:
    """A thread that alternates between taking orders and going a step on."""

    def __init__(self, name: str, work: Work, max_open: int) -> None:
        """
        Args:
            name: Of the thread.
            work: What is done between orders.
            max_open: Tickets of `iterate` and `aiterate` that may be open at the same time.
        """
        self._work, self._max_open = work, max_open
        self._orders: queue.SimpleQueue[tuple[Callable[[Ticket[Any]], None], Ticket[Any]] | None] = queue.SimpleQueue()
        self._n_open = 0
        self._closed = False
        self._lock = threading.Lock()  # of the two above
        # A daemon, so that a program that forgets to close does not hang at its end.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """See whether an order would be taken.

        Raises:
            UsageError: The worker is closed.
            BusyError: Too many tickets are open.
        """
        with self._lock:
            self._check(bounded=True)

    def iterate(self, start: Callable[[Ticket[T]], None], bounded: bool = True) -> Generator[T, None, None]:
        """Call a function in the worker's thread and yield here what comes on its ticket. Closing cancels it.

        Args:
            start: The function.
            bounded: Whether the ticket counts among those of which only so many may be open.

        Raises:
            UsageError: The worker is closed.
            BusyError: Too many tickets are open.
        """
        box: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
        ticket = self._order(start, box.put, bounded)
        try:
            while True:
                try:
                    item = box.get(timeout=_POLL_S)
                except queue.Empty:
                    if not self._thread.is_alive() and box.empty():
                        raise _closed_error() from None
                    continue
                if isinstance(item, _End):
                    if item.error is not None:
                        raise item.error
                    return
                yield item
        finally:
            ticket.cancel()

    async def aiterate(self, start: Callable[[Ticket[T]], None]) -> AsyncGenerator[T, None]:
        """As `iterate`, for an event loop, which is not blocked."""
        loop = asyncio.get_running_loop()
        box: asyncio.Queue[T | _End] = asyncio.Queue()

        def put(item: T | _End) -> None:
            try:
                loop.call_soon_threadsafe(box.put_nowait, item)
            except RuntimeError:
                ticket.cancel()  # the loop is closed, and nobody waits

        ticket = self._order(start, put, bounded=True)
        try:
            while True:
                item = await box.get()
                if isinstance(item, _End):
                    if item.error is not None:
                        raise item.error
                    return
                yield item
        finally:
            ticket.cancel()

    def call(self, function: Callable[[], T]) -> T:
        """Run a function in the worker's thread, between two steps, and return what it returns."""

        def start(ticket: Ticket[T]) -> None:
            ticket.deliver(function())
            ticket.end()

        for result in self.iterate(start, bounded=False):
            return result
        raise EngineError("the model was closed meanwhile")

    def close(self) -> None:
        """End all tickets, and the thread. Waits for the step that is under way."""
        with self._lock:
            self._closed = True
        self._orders.put(None)
        if not self.is_current():
            self._thread.join()

    def is_current(self) -> bool:
        """Whether this is called in the worker's own thread, which cannot wait for its own end."""
        return threading.current_thread() is self._thread

    def _check(self, bounded: bool) -> None:
        if self._closed:
            raise UsageError(CLOSED)
        if bounded and self._n_open >= self._max_open:
            raise BusyError(
                f"busy: {self._n_open} questions wait or are answered, all that max_waiting allows; try again later"
            )

    def _order(self, start: Callable[[Ticket[T]], None], put: Callable[[T | _End], None], bounded: bool) -> Ticket[T]:
        ticket: Ticket[T] = Ticket(put, self._one_less if bounded else lambda: None, lambda: self._closed)
        with self._lock:
            self._check(bounded)
            self._n_open += bounded
            self._orders.put((start, ticket))
        return ticket

    def _one_less(self) -> None:
        with self._lock:
            self._n_open -= 1

    def _run(self) -> None:
        try:
            self._loop()
        finally:
            closed = _closed_error()
            with self._lock:
                self._closed = True  # also after a defect of the loop itself
            try:
                self._work.fail(closed)
            finally:
                while not self._orders.empty():
                    if (order := self._orders.get()) is not None:
                        order[1].end(closed)

    def _loop(self) -> None:
        busy = False
        while not self._closed:
            try:
                order = self._orders.get(block=not busy)
                while order is not None:
                    self._take(*order)
                    order = self._orders.get(block=False)
            except queue.Empty:
                pass
            if not self._closed:
                busy = self._step()

    def _take(self, start: Callable[[Ticket[Any]], None], ticket: Ticket[Any]) -> None:
        if ticket.cancelled:
            ticket.drop()
            return
        try:
            start(ticket)
        except BaseException as e:
            ticket.end(e)

    def _step(self) -> bool:
        try:
            return self._work.step()
        except BaseException as e:
            self._work.fail(e)
            return False


def _closed_error() -> EngineError:
    return EngineError("the model was closed before the answer was complete")
