"""The guard around the server: a real uvicorn, a small app behind it, and clients that do what clients should not."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import json
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import guarded_server
import pytest
from guarded_server import everything
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from local_llava.errors import UsageError
from local_llava.server import connections, guard, limits, refusals
from local_llava.server.settings import ServerSettings


class App:
    """Answers by path; what became of its answers is in `ended`."""

    def __init__(self) -> None:
        self.ended: list[str] = []
        self.calls = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.calls += 1
        path = scope["path"].rsplit("/", 1)[1]
        try:
            if path in STREAMS:
                kind, pieces = STREAMS[path]
                await StreamingResponse(pieces(), media_type=kind)(scope, receive, send)
            elif path == "never":
                await asyncio.sleep(60)
            elif path == "until-gone":
                while (await receive())["type"] != "http.disconnect":
                    pass
            else:
                size, more = 0, True
                while more:
                    message = await receive()
                    size, more = size + len(message.get("body", b"")), message.get("more_body", False)
                await JSONResponse({"path": scope["path"], "size": size})(scope, receive, send)
        except BaseException as e:
            self.ended.append(f"{path}: {type(e).__name__}")
            raise
        self.ended.append(path)


async def endless() -> AsyncIterator[bytes]:
    while True:
        yield b"x" * (256 << 10)
        await asyncio.sleep(0)


async def big() -> AsyncIterator[bytes]:
    yield b"x" * (10 << 20)


async def halting() -> AsyncIterator[bytes]:
    yield b"data: 1\n\n"
    await asyncio.sleep(60)


STREAMS = {"endless": ("text/plain", endless), "big": ("text/plain", big), "events": ("text/event-stream", halting),
           "lines": ("application/x-ndjson", halting)}  # fmt: skip


class Running(guarded_server.Running):
    """The app above, guarded."""

    def __init__(self, settings: ServerSettings, address: str) -> None:
        self.app = App()
        super().__init__(self.app, settings, address)


@contextmanager
def running(address: str = "127.0.0.1", **values: Any) -> Iterator[Running]:
    made = Running(ServerSettings(**values), address)
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def plain() -> Iterator[Running]:
    with running() as made:
        yield made


@pytest.fixture(scope="module")
def keyed() -> Iterator[Running]:
    with running(api_key="s3cret~key") as made:
        yield made


@pytest.fixture(scope="module")
def listed() -> Iterator[Running]:
    origins = ("https://Pages.example/", "http://localhost:3000", "chrome-extension://abcd")
    with running(api_key="k", cors_origins=origins, allowed_hosts=("box.lan", "fd00::1")) as made:
        yield made


# --- who may ask


@pytest.mark.parametrize("host", ["localhost:PORT", "127.0.0.1:PORT", "[::1]:PORT", "LOCALHOST", "localhost.:PORT",
    "localhost:9000",
                                  "[0:0:0::1]", "[::ffff:127.0.0.1]:1"])  # fmt: skip
def test_names_of_the_server(plain: Running, host: str) -> None:
    assert plain.ask(Host=host).status == 200


@pytest.mark.parametrize("host", [
    "evil.example", "evil.example:PORT", "localhost.evil.example", "evil.localhost", "127.0.0.1.nip.io:PORT",
    "127.0.0.2", "10.0.0.1",
    "0.0.0.0:PORT", "[::]:PORT", "[fe80::1]", "192.168.0.1:PORT", "2130706433", "localhos", "xlocalhost",
])  # fmt: skip
def test_other_names_may_be_rebound_to_here(plain: Running, host: str) -> None:
    calls = plain.app.calls
    answer = plain.ask(Host=host)
    assert answer.status == 403 and "--allowed-host" in answer.message and plain.app.calls == calls
    # The page of such a name is "the same origin" for the browser.
    assert plain.ask(Host=host, Origin=f"http://{host}").status == 403


@pytest.mark.parametrize("host", ["", " ", "localhost:", "localhost:x", "localhost:123456", "a b", "user@localhost",
    "localhost/x",
                                  "[::1", "::1", "[localhost]", "localhost,evil.example", "lo\u00e7alhost",
                                  "localhost#", "*"])  # fmt: skip
def test_hosts_that_are_none(plain: Running, host: str) -> None:
    assert plain.raw(f"GET /v1/x HTTP/1.1\nHost: {host}\n\n")[0] in (400, 403)


def test_allowed_hosts(listed: Running) -> None:
    for host in ("box.lan", "BOX.lan:1", "[fd00::1]:8000", "[fd00:0::1]"):
        assert listed.ask("/health", Host=host).status == 200
    assert listed.ask("/health", Host="x.box.lan").status == 403


def test_all_addresses() -> None:
    with running(host="0.0.0.0", api_key="k") as server:
        assert server.ask("/health", Host="127.0.0.1").status == 200
    with running(host="0.0.0.0", api_key="k", address="0.0.0.0") as server:
        # The one that was connected to is the server's; a name is not, whatever it stands for.
        assert server.ask("/health", address="127.0.0.3", Host="127.0.0.3:PORT").status == 200
        assert server.ask("/health", address="127.0.0.3", Host="127.0.0.4:PORT").status == 403
        assert server.ask("/health", address="127.0.0.3", Host="evil.example").status == 403


@pytest.mark.parametrize(("host", "origin", "status"), [
    ("localhost:PORT", "http://localhost:PORT", 200),
    ("localhost:PORT", "https://localhost:PORT", 200),  # a proxy may have added TLS
    ("localhost", "http://localhost", 200),
    ("localhost", "https://localhost", 200),
    ("localhost:443", "https://localhost", 200),
    ("[::1]:PORT", "http://[::1]:PORT", 200),
    ("localhost:PORT", "HTTP://LOCALHOST:PORT", 200),
    ("localhost:PORT", "http://localhost", 403),
    ("localhost:PORT", "http://localhost:1", 403),
    ("localhost:PORT", "http://127.0.0.1:PORT", 403),
    ("localhost", "https://localhost:80", 403),
    ("localhost:PORT", "http://evil.example", 403),
    ("localhost:PORT", "http://localhost:PORT.evil.example", 403),
    ("localhost:PORT", "http://localhost:PORT@evil.example", 403),
    ("localhost:PORT", "http://evil.example/http://localhost:PORT", 403),
    ("localhost:PORT", "ftp://localhost:PORT", 403),
    ("localhost:PORT", "null", 403),
    ("localhost:PORT", "", 403),
    ("localhost:PORT", "localhost:PORT", 403),
    ("localhost:PORT", "chrome-extension://abcd", 403),
    ("localhost:PORT", "http://localhost:PORT http://evil.example", 403),
])  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "DELETE"])
def test_pages_of_others_are_refused(plain: Running, host: str, origin: str, status: int, method: str) -> None:
    calls = plain.app.calls
    answer = plain.ask("/v1/x", method, Host=host, Origin=origin)
    assert answer.status == status and plain.app.calls - calls == (status == 200)
    assert not [name for name in answer.headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize(("method", "site", "mode", "dest", "status"), [
    ("GET", "none", "navigate", "document", 200),
    ("GET", "same-origin", "cors", "empty", 200),
    ("POST", "same-origin", "cors", "empty", 200),
    ("GET", "cross-site", "navigate", "document", 200),  # a link to here
    ("GET", "cross-site", "navigate", "iframe", 403),
    ("GET", "cross-site", "no-cors", "image", 403),
    ("GET", "same-site", "no-cors", "script", 403),  # another port of localhost
    ("POST", "cross-site", "navigate", "document", 403),
    ("POST", "cross-site", "no-cors", "empty", 403),
])  # fmt: skip
def test_what_pages_of_others_embed(plain: Running, method: str, site: str, mode: str, dest: str, status: int) -> None:
    named = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode, "Sec-Fetch-Dest": dest}
    assert plain.ask("/", method, **named).status == status


def test_listed_origins(listed: Running) -> None:
    for origin in ("https://pages.example", "http://localhost:3000", "chrome-extension://abcd"):
        before = {
            "Access_Control_Request_Method": "POST",
            "Access_Control_Request_Headers": "authorization,x-stainless-os",
        }
        asked = listed.ask("/v1/chat/completions", "OPTIONS", Origin=origin, **before)  # without the key
        assert asked.status == 200 and asked.headers["Access-Control-Allow-Origin"] == origin
        assert "x-stainless-os" in asked.headers["Access-Control-Allow-Headers"]
        assert "Access-Control-Allow-Credentials" not in asked.headers
        for key, status in (("k", 200), ("wrong", 401)):
            answer = listed.ask(
                "/v1/x", "POST", Origin=origin, Authorization=f"Bearer {key}", Sec_Fetch_Site="cross-site"
            )
            assert answer.status == status and answer.headers["Access-Control-Allow-Origin"] == origin
    for origin in ("https://pages.example.evil.example", "http://pages.example", "http://localhost:3001", "null"):
        answer = listed.ask("/v1/x", "OPTIONS", Origin=origin, Access_Control_Request_Method="POST")
        assert answer.status == 403 and "Access-Control-Allow-Origin" not in answer.headers


def test_all_origins() -> None:
    with running(cors_origins=("*",)) as server:
        for origin in ("https://anything.example", "null"):
            answer = server.ask(Origin=origin)
            assert answer.status == 200 and answer.headers["Access-Control-Allow-Origin"] == "*"
        assert server.ask(Host="evil.example", Origin="http://evil.example").status == 403


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(("given", "status"), [
    ("Bearer s3cret~key", 200), ("bearer  s3cret~key ", 200), (basic("anyone:s3cret~key"), 200),
    (basic(":s3cret~key"), 200),
    (None, 401), ("", 401), ("Bearer", 401), ("Bearer ", 401), ("Bearer s3cret~ke", 401), ("Bearer s3cret~key2", 401),
    ("Bearer S3CRET~KEY", 401), ("s3cret~key", 401), ("Token s3cret~key", 401), ("Bearer \u00e9", 401),
    (basic("s3cret~key"), 401),
    (basic("s3cret~key:x"), 401), ("Basic *", 401), ("Basic s3cret~key", 401),
])  # fmt: skip
def test_the_key(keyed: Running, given: str | None, status: int) -> None:
    calls = keyed.app.calls
    line = "" if given is None else f"Authorization: {given}\n"
    got, text = keyed.raw(f"GET /v1/models HTTP/1.1\nHost: localhost\n{line}Connection: close\n\n")
    assert got == status and keyed.app.calls - calls == (status == 200)
    if status == 401:
        assert "www-authenticate: Bearer\r\n" in text and '"code": "invalid_api_key"' in text


def test_what_needs_no_key(keyed: Running) -> None:
    assert keyed.ask("/health").status == keyed.ask("/health", "HEAD").status == 200
    for path in (
        "/",
        "/health/",
        "/health/../v1/x",
        "/%68ealth",
        "/metrics",
        "/docs",
        "//health",
        "/health%2f",
        "/HEALTH",
    ):
        # What is free is decided by the path that routes go by.
        expected = 200 if path == "/%68ealth" else 401
        assert keyed.ask(path).status == expected, path
    assert keyed.ask("/health", "POST", b"{}").status == 401
    assert keyed.ask("/health", Host="evil.example").status == 403
    # A browser asks its user.
    assert keyed.ask("/", Accept="text/html,*/*;q=0.8").headers["WWW-Authenticate"].startswith("Basic realm=")


@pytest.mark.parametrize("values", [
    {"api_key": ""}, {"api_key": " k"}, {"api_key": "schl\u00fcssel"}, {"api_key": "a\nb"},
    {"cors_origins": ("example.com",)},
    {"cors_origins": ("https://a.example/path",)}, {"cors_origins": ("https://*.example",)}, {"allowed_hosts": ("http://a",)},
    {"allowed_hosts": ("box.lan:8000",)}, {"allowed_hosts": ("",)}, {"allowed_hosts": ("*",)},
])  # fmt: skip
def test_settings_that_cannot_be(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        guard.guarded(App(), ServerSettings(**values))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("extra", ["Host: localhost", "Origin: http://localhost\nOrigin: http://localhost",
                                   "Authorization: Bearer k\nAuthorization: Bearer k",
                                   "Content-Type: application/json\nContent-Type: text/plain",
                                   "Content-Length: 1\nContent-Length: 2", "Content-Length: -1", "Content-Length: 1e3",
                                   "Content-Length: 99999999999999999999", "No colon", " Folded: x", "Bad\x00name: x",
                                   "X: a\x00b",
                                   "Transfer-Encoding: gzip, chunked", "X: " + "y" * 1_000_000])  # fmt: skip
def test_odd_headers(plain: Running, extra: str) -> None:
    calls = plain.app.calls
    assert 400 <= plain.raw(f"POST /v1/x HTTP/1.1\nHost: localhost\n{extra}\n\n{{}}")[0] < 500 or "Encoding" in extra
    assert plain.app.calls == calls


def test_no_host_and_no_http(plain: Running) -> None:
    assert plain.raw("GET /v1/x HTTP/1.0\n\n")[0] == 400
    for nonsense in ("\x16\x03\x01\x02\x00", "GET\n\n", "G E T / HTTP/1.1\n\n", "PRI * HTTP/2.0\n\n"):
        assert plain.raw(nonsense)[0] in (0, 400)
    assert plain.ask().status == 200


def test_what_all_responses_say(plain: Running) -> None:
    for answer in (plain.ask(), plain.ask(Host="evil.example")):
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["X-Frame-Options"] == "SAMEORIGIN"
        assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"


def test_errors_have_the_form_of_the_api(plain: Running) -> None:
    assert plain.ask("/api/tags", Host="evil.example").json == {
        "error": "this server is not called evil.example; --allowed-host adds a name to localhost"
    }
    error = plain.ask("/v1/models", Host="evil.example").json["error"]
    assert error["type"] == "permission_error" and set(error) == {"message", "type", "param", "code"}


def test_no_websockets() -> None:
    async def open_one() -> list[Message]:
        app, sent = App(), []

        async def receive() -> Message:
            return {"type": "websocket.connect"}

        async def send(message: Message) -> None:
            sent.append(message)

        headers = [(b"host", b"localhost"), (b"origin", b"http://evil.example")]
        await guard.guarded(app, ServerSettings())(
            {"type": "websocket", "path": "/", "headers": headers}, receive, send
        )
        assert app.calls == 0
        return sent

    assert asyncio.run(open_one()) == [{"type": "websocket.close", "code": 1008}]


# --- how much


def pieces(size: int, piece: int = 50_000) -> Iterator[bytes]:
    for at in range(0, size, piece):
        yield b"x" * min(piece, size - at)


def test_sizes_of_bodies() -> None:
    with running(max_body_bytes=1 << 20) as server:
        for most in (0, 1, 100_000, 1 << 20):
            for body in (b"x" * most, pieces(most)):
                assert server.ask("/v1/x", "POST", body).json == {"path": "/v1/x", "size": most}
        calls = server.app.calls
        # Clients that send all before they read still see why it was refused.
        for body in (b"x" * ((1 << 20) + 1), pieces((1 << 20) + 1), b"x" * (30 << 20), pieces(30 << 20)):
            answer = server.ask("/v1/x", "POST", body)
            assert answer.status == 413 and "larger than 1048576 bytes" in answer.message
            assert answer.headers["Connection"] == "close"
        assert server.app.calls == calls
        # One who asks first need not send anything.
        with server.connect() as connection:
            connection.sendall(
                b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999\r\nExpect: 100-continue\r\n\r\n"
            )
            began = time.monotonic()
            assert everything(connection).startswith(b"HTTP/1.1 413 ") and time.monotonic() - began < 1


def test_all_bodies_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HELD_BODIES", 2)
    with running(max_body_bytes=1 << 20) as server:
        head = b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000001\r\n\r\n"
        with server.connect() as one, server.connect() as two:
            for connection in (one, two):
                connection.sendall(head + b"x" * 1_000_000)
            time.sleep(0.2)
            answer = server.ask("/v1/x", "POST", b"x" * 200_000)
            assert answer.status == 429 and answer.headers["Retry-After"] == "2" and "fill the room" in answer.message
            one.sendall(b"x")
            assert one.recv(15) == b"HTTP/1.1 200 OK"
            assert server.ask("/v1/x", "POST", b"x" * 200_000).status == 200
        # A client that goes half-way leaves nothing behind.
        assert server.wait(lambda: server.n_connections == 0)
        assert server.ask("/v1/x", "POST", b"x" * (1 << 20)).status == 200


def test_requests_in_flight() -> None:
    with running(max_requests=2) as server, contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(server.connect()) for _ in range(2)]
        for connection in waiting:
            connection.sendall(b"POST /v1/until-gone HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}")
        assert server.wait(lambda: server.app.calls == 2)
        for path in ("/v1/x", "/api/x"):
            answer = server.ask(path, "POST", b"x" * 3_000_000)
            assert answer.status == 429 and answer.headers["Retry-After"] == "2"
        assert answer.json == {"error": "2 requests are answered or wait already; try again later"}
        assert server.ask("/v1/models").status == server.ask("/page/x", "POST", b"{}").status == 200
        waiting[0].close()
        assert server.wait(lambda: server.app.ended.count("until-gone") == 1)
        assert server.ask("/v1/x", "POST", b"{}").status == 200


def test_time_of_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    with running(request_timeout_s=0.3) as server:
        began = time.monotonic()
        late = server.ask("/v1/never", "POST", b"{}")
        assert late.status == 504 and late.message == "the answer took longer than 0.3 seconds"
        assert server.ask("/v1/events").body == b"data: 1\n\ndata: " + json.dumps(late.json).encode() + b"\n\n"
        lines = server.ask("/api/lines").body
        assert lines == b'data: 1\n\n{"error": "the answer took longer than 0.3 seconds"}\n'
        with pytest.raises(http.client.IncompleteRead):  # not taken for all of it
            server.ask("/v1/endless")
        assert time.monotonic() - began < 3
        assert server.wait(lambda: len(server.app.ended) == 4)
        assert server.app.ended == [f"{path}: CancelledError" for path in ("never", "events", "lines", "endless")]
        assert server.ask().status == 200


# --- slow clients

SLOW = 0.4
HEAD = b"GET /v1/x HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def hasty() -> Iterator[Running]:
    with running(read_timeout_s=SLOW) as made:
        yield made


def dropped_after(connection: socket.socket, drip: Callable[[], bytes]) -> float:
    """Seconds until the server closes a connection into which drops fall."""
    began = time.monotonic()
    connection.settimeout(0.05)
    while time.monotonic() - began < 5:
        with contextlib.suppress(socket.timeout):
            try:
                connection.sendall(drip())
                if not connection.recv(1 << 16):
                    break
            except ConnectionError:
                break
    return time.monotonic() - began


@pytest.mark.parametrize("first", [b"", HEAD, HEAD + b"\r\n" + HEAD])
def test_headers_in_drops(hasty: Running, first: bytes) -> None:
    with hasty.connect() as connection:
        connection.sendall(first)
        took = dropped_after(connection, lambda: b"X" if first else b"")
    assert SLOW * 0.9 < took < SLOW + 0.6
    assert hasty.wait(lambda: hasty.n_connections == 0)


@pytest.mark.parametrize("kind", ["Content-Length: 1000", "Transfer-Encoding: chunked"])
def test_bodies_in_drops(hasty: Running, kind: str) -> None:
    calls = hasty.app.calls
    drop = b"x" if "Length" in kind else b"1\r\nx\r\n"
    with hasty.connect() as connection:
        connection.sendall(f"POST /v1/x HTTP/1.1\r\nHost: localhost\r\n{kind}\r\n\r\n".encode())
        began = time.monotonic()
        connection.settimeout(0.05)
        answer = b""
        while not answer and time.monotonic() - began < 5:
            connection.sendall(drop)
            with contextlib.suppress(socket.timeout):
                answer = connection.recv(1 << 16)
    assert answer.startswith(b"HTTP/1.1 408 ") and b"longer than 0.4 seconds to arrive" in answer
    assert SLOW * 0.9 < time.monotonic() - began < SLOW + 0.6
    assert hasty.wait(lambda: hasty.n_connections == 0) and hasty.app.calls == calls


@pytest.mark.parametrize("path", ["endless", "big"])
def test_readers_that_do_not_read(hasty: Running, path: str) -> None:
    hasty.app.ended.clear()
    with hasty.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(f"GET /v1/{path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert hasty.wait(lambda: hasty.n_connections == 1)
        began = time.monotonic()
        assert hasty.wait(lambda: hasty.n_connections == 0)
        assert SLOW * 0.9 < time.monotonic() - began < 2
        # The connection is reset, not kept until all of it was read.
        with pytest.raises(ConnectionResetError):
            while connection.recv(1 << 16):
                pass


def test_a_slow_reader_who_keeps_reading(hasty: Running) -> None:
    with hasty.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        connection.sendall(b"GET /v1/endless HTTP/1.1\r\nHost: localhost\r\n\r\n")
        end, received = time.monotonic() + 4 * SLOW, 0
        while time.monotonic() < end:
            received += len(connection.recv(20_000))
            time.sleep(0.05)
        assert received > 100_000
    assert hasty.wait(lambda: hasty.app.ended[-1:] == ["endless: CancelledError"] or hasty.n_connections == 0)


def test_a_client_that_goes_ends_its_answer(plain: Running) -> None:
    plain.app.ended.clear()
    with plain.connect() as connection:
        connection.sendall(b"POST /v1/until-gone HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}")
        assert plain.wait(lambda: plain.n_connections == 1) and plain.app.ended == []
    assert plain.wait(lambda: plain.app.ended == ["until-gone"])


def test_connections_without_end(hasty: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 3)
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(hasty.connect()) for _ in range(3)]
        assert hasty.wait(lambda: hasty.n_connections == 3)
        with contextlib.suppress(ConnectionError), hasty.connect() as one_more:
            assert everything(one_more) == b""
        assert hasty.n_connections == 3
        opened[0].close()
        assert hasty.wait(lambda: hasty.n_connections == 2)
        assert hasty.ask().status == 200


def test_refused_clients_do_not_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "_LINGER_S", 0.3)
    with running() as server, server.connect() as connection:
        connection.sendall(b"POST /v1/x HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 1000000\r\n\r\n")
        began = time.monotonic()
        assert everything(connection).startswith(b"HTTP/1.1 403 ")
        assert 0.2 < time.monotonic() - began < 2
