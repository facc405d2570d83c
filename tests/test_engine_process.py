"""A model in a process of its own: the same answers, and what happens when either of both ends."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import tiny_world

from local_llava import BusyError, ImageError, Llava, LocalLlavaError, ModelFileError, PromptError, Reply, UsageError
from local_llava.errors import EngineError, NotEnoughMemoryError
from local_llava.server import engine_process
from local_llava.server.backend import EngineDiedError, Job
from local_llava.server.engine_messages import Failed
from local_llava.server.engine_process import EngineProcess
from local_llava.store.process_lock import LockedError
from local_llava.types import Message, ModelFiles

T = TypeVar("T")

OPTIONS: dict[str, Any] = {"n_threads": 1, "kv_type": "F32", "n_ctx": 1024, "parallel": 8}
LONG: dict[str, Any] = {"json_schema": {"type": "array", "items": {"const": "a"}, "minItems": 150}, "max_tokens": 700}
"""An answer that takes long."""

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals")


def png(seed: int) -> bytes:
    file = io.BytesIO()
    tiny_world.picture(seed).save(file, "PNG")
    return file.getvalue()


def job(text: str = tiny_world.QUESTION, *images: bytes, raw: bool = False, **options: Any) -> Job:
    return Job([Message("user", text, images)], options, raw)


async def reply(process: EngineProcess, job: Job) -> Reply:
    *_, last = [chunk async for chunk in process.stream(job)]
    assert last.reply is not None
    return last.reply


@asynccontextmanager
async def running(files: ModelFiles, **options: Any) -> AsyncIterator[EngineProcess]:
    process = await EngineProcess.start()
    try:
        await process.prepare(files)
        await process.load({**OPTIONS, **options})
        yield process
    finally:
        await process.close()


def with_process(files: ModelFiles, use: Callable[[EngineProcess], Awaitable[T]], **options: Any) -> T:
    async def main() -> T:
        async with running(files, **options) as process:
            return await use(process)

    return asyncio.run(main())


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def test_answers_are_the_models_own(tiny: ModelFiles) -> None:
    """Text, tokens, probabilities, values that follow a schema; with pictures, without a chat format, and eight at a
    time."""
    jobs = [
        job(tiny_world.QUESTION, png(1), logprobs=3),
        job("How many shapes are there?", png(2), json_schema={"type": "integer"}),
        job("A red", png(3), raw=True, max_tokens=12),
        job("What is left?", png(1), png(2), system="Be brief.", temperature=1.0, seed=7),
    ]
    with Llava.load(tiny.model, tiny.mmproj, **OPTIONS) as llava:
        expected = [[*llava.stream([*j.messages], raw=j.raw, **j.options)] for j in jobs]

    async def use(process: EngineProcess) -> None:
        assert process.loaded is not None and (process.loaded.n_ctx, process.loaded.parallel) == (1024, 8)
        for asked, chunks in zip(jobs, expected, strict=True):
            got = [chunk async for chunk in process.stream(asked)]
            assert [(c.text, c.tokens) for c in got] == [(c.text, c.tokens) for c in chunks]
            for a, b in zip(got, chunks, strict=True):
                assert [(p.token, p.text) for p in a.logprobs] == [(p.token, p.text) for p in b.logprobs]
                assert [p.logprob for p in a.logprobs] == pytest.approx([p.logprob for p in b.logprobs], abs=1e-4)
            assert got[-1].reply is not None and chunks[-1].reply is not None
            assert got[-1].reply.parsed == chunks[-1].reply.parsed
        together = await asyncio.gather(*(reply(process, j) for j in [*jobs, *jobs]))
        assert [r.tokens for r in together[:4]] == [r.tokens for r in together[4:]]
        assert [r.tokens for r in together[:4]] == [c[-1].reply.tokens for c in expected if c[-1].reply]

    with_process(tiny, use)


def test_errors_come_out_as_themselves(tiny: ModelFiles, tmp_path: Path) -> None:
    wrong: list[tuple[type[Exception], str, Job]] = [
        (ImageError, "picture", job("?", b"no picture")),
        (PromptError, "the prompt has", job("word " * 5000)),
        (UsageError, "temperature must be 0 to 100", job("?", temperature=-1)),
        (UsageError, "n_ctx is settled when the model is loaded", job("?", n_ctx=5)),
        (RuntimeError, "TypeError: 'int' object is not iterable", Job(5)),  # type: ignore[arg-type]
    ]

    async def use(process: EngineProcess) -> None:
        for kind, text, asked in wrong:
            with pytest.raises(kind, match=text) as error:
                await reply(process, asked)
            assert type(error.value) is kind
        assert (await reply(process, job("?", max_tokens=2))).tokens
        with pytest.raises(UsageError, match="n_ctx must be 1 to"):
            await process.load({"n_ctx": 1 << 26})
        with pytest.raises(EngineError, match="the model is not loaded"):
            await reply(process, job())
        (tmp_path / "bad.gguf").write_bytes(b"GGUF of no version")
        await process.prepare(ModelFiles(tmp_path / "bad.gguf", tiny.mmproj))
        with pytest.raises(ModelFileError, match=r"bad\.gguf"):
            await process.load({})

    with_process(tiny, use)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (BusyError("busy"), BusyError),
        (NotEnoughMemoryError("1 GB"), NotEnoughMemoryError),
        (LockedError("another process"), LockedError.__base__),
        (MemoryError(), NotEnoughMemoryError),
        (LocalLlavaError("any"), LocalLlavaError),
    ],
)
def test_every_error_has_its_own_class(error: Exception, kind: type[Exception]) -> None:
    again = Failed.of(3, error).error()
    assert type(again) is kind and str(error) in str(again)


def test_an_answer_that_nobody_waits_for_makes_room(tiny: ModelFiles) -> None:
    """With one answer at a time, the next one does not wait for the end of it."""

    async def use(process: EngineProcess) -> None:
        whole = time.perf_counter()
        await reply(process, job(**LONG))
        whole = time.perf_counter() - whole
        started = time.perf_counter()
        async with aclosing(process.stream(job("Why?", **LONG))) as chunks:
            async for _ in chunks:
                break
        task = asyncio.create_task(reply(process, job("And this?", **LONG)))
        await asyncio.sleep(whole / 20)
        task.cancel()
        await reply(process, job("?", max_tokens=1))
        assert time.perf_counter() - started < whole / 2
        assert not process._answers

    with_process(tiny, use, parallel=1)


@posix
@pytest.mark.parametrize(("name", "words"), [("SIGKILL", "was killed (SIGKILL)"), ("SIGABRT", "aborted (SIGABRT)")])
def test_all_answers_under_way_are_told_of_a_death(tiny: ModelFiles, name: str, words: str) -> None:
    async def use(process: EngineProcess) -> None:
        tasks = [asyncio.create_task(reply(process, job(f"{i}?", **LONG))) for i in range(12)]
        await asyncio.sleep(0.3)
        os.kill(process.pid, getattr(signal, name))
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        assert all(type(r) is EngineDiedError and words in str(r) for r in results), results
        assert process.ended.done() and not process._answers
        with pytest.raises(EngineDiedError):
            await reply(process, job())
        with pytest.raises(EngineDiedError):
            await process.load({})

    with_process(tiny, use)
    assert not children()


@posix
def test_a_process_that_hangs_is_killed(tiny: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_process, "CLOSE_S", 0.3)

    async def use(process: EngineProcess) -> float:
        os.kill(process.pid, signal.SIGSTOP)
        return time.perf_counter()

    stopped = with_process(tiny, use)
    assert 0.2 < time.perf_counter() - stopped < 5
    assert not children()


def test_closing_ends_the_process_and_fails_what_is_under_way(tiny: ModelFiles) -> None:
    async def use(process: EngineProcess) -> None:
        task = asyncio.create_task(reply(process, job(**LONG)))
        await asyncio.sleep(0.2)
        await process.close()
        with pytest.raises(EngineError, match="before the answer was complete"):
            await task
        assert process.ended.result() is None

    with_process(tiny, use)
    assert not children()


@posix
def test_signals_are_the_servers(tiny: ModelFiles) -> None:
    """Ctrl-C, and service managers, send them to all processes; running answers are to be finished."""

    async def use(process: EngineProcess) -> None:
        task = asyncio.create_task(reply(process, job(**LONG)))
        await asyncio.sleep(0.1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(process.pid, number)
        assert (await task).parsed is not None

    with_process(tiny, use)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_sockets_are_not_inherited(tiny: ModelFiles) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        inode = os.fstat(listening.fileno()).st_ino

        async def use(process: EngineProcess) -> None:
            open_files = [str(path.readlink()) for path in Path(f"/proc/{process.pid}/fd").iterdir()]
            assert f"socket:[{inode}]" not in open_files and any(path.startswith("pipe:") for path in open_files)

        with_process(tiny, use)


PARENT = """
import asyncio, sys
from pathlib import Path
from local_llava.server.backend import Job
from local_llava.server.engine_process import EngineProcess
from local_llava.types import Message, ModelFiles

