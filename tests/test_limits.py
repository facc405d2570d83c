"""How much a request may take: bytes, time, places; and clients that are slow, or go, or never end."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator

import pytest
from guarded_app import Running, running
from guarded_server import everything

from local_llava.server import connections, limits, refusals


@pytest.fixture(scope="module")
def plain() -> Iterator[Running]:
    with running() as made:
        yield made


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
            assert everything(connection).startswith(b"HTTP/1.1 413 ") and time.monotonic() - began < 5


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
        assert time.monotonic() - began < 10
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
    assert SLOW * 0.9 < time.monotonic() - began < 4
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
        assert SLOW * 0.9 < time.monotonic() - began < 4
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
        assert 0.2 < time.monotonic() - began < 4
