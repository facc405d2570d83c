"""A server as its users run it: `local-llava serve` in a process of its own, on a port that was free."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Server:
    """A server that runs, or did."""

    process: subprocess.Popen[str]
    url: str
    """Without a slash at its end."""
    log: Path
    """What it wrote to stderr."""

    def request(
        self, path: str, body: Any = None, headers: Mapping[str, str] | None = None, timeout: float = 60
    ) -> tuple[int, bytes]:
        """Status and body of one request: GET, or POST where there is a body, of JSON if it is not bytes."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, dict(headers or {}))
        if data is not None and not request.has_header("Content-type"):
            request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as e:
            return e.code, e.read()

    def health(self) -> dict[str, Any]:
        """What /health says."""
        health: dict[str, Any] = json.loads(self.request("/health")[1])
        return health

    def stop(self, timeout: float = 30) -> int:
        """End it as a supervisor does; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)


@contextmanager
def running(*arguments: str, env: Mapping[str, str] | None = None, timeout: float = 120) -> Iterator[Server]:
    """A server that answers. Its stderr is shown if it never does.

    Args:
        arguments: Of `local-llava serve`, besides --port.
        env: Variables to change.
        timeout: Seconds until it must answer.
    """
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "stderr.txt"
        with log.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "local_llava.cli", "serve", "--port", "0", *arguments],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, **(env or {})},
            )
        try:
            yield Server(process, _announced(process, log, timeout), log)
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def _announced(process: subprocess.Popen[str], log: Path, timeout: float) -> str:
    """The URL that a server prints when it listens."""
    assert process.stdout is not None
    watchdog = threading.Timer(timeout, process.kill)
    watchdog.start()
    line = process.stdout.readline()  # ends at the latest when the process does
    watchdog.cancel()
    match = re.search(r"http://\S+", line)
    assert match, f"the server did not start: {line!r}, {log.read_text()}"
    end = time.monotonic() + timeout
    while True:
        try:
            with urllib.request.urlopen(f"{match[0]}/health", timeout=5):
                return match[0]
        except OSError:
            assert time.monotonic() < end, f"the server does not answer: {log.read_text()}"
            time.sleep(0.05)
