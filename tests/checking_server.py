"""A server for fuzz_server.py: the guard, the routes, and models that only check what they are asked.

Run as a process of its own, so that what it takes is its own: prints its URL, and ends when its input does.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing

from guarded_server import Running
from scripted_backend import Scripted

from local_llava.conversation import as_messages
from local_llava.errors import PromptError
from local_llava.images import load_image
from local_llava.schema.compiler import compile_schema
from local_llava.server import app
from local_llava.server.backend import Job, ModelInfo
from local_llava.server.settings import ServerSettings
from local_llava.types import Chunk, Options

MAX_TEXT = 100_000
"""Characters that fit the context."""


class CheckingBackend(Scripted):
    """Refuses what the engine refuses, as far as that needs no model."""

    def info(self, name: str | None) -> ModelInfo:
        return super().info(name and name[:80])

    async def stream(
        self, name: str | None, job: Job, *, keep_alive_s: float | None = None
    ) -> AsyncGenerator[Chunk, None]:
        self.info(name)
        options = Options().updated(job.options, loaded=True)
        messages = as_messages(list(job.messages), system=options.system)
        if options.json_schema is not None:
            compile_schema(options.json_schema)
        for image in (image for message in messages for image in message.images):
            assert isinstance(image, bytes), "the engine would take it for a path or a URL"
            load_image(image, remote=False, local=False)
        if sum(len(message.text) for message in messages) > MAX_TEXT:
            raise PromptError("the conversation does not fit the context")
        self.jobs.clear()
        self.names.clear()
        async with aclosing(super().stream(name, job, keep_alive_s=keep_alive_s)) as chunks:
            async for chunk in chunks:
                yield chunk


def main() -> None:
    logging.basicConfig(level=logging.ERROR)
    settings = ServerSettings(ui=False, max_tokens=100, request_timeout_s=20, read_timeout_s=10)
    server = Running(
        app.create(CheckingBackend('{"calls": [{"name": "weather", "arguments": {}}]}'), settings), settings
    )
    print(f"http://localhost:{server.port}", flush=True)
    sys.stdin.read()
    server.stop()


if __name__ == "__main__":
    main()
