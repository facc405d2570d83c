"""Uses the engine over and over in this process, and prints by how many bytes its resident memory grew.

    python leaking.py MODEL MMPROJ requests|loads N [LEAK]

With LEAK, something is kept that should be let go, to show that this would be noticed.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
from PIL import Image

from local_llava import EngineError, Llava, LocalLlavaError, Message, aside

kept: list[Any] = []
OPTIONS: dict[str, Any] = {"n_threads": 1, "n_ctx": 256, "parallel": 3}

# New pictures are read in a cache of their own.
aside.MIN_ROWS = aside.MIN_OTHERS = 32


def resident() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def pictures(n: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (96, 96, 3), np.uint8)) for _ in range(n)]


def requests(llava: Llava, shown: list[Image.Image], n: int) -> None:
    """Answers, and now and then one that is left early, one that fails, several at once, a schema, a chat."""
    decode = llava._llm.decode
    for i in range(n):
        picture = shown[i * 7 % len(shown)]
        kind = i % 20
        if kind < 12:
            llava.ask(f"What is number {i}?", picture, max_tokens=3)
        elif kind == 12:
            stream = llava.stream(f"What is number {i}?", picture, max_tokens=30)
            next(stream)
            stream.close()
        elif kind == 13:
            with contextlib.suppress(ZeroDivisionError):
                llava.ask(f"What is number {i}?", picture, on_prefill=lambda done, total: 1 // 0)  # type: ignore[arg-type,return-value]
        elif kind == 14:

            def fail(*_: Any) -> None:
                raise EngineError("on purpose")

            llava._llm.decode = fail  # type: ignore[method-assign]
            with contextlib.suppress(EngineError):
                llava.ask(f"What is number {i}?", picture)
            llava._llm.decode = decode  # type: ignore[method-assign]
        elif kind == 15:
            with contextlib.suppress(LocalLlavaError):
                llava.ask("word " * 1000, picture)
        elif kind == 16:
            llava.ask("How many?", picture, json_schema={"type": "boolean"}, temperature=1.0, logprobs=2)
        elif i % 100 == 17:

            async def some(i: int = i, picture: Image.Image = picture) -> None:
                tasks = [asyncio.create_task(llava.aask(f"{i} {k}?", picture, max_tokens=3)) for k in range(3)]
                await asyncio.sleep(0.001)
                tasks[0].cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

            asyncio.run(some())
        elif kind == 18:
            turns = [Message("user", f"{i}?"), Message("assistant", "No."), Message("user", "And now?")]
            llava.chat(turns, picture, max_tokens=3)
        elif kind == 19:
            llava.embed_images([picture, shown[i % len(shown)]])


def measure(once: Callable[[int], None], warm_up: int, n: int) -> int:
    once(warm_up)
    before = resident()
    once(n)
    return resident() - before


def main() -> None:
    model, mmproj, what, count = sys.argv[1:5]
    leak = sys.argv[5] if len(sys.argv) > 5 else ""
    n = int(count)
    if what == "loads":

        def load(n: int) -> None:
            for _ in range(n):
                llava = Llava.load(model, mmproj, **OPTIONS)
                llava.ask("?", Image.new("RGB", (50, 50)), max_tokens=2)
                if leak == "context":
                    llava._llm._stack.pop_all()
                if leak == "tower":
                    llava._tower._stack.pop_all()
                llava.close()

        print(measure(load, 5, n))
        return
    with Llava.load(model, mmproj, **OPTIONS) as llava:
        shown = pictures(100)
        if leak == "embeddings":
            from local_llava.embeddings import Encoder

            begin = Encoder.begin

            def keeping(self: Encoder, pictures: Any) -> Any:
                encoding = begin(self, list(pictures))
                kept.append(encoding)
                kept.extend(values.copy() for values in encoding.embeddings.values())
                return encoding

            Encoder.begin = keeping  # type: ignore[method-assign]
        if leak == "samplers":
            from local_llava.answer import Answer

            Answer.close = lambda self: None  # type: ignore[method-assign]
        print(measure(lambda n: requests(llava, shown, n), 200, n))


if __name__ == "__main__":
    main()
