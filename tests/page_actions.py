"""What people do on the page, and the servers that it comes from."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import tiny_world
from playwright.sync_api import Browser, Locator, Page, expect

HERE = Path(__file__).parent
expect.set_options(timeout=20_000)


class Server:
    """A server in a process of its own, with its own directory for temporary files."""

    def __init__(self, command: list[str], url: str, directory: Path) -> None:
        self.url, self.temporary, self._command = url, directory / "tmp", command
        self.temporary.mkdir(exist_ok=True)
        self._cwd = directory
        self.start()

    def start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        environment.update(TMPDIR=str(self.temporary), PYTHONPATH=str(HERE))
        self._process = subprocess.Popen(self._command, env=environment, cwd=self._cwd)
        until(lambda: reachable(self.url), "the server does not start", seconds=60)

    def stop(self) -> int:
        self._process.terminate()
        return self._process.wait(30)

    def files(self) -> list[Path]:
        """What it left in its directory."""
        return [path for path in self._cwd.rglob("*") if path.is_file()]


def reachable(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code in (200, 401)
    except httpx.TransportError:
        return False


def until(happened: Callable[[], bool], otherwise: str, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, otherwise
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def scripted_server(directory: Path, **settings: Any) -> Iterator[Server]:
    port = free_port()
    command = [sys.executable, str(HERE / "page_server.py"), str(port), json.dumps(settings)]
    running = Server(command, f"http://127.0.0.1:{port}", directory)
    yield running
    running.stop()


def opened(chromium: Browser, url: str, **how: Any) -> Iterator[Page]:
    """The page in a fresh browser profile. What it asks of any other server, or says of an error, fails the test."""
    context = chromium.new_context(**how)
    foreign, errors = [], []
    context.on("request", lambda r: None if r.url.startswith((url, "blob:", "data:")) else foreign.append(r.url))
    context.on("weberror", lambda e: errors.append(str(e.error)))
    page = context.new_page()
    page.goto(url)
    expect(page.get_by_role("textbox", name="Question")).to_be_visible()
    yield page
    context.close()
    assert not foreign
    assert not errors


def png(seed: int = 1) -> bytes:
    data = io.BytesIO()
    tiny_world.picture(seed).save(data, "PNG")
    return data.getvalue()


def add(page: Page, name: str = "scene.png", data: bytes | None = None) -> None:
    buffer = png() if data is None else data
    page.locator("input[type=file]").first.set_input_files({"name": name, "mimeType": "image/png", "buffer": buffer})
    expect(page.get_by_role("button", name=f"Leave out {name}")).to_be_visible()


def ask(page: Page, question: str) -> None:
    box = page.get_by_role("textbox", name="Question", exact=True)
    box.fill(question)
    box.press("Enter")


def answers(page: Page) -> Locator:
    return page.get_by_role("article", name="Answer")


def answered(page: Page, question: str, n: int = 1) -> Locator:
    """The answer to a question, complete; `n` are there then."""
    ask(page, question)
    expect(answers(page)).to_have_count(n)
    last = answers(page).last
    expect(last.locator(".llava-note")).to_contain_text("to the first")
    return last


def echo(answer: Locator) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(answer.locator(".llava-text").inner_text())
    return found
