"""One answer on its way to the page. Knows no NiceGUI."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from local_llava.server.backend import Backend, Job
from local_llava.server.errors import reported
from local_llava.server.ui.rendering import caption


@dataclass(frozen=True)
class Progress:
    """How far an answer is."""

    text: str
    note: str = ""
    """What it cost; once it is complete."""
    error: str = ""
    """Why it does not go on; then `text` is what there is of it."""


async def answer(backend: Backend, model: str | None, job: Job) -> AsyncGenerator[Progress, None]:
    """An answer as it grows. The last one has a note or an error; closing it stops the work.

    Args:
        backend: The models.
        model: Name of one; None for the default one.
        job: What is asked.
    """
    begun, text = time.monotonic(), ""
    first_s: float | None = None
    try:
        async with aclosing(backend.stream(model, job)) as chunks:
            async for chunk in chunks:
                if first_s is None and (chunk.tokens or chunk.text or chunk.reply):
                    first_s = time.monotonic() - begun
                text += chunk.text
                if chunk.reply is not None:
                    yield Progress(chunk.reply.text, caption(chunk.reply, first_s or 0.0))
                    return
                if chunk.text:
                    yield Progress(text)
        yield Progress(text, error="the model was closed before the answer was complete")
    except Exception as error:
        yield Progress(text, error=reported(error).message)
