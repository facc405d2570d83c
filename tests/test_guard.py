"""Who may ask: a real uvicorn, a small app behind the guard, and pages and programs that should not get in."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from typing import Any

import pytest
from guarded_app import App, Running, running
from starlette.types import Message

from local_llava.errors import UsageError
from local_llava.server import guard
from local_llava.server.settings import ServerSettings


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
