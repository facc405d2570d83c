"""Finds the fastest way to run a pair on this computer: tries one after the other and keeps what wins clearly.

Knows which options are tried, and in which order. Everything is measured through `Llava`, as users get it: pictures and
texts are new each time, so that nothing is reused. What was found is kept by `tuning`.

One option after the other is settled, threads first. Reading a prompt, writing an answer and encoding a picture are
measured apart and put together to the time of one question about a new picture, which is what is made short.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from local_llava import devices, ggml
from local_llava.engine import Llava
from local_llava.errors import EngineError, UsageError
from local_llava.llm import N_BATCH
from local_llava.types import ModelFiles, Timings

log = logging.getLogger("local_llava")

MIN_GAIN = 0.03
"""Share of the time that must be saved: less is what two measurements of the same differ by."""

_QUESTION, _ANSWER = 40, 100
"""Tokens of the question and of the answer that times are put together for, besides the picture's."""
_PROMPTS, _ANSWERS = (64, 1024), (8, 64)
"""Shortest and longest prompt that is read, and answer that is written, to measure; tokens."""
_BATCHES = (64, 128, 256, 512, 1024)
_SHARE = 1 / 12
"""Of the time given, for one measurement."""

_WORDS = (
    *("a", "the", "of", "in", "on", "is", "red", "blue", "green", "house", "tree", "water", "road", "dog", "cat"),
    *("bird", "stone", "light", "day", "night", "two", "five", "one"),
)

Settings: TypeAlias = dict[str, Any]
"""Options by name, of `tuning.FIELDS`."""


@dataclass(eq=False)
class Measurement:
    """What one way of running took; several times, the shortest counts, since others are disturbed."""

    settings: Settings
    picture_s: list[float] = field(default_factory=list)
    """Of one picture in the tower."""
    prefill_s: list[float] = field(default_factory=list)
    """A token of the prompt."""
    decode_s: list[float] = field(default_factory=list)
    """A token of the answer."""
    picture_tokens: int = 0

    @property
    def total_s(self) -> float:
        """Of a question about a new picture."""
        tokens = self.picture_tokens + _QUESTION
        return min(self.picture_s) + tokens * min(self.prefill_s) + _ANSWER * min(self.decode_s)


@dataclass(frozen=True)
class Result:
    """What was found."""

    default: Measurement
    best: Measurement
    tried: list[Measurement]
    skipped: list[Settings]
    """For which the time was too short."""

    @property
    def gain(self) -> float:
        """Share of the time that the best way saves."""
        return 1 - self.best.total_s / self.default.total_s

    @property
    def changes(self) -> Settings:
        """What to keep: the options that differ from the defaults; none where nothing wins clearly."""
        if self.gain < MIN_GAIN:
            return {}
        return {name: v for name, v in self.best.settings.items() if v != self.default.settings[name]}


