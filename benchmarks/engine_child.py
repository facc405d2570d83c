"""A process with one engine in it, so that its memory is its own and its log can be put aside: ours, or a Python peer.

    python benchmarks/engine_child.py ours|stock|libmtmd MODEL MMPROJ OPTIONS

OPTIONS is JSON. Reads commands from stdin, a line of JSON each, and answers each with one to stdout. `ours` and
`stock` take lists of `clients.Request`, which are asked at the same time; `ours` and `libmtmd` also a list of pictures
to encode, and answer with the seconds. Started by `engine_peers.Child`.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import clients
import llama_cpp.llama_cpp as llama
from clients import Answer, Request

Command: TypeAlias = dict[str, Any]

CALLS: dict[str, list[tuple[float, float]]] = {"llama_decode": [], "llama_sampler_sample": []}
"""When which of llama.cpp's functions ran in this process."""


def time_calls() -> None:
    """Have llama.cpp's functions timed. Before local_llava is imported, which may keep them under names of its own."""

    def timed(function: Callable[..., Any], calls: list[tuple[float, float]]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = function(*arguments)
            calls.append((started, time.perf_counter()))
            return result

        return call

    for name, calls in CALLS.items():
        setattr(llama, name, timed(getattr(llama, name), calls))


def seconds_inside(start: float, end: float) -> dict[str, float]:
    """Seconds of a period that were spent in each of them."""
    return {
        name: sum(max(0.0, min(b, end) - max(a, start)) for a, b in calls if b > start) for name, calls in CALLS.items()
    }


class Ours:
    """Through the public API."""

    def __init__(self, model: str, mmproj: str, options: dict[str, Any]) -> None:
        from local_llava import Llava

        self._llava = Llava.load(model, mmproj, **options)

    def stream(self, request: Request) -> Generator[int | dict[str, Any], None, None]:
        images = [request.image] if request.image else []
        counters: dict[str, Any] = {}
        with closing(
            self._llava.stream(request.question, images, max_tokens=request.max_tokens, speculate=False)
        ) as chunks:
            for chunk in chunks:
                if chunk.tokens:
                    yield len(chunk.tokens)
                if chunk.reply:
                    counters = asdict(chunk.reply.timings)
        yield counters

    def encode(self, pictures: Sequence[str]) -> float:
        started = time.perf_counter()
        self._llava.embed_images(pictures)
        return time.perf_counter() - started

    def close(self) -> None:
        self._llava.close()


class Stock:
    """llama-cpp-python's own chat handler, with the prompt that Llama 3 LLaVAs were trained on."""

    def __init__(self, model: str, mmproj: str, options: dict[str, Any]) -> None:
        from llama_cpp import Llama
        from llama_cpp.llama_chat_format import Llava15ChatHandler

        class Handler(Llava15ChatHandler):
            DEFAULT_SYSTEM_MESSAGE = None
            CHAT_FORMAT = (
                "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
                "{% for c in m.content %}{% if c.type == 'image_url' %}{{ c.image_url.url }}\n{% endif %}{% endfor %}"
                "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}<|eot_id|>"
                # Jinja drops a newline at the very end of a template, hence the last "if".
                "{% endfor %}{% if true %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
            )

        handler = Handler(clip_model_path=mmproj, verbose=False)
        threads = options["n_threads"]
        self._llama = Llama(
            model,
            chat_handler=handler,
            n_ctx=options["n_ctx"],
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        handler._init_mtmd_context(self._llama)  # else the first picture pays for the loading of the tower

    def stream(self, request: Request) -> Generator[int | dict[str, Any], None, None]:
        content: list[dict[str, Any]] = [{"type": "text", "text": request.question}]
        if request.image:
            content.insert(0, {"type": "image_url", "image_url": {"url": Path(request.image).resolve().as_uri()}})
        messages: Any = [{"role": "user", "content": content}]
        chunks: Any = self._llama.create_chat_completion(
            messages,
            max_tokens=request.max_tokens,
            temperature=0.0,
            repeat_penalty=1.0,
            stream=True,
        )
        came = False
        for chunk in chunks:
            if chunk["choices"][0]["delta"].get("content"):
                came = True
                yield 1
        if not came:  # a token that is half a character
            yield 1

    def encode(self, pictures: Sequence[str]) -> float:
        raise NotImplementedError

    def close(self) -> None:
        self._llama.close()


class Libmtmd:
    """llama.cpp's tower alone, as llama-cpp-python carries it."""

    def __init__(self, model: str, mmproj: str, options: dict[str, Any]) -> None:
        from llama_cpp import Llama, mtmd_cpp

        self._c = mtmd_cpp
        # The tower does not load without a language model beside it.
        self._llama = Llama(model, n_ctx=64, verbose=False)
        params = mtmd_cpp.mtmd_context_params_default()
        params.print_timings = False
        params.n_threads = options["n_threads"]
        self._context = mtmd_cpp.mtmd_init_from_file(mmproj.encode(), self._llama.model, params)

    def encode(self, pictures: Sequence[str]) -> float:
        """From files to embeddings; pictures share a graph as far as libmtmd lets them."""
        c, started = self._c, time.perf_counter()
        bitmaps, prompts = [], []
        for path in pictures:
            data = Path(path).read_bytes()
            buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
            bitmaps.append(c.mtmd_helper_bitmap_init_from_buf(self._context, buffer, len(data), False))
            prompts.append(self._tokenize(bitmaps[-1]))
        waiting = [chunk for chunks in prompts for chunk in self._image_chunks(chunks)]
        while waiting:
            batch = c.mtmd_batch_init(self._context)
            while waiting and c.mtmd_batch_add_chunk(batch, waiting[0]) == 0:
                del waiting[0]
            if c.mtmd_batch_encode(batch) != 0:
                raise RuntimeError("libmtmd failed")
            c.mtmd_batch_free(batch)
        seconds = time.perf_counter() - started
        for chunks, bitmap in zip(prompts, bitmaps, strict=True):
            c.mtmd_input_chunks_free(chunks)
            c.mtmd_bitmap_free(bitmap)
        return seconds

    def _tokenize(self, bitmap: Any) -> Any:
        c = self._c
        chunks = c.mtmd_input_chunks_init()
        marker = c.mtmd_default_marker()
        text = c.mtmd_input_text(marker, len(marker), False, True)
        array = (c.mtmd_bitmap_p_ctypes * 1)(bitmap)
        if c.mtmd_tokenize(self._context, chunks, ctypes.byref(text), array, 1) != 0:
            raise RuntimeError("libmtmd cannot tokenize")
        return chunks

    def _image_chunks(self, chunks: Any) -> list[Any]:
        c = self._c
        found = [c.mtmd_input_chunks_get(chunks, i) for i in range(c.mtmd_input_chunks_size(chunks))]
        return [chunk for chunk in found if c.mtmd_input_chunk_get_type(chunk) == c.MTMD_INPUT_CHUNK_TYPE_IMAGE]

    def stream(self, request: Request) -> Generator[int | dict[str, Any], None, None]:
        raise NotImplementedError

    def close(self) -> None:
        self._c.mtmd_free(self._context)
        self._llama.close()


def answers(engine: Ours | Stock, requests: Sequence[Request]) -> list[dict[str, Any]]:
    for calls in CALLS.values():
        calls.clear()
    began = time.perf_counter()
    done: list[Answer] = clients.ask(requests, engine.stream)
    for answer in done:
        answer.counters["inside"] = seconds_inside(began + answer.arrivals[0], began + answer.arrivals[-1])
    return [asdict(answer) for answer in done]


def main() -> None:
    kind, model, mmproj, options = sys.argv[1:]
    # Whatever a library prints must not get between the answers.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    time_calls()
    engines: dict[str, Any] = {"ours": Ours, "stock": Stock, "libmtmd": Libmtmd}
    engine = engines[kind](model, mmproj, json.loads(options))
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        command: Command = json.loads(line)
        if "encode" in command:
            result: Any = engine.encode(command["encode"])
        else:
            result = answers(engine, [Request(**request) for request in command["ask"]])
        print(json.dumps(result), file=out, flush=True)
    engine.close()


if __name__ == "__main__":
    main()