async def main():
    process = await EngineProcess.start()
    await process.prepare(ModelFiles(Path(sys.argv[1]), Path(sys.argv[2])))
    await process.load({"n_threads": 1, "n_ctx": 1024})
    schema = {"type": "array", "items": {"const": "a"}, "minItems": 200}
    first = True
    async for _ in process.stream(Job([Message("user", "?")], {"json_schema": schema, "max_tokens": 900})):
        if first and sys.argv[3] == "answering":
            print(process.pid, "llama_cpp" in sys.modules, flush=True)
        first = False
    print(process.pid, "llama_cpp" in sys.modules, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@posix
@pytest.mark.parametrize("state", ["answering", "idle"])
def test_it_does_not_outlive_the_server(tiny: ModelFiles, state: str) -> None:
    """Nor does the server load llama.cpp into its own process."""
    command = [sys.executable, "-c", PARENT, str(tiny.model), str(tiny.mmproj), state]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid, loaded = parent.stdout.readline().split()
    child = psutil.Process(int(pid))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert loaded == "False"
    tiny_world.wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, timeout=5)


def test_nothing_is_left_of_many_requests(tiny: ModelFiles) -> None:
    """Answers, errors, and answers that nobody waits for."""
    picture = png(4)

    async def one(process: EngineProcess, i: int) -> None:
        if i % 10 == 3:
            with pytest.raises(ImageError):
                await reply(process, job("?", b"none"))
        elif i % 10 == 6:
            async with aclosing(process.stream(job("?", picture, max_tokens=50))) as chunks:
                async for _ in chunks:
                    break
        else:
            await reply(process, job("?", max_tokens=1))

    async def some(process: EngineProcess, n: int) -> None:
        numbers = iter(range(n))

        async def client() -> None:
            for i in numbers:
                await one(process, i)

        await asyncio.gather(*(client() for _ in range(8)))

    async def use(process: EngineProcess) -> tuple[int, int]:
        await some(process, 80)
        before = psutil.Process(process.pid).memory_info().rss
        await some(process, 250)
        assert not process._answers and len(asyncio.all_tasks()) <= 2
        return before, psutil.Process(process.pid).memory_info().rss

    before, after = with_process(tiny, use)
    assert after - before < 8 << 20
