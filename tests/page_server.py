"""The real app with the page, and a model whose answers are written in the question. Run as a process of its own:

    python tests/page_server.py PORT SETTINGS

SETTINGS are fields of `ServerSettings`, as JSON. A question is one of

    count N      N words, one each 50 ms
    fail N       N words, and then the model dies
    echo         the options and the messages that the model got, as JSON
    write TEXT   TEXT
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from collections.abc import AsyncGenerator

import uvicorn
from fastapi import FastAPI

from local_llava.server import guard, ui
from local_llava.server.backend import EngineDiedError, Health, Job, ModelInfo
from local_llava.server.settings import ServerSettings
from local_llava.types import Chunk, Reply, Timings

MODELS = [
    ModelInfo(name, size=1, modified=0.0, digest="0", loaded=True, n_ctx=2048) for name in ("first:Q8_0", "second:F16")
]


class Scripted:
    """A `Backend`; `running` counts the answers that are given."""

    def __init__(self) -> None:
        self.running = 0
        self._seen: set[bytes] = set()

    def models(self) -> list[ModelInfo]:
        return MODELS

    def info(self, name: str | None) -> ModelInfo:
        return next((info for info in MODELS if info.name == name), MODELS[0])

    async def load(self, name: str | None, *, keep_alive_s: float | None = None) -> None:
        pass

    def health(self) -> Health:
        return Health("ok", tuple(info.name for info in MODELS), self.running, 0)

    async def stream(
        self, name: str | None, job: Job, *, keep_alive_s: float | None = None
    ) -> AsyncGenerator[Chunk, None]:
        self.running += 1
        try:
            command, _, rest = job.messages[-1].text.partition(" ")
            words = ["nothing"]
            if command in ("count", "fail"):
                words = [f"word{i} " for i in range(int(rest))]
            elif command == "echo":
                words = [json.dumps(self._asked(name, job))]
            elif command == "write":
                words = [rest]
            for word in words:
                if command in ("count", "fail"):
                    await asyncio.sleep(0.05)
                yield Chunk(word, tokens=(1,))
            if command == "fail":
                raise EngineDiedError("the model's process ended; it is started again")
            yield Chunk("", reply=self._reply("".join(words), job))
        finally:
            self.running -= 1

    def _asked(self, name: str | None, job: Job) -> dict[str, object]:
        messages = [
            [message.role, message.text, [hashlib.sha256(image).hexdigest() for image in message.images]]
            for message in job.messages
        ]
        return {"model": name, "options": dict(job.options), "messages": messages}

    def _reply(self, text: str, job: Job) -> Reply:
        pictures = {image for message in job.messages for image in message.images}
        new, n = pictures - self._seen, len(text.split())
        self._seen |= pictures
        timings = Timings(0.0, 0.1, 0.2, 0.3, 600, 576 * bool(pictures), 0 if new else 590, len(new), n)
        return Reply(text, (1,) * n, "stop", timings)


def main() -> None:
    port, changed = int(sys.argv[1]), json.loads(sys.argv[2])
    settings = ServerSettings(port=port, options={"max_tokens": 200}, max_images=4, max_body_bytes=3_000_000, **changed)
    backend = Scripted()
    app = FastAPI(docs_url=None, redoc_url=None)

    @app.get("/running")
    async def running() -> int:
        return backend.running

    ui.mount(app, backend, settings)
    uvicorn.run(guard.guarded(app, settings), port=settings.port, ws="none", log_level="warning")


if __name__ == "__main__":
    main()
