"""Several answers to one request, given at the same time.

Knows async generators of pieces, and nothing of HTTP or of what is asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from local_llava.errors import EngineError
from local_llava.types import Chunk, Reply


async def side_by_side(answers: Sequence[AsyncGenerator[Chunk, None]]) -> AsyncGenerator[tuple[int, Chunk], None]:
    """Pieces of all answers as they come, each with the number of its answer.

    Closing this closes all of them, and so does an error of one, which is raised here.
    """
    if len(answers) == 1:
        async with aclosing(answers[0]) as chunks:
            async for chunk in chunks:
                yield 0, chunk
        return
    # A client that is slow to read holds its answers back: no more is kept than one piece of each.
    pieces: asyncio.Queue[tuple[int, Chunk | BaseException | None]] = asyncio.Queue(len(answers))
    tasks = [asyncio.ensure_future(_forward(i, answer, pieces)) for i, answer in enumerate(answers)]
    try:
        running = len(tasks)
        while running:
            i, piece = await pieces.get()
            if isinstance(piece, BaseException):
                raise piece
            if piece is None:
                running -= 1
            else:
                yield i, piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # Of a task that was cancelled before its first step, the generator was never begun.
        for answer in answers:
            await answer.aclose()


async def replies(answers: Sequence[AsyncGenerator[Chunk, None]]) -> list[Reply]:
    """The complete answers.

    Raises:
        EngineError: One of them ended early.
        LocalLlavaError: As the generators.
    """
    found: dict[int, Reply] = {}
    async with aclosing(side_by_side(answers)) as pieces:
        async for i, chunk in pieces:
            if chunk.reply is not None:
                found[i] = chunk.reply
    if len(found) < len(answers):
        raise EngineError("the model was closed before the answer was complete")
    return [found[i] for i in range(len(answers))]


async def _forward(
    i: int, answer: AsyncGenerator[Chunk, None], pieces: asyncio.Queue[tuple[int, Chunk | BaseException | None]]
) -> None:
    try:
        async with aclosing(answer) as chunks:
            async for chunk in chunks:
                await pieces.put((i, chunk))
    except Exception as e:
        await pieces.put((i, e))
    else:
        await pieces.put((i, None))
