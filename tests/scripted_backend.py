"""Models that answer what a test tells them to, for tests of the routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

from local_llava.server.backend import Health, Job, ModelInfo, UnknownModelError
from local_llava.server.settings import ServerSettings
from local_llava.types import Chunk, FinishReason, Reply, Timings, TokenLogprob

TIMINGS = Timings(
    load_s=0.5,
    image_s=0.25,
    prefill_s=0.5,
    decode_s=1.0,
    prompt_tokens=30,
    image_tokens=16,
    reused_tokens=20,
    images_encoded=1,
    completion_tokens=5,
)


def reply(text: str, finish_reason: FinishReason = "stop", **fields: Any) -> Reply:
    """A whole answer."""
    return Reply(text, tuple(range(len(text))), finish_reason, TIMINGS, **fields)


class Scripted:
    """One model, `tiny:F32`.

    Attributes:
        jobs: All that was asked, in order.
        open: Answers under way.
        closed: Answers that ended, in whatever way.
    """

    def __init__(self, *answers: str | Reply | Exception | Sequence[Any]) -> None:
        """
        Args:
            answers: One for each question, the last one for all that follow; a list is what comes of an answer before
                it fails, or before it waits for ever (None).
        """
        self._answers = answers or ("Two cats.",)
        self.jobs: list[Job] = []
        self.names: list[str | None] = []
        self.open = self.closed = 0
        self.waiting = asyncio.Event()

    def models(self) -> list[ModelInfo]:
        return [ModelInfo("tiny:F32", 1000, 1_700_000_000.5, "ab12", "F32")]

    def info(self, name: str | None) -> ModelInfo:
        if (name or "").removesuffix(":latest") not in ("", "tiny", "tiny:F32"):
            raise UnknownModelError(f"there is no model {name!a}; there is tiny:F32")
        return self.models()[0]

    async def stream(
        self, name: str | None, job: Job, *, keep_alive_s: float | None = None
    ) -> AsyncGenerator[Chunk, None]:
        answer = self._answers[min(len(self.jobs), len(self._answers) - 1)]
        self.jobs.append(job)
        self.names.append(name)
        self.open += 1
        try:
            for part in [answer] if isinstance(answer, (str, Reply, Exception)) else answer:
                if isinstance(part, Exception):
                    raise part
                if part is None:
                    self.waiting.set()
                    await asyncio.Event().wait()
                whole = part if isinstance(part, Reply) else reply(part)
                for chunk in _pieces(whole, job):
                    await asyncio.sleep(0)
                    yield chunk
        finally:
            self.open -= 1
            self.closed += 1

    async def load(self, name: str | None, *, keep_alive_s: float | None = None) -> None:
        self.info(name)

    def health(self) -> Health:
        return Health("ok", ("tiny:F32",), self.open, 0)


class NoPictures:
    """Takes the names of pictures for their bytes."""

    def __init__(self) -> None:
        self.resolved: list[Job] = []

    async def resolve(self, job: Job) -> Job:
        self.resolved.append(job)
        messages = [replace(m, images=tuple(str(image).encode() for image in m.images)) for m in job.messages]
        return replace(job, messages=messages)


SETTINGS = ServerSettings(max_tokens=1000, ui=False)


def _pieces(whole: Reply, job: Job) -> list[Chunk]:
    """The chunks of an answer: words, as tokens."""
    words = whole.text.replace(" ", " \0").split("\0")
    n = job.options.get("logprobs")
    known = [TokenLogprob(i, word, -0.5, ((i, word, -0.5), (99, "other", -1.5))[:n]) for i, word in enumerate(words)]
    chunks = [Chunk(word, (i,), () if n is None else (known[i],)) for i, word in enumerate(words)]
    return [*chunks, Chunk("", reply=whole if n is None else replace(whole, logprobs=tuple(known)))]
