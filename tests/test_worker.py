"""The thread that owns the models: order, cancelling, errors, closing."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

from local_llava.errors import UsageError
from local_llava.worker import Worker


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker("test")
    yield worker
    worker.close()


def counting(log: list[object], n: int = 1_000_000) -> Iterator[int]:
    try:
        for i in range(n):
            log.append(i)
            yield i
            time.sleep(0.001)
    finally:
        log.append("end")


def test_items_and_results_travel(worker: Worker) -> None:
    assert list(worker.iterate(iter(range(5)))) == [0, 1, 2, 3, 4]
    assert worker.call(threading.get_ident) == worker.call(threading.get_ident) != threading.get_ident()


def test_errors_are_raised_where_they_are_waited_for(worker: Worker) -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise ZeroDivisionError("here")

    items = worker.iterate(failing())
    assert next(items) == 1
    with pytest.raises(ZeroDivisionError, match="here"):
        next(items)
    assert worker.call(lambda: 2) == 2, "the next job works"


def test_closing_stops_the_work(worker: Worker) -> None:
    log: list[object] = []
    items = worker.iterate(counting(log))
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    items.close()
    assert worker.call(lambda: "next") == "next"  # after the cancelled one
    assert log[-1] == "end" and len(log) < 1000


def test_jobs_wait_for_one_another_without_deadlock(worker: Worker) -> None:
    items = worker.iterate(iter(range(3)))
    assert next(items) == 0
    assert worker.call(lambda: "inner") == "inner", "though the outer one is not read to its end"
    assert list(items) == [1, 2]


def test_an_event_loop_is_not_blocked(worker: Worker) -> None:
    async def main() -> tuple[list[int], int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.002)

        task = asyncio.create_task(tick())
        items = [i async for i in worker.aiterate(counting([], 40))]
        task.cancel()
        return items, ticks

    items, ticks = asyncio.run(main())
    assert items == list(range(40)) and ticks > 3


def test_cancelling_a_task_stops_the_work(worker: Worker) -> None:
    log: list[object] = []

    async def read() -> None:
        async for _ in worker.aiterate(counting(log)):
            pass

    async def main() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(read(), 0.05)

    asyncio.run(main())
    assert worker.call(lambda: 1) == 1
    assert log[-1] == "end"


def test_closing_ends_what_runs_and_what_waits() -> None:
    worker = Worker("test")
    log: list[object] = []
    running, waiting = worker.iterate(counting(log)), worker.iterate(counting([]))
    assert next(running) == 0
    results: list[list[int]] = []
    thread = threading.Thread(target=lambda: results.append(list(waiting)))
    thread.start()
    time.sleep(0.05)
    worker.close()
    thread.join(5)
    assert results == [[]] and log[-1] == "end"
    with pytest.raises(UsageError, match="closed"):
        worker.call(lambda: 1)