class Tuner:
    """One search."""

    def __init__(
        self,
        files: ModelFiles,
        seconds: float,
        rounding_kv: bool,
        progress: Callable[[Measurement], None] = lambda _: None,
    ) -> None:
        """
        Args:
            files: The pair.
            seconds: To take, roughly; not counting the first measurement, which must be.
            rounding_kv: Whether a KV cache in Q8_0, which rounds, may be chosen. It is measured anyhow.
            progress: Called with each measurement.
        """
        self.files, self.rounding_kv, self.progress = files, rounding_kv, progress
        self._share = seconds * _SHARE
        self._end = time.monotonic() + seconds
        self._longest = 0.0
        self._prompt, self._answer = _PROMPTS[0], _ANSWERS[0]
        self._random = random.Random()
        self.tried: list[Measurement] = []
        self.skipped: list[Settings] = []

    def run(self) -> Result:
        """Measure.

        Raises:
            LocalLlavaError: The pair cannot be loaded as it is.
        """
        default = Measurement(
            {"n_threads": devices.physical_cores(), "n_batch": N_BATCH, "flash_attention": None, "kv_type": "auto"}
        )
        self._measure(default, first=True)
        best = default
        for name, values in self._candidates():
            before = best.settings
            for value in values:
                measured = Measurement({**before, name: value})
                if measured.settings == before or not self._try(measured):
                    continue
                allowed = name != "kv_type" or self.rounding_kv
                if allowed and measured.total_s < best.total_s:
                    best = measured
        if best is not default:
            # Once more, in turn: what another program took meanwhile must not decide.
            for _ in range(2):
                self._measure(default)
                self._measure(best)
        return Result(default, best, self.tried, self.skipped)

    def _candidates(self) -> Iterator[tuple[str, Sequence[Any]]]:
        cores, cpus = devices.physical_cores(), ggml.available_cpus()
        yield "n_threads", sorted({cpus, *([cores - 1] if cores > 2 else []), *([cores // 2] if cores > 3 else [])})
        # A batch longer than what is read at once cannot show what it is worth.
        yield "n_batch", [n for n in _BATCHES if n <= self._prompt]
        yield "flash_attention", [True, False]
        yield "kv_type", ["Q8_0"]

    def _try(self, measured: Measurement) -> bool:
        """Measure, if there is time and it can be loaded."""
        if time.monotonic() + self._longest > self._end:
            self.skipped.append(measured.settings)
            return False
        try:
            self._measure(measured)
        except (EngineError, UsageError) as e:
            log.info("%s: %s", measured.settings, e)
            return False
        return True

    def _measure(self, measured: Measurement, first: bool = False) -> None:
        started = time.monotonic()
        with Llava.load(
            self.files.model, self.files.mmproj, parallel=1, image_cache="off", **measured.settings
        ) as llava:
            warm = self._ask(llava, _PROMPTS[0] // 2, _ANSWERS[0] // 2)  # also reads the weights from the disk
            if first:
                picture = [token for token in llava.prompt_tokens("?", self._picture()) if token is None]
                measured.picture_tokens = len(picture)
                self._size(warm, llava.n_ctx)
            else:
                measured.picture_tokens = self.tried[0].picture_tokens
            at = time.perf_counter()
            llava.embed_images(self._picture())
            measured.picture_s.append(time.perf_counter() - at)
            timings = self._ask(llava, self._prompt, self._answer)
            measured.prefill_s.append(timings.prefill_s / timings.prefilled_tokens)
            measured.decode_s.append(timings.decode_s / max(1, timings.completion_tokens - 1))
        self._longest = max(self._longest, time.monotonic() - started)
        if measured not in self.tried:
            self.tried.append(measured)
        self.progress(measured)

    def _size(self, warm: Timings, n_ctx: int) -> None:
        """Set how much is read and written, by how long a little took."""

        def fitting(seconds_each: float, least: int, most: int) -> int:
            return max(least, min(most, int(self._share / 2 / max(seconds_each, 1e-9))))

        room = max(_PROMPTS[0], n_ctx - _ANSWERS[1] - 64)
        self._prompt = min(room, fitting(warm.prefill_s / warm.prefilled_tokens, *_PROMPTS))
        self._answer = fitting(warm.decode_s / max(1, warm.completion_tokens - 1), *_ANSWERS)

    def _ask(self, llava: Llava, n_prompt: int, n_answer: int) -> Timings:
        """A text that was not asked before, and an answer that goes on: any of many tokens may come at any place."""
        words = self._random.choices(_WORDS, k=n_prompt)
        n_tokens = len(llava.prompt_tokens(" ".join(words)))
        text = " ".join(words[: max(1, n_prompt * n_prompt // n_tokens)])
        return llava.ask(
            text, max_tokens=n_answer, temperature=100.0, top_k=1000, top_p=1.0, min_p=0.0, seed=1, speculate=False
        ).timings

    def _picture(self) -> Image.Image:
        noise = np.frombuffer(self._random.randbytes(480 * 640 * 3), np.uint8)
        return Image.fromarray(noise.reshape(480, 640, 3))
