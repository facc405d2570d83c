"""Pictures from URLs: a real server that does what servers should not."""

from __future__ import annotations

import base64
import itertools
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from picture_files import pdf, photo
from picture_server import OK, PICTURE, Answer, Server

from local_llava.errors import ImageError
from local_llava.images import load_image
from local_llava.pictures import fetch


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    made = Server()
    yield made
    made.close()


def refused(url: str) -> str:
    with pytest.raises(ImageError) as caught:
        load_image(url)
    message = str(caught.value)
    assert message.isprintable(), message
    return message


def test_a_picture(server: Server) -> None:
    assert load_image(server.url()).tobytes() == photo().tobytes()
    assert load_image(server.url().upper().replace("A.PNG", "a.png")).size == photo().size
    request = server.requests[0].decode()
    assert request.startswith("GET /a.png HTTP/1.1\r\n") and "User-Agent: local-llava/" in request
    assert "Authorization" not in request and "Cookie" not in request


def test_as_users_type_it(server: Server) -> None:
    load_image(server.url("/mein Bild ä%20b.png?größe=1&t=a%2Fb#teil"))
    assert server.requests[0].startswith(b"GET /mein%20Bild%20%C3%A4%20b.png?gr%C3%B6%C3%9Fe=1&t=a%2Fb HTTP/1.1\r\n")
    server.answer = b"HTTP/1.1 200 OK\r\n\r\n" + pdf([b"", b"1 0 0 rg 0 0 200 100 re f"])
    assert load_image(server.url("/a.pdf#page=2")).getpixel((5, 5)) == (255, 0, 0)
    assert b"#" not in server.requests[1]


def test_not_where_it_was_not_typed(server: Server) -> None:
    with pytest.raises(ImageError, match=r"127\.0\.0\.1.*not fetched"):
        load_image(server.url("/a.png?key=SECRET"), remote=False)
    assert server.requests == []


def test_redirects(server: Server) -> None:
    def chain(n: int) -> Answer:
        def answer(request: bytes, connection: socket.socket) -> None:
            at = int(request.split()[1].rsplit(b"/", 1)[1] or b"0")
            redirect = b"HTTP/1.1 302 Found\r\nLocation: ./%d\r\nContent-Length: 9999999999\r\n\r\n" % (at + 1)
            connection.sendall(OK if at == n else redirect)

        return answer

    server.answer = chain(5)
    assert load_image(server.url("/0")).size == photo().size
    server.answer, server.requests[:] = chain(6), []
    assert "redirects more than 5 times" in refused(server.url("/0")) and len(server.requests) == 6
    for target in ("file:///etc/passwd", "ftp://127.0.0.1/a", "data:image/png;base64,AA"):
        server.answer = b"HTTP/1.1 301 Moved\r\nLocation: %s\r\n\r\n" % target.encode()
        assert "other than http and https" in refused(server.url())
    server.answer = b"HTTP/1.1 307 Temporary Redirect\r\n\r\n"
    assert "other than http" in refused(server.url())


def test_passwords_go_to_their_server_only_and_into_no_error(server: Server) -> None:
    def answer(request: bytes, connection: socket.socket) -> None:
        elsewhere = server.url("/there", "localhost").encode()
        moved = b"HTTP/1.1 302 Found\r\nLocation: " + elsewhere + b"\r\n\r\n"
        connection.sendall(OK if b"/there" in request else moved)

    server.answer = answer
    load_image(server.url("/a").replace("//", "//me:p%40ss@"))
    expected = b"Authorization: Basic " + base64.b64encode(b"me:p@ss")
    assert expected in server.requests[0] and b"Authorization" not in server.requests[1]

    server.answer = b"HTTP/1.1 403 HUNTER2\x1b[31m\r\n\r\n"
    message = refused(f"http://me:HUNTER2@127.0.0.1:{server.port}/path?token=HUNTER2#HUNTER2")
    assert message == f"http://127.0.0.1:{server.port}/path: the server answered 403 (Forbidden)"
    for url in ("http://u:HUNTER2@nowhere.invalid/", "http://u:HUNTER2@127.0.0.1:99999/", "http://u:HUNTER2@[::1/"):
        assert "HUNTER2" not in refused(url)


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 9999999999\r\n\r\n", r"404 \(Not Found\)"),
        (b"HTTP/1.1 799 What\r\n\r\n", "799"),
        (b"HTTP/1.1 304 Not Modified\r\n\r\n", "304"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not http"),
        (b"", "broke off"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n" + PICTURE, "damaged|not a picture"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n" + PICTURE, f"ended after {len(PICTURE)} of 99999 bytes"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n" + PICTURE, "larger than 256 MiB"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde", "broke off"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabcde", "broke off"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + PICTURE, "compressed"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n <!DOCTYPE html><p>Log in", "a web page"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000 + b"\r\n", "not http"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 99999 + b"\r\n\r\n", "not http"),
    ],
)
def test_what_servers_answer(server: Server, answer: bytes, what: str) -> None:
    server.answer = answer
    with pytest.raises(ImageError, match=what):
        load_image(server.url())


def test_without_end(server: Server) -> None:
    def body(head: bytes, piece: bytes) -> Answer:
        def answer(request: bytes, connection: socket.socket) -> None:
            connection.sendall(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n")
            while True:
                connection.sendall(piece)

        return answer

    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    for server.answer in (body(b"", bytes(1 << 16)), body(b"Transfer-Encoding: chunked\r\n", chunk)):
        with pytest.raises(ImageError, match="here: larger than 3 MiB"):
            fetch.fetch(server.url(), "here", 3 << 20)


@pytest.mark.parametrize("before", ["", "HTTP/1.1 200 OK\r\nX: ", "HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n",
                                    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", None])  # fmt: skip
def test_in_drops(server: Server, before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "MAX_SECONDS", 0.6)

    def answer(request: bytes, connection: socket.socket) -> None:
        if before is None:
            time.sleep(5)
            return
        connection.sendall(before.encode())
        for _ in itertools.count():
            connection.sendall(b"1")
            time.sleep(0.05)

    server.answer = answer
    began = time.monotonic()
    assert "within the time" in refused(server.url())
    assert time.monotonic() - began < 4


def test_nobody_there(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    server.close()
    assert "Connection refused" in refused(server.url())
    monkeypatch.setattr(socket, "getaddrinfo", _unknown_name)  # the machine may have no resolver to ask
    assert "name cannot be found" in refused("http://nowhere.invalid/a.png")
    for url in ("http://", "http:///a.png", "http://a b/", "http://a:b/", "http://" + "ü" * 70 + "/", "http://[/"):
        assert "not a valid URL" in refused(url), url


def _unknown_name(*_: object, **__: object) -> None:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def test_proxies_of_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.port}")
    load_image("http://pictures.example/a.png")
    assert server.requests[0].startswith(b"GET http://pictures.example/a.png HTTP/1.1\r\n")
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{server.port}")
    server.answer = b"HTTP/1.1 403 No\r\n\r\n"
    assert "no connection" in refused("https://pictures.example/a.png")
    assert server.requests[1].startswith(b"CONNECT pictures.example:443 ")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server.answer = OK
    load_image(server.url())
    assert server.requests[2].startswith(b"GET /a.png ")


def test_certificates_are_checked(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    certificate = server.speak_tls(tmp_path)
    assert "certificate is not trusted: self" in refused(server.url())
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert load_image(server.url()).size == photo().size
    assert "not trusted" in refused(server.url(host="127.1"))  # a name of this computer that it does not bear
    server.tls = None  # http on an https port
    assert "secure connection" in refused(server.url().replace("http:", "https:"))
