"""tiny-llava's world, drawn anew, and a look at what the engine does with questions about it."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import pytest
import scenes
from PIL import Image

from local_llava import Llava, Reply
from local_llava.llm.rows import Rows

T = TypeVar("T")

QUESTION = "What do you see?"


class Asked(NamedTuple):
    """A question, and its true answer."""

    picture: Image.Image
    question: str
    answer: str


def picture(seed: int | str) -> Image.Image:
    scene, _ = next(scenes.sample_scenes(seed, held_out=True))
    return scenes.draw(scene)


def fresh_seed() -> int:
    """Another one in each run; say it where a test fails."""
    return random.SystemRandom().randrange(1 << 40)


def questions(seed: int, n_pictures: int, each: int) -> list[Asked]:
    """`each` about one picture, then `each` about the next."""
    drawn = itertools.islice(scenes.sample_scenes(seed, held_out=True), n_pictures)
    return [
        Asked(image, q.question, q.answer)
        for scene, rng in drawn
        for image in [scenes.draw(scene)]
        for q in scenes.sample_questions(scene, rng, each)
    ]


def at_once(calls: Sequence[Callable[[], T]], timeout: float = 120) -> list[T]:
    """The results of calls, each in a thread of its own. An exception is raised here."""
    results: list[T | None] = [None] * len(calls)
    errors: list[BaseException] = []

    def call(i: int) -> None:
        try:
            results[i] = calls[i]()
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)
        assert not thread.is_alive(), "it hangs"
    if errors:
        raise errors[0]
    return results  # type: ignore[return-value]


class Asking:
    """A question that is being asked in a thread of its own."""

    def __init__(self, call: Callable[[], Reply]) -> None:
        self._call = call
        self._reply: Reply | None = None
        self._error: BaseException | None = None
        self.done_at = 0.0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._reply = self._call()
        except BaseException as e:
            self._error = e
        self.done_at = time.perf_counter()

    @property
    def reply(self) -> Reply:
        """Waits for it; its error is raised here."""
        self._thread.join(120)
        assert not self._thread.is_alive(), "it hangs"
        if self._error is not None:
            raise self._error
        assert self._reply is not None
        return self._reply

    @property
    def error(self) -> BaseException | None:
        self._thread.join(120)
        assert not self._thread.is_alive(), "it hangs"
        return self._error


class Line:
    """Questions that reach the engine in a known order, and none before all of them are there."""

    def __init__(self, llava: Llava) -> None:
        self._llava, self._worker = llava, llava._worker
        self.asked: list[Asking] = []

    def ask(self, *args: Any, **options: Any) -> Asking:
        n_before = self._worker._orders.qsize()
        self.asked.append(Asking(lambda: self._llava.ask(*args, **options)))
        wait_until(lambda: self._worker._orders.qsize() > n_before or not self.asked[-1]._thread.is_alive())
        return self.asked[-1]


@contextlib.contextmanager
def line(llava: Llava) -> Iterator[Line]:
    """While this is open, the engine stands still."""
    entered, gate = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        gate.wait(120)

    thread = threading.Thread(target=lambda: llava._worker.call(hold))
    thread.start()
    entered.wait(120)
    try:
        yield Line(llava)
    finally:
        gate.set()
        thread.join()


def wait_until(condition: Callable[[], bool], timeout: float = 60) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.001)


def between_steps(llava: Llava, look: Callable[[Any], T]) -> T:
    """What a function of the scheduler gives, in the engine's thread."""
    return llava._worker.call(lambda: look(llava._scheduler))


def is_idle(llava: Llava) -> bool:
    """Whether no request is left, and nothing of the KV cache is in use or promised but what retired sequences hold."""

    def look(scheduler: Any) -> bool:
        sequences = scheduler._sequences
        held = {cell for sequence in sequences.retired for cell in sequence.cells}
        nobody = not scheduler._running and not scheduler._waiting and not scheduler._suspects
        return nobody and not llava._worker._n_open and sequences.n_free == llava._llm.n_cells - len(held)

    return between_steps(llava, look)


class Batches:
    """What the engine evaluates.

    Attributes:
        rows: Rows by sequence, batch by batch.
        before: Called with each batch before it is evaluated; may raise.
    """

    def __init__(self, llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[Counter[int]] = []
        self.before: Callable[[Rows], None] = lambda rows: None
        decode = llava._llm.decode

        def watched(rows: Rows, *args: Any, **kwargs: Any) -> None:
            self.before(rows)
            self.rows.append(Counter(rows.sequences))
            decode(rows, *args, **kwargs)

        monkeypatch.setattr(llava._llm, "decode", watched)

    @property
    def n_rows(self) -> int:
        return sum(batch.total() for batch in self.rows)


def forget_everything(llava: Llava) -> None:
    """As if it were just loaded: no picture and no prompt is known."""

    def forget(scheduler: Any) -> None:
        for sequence in scheduler._sequences.retired:
            scheduler._sequences.discard(sequence)
        scheduler._encoder._known.clear()
        llava._given._seen.clear()

    between_steps(llava, forget)
