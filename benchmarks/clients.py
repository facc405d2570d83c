"""Clients that ask at the same time, the pictures that they ask about, and when each token came.

Knows neither local-llava nor its peers: what answers is a function that yields as tokens come.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

QUESTIONS = (
    "What is in the middle of this picture?",
    "Which colours are there, and where are they?",
    "Describe the background in a few words.",
    "Who might have taken this photograph?",
    "Is it day or night, and how can you tell?",
    "Count what there is more than one of.",
    "What would you change about this picture?",
    "Write a caption that fits on one line.",
    "How far away is what is largest?",
    "Name three things that are not shown.",
    "Would this picture look good on a wall?",
    "In which season was it taken?",
    "Are there any people or animals?",
    "Tell a short story about it.",
    "Say what is at the left border.",
    "Of what material is the brightest object?",
)
"""Each begins with another word, so that nothing after the picture is shared."""


@dataclass(frozen=True)
class Request:
    """What a client asks."""

    question: str
    image: str | None
    """Path of a picture."""
    max_tokens: int
    follows: int = 0
    """Wait until the first client has this many tokens."""
    until_others: bool = False
    """Leave as soon as all others have their answers."""


@dataclass(frozen=True)
class Answer:
    """How an answer came."""

    arrivals: tuple[float, ...]
    """Of its tokens: seconds after the clients began."""
    started: float
    """When the client asked."""
    counters: dict[str, Any] = field(default_factory=dict)
    """What the other side says of it."""

    @property
    def first_s(self) -> float:
        """Seconds to the first token."""
        return self.arrivals[0] - self.started

    @property
    def longest_gap(self) -> float:
        """Seconds between two tokens, at most."""
        return max(b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False))


Stream: TypeAlias = Callable[[Request], Generator["int | dict[str, Any]", None, None]]
"""Yields how many tokens came, each time that some do, and at the end perhaps counters. Closing it cancels."""


def ask(requests: Sequence[Request], stream: Stream) -> list[Answer]:
    """Ask all at the same time, each from a thread of its own."""
    began = time.perf_counter()
    answers: list[Answer | BaseException | None] = [None] * len(requests)
    arrivals: list[list[float]] = [[] for _ in requests]
    changed = threading.Condition()

    def follow(index: int) -> None:
        request = requests[index]
        counters: dict[str, Any] = {}
        with changed:
            changed.wait_for(lambda: len(arrivals[0]) >= request.follows or answers[0] is not None)
        started = time.perf_counter() - began
        with closing(stream(request)) as items:
            for item in items:
                if isinstance(item, dict):
                    counters = item
                    continue
                with changed:
                    arrivals[index] += [time.perf_counter() - began] * item
                    changed.notify_all()
                if request.until_others and all(a is not None for i, a in enumerate(answers) if i != index):
                    break
        answers[index] = Answer(tuple(arrivals[index]), started, counters)

    def run(index: int) -> None:
        try:
            follow(index)
        except BaseException as e:
            answers[index] = e
        with changed:
            changed.notify_all()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done = []
    for answer in answers:
        if not isinstance(answer, Answer):
            raise answer or RuntimeError("no answer")
        done.append(answer)
    return done


def tokens_per_s(answers: Sequence[Answer]) -> float:
    """All tokens over all the time that it took."""
    return sum(len(a.arrivals) for a in answers) / max(a.arrivals[-1] for a in answers)


def decode_tokens_per_s(answer: Answer) -> float:
    """Between the first token and the last."""
    return (len(answer.arrivals) - 1) / (answer.arrivals[-1] - answer.arrivals[0])


class Pictures:
    """Squares out of photographs that come with scikit-image, no two alike; as PNG files."""

    def __init__(self, directory: Path, seed: int = 0) -> None:
        import numpy as np
        from skimage import data

        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._random = directory, np.random.default_rng(seed)
        sources: list[Any] = [data.astronaut, data.chelsea, data.coffee, data.rocket]
        self._photographs = [source() for source in sources]
        self._count = 0

    def new(self) -> str:
        """The path of one that nobody has seen."""
        from PIL import Image

        photograph = self._photographs[self._count % len(self._photographs)]
        size = 256
        top, left = (int(self._random.integers(0, n - size)) for n in photograph.shape[:2])
        path = self._directory / f"{self._count:04d}.png"
        Image.fromarray(photograph[top : top + size, left : left + size]).resize((400, 400)).save(path)
        self._count += 1
        return str(path)


def spread(values: Sequence[float], unit: str = "s", digits: int = 2) -> str:
    """Median, with the least and the most where there are several."""
    middle = f"{statistics.median(values):.{digits}f} {unit}"
    return middle if len(values) < 2 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


@dataclass(frozen=True)
class Memory:
    """Resident memory of a process, bytes."""

    private: int
    """Beyond mapped files: RssAnon + RssShmem."""
    mapped: int
    """RssFile."""

    @classmethod
    def of(cls, pid: int) -> Memory:
        """Of a process that runs; on Linux alone."""
        if not Path("/proc").is_dir():
            raise SystemExit("resident memory is told apart on Linux alone")
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
        return cls((kib["RssAnon"] + kib["RssShmem"]) << 10, kib["RssFile"] << 10)

    def __str__(self) -> str:
        return f"{self.private / 1e6:.0f} MB, and {self.mapped / 1e6:.0f} MB of mapped files"
