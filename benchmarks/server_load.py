#!/usr/bin/env python3
"""The server under load, beside llama-server on the same pair.

    python benchmarks/server_load.py --shape demo|1b --directory /big/disk [--seconds 120] [--clients 1 8 32]

Each client asks again and again, through /v1/chat/completions, streaming: mostly about one of four pictures, at times
about one that nobody has seen; now and then it leaves after the first token, or sends what is no request. Printed for
each side and number of clients: answers, refusals (429, 503), bad requests that were answered 4xx as they should, what
went wrong otherwise, time to the first token, tokens a second, and resident memory beyond mapped files, before and
after. Both sides get the same threads, eight answers at a time and 1,024 tokens for each. `demo` is the built-in
tiny-llava, `1b` has random weights (`shapes.py`). Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import json
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import engine_peers
import machine
import psutil
import shapes
from clients import QUESTIONS, Memory, Pictures

from local_llava import hub
from local_llava.types import ModelFiles

SLOTS = 8
TOKENS = 32
"""Of an answer, at most."""
TIMEOUT_S = 600.0

BAD = (b"{", b'{"messages": "none"}', b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": '
       b'{"url": "data:image/png;base64,AAAA"}}]}]}')  # fmt: skip
"""No JSON, no messages, no picture."""


@dataclass(frozen=True)
class Side:
    """A server that runs."""

    name: str
    port: int
    pid: int

    def memory(self) -> int:
        """Bytes beyond mapped files, of its processes."""
        process = psutil.Process(self.pid)
        return sum(Memory.of(p.pid).private for p in [process, *process.children(recursive=True)])


@contextmanager
def ours(files: ModelFiles, directory: Path, threads: int) -> Iterator[Side]:
    """`local-llava serve`, with the model loaded."""
    command: list[object] = [
        *(sys.executable, "-m", "local_llava.cli", "serve", "--model", files.model, "--mmproj", files.mmproj),
        *("--port", 0, "--no-ui", "--threads", threads, "--n-ctx", engine_peers.N_CTX, "--parallel", SLOTS),
        *("--image-cache", "off", "--keep-alive", "-1"),
    ]
    engine_peers.show(command)
    with (directory / "local-llava.log").open("w") as log:
        process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout
            found = re.search(r":(\d+)", process.stdout.readline())
            if found is None:
                raise SystemExit(f"local-llava serve ended: see {log.name}")
            yield Side("local-llava", int(found[1]), process.pid)
        finally:
            process.terminate()
            process.wait()


@contextmanager
def theirs(files: ModelFiles, directory: Path, threads: int) -> Iterator[Side]:
    """llama-server."""
    with engine_peers.server(files, directory, threads, SLOTS) as server:
        yield Side("llama-server", server.port, server.pid)


@dataclass
class Seen:
    """What the clients saw."""

    counts: Counter[str] = field(default_factory=Counter)
    first_s: list[float] = field(default_factory=list)
    n_tokens: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, what: str, first_s: float | None = None, n_tokens: int = 0) -> None:
        with self.lock:
            self.counts[what] += 1
            self.n_tokens += n_tokens
            if first_s is not None:
                self.first_s.append(first_s)


class Client:
    """Asks until time is up."""

    def __init__(self, side: Side, pictures: Pictures, known: Sequence[str], seen: Seen, seed: int) -> None:
        self._side, self._pictures, self._known, self._seen = side, pictures, known, seen
        self._random = random.Random(seed)

    def run(self, end: float) -> None:
        while time.perf_counter() < end:
            kind = self._random.choices(("known", "new", "leaves", "bad"), (60, 25, 10, 5))[0]
            try:
                self._bad() if kind == "bad" else self._ask(kind, end)
            except (OSError, http.client.HTTPException) as e:
                if time.perf_counter() >= end:  # it did not wait longer
                    return
                self._seen.add(f"broken: {type(e).__name__}")

    def _bad(self) -> None:
        with self._post(self._random.choice(BAD), TIMEOUT_S) as response:
            response.read()
            self._seen.add("4xx" if 400 <= response.status < 500 else f"a bad request got {response.status}")

    def _ask(self, kind: str, end: float) -> None:
        with self._seen.lock:
            picture = self._pictures.new() if kind == "new" else self._random.choice(self._known)
        body = json.dumps(request(self._random.choice(QUESTIONS), picture)).encode()
        started = time.perf_counter()
        first_s: float | None = None
        n_tokens = 0
        with self._post(body, max(0.1, end - started)) as response:
            if response.status != 200:
                response.read()
                self._seen.add("refused" if response.status in (429, 503) else f"status {response.status}")
                time.sleep(0.5)
                return
            for line in response:
                if time.perf_counter() > end:
                    return
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if event.get("choices") and event["choices"][0]["delta"].get("content") and first_s is None:
                    first_s = time.perf_counter() - started
                    if kind == "leaves":
                        self._seen.add("left", first_s, 1)
                        return
                n_tokens = (event.get("usage") or {}).get("completion_tokens", n_tokens)
        self._seen.add("answered", first_s, n_tokens)

    @contextmanager
    def _post(self, body: bytes, timeout: float) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self._side.port, timeout=timeout)
        with contextlib.closing(connection):
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            yield connection.getresponse()


def request(question: str, picture: str) -> dict[str, Any]:
    """Body of a question about a picture."""
    url = f"data:image/png;base64,{base64.b64encode(Path(picture).read_bytes()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return {
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def load(side: Side, pictures: Pictures, n: int, seconds: float) -> None:
    """So many clients for so long; prints what they saw."""
    known, seen = [pictures.new() for _ in range(4)], Seen()
    before, began = side.memory(), time.perf_counter()
    clients = [Client(side, pictures, known, seen, seed) for seed in range(n)]
    threads = [threading.Thread(target=client.run, args=(began + seconds,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = seen.counts
    wrong = sum(counts.values()) - sum(counts[what] for what in ("answered", "left", "refused", "4xx"))
    first = sorted(seen.first_s) or [float("nan")]
    p95 = first[min(len(first) - 1, int(0.95 * len(first)))]
    print(
        f"{side.name}, {n} clients: {counts['answered']} answered, {counts['left']} left, {counts['refused']} refused, "
        f"{counts['4xx']} bad ones refused, {wrong} wrong; first token p50 {statistics.median(first):.2f} s, "
        f"p95 {p95:.2f} s; {seen.n_tokens / seconds:.2f} tokens/s; "
        f"RSS {before / 1e6:.0f} to {side.memory() / 1e6:.0f} MB",
        flush=True,
    )
    if wrong:
        print(f"  {dict(counts)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("demo", "1b", "8b"), default="1b", help="of the models (default 1b)")
    parser.add_argument("--directory", type=Path, required=True, help="where models, pictures and logs may be written")
    parser.add_argument("--seconds", type=float, default=120, help="for each number of clients (default 120)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads that both sides get (default 2)")
    args = parser.parse_args()
    print(machine.describe())
    files = hub.resolve(None) if args.shape == "demo" else shapes.pair(args.shape, args.directory)
    args.directory.mkdir(parents=True, exist_ok=True)
    pictures = Pictures(args.directory / "pictures")
    for start in (ours, theirs):
        with start(files, args.directory, args.threads) as side:
            warm = Client(side, pictures, [pictures.new()], Seen(), 0)
            warm._ask("known", time.perf_counter() + TIMEOUT_S)
            for n in args.clients:
                load(side, pictures, n, args.seconds)


if __name__ == "__main__":
    main()
