"""The thread that owns the models: order, cancelling, errors, too many callers, closing."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from local_llava.errors import BusyError, EngineError, UsageError
from local_llava.worker import Ticket, Worker


class Counting:
    """Work that gives every ticket one number a step."""

    def __init__(self) -> None:
        self.open: list[tuple[Ticket[Any], Iterator[int]]] = []
        self.log: list[tuple[Ticket[Any], int]] = []
        self.ended: list[Ticket[Any]] = []
        self.fault: BaseException | None = None

    def up_to(self, n: int) -> Callable[[Ticket[Any]], None]:
        return lambda ticket: self.open.append((ticket, iter(range(n))))

    def step(self) -> bool:
        time.sleep(0.0005)
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault
        for ticket, numbers in list(self.open):
            if ticket.cancelled:
                self._end(ticket, EngineError("the model was closed before the answer was complete"))
            elif (number := next(numbers, None)) is None:
                self._end(ticket, None)
            else:
                self.log.append((ticket, number))
                ticket.deliver(number)
        return bool(self.open)

    def fail(self, error: BaseException) -> None:
        for ticket, _ in list(self.open):
            self._end(ticket, error)

    def _end(self, ticket: Ticket[Any], error: BaseException | None) -> None:
        self.open = [entry for entry in self.open if entry[0] is not ticket]
        self.ended.append(ticket)
        ticket.end(error)


@pytest.fixture
def work() -> Counting:
    return Counting()


@pytest.fixture
def worker(work: Counting) -> Iterator[Worker]:
    worker = Worker("test", work, max_open=4)
    yield worker
    worker.close()


FOREVER = 1_000_000


def test_items_and_results_travel(worker: Worker, work: Counting) -> None:
    assert list(worker.iterate(work.up_to(5))) == [0, 1, 2, 3, 4]
    assert worker.call(threading.get_ident) == worker.call(threading.get_ident) != threading.get_ident()


def test_those_who_wait_are_served_together(worker: Worker, work: Counting) -> None:
    one, other = worker.iterate(work.up_to(50)), worker.iterate(work.up_to(50))
    assert next(one) == next(other) == 0
    assert list(one) == list(other) == list(range(1, 50))
    tickets = [ticket for ticket, _ in work.log]
    assert tickets.index(tickets[-1]) < 50, "the second one did not wait for the end of the first"


def test_errors_are_raised_where_they_are_waited_for(worker: Worker, work: Counting) -> None:
    def failing(ticket: Ticket[int]) -> None:
        ticket.deliver(1)
        raise ZeroDivisionError("here")

    def ending(ticket: Ticket[int]) -> None:
        ticket.end(EngineError("no memory"))
        ticket.end(ZeroDivisionError("too late to be heard"))

    other = worker.iterate(work.up_to(FOREVER))
    next(other)
    items = worker.iterate(failing)
    assert next(items) == 1
    with pytest.raises(ZeroDivisionError, match="here"):
        next(items)
    with pytest.raises(EngineError, match="no memory"):
        list(worker.iterate(ending))
    with pytest.raises(ZeroDivisionError):
        worker.call(lambda: 1 // 0)
    assert worker.call(lambda: 2) == 2, "the next one works"
    assert next(other) == 1, "and the others go on"
    other.close()


def test_a_step_that_fails_ends_what_is_open_and_nothing_else(worker: Worker, work: Counting) -> None:
    items = worker.iterate(work.up_to(FOREVER))
    next(items)
    work.fault = ZeroDivisionError("in a step")
    with pytest.raises(ZeroDivisionError, match="in a step"):
        list(items)
    assert list(worker.iterate(work.up_to(3))) == [0, 1, 2]


def test_closing_the_iterator_stops_the_work_within_a_step(worker: Worker, work: Counting) -> None:
    items = worker.iterate(work.up_to(FOREVER))
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    items.close()
    n_done = len(work.log)
    assert worker.call(lambda: "next") == "next"
    worker.call(lambda: None)
    assert work.ended and not work.open
    assert len(work.log) <= n_done + 1


def test_what_is_cancelled_before_its_turn_is_not_begun(worker: Worker, work: Counting) -> None:
    entered, gate = threading.Event(), threading.Event()
    thread = threading.Thread(target=worker.call, args=(lambda: (entered.set(), gate.wait()),))
    thread.start()
    entered.wait()
    try:
        ticket = worker._order(work.up_to(FOREVER), lambda item: None, bounded=True)
        ticket.cancel()
    finally:
        gate.set()
    thread.join()
    worker.call(lambda: None)
    assert not work.log and not work.open


def test_jobs_wait_for_one_another_without_deadlock(worker: Worker, work: Counting) -> None:
    items = worker.iterate(work.up_to(3))
    assert next(items) == 0
    assert worker.call(lambda: "inner") == "inner", "though the outer one is not read to its end"
    assert list(items) == [1, 2]


def test_one_too_many_is_refused_at_once(worker: Worker, work: Counting) -> None:
    several = [worker.iterate(work.up_to(FOREVER)) for _ in range(4)]
    for items in several:
        next(items)
    with pytest.raises(BusyError, match=r"busy: .*\b4\b"):
        worker.check()
    with pytest.raises(BusyError, match=r"busy: .*\b4\b"):
        next(worker.iterate(work.up_to(1)))
    assert worker.call(lambda: 1) == 1, "which does not count"
    several[0].close()
    worker.call(lambda: None)
    worker.call(lambda: None)
    worker.check()
    assert list(worker.iterate(work.up_to(2))) == [0, 1]
    assert list(worker.iterate(work.up_to(2))) == [0, 1], "one that ended has left its place"
    for items in several[1:]:
        items.close()


def test_an_event_loop_is_not_blocked(worker: Worker, work: Counting) -> None:
    async def main() -> tuple[list[int], int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.002)

        task = asyncio.create_task(tick())
        items = [i async for i in worker.aiterate(work.up_to(60))]
        task.cancel()
        return items, ticks

    items, ticks = asyncio.run(main())
    assert items == list(range(60)) and ticks > 3


def test_errors_reach_event_loops(worker: Worker) -> None:
    def failing(ticket: Ticket[int]) -> None:
        raise ZeroDivisionError("here")

    async def main() -> None:
        with pytest.raises(ZeroDivisionError, match="here"):
            async for _ in worker.aiterate(failing):
                pass

    asyncio.run(main())


def test_cancelling_a_task_stops_the_work(worker: Worker, work: Counting) -> None:
    async def read() -> None:
        async for _ in worker.aiterate(work.up_to(FOREVER)):
            pass

    async def main() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(read(), 0.05)

    asyncio.run(main())
    worker.call(lambda: None)
    worker.call(lambda: None)
    assert work.log and not work.open


def test_an_event_loop_that_is_gone_counts_as_cancelled(worker: Worker, work: Counting) -> None:
    loop = asyncio.new_event_loop()
    items = worker.aiterate(work.up_to(FOREVER))
    assert loop.run_until_complete(anext(items)) == 0
    loop.close()
    end = time.monotonic() + 20
    while worker.call(lambda: bool(work.open)):
        assert time.monotonic() < end
    assert list(worker.iterate(work.up_to(2))) == [0, 1]


def test_closing_ends_what_runs_and_what_waits() -> None:
    work = Counting()
    worker = Worker("test", work, max_open=100)
    errors: list[BaseException] = []

    def read() -> None:
        try:
            for _ in worker.iterate(work.up_to(FOREVER)):
                pass
        except EngineError as e:
            errors.append(e)

    async def aread() -> None:
        async for _ in worker.aiterate(work.up_to(FOREVER)):
            pass

    def loop() -> None:
        try:
            asyncio.run(aread())
        except EngineError as e:
            errors.append(e)

    def call() -> None:  # by chance done, underway or not begun
        with contextlib.suppress(EngineError, UsageError):
            worker.call(lambda: time.sleep(0.01))

    threads = [threading.Thread(target=target) for target in (*[read] * 4, *[loop] * 2)]
    callers = [threading.Thread(target=call) for _ in range(20)]
    for thread in threads:
        thread.start()
    while len({ticket for ticket, _ in list(work.log)}) < 6:
        time.sleep(0.001)
    for thread in callers:
        thread.start()
    worker.close()
    for thread in (*threads, *callers):
        thread.join(20)
        assert not thread.is_alive()
    assert [str(e) for e in errors] == ["the model was closed before the answer was complete"] * 6
    worker.close()
    for use in (worker.check, lambda: worker.call(lambda: 1), lambda: next(worker.iterate(work.up_to(1)))):
        with pytest.raises(UsageError, match="closed"):
            use()


def test_it_can_be_closed_from_its_own_thread(work: Counting) -> None:
    worker = Worker("test", work, max_open=4)
    worker.call(worker.close)
    worker._thread.join(20)
    assert not worker._thread.is_alive()


def test_many_threads(work: Counting) -> None:
    worker = Worker("test", work, max_open=16)
    results: list[list[list[int]]] = [[] for _ in range(16)]

    def use(i: int) -> None:
        for n in range(12):
            if n % 4 == i % 4:
                results[i].append([worker.call(lambda n=n: n)])  # type: ignore[misc]
            elif n % 4 == (i + 1) % 4:
                items = worker.iterate(work.up_to(FOREVER))
                results[i].append([next(items)])
                items.close()
                # Its place is free when the worker has seen that.
                worker.call(lambda: None)
                worker.call(lambda: None)
            else:
                results[i].append(list(worker.iterate(work.up_to(n))))

    threads = [threading.Thread(target=use, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for i, lists in enumerate(results):
        expected = [[n] if n % 4 == i % 4 else [0] if n % 4 == (i + 1) % 4 else list(range(n)) for n in range(12)]
        assert lists == expected
    worker.close()
    assert not work.open and worker._n_open == 0
