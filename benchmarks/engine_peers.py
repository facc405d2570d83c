"""The sides of the engine's benchmarks: engines in processes of their own, and llama.cpp's tools.

Knows their commands and how they are talked to. Does not know what is measured with them.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import clients
import peers
from clients import Answer, Memory, Request

from local_llava.types import ModelFiles

N_CTX = 1024
"""Tokens of a conversation: a picture, a question and an answer."""

LOADED = b"WARN: This is an experimental CLI"
"""What llama-mtmd-cli says when both models are loaded and warm, before it opens the picture."""


class Side(Protocol):
    """What answers."""

    name: str

    def ask(self, *requests: Request) -> list[Answer]:
        """Ask all at the same time."""

    def memory(self) -> Memory:
        """Of its process, now."""


class Child:
    """An engine in `engine_child.py`."""

    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        self.name, self._process = name, process
        self._read()

    def ask(self, *requests: Request) -> list[Answer]:
        return [Answer(**answer) for answer in self._send({"ask": [asdict(request) for request in requests]})]

    def encode(self, pictures: Sequence[str]) -> float:
        """Seconds that the pictures took together."""
        return float(self._send({"encode": pictures}))

    def memory(self) -> Memory:
        return Memory.of(self._process.pid)

    def _send(self, command: Mapping[str, Any]) -> Any:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return json.loads(self._read())

    def _read(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended; its log has the reason")
        return line


@contextmanager
def child(kind: str, files: ModelFiles, directory: Path, threads: int, **options: Any) -> Iterator[Child]:
    """An engine of `engine_child.py`, loaded: ours, stock or libmtmd."""
    options = {"n_ctx": N_CTX, "n_threads": threads} | options
    script = Path(__file__).parent / "engine_child.py"
    command = [sys.executable, script, kind, files.model, files.mmproj, json.dumps(options)]
    # Neither what was tuned on this machine nor what was kept of pictures shall help.
    own = {"LOCAL_LLAVA_HOME": str(directory / "home"), "LOCAL_LLAVA_CACHE": str(directory / "pictures-cache")}
    with (directory / f"{kind}.log").open("w") as log:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **own},
        )
        with _ended(process):
            yield Child(kind, process)
            assert process.stdin
            process.stdin.close()
            process.wait(60)


class Server:
    """llama-server."""

    def __init__(self, name: str, port: int, pid: int) -> None:
        self.name, self.port, self.pid = name, port, pid

    def ask(self, *requests: Request) -> list[Answer]:
        return clients.ask(requests, self._stream)

    def memory(self) -> Memory:
        return Memory.of(self.pid)

    def _stream(self, request: Request) -> Generator[int | dict[str, Any], None, None]:
        content: list[dict[str, Any]] = [{"type": "text", "text": request.question}]
        if request.image:
            data = base64.b64encode(Path(request.image).read_bytes()).decode()
            content.insert(0, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
        body = {
            "messages": [{"role": "user", "content": content}],
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": True,
            "stream": True,
            "timings_per_token": True,
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        with contextlib.closing(connection):
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise SystemExit(f"llama-server: {response.read().decode()[:500]}")
            came = 0
            timings: dict[str, Any] = {}
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                timings = json.loads(line[6:]).get("timings") or timings
                # Tokens that are half a character come with the next ones; the last ones with the end.
                if (new := int(timings.get("predicted_n", 0)) - came) > 0:
                    came += new
                    yield new
            yield timings


@contextmanager
def server(files: ModelFiles, directory: Path, threads: int, slots: int, *flags: str) -> Iterator[Server]:
    """llama-server, loaded and warm, with N_CTX tokens for each slot.

    Args:
        files: The pair.
        directory: Where its log goes.
        threads: CPU threads.
        slots: Answers at a time.
        flags: Further ones of its command line.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command: list[object] = [
        *(peers.build("llama-server"), "-m", files.model, "--mmproj", files.mmproj),
        *("-t", threads, "-c", slots * N_CTX, "-np", slots, *flags),
    ]
    show(command)
    command += ["--port", port]
    with (directory / "llama-server.log").open("wb") as log:
        process = subprocess.Popen([str(part) for part in command], stdout=log, stderr=log)
        with _ended(process):
            while not _healthy(port):
                if process.poll() is not None:
                    raise SystemExit(f"llama-server ended: see {log.name}")
                time.sleep(0.2)
            yield Server(" ".join(("llama-server", *flags)), port, process.pid)


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    with contextlib.closing(connection), contextlib.suppress(OSError):
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    return False


@contextmanager
def _ended(process: subprocess.Popen[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        process.terminate()
        process.wait()


class MtmdCli:
    """llama-mtmd-cli: a process for each question."""

    name = "llama-mtmd-cli"

    def __init__(self, files: ModelFiles, threads: int) -> None:
        self._files, self._threads = files, threads

    def ask(self, *requests: Request) -> list[Answer]:
        """One after the other; the time begins when both models are loaded and warm. Knows the first token alone."""
        return [Answer((self._first_s(request),), 0.0) for request in requests]

    def memory(self) -> Memory:
        raise NotImplementedError("it has ended")

    def _first_s(self, request: Request) -> float:
        command: list[object] = [
            *(peers.build("llama-mtmd-cli"), "-m", self._files.model, "--mmproj", self._files.mmproj),
            *("-t", self._threads, "-c", N_CTX, "--temp", 0, "-n", request.max_tokens),
        ]
        show([*command, "--image", "PICTURE", "-p", "QUESTION"])
        command += ["--image", request.image, "-p", request.question]
        process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        with _ended(process):
            assert process.stdout and process.stderr
            log = b""
            while LOADED not in log:
                line = process.stderr.readline()
                if not line:
                    raise SystemExit(f"llama-mtmd-cli ended: {log[-500:]!r}")
                log += line
            started = time.perf_counter()
            while process.stdout.read(1) == b"\n":  # one comes before the answer
                pass
            seconds = time.perf_counter() - started
            process.communicate()
        return seconds


def bench(files: ModelFiles, threads: int, n: int, depth: int) -> float:
    """Tokens per second of llama-bench, n of them after a prompt of `depth`."""
    command: list[object] = [
        *(peers.build("llama-bench"), "-m", files.model, "-t", threads, "-p", 0, "-n", n, "-d", depth),
        *("-r", 1, "-o", "json"),
    ]
    show(command)
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"llama-bench failed: {done.stderr[-500:]}")
    return float(json.loads(done.stdout)[0]["avg_ts"])


_shown: set[str] = set()


def show(command: Sequence[object]) -> None:
    """Print a command the first time that it is run."""
    words = [Path(part).name if isinstance(part, Path) else str(part) for part in command]
    line = shlex.join(words)
    if line not in _shown:
        _shown.add(line)
        print(f"  $ {line}", flush=True)
