"""The server under nonsense: its routes, parsers and guard, before models that only check what they are asked.

    python tests/fuzz_server.py --seconds 600 [--seed N] [--only parsers|names|requests|schema|sockets|bulk] [--real]

By turns: `parsers` calls the parsers with right requests of which a few values are changed; `names` asks for pictures
by what may stand for one; `requests` sends such requests over HTTP; `schema` sends what schemathesis makes of the
server's own OpenAPI; `sockets` sends bytes that are no HTTP, or almost; `bulk` sends what may cost more than its bytes.

A finding is a status from 500 on that is not documented, an answer that is not of its API's form or takes longer than
LIMIT_S, a server that does not answer afterwards, and memory, threads, descriptors or answers that are left when all is
answered. With --real, requests go to `local-llava serve` with the built-in model.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import socket
import subprocess
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fuzz_requests
import psutil
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from local_llava.server import completions_wire, ollama_wire, openai_wire, responses_wire
from local_llava.server.backend import Job
from local_llava.server.defaults import Defaults
from local_llava.server.errors import failure
from local_llava.server.image_refs import ImagePolicy
from local_llava.server.json_body import parse_object
from local_llava.server.openai_request import ChatRequest, CompletionRequest
from local_llava.server.responses_request import ResponsesRequest
from local_llava.server.settings import ServerSettings
from local_llava.server.validation import parsed
from local_llava.types import Message, Options

LIMIT_S = 10.0
"""For one answer of a model that takes no time."""
REAL_LIMIT_S = 60.0
"""For one of the built-in model, which may write hundreds of tokens."""
DOCUMENTED = (501, 503)
"""Statuses from 500 on that are no finding: not offered, and not now."""
GROWTH = 24 << 20
"""Bytes by which the server may grow, once it is warm."""


class Client:
    """Asks a server, and looks at what it answers."""

    def __init__(self, url: str, pid: int, limit_s: float = LIMIT_S) -> None:
        self.url, self.pid, self.limit_s = url, pid, limit_s
        self.host, self.port = str(urlsplit(url).hostname), int(urlsplit(url).port or 80)
        self.statuses: Counter[int] = Counter()
        self.took: dict[str, float] = defaultdict(float)
        """Seconds, by the names of bulk."""
        self._connection = HTTPConnection(self.host, self.port, timeout=3 * limit_s)

    def post(self, path: str, body: bytes, **headers: str) -> None:
        """Send a body, and look at the answer.

        Raises:
            AssertionError: It is a finding.
        """
        began = time.monotonic()
        sent = {"Content-Type": "application/json", **headers}
        try:
            self._connection.request("POST", path, body, sent)
            response = self._connection.getresponse()
        except ConnectionError:  # it was kept for too long; a new one must do
            self._connection.close()
            self._connection.request("POST", path, body, sent)
            response = self._connection.getresponse()
        answer = response.read()
        self.look(path, response.status, str(response.headers["Content-Type"]), answer, time.monotonic() - began)

    def look(self, path: str, status: int, kind: str, answer: bytes, took: float) -> None:
        """
        Raises:
            AssertionError: It is a finding.
        """
        self.statuses[status] += 1
        assert status < 500 or status in DOCUMENTED, f"status {status}: {answer!r:.300}"
        assert took < self.limit_s, f"took {took:.1f} s"
        if status >= 400:
            error = json.loads(answer)["error"]
            message = error if path.startswith("/api/") else error["message"]
            assert isinstance(message, str) and "\n" not in message and len(message) < 2000, f"message {message!r:.300}"
        elif kind.startswith("text/event-stream"):
            events = [line for line in answer.decode().splitlines() if line.startswith("data: ")]
            assert events and all(line == "data: [DONE]" or json.loads(line[6:]) for line in events)
        elif kind.startswith(("application/x-ndjson", "application/json")):
            assert all(isinstance(json.loads(line), dict) for line in answer.splitlines()) and answer

    def alive(self) -> bool:
        """Whether the server still answers at once."""
        began = time.monotonic()
        with closing(HTTPConnection(self.host, self.port, timeout=LIMIT_S)) as connection:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200 and time.monotonic() - began < 2


# --- what is done to it; each goes on until the time is over, or something is found

Check = Callable[[Any], None]


def explore(strategy: st.SearchStrategy[Any], check: Check, end: float, chosen: int) -> int:
    """Check what a strategy gives until the time is over; returns how many.

    Raises:
        Exception: Of the check, for the simplest value that hypothesis finds.
    """
    n = 0
    for round_ in itertools.count():

        @seed(chosen + round_)
        @settings(
            max_examples=20,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
            report_multiple_bugs=False,
        )
        @given(strategy)
        def one(value: Any) -> None:
            nonlocal n
            n += 1
            check(value)

        one()
        if time.monotonic() > end:
            return n
    raise AssertionError


def _asked(path: str, body: Any) -> Job | None:
    """What a parser makes of a body."""
    body = parse_object(as_json(body))
    defaults = Defaults(100, 7)
    match path:
        case fuzz_requests.CHAT:
            return openai_wire.chat(parsed(ChatRequest, body), defaults).jobs[0]
        case "/v1/completions":
            return completions_wire.completions(parsed(CompletionRequest, body), defaults).jobs[0]
        case "/v1/responses":
            return responses_wire.responses(parsed(ResponsesRequest, body), defaults).jobs[0]
        case "/api/generate":
            return ollama_wire.generate_job(parsed(ollama_wire.GenerateRequest, body), defaults)[0]
        case "/api/chat":
            request = parsed(ollama_wire.ChatRequest, body)
            return ollama_wire.chat_job(request, defaults)[0] if request.messages else None
    return None


def as_json(value: Any) -> bytes:
    """JSON; what is infinite is written as 1e999."""
    return json.dumps(value).replace("Infinity", "1e999").encode()


def parsers(client: Client, end: float, chosen: int) -> int:
    def check(request: tuple[str, Any]) -> None:
        began = time.monotonic()
        with refusals():
            job = _asked(*request)
            if job is not None:
                Options().updated(job.options, loaded=True)
                assert job.messages and all(isinstance(message, Message) for message in job.messages)
        assert time.monotonic() - began < LIMIT_S

    return explore(fuzz_requests.requests(), check, end, chosen)


def names(client: Client, end: float, chosen: int) -> int:
    policy = ImagePolicy(ServerSettings(max_body_bytes=1 << 20))

    def check(name: str) -> None:
        with refusals():
            job = asyncio.run(policy.resolve(Job([Message("user", "", (name,))])))
            assert isinstance(job.messages[0].images[0], bytes)

    return explore(fuzz_requests.data_urls, check, end, chosen)


@contextmanager
def refusals() -> Iterator[None]:
    """Let errors pass that the client is told in one line.

    Raises:
        Exception: Of another kind.
    """
    try:
        yield
    except Exception as e:
        failed = failure(e)
        if failed.status >= 500 or "\n" in failed.message or not failed.message:
            raise


def requests(client: Client, end: float, chosen: int) -> int:
    def check(request: tuple[str, Any] | tuple[str, bytes, str]) -> None:
        path, body, *kind = request
        headers = {"Content-Type": kind[0]} if kind else {}
        client.post(path, body if isinstance(body, bytes) else as_json(body), **headers)

    paths = st.sampled_from(sorted(fuzz_requests.RIGHT))
    kinds = st.sampled_from(["application/json", "text/plain", "application/xml", "application/json; charset=utf-16"])
    bodies = st.one_of(st.binary(max_size=50), st.text(max_size=50).map(str.encode), fuzz_requests.VALUES.map(as_json))
    raw = st.tuples(paths, bodies, kinds)
    return explore(st.one_of(*[fuzz_requests.requests()] * 4, raw), check, end, chosen)


def schema(client: Client, end: float, chosen: int) -> int:
    described = schemathesis.openapi.from_url(f"{client.url}/openapi.json")
    operations = [result.ok() for result in described.get_all_operations()]
    assert len(operations) > 10
    cases = st.one_of(
        operation.as_strategy(generation_mode=mode) for operation in operations for mode in GenerationMode
    )

    def check(case: schemathesis.Case) -> None:
        response = case.call(base_url=client.url, timeout=3 * client.limit_s)
        kind = response.headers.get("content-type", [""])[0]
        client.look(case.path, response.status_code, kind, response.content, response.elapsed)

    return explore(cases, check, end, chosen)


def sockets(client: Client, end: float, chosen: int) -> int:
    heads = st.one_of(
        st.binary(max_size=200),
        st.lists(st.sampled_from(_PIECES), max_size=12).map(b"".join),
    )

    def check(sent: bytes) -> None:
        address = client.host, client.port
        with suppress(ConnectionError), closing(socket.create_connection(address, timeout=LIMIT_S)) as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            answer = b""
            while piece := connection.recv(1 << 16):
                answer += piece
            assert not answer or answer.startswith((b"HTTP/1.1 2", b"HTTP/1.1 4", b"HTTP/1.1 1")), answer[:300]

    return explore(heads, check, end, chosen)


_PIECES = [
    b"GET ", b"POST ", b"HEAD ", b"OPTIONS ", b"DELETE ", b"/", b"/v1/models", b"/v1/chat/completions", b"/api/tags",
    b"/health", b"*", b"/v1/models/%2e%2e/", b"/v1/models/%00%ff", b"http://localhost/", b"?a=%", b" HTTP/1.1\r\n",
    b" HTTP/1.0\r\n", b" HTTP/2.0\r\n", b"\r\n", b"\r\n\r\n", b"\n", b"Host: localhost\r\n", b"Host: \xff\r\n",
    b"Content-Length: 2\r\n", b"Content-Length: 99999999999\r\n", b"Transfer-Encoding: chunked\r\n",
    b"2\r\n{}\r\n0\r\n\r\n", b"{}", b"Expect: 100-continue\r\n", b"Connection: close\r\n",
    b"Connection: Upgrade\r\nUpgrade: websocket\r\n", b"Origin: http://localhost\r\n", b"Origin: null\r\n",
    b"Cookie: a=b\r\n", b"Authorization: Basic Og==\r\n", b"Content-Type: application/json\r\n",
    b"X: " + b"y" * 9000 + b"\r\n", b"\x00", b"\x16\x03\x01",
]  # fmt: skip


def bulk(client: Client, end: float, chosen: int, size: int = 1 << 20) -> int:
    """All of it, however long that takes; with `size` bytes for each."""
    found: list[str] = []
    bodies = list(fuzz_requests.bulk(size))
    for name, path, body in bodies:
        began = time.monotonic()
        try:
            client.post(path, as_json(body))
            assert client.alive(), "the server does not answer any more"
        except Exception as e:
            found.append(f"{name}: {type(e).__name__}: {e!s:.300}")
        client.took[name] = max(client.took[name], time.monotonic() - began)
    assert not found, "\n".join(found)
    return len(bodies)


KINDS: dict[str, Callable[[Client, float, int], int]] = {
    "parsers": parsers,
    "names": names,
    "requests": requests,
    "schema": schema,
    "sockets": sockets,
    "bulk": bulk,
}


class Taken:
    """What a server holds when all is answered."""

    def __init__(self, client: Client) -> None:
        time.sleep(0.2)
        server = psutil.Process(client.pid)
        processes = [server, *server.children(recursive=True)]
        self.memory = sum(process.memory_info().rss for process in processes)
        self.threads, self.files = server.num_threads(), server.num_fds()
        with closing(HTTPConnection(client.host, client.port, timeout=LIMIT_S)) as connection:
            connection.request("GET", "/health")
            self.answers = json.loads(connection.getresponse().read())["answering"]

    def since(self, before: Taken) -> list[str]:
        """What it holds beyond what it held before."""
        grew = self.memory - before.memory
        found = [f"grew by {grew >> 20} MiB"] if grew > GROWTH else []
        # Some threads wait for more work.
        found += [f"{self.threads - before.threads} threads more"] if self.threads > before.threads + 8 else []
        found += [f"{self.files - before.files} files more"] if self.files > before.files + 4 else []
        return found + ([f"{self.answers} answers that nobody waits for"] if self.answers else [])


@contextmanager
def checking_server() -> Iterator[Client]:
    """A server whose models only check what they are asked."""
    program = [sys.executable, str(Path(__file__).with_name("checking_server.py"))]
    process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    with process:
        try:
            yield Client(process.stdout.readline().strip(), process.pid)
        finally:
            process.stdin.close()
            assert process.wait(20) == 0


@contextmanager
def real_server() -> Iterator[Client]:
    """The server as its users run it, with the built-in model."""
    import server_process

    with server_process.running("--no-ui") as server:
        yield Client(server.url, server.process.pid, REAL_LIMIT_S)
        assert server.stop() == 0


def fuzz(client: Client, kind: str, seconds: float, chosen: int) -> tuple[int, str | None]:
    """One kind of nonsense for some time: how much it was, and the finding."""
    try:
        n = KINDS[kind](client, time.monotonic() + seconds, chosen)
    except Exception as e:
        frames = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(e.__traceback__)]
        notes = " ".join(getattr(e, "__notes__", ()))
        return 0, f"{type(e).__name__}: {e!s:.2000}\n  at {' '.join(frames[-6:])}\n  {notes:.2000}"
    return n, None if client.alive() else "the server does not answer any more"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--only", choices=KINDS)
    parser.add_argument("--real", action="store_true")
    options = parser.parse_args()
    kinds = [options.only] if options.only else list(KINDS)
    end, findings, counts = time.monotonic() + options.seconds, 0, Counter[str]()
    print(f"seed {options.seed}")
    with real_server() if options.real else checking_server() as client:
        before: Taken | None = None
        for round_ in itertools.count():
            for kind in kinds:
                share = min(20.0, options.seconds / len(kinds))
                n, finding = fuzz(client, kind, share, options.seed + 1000 * round_)
                counts[kind] += n
                if finding:
                    findings += 1
                    print(f"{kind}, --seed {options.seed + 1000 * round_}: {finding}\n", flush=True)
            before = before or Taken(client)
            if time.monotonic() > end:
                break
        for grown in Taken(client).since(before):
            findings += 1
            print(f"after all: {grown}")
        slowest = sorted(client.took.items(), key=lambda item: -item[1])[:5]
        print(f"longest: {', '.join(f'{name} {took:.2f} s' for name, took in slowest)}")
        print(f"{dict(counts)}; statuses {dict(sorted(client.statuses.items()))}; {findings} findings")
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(main())
