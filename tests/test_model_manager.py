"""The models of a server: loaded when they are asked, unloaded, and started again after their processes died.

Most of it with processes that only pretend to have a model (`fake_engine_child`).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import tiny_world
from llava_checkpoints import TINY
from test_engine_process import LONG, children, job, png

from local_llava import BusyError, Llava, ModelFileError, PromptError, hub
from local_llava.errors import NotEnoughMemoryError
from local_llava.server import engine_process, supervised_engine
from local_llava.server.backend import EngineDiedError, Job, RestartingError, StoppingError, UnknownModelError
from local_llava.server.model_manager import ModelManager
from local_llava.server.settings import ServerSettings
from local_llava.types import ModelFiles, Reply

T = TypeVar("T")

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals")


async def ask(manager: ModelManager, name: str | None, job: Job, **kwargs: Any) -> Reply:
    async with aclosing(manager.stream(name, job, **kwargs)) as chunks:
        async for chunk in chunks:
            if chunk.reply is not None:
                return chunk.reply
    raise AssertionError("no reply")


def managed(settings: ServerSettings, use: Callable[[ModelManager], Awaitable[T]]) -> T:
    async def main() -> T:
        manager = ModelManager(settings)
        await manager.start()
        try:
            return await use(manager)
        finally:
            await manager.stop(0)
            assert not children(), "a process is left"

    return asyncio.run(main())


async def until(condition: Callable[[], bool], timeout: float = 20) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it does not come about"
        await asyncio.sleep(0.01)


class Fakes:
    """Processes that pretend, and what they are told."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def say(self, name: str, text: str = "") -> None:
        (self.directory / name).write_text(text)

    def unsay(self, name: str) -> None:
        (self.directory / name).unlink()

    @property
    def loads(self) -> list[str]:
        """The names of all models that were loaded, in order."""
        log = self.directory / "loads"
        return [Path(line).stem for line in log.read_text().splitlines()] if log.exists() else []


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    directory = tmp_path / "fakes"
    directory.mkdir()
    command = [sys.executable, str(Path(__file__).with_name("fake_engine_child.py")), str(directory)]
    monkeypatch.setattr(engine_process, "child_command", lambda: command)
    return Fakes(directory)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store, and an empty cache of the Hub."""
    monkeypatch.setenv("LOCAL_LLAVA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "home"


def checkpoint(directory: Path) -> Path:
    """A copy of the built-in one, which is known by another name and another content."""
    shutil.copytree(TINY, directory)
    (directory / "name.txt").write_text(directory.name)
    return directory


@pytest.fixture(scope="module")
def store_of_three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_LLAVA_HOME", str(home))
        for name in "abc":
            hub.converted(checkpoint(tmp_path_factory.mktemp("checkpoints") / name), quant="Q8_0")
    return home


@pytest.fixture
def three(home: Path, store_of_three: Path, monkeypatch: pytest.MonkeyPatch) -> ServerSettings:
    """A server with the models a:Q8_0, b:Q8_0 and c:Q8_0, of which a is the default one."""
    monkeypatch.setenv("LOCAL_LLAVA_HOME", str(store_of_three))
    return ServerSettings(model="a:Q8_0")


@pytest.fixture
def one(tiny: ModelFiles, home: Path) -> ServerSettings:
    return ServerSettings(model=str(tiny.model), options={"n_threads": 1, "kv_type": "F32", "n_ctx": 1024})


def test_the_same_answers_and_what_is_known_of_the_model(tiny: ModelFiles, one: ServerSettings) -> None:
    asked = job(tiny_world.QUESTION, png(5))
    with Llava.load(tiny.model, **one.options) as llava:
        expected = llava.chat([*asked.messages])

    async def use(manager: ModelManager) -> None:
        before = manager.info(None)
        assert (before.quant, before.family, before.loaded) == ("F32", "llama", False)
        assert before.size == sum(tiny.sizes) and before.parameters > 1e6 and "start_header_id" in before.template
        replies = await asyncio.gather(*(ask(manager, None, asked) for _ in range(8)))
        assert {r.tokens for r in replies} == {expected.tokens}
        after = manager.info(before.name)
        assert after.expires is not None and 295 < after.expires - time.time() <= 300
        assert after == replace(before, loaded=True, expires=after.expires, n_ctx=1024)
        health = manager.health()
        assert (health.status, health.loaded, health.answering) == ("ok", (before.name,), 0)

    managed(one, use)


@posix
def test_a_process_that_is_killed_under_load_is_started_again(one: ServerSettings) -> None:
    async def use(manager: ModelManager) -> None:
        await manager.load(None)
        tasks = [asyncio.create_task(ask(manager, None, job(f"{i}?", **LONG))) for i in range(10)]
        await asyncio.sleep(0.3)
        (child,) = children()
        os.kill(child.pid, signal.SIGKILL)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(type(r) is EngineDiedError and "SIGKILL" in str(r) for r in results)
        assert manager.health().status == "restarting"
        # Nobody need ask for it to come again, and whoever asks before waits.
        assert (await ask(manager, None, job("?", max_tokens=2))).tokens
        health = manager.health()
        assert (health.status, health.restarts) == ("ok", 1) and "SIGKILL" in health.detail

    managed(one, use)


def test_a_checkpoint_is_converted_by_the_process(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in model, which nobody has used before on this computer."""
    monkeypatch.setattr(hub, "converted", None)  # in this process

    async def use(manager: ModelManager) -> None:
        known = manager.info(None)
        assert known.name == "tiny-llava:Q4_K_M" and manager.models() == [known]
        await asyncio.gather(*(ask(manager, name, job("?", max_tokens=1)) for name in (None, "tiny-llava", "")))
        assert len(children()) == 1
        (now,) = manager.models()
        assert now.loaded and now.name == known.name and now.size != known.size
        assert manager.info("Tiny-LLaVA:latest") == now == manager.info("tiny-llava:q4_k_m")

    managed(ServerSettings(options={"n_threads": 1, "n_ctx": 512}), use)


def test_requests_that_come_together_load_once(fakes: Fakes, three: ServerSettings) -> None:
    async def use(manager: ModelManager) -> None:
        names = ["a", "a:q8_0", "A:latest", None, "a:Q8_0", ""]
        replies = await asyncio.gather(*(ask(manager, name, job("to be or not")) for name in names))
        assert {r.text for r in replies} == {"to be or not"}
        assert len(fakes.loads) == len(children()) == 1

    managed(three, use)


def test_names(fakes: Fakes, three: ServerSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(manager: ModelManager) -> None:
        first, *others = manager.models()
        assert first.name == "a:Q8_0" and sorted(m.name for m in others) == ["b:Q8_0", "c:Q8_0"]
        assert len({m.digest for m in (first, *others)}) == 3
        assert manager.info("b").name == manager.info("B:LATEST").name == "b:Q8_0"
        monkeypatch.chdir(tmp_path)  # where directories of these names are
        checkpoint(tmp_path / "d")
        checkpoint(tmp_path / "b")
        assert manager.info("b").name == "b:Q8_0"
        for name in ("d", str(tmp_path / "b"), "./b", "b:Q4_0", "gpt-4o", "a\0", "../a", "x" * 999, "llava-1.5-7b"):
            with pytest.raises(UnknownModelError):
                manager.info(name)
            with pytest.raises(UnknownModelError):
                await ask(manager, name, job())
        assert not fakes.loads and not manager._n_requests

    managed(three, use)


def test_several_of_one_name_have_names_of_their_own(fakes: Fakes, home: Path, tmp_path: Path) -> None:
    checkpoint(tmp_path / "a")
    for mmproj_quant in ("F16", "Q8_0"):
        hub.converted(tmp_path / "a", quant="Q8_0", mmproj_quant=mmproj_quant)

    async def use(manager: ModelManager) -> None:
        names = [m.name for m in manager.models()]
        assert names[:2] == ["tiny-llava:Q4_K_M", names[1]] and "a:Q8_0" in names and len(set(names)) == 3
        assert [manager.info(name).name for name in names] == names
        assert len({manager.info(name).size for name in names}) == 3

    managed(ServerSettings(), use)


def test_a_default_model_that_is_not_there_is_said_at_once(home: Path) -> None:
    async def nothing(manager: ModelManager) -> None:
        raise AssertionError

    with pytest.raises(ModelFileError, match=r"local-llava pull llava-1\.5-7b"):
        managed(ServerSettings(model="llava-1.5-7b"), nothing)


def test_unloaded_when_nobody_asks_and_loaded_again(fakes: Fakes, three: ServerSettings) -> None:
    async def use(manager: ModelManager) -> None:
        await ask(manager, None, job("one"))
        await asyncio.gather(*(ask(manager, None, job("two three", temperature=0.1)) for _ in range(2)))
        assert fakes.loads == ["a-Q8_0"] and manager.info(None).loaded
        await until(lambda: not manager.info(None).loaded and not children(), 3)
        assert manager.health().loaded == ()
        await ask(manager, None, job("four"))
        assert fakes.loads == ["a-Q8_0", "a-Q8_0"]

    managed(replace(three, keep_alive_s=0.15), use)


def test_keep_alive_of_a_request(fakes: Fakes, three: ServerSettings) -> None:
    async def use(manager: ModelManager) -> None:
        await ask(manager, None, job("x"), keep_alive_s=-1)
        assert manager.info(None).expires is None and manager.info(None).loaded
        await asyncio.sleep(0.3)
        assert manager.info(None).loaded
        # At once, but not before the answers that are being given.
        running = asyncio.create_task(ask(manager, None, job("a b", temperature=0.2), keep_alive_s=60))
        await until(lambda: manager.health().answering == 1)
        await manager.load(None, keep_alive_s=0)
        assert (await running).text == "a b" and fakes.loads == ["a-Q8_0"]
        await until(lambda: not manager.info(None).loaded and not children(), 3)
        await manager.load("b", keep_alive_s=0)
        assert len(fakes.loads) == 1  # nothing is loaded to be unloaded
        await manager.load("b", keep_alive_s=60)
        assert fakes.loads[1:] == ["b-Q8_0"] and manager.health().loaded == ("b:Q8_0",)
        await ask(manager, "b", job("x"), keep_alive_s=0)
        await until(lambda: not children(), 3)

    managed(replace(three, keep_alive_s=0.1), use)


def test_whoever_comes_when_its_time_is_over_keeps_it(fakes: Fakes, three: ServerSettings) -> None:
    async def use(manager: ModelManager) -> None:
        await manager.load(None)
        (engine,) = set(manager._engines.values())
        engine._expired()
        async with engine.use(60) as process:
            await asyncio.sleep(0.05)
            assert engine.process is process
        assert fakes.loads == ["a-Q8_0"] and manager.info(None).loaded

    managed(three, use)


def test_several_models_and_the_oldest_unused_one_goes_when_memory_is_short(
    fakes: Fakes, three: ServerSettings
) -> None:
    fakes.say("room", "2")

    async def use(manager: ModelManager) -> None:
        for name in ("a", "b", "a", "c"):
            await ask(manager, name, job("x"))
        assert fakes.loads == ["a-Q8_0", "b-Q8_0", "c-Q8_0"]
        assert manager.health().loaded == ("a:Q8_0", "c:Q8_0")
        # All at once: one after the other gets its turn, though all others are in use.
        names = ["a", "b", "c"] * 3
        replies = await asyncio.gather(*(ask(manager, name, job(f"x y {name}", temperature=0.03)) for name in names))
        assert [r.text[-1] for r in replies] == names
        assert len(fakes.loads) < 9 and len(manager.health().loaded) == 2

    managed(three, use)


def test_an_answering_model_is_waited_for(fakes: Fakes, three: ServerSettings) -> None:
    fakes.say("room", "1")

    async def use(manager: ModelManager) -> None:
        await manager.load("a")
        (engine,) = set(manager._engines.values())
        running = asyncio.create_task(ask(manager, "a", job("to be or not to be", temperature=0.3)))
        await until(lambda: manager.health().answering == 1)
        other = asyncio.create_task(ask(manager, "b", job("that is")))
        await until(lambda: not engine._open.is_set())
        again = asyncio.create_task(ask(manager, "a", job("the question")))  # its turn is after b's
        assert (await running).text == "to be or not to be" and not other.done()
        assert (await other).text == "that is" and (await again).text == "the question"
        assert fakes.loads == ["a-Q8_0", "b-Q8_0", "a-Q8_0"]

    managed(three, use)


def test_a_model_with_nothing_beside_it_to_unload_does_not_fit(fakes: Fakes, three: ServerSettings) -> None:
    fakes.say("room", "0")

    async def use(manager: ModelManager) -> None:
        with pytest.raises(NotEnoughMemoryError, match="1 byte is needed"):
            await ask(manager, None, job("x"))
        assert not children() and manager.health().status == "ok"
        fakes.say("room", "1")
        assert (await ask(manager, None, job("x"))).text == "x"

    managed(three, use)


def test_an_unused_model_costs_another_one_nothing(fakes: Fakes, three: ServerSettings) -> None:
    """Where both fit, but one with a shorter context, the unused one goes."""
    fakes.say("short")

    async def use(manager: ModelManager) -> None:
        for name in ("a", "b"):
            await ask(manager, name, job("x"))
        assert fakes.loads == ["a-Q8_0", "b-Q8_0", "b-Q8_0"] and manager.health().loaded == ("b:Q8_0",)

    managed(three, use)


@posix
def test_a_crash_loop_backs_off_and_says_so(
    fakes: Fakes, three: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervised_engine, "FIRST_PAUSE_S", 0.4)
    monkeypatch.setattr(supervised_engine, "WAIT_S", 0.15)
    monkeypatch.setattr(supervised_engine, "MAX_PAUSE_S", 0.8)
    fakes.say("dies")

    async def use(manager: ModelManager) -> None:
        with pytest.raises(EngineDiedError, match="SIGABRT"):
            await ask(manager, None, job("x"))
        await until(lambda: manager.health().status == "failing")
        (engine,) = set(manager._engines.values())
        await until(lambda: engine._not_before - time.monotonic() > 0.6)
        with pytest.raises(RestartingError, match=r"died \d+ times in a row") as error:
            await ask(manager, None, job("x"))
        assert 0.3 < error.value.retry_after_s <= 0.8
        assert "SIGABRT" in manager.health().detail and not manager.health().loaded
        fakes.unsay("dies")
        await until(lambda: manager.health().status == "ok")
        assert (await ask(manager, None, job("x"))).text == "x"
        assert manager.health().restarts == 1 and len(fakes.loads) == 1

    managed(three, use)


@posix
def test_a_crash_loop_ends_when_nobody_wants_the_model(
    fakes: Fakes, three: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervised_engine, "FIRST_PAUSE_S", 0.01)
    fakes.say("dies")

    async def use(manager: ModelManager) -> None:
        with pytest.raises(EngineDiedError):
            await ask(manager, None, job("x"), keep_alive_s=0)
        (engine,) = set(manager._engines.values())
        await until(lambda: engine._restarting is None)
        assert engine._deaths == 1 and not children()

    managed(three, use)


def test_a_process_that_says_what_is_no_message_ends(fakes: Fakes, three: ServerSettings) -> None:
    fakes.say("lies")

    async def use(manager: ModelManager) -> None:
        with pytest.raises(EngineDiedError):
            await ask(manager, None, job("x"), keep_alive_s=0)

    managed(three, use)


def test_one_request_more_than_may_wait_is_refused(fakes: Fakes, three: ServerSettings) -> None:
    async def use(manager: ModelManager) -> None:
        tasks = [asyncio.create_task(ask(manager, name, job("a b", temperature=0.2))) for name in "aabb"]
        await until(lambda: manager.health().answering == 4)
        with pytest.raises(BusyError, match="4 requests wait or are answered"):
            await ask(manager, "c", job("x"))
        assert [r.text for r in await asyncio.gather(*tasks)] == ["a b"] * 4
        assert (await ask(manager, "b", job("x"))).text == "x" and manager.health().answering == 0

    managed(replace(three, max_requests=4), use)


def test_the_end_waits_for_answers_and_takes_no_new_ones(
    fakes: Fakes, three: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_process, "CLOSE_S", 0.3)

    async def use(manager: ModelManager) -> None:
        running = asyncio.create_task(ask(manager, None, job("a b c", temperature=0.2)))
        late = asyncio.create_task(ask(manager, "b", job("x " * 100, temperature=1)))
        await until(lambda: manager.health().loaded == ("a:Q8_0", "b:Q8_0"))
        stopping = asyncio.create_task(manager.stop(1.5))
        await asyncio.sleep(0)
        with pytest.raises(StoppingError):
            await ask(manager, None, job("x"))
        assert (await running).text == "a b c" and not stopping.done()
        await stopping
        assert isinstance((await asyncio.gather(late, return_exceptions=True))[0], Exception)

    managed(three, use)


def test_nothing_is_left_of_a_thousand_requests(fakes: Fakes, three: ServerSettings) -> None:
    """Answers, errors, unknown names, and answers that nobody waits for."""

    async def one(manager: ModelManager, i: int) -> None:
        name = "abc"[i % 3]
        if i % 10 == 3:
            with pytest.raises(PromptError):
                await ask(manager, name, job(""))
        elif i % 10 == 5:
            with pytest.raises(UnknownModelError):
                await ask(manager, f"none-{i}", job("x"))
        elif i % 10 == 7:
            async with aclosing(manager.stream(name, job("x y"))) as chunks:
                async for _ in chunks:
                    break
        else:
            assert (await ask(manager, name, job(f"x {i}"))).text == f"x {i}"

    async def use(manager: ModelManager) -> None:
        numbers = iter(range(1000))

        async def client() -> None:
            for i in numbers:
                await one(manager, i)

        await asyncio.gather(*(client() for _ in range(16)))
        assert manager._n_requests == 0 and len(manager._engines) == 3
        for engine in manager._engines.values():
            assert engine.users == 0 and engine.process is not None and not engine.process._answers
        # Ours, one reader for each process, and nothing else.
        assert len(asyncio.all_tasks()) == 4
        assert len(manager._catalog._fresh) < 10

    managed(replace(three, max_requests=16), use)
