"""`local-llava serve` as people run it: a process, its port, its signals."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from server_process import Server, running

from local_llava.errors import LocalLlavaError, UsageError
from local_llava.server import run
from local_llava.server.settings import ServerSettings
from local_llava.types import ModelFiles

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals")

LONG = {
    "prompt": "What do you see?",
    "format": {"type": "array", "items": {"const": "a"}, "minItems": 150},
    "options": {"num_predict": 700},
}
"""An answer that takes a second or two."""


@pytest.fixture
def small(tiny: ModelFiles) -> list[str]:
    """Arguments for a server that is there at once."""
    return ["--model", str(tiny.model), "--no-ui", "--n-ctx", "1024", "--threads", "1"]


@contextlib.contextmanager
def asking(server: Server, body: dict[str, Any]) -> Iterator[Iterator[dict[str, Any]]]:
    """Lines of an answer as they come."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(server.url).netloc, timeout=60)
    try:
        connection.request("POST", "/api/generate", json.dumps(body))
        response = connection.getresponse()
        yield (json.loads(line) for line in response)
    finally:
        connection.close()


def children(server: Server) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_when_running_answers_are_given(small: list[str], number: int) -> None:
    with running(*small) as server, asking(server, LONG) as lines:
        first = next(lines)
        started = children(server)
        assert "error" not in first and started
        server.process.send_signal(number)
        end = time.monotonic() + 5
        while server.health()["status"] != "stopping":
            assert time.monotonic() < end
        status, body = server.request("/api/generate", {"prompt": "What?"})
        assert status == 503 and "stopp" in json.loads(body)["error"]
        last = list(lines)[-1]
        assert last["done"] is True and last["done_reason"] == "stop"
        assert server.process.wait(20) == 0
        assert server.log.read_text().splitlines()[-1:] == ["Stopped"]
        assert not [process for process in started if process.is_running()]


@posix
def test_a_second_signal_ends_it_at_once(small: list[str]) -> None:
    with running(*small) as server, asking(server, {**LONG, "options": {"num_predict": 1000}}) as lines:
        next(lines)
        started = children(server)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(5) == 0
        assert "Traceback" not in server.log.read_text()
        assert not [process for process in started if process.is_running()]


@posix
def test_it_outlives_the_process_that_holds_the_model(small: list[str]) -> None:
    with running(*small) as server:
        with asking(server, LONG) as lines:
            next(lines)
            (child,) = children(server)
            child.kill()
            last = list(lines)[-1]
        assert list(last) == ["error"] and "SIGKILL" in last["error"]
        status, body = server.request("/api/generate", {"prompt": "What?", "stream": False})
        assert status == 200 and json.loads(body)["done"] is True
        health = server.health()
        assert health["status"] == "ok" and health["restarts"] == 1 and health["detail"]
        assert server.stop() == 0


@posix
def test_without_answers_it_ends_at_once(small: list[str]) -> None:
    with running(*small) as server:
        connection = http.client.HTTPConnection(urllib.parse.urlsplit(server.url).netloc)
        connection.request("GET", "/health")  # and stays open, as clients keep theirs
        connection.getresponse().read()
        begun = time.monotonic()
        assert server.stop() == 0 and time.monotonic() - begun < 4
        connection.close()


def test_the_key_may_be_in_a_variable(small: list[str]) -> None:
    with running(*small, "--max-images", "1", env={"LOCAL_LLAVA_API_KEY": "s3cret"}) as server:
        assert server.request("/health")[0] == 200
        assert server.request("/api/tags")[0] == 401
        key = {"Authorization": "Bearer s3cret"}
        status, body = server.request("/api/generate", {"prompt": "a", "images": ["QUJD"] * 2}, key)
        assert status == 400 and b"at most 1" in body
        metrics = server.request("/metrics", headers=key)[1].decode()
        assert 'method="POST",route="/api/generate",status="400"} 1.0' in metrics
        assert 'method="GET",route="other",status="401"} 1.0' in metrics


def test_a_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "local_llava.cli", "-q", "serve", "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and done.stdout == ""
    assert line.startswith(f"local-llava: port {port} of 127.0.0.1 is in use by another program")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"model": "no/such/model.gguf"}, "no/such/model.gguf"),
        ({"media_root": Path("no/such/directory")}, "--media-root"),
        ({"cors_origins": ("example.com",)}, "example.com"),
        ({"allowed_hosts": ("a b",)}, "a b"),
        ({"api_key": " "}, "API key"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_it_listens(values: dict[str, Any], text: str) -> None:
    with pytest.raises(LocalLlavaError, match=text):
        run.serve(ServerSettings(port=0, ui=False, **values), lambda url: pytest.fail("it listens"))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--keep-alive", "soon"], "--keep-alive"),
        (["--request-timeout", "0"], "--request-timeout"),
        (["--read-timeout", "-1"], "--read-timeout"),
        (["--max-body", "much"], "--max-body"),
        (["--parallel", "99"], "--parallel"),
        (["--temperature", "-1"], "--temperature"),
    ],
)
def test_flags_are_checked(arguments: list[str], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from local_llava.cli import app

    monkeypatch.setattr(run, "serve", lambda *_: pytest.fail("it was started"))
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert isinstance(result.exception, UsageError) and str(result.exception).startswith(text)


def test_flags_become_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from local_llava.cli import app

    seen: list[ServerSettings] = []
    monkeypatch.setattr(run, "serve", lambda settings, on_listening: seen.append(settings))
    monkeypatch.delenv("LOCAL_LLAVA_API_KEY", raising=False)
    assert CliRunner().invoke(app, ["serve"]).exit_code == 0
    plain = ServerSettings(options={"image_cache": "kv", "image_cache_after": 2}, max_body_bytes=64_000_000)
    assert seen.pop() == plain
    arguments = (
        "serve --model m.gguf --host ::1 --port 1 --keep-alive 1h --api-key k --allow-network --allow-remote-images "
        f"--media-root {tmp_path} --cors-origin https://a.example --cors-origin https://b.example --allowed-host a "
        "--no-ui --max-tokens 100 --max-images 2 --max-body 1MB --max-requests 3 --request-timeout 1m "
        "--read-timeout 5s --image-cache off --n-ctx 512 --parallel 2"
    )
    result = CliRunner().invoke(app, arguments.split())
    assert result.exit_code == 0, result.output
    assert seen.pop() == ServerSettings(
        host="::1",
        port=1,
        model="m.gguf",
        options={"n_ctx": 512, "parallel": 2, "max_tokens": 100},
        keep_alive_s=3600,
        api_key="k",
        allow_network=True,
        allowed_hosts=("a",),
        cors_origins=("https://a.example", "https://b.example"),
        allow_remote_images=True,
        media_root=tmp_path,
        ui=False,
        max_body_bytes=1_000_000,
        max_images=2,
        max_tokens=100,
        max_requests=3,
        request_timeout_s=60,
        read_timeout_s=5,
    )


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_computers_are_let_in_only_on_purpose(host: str) -> None:
    with pytest.raises(UsageError, match="--api-key or LOCAL_LLAVA_API_KEY"):
        run.bound(ServerSettings(host=host, port=0))


@pytest.mark.parametrize("allowed", [{"api_key": "k"}, {"allow_network": True}])
def test_a_key_or_a_flag_lets_them_in(allowed: dict[str, Any]) -> None:
    with run.bound(ServerSettings(host="0.0.0.0", port=0, **allowed)) as listener:
        assert listener.getsockname()[0] == "0.0.0.0"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.2"])
def test_this_computer_alone_needs_no_key(host: str) -> None:
    if host == "127.0.0.2" and not sys.platform.startswith("linux"):
        pytest.skip("other systems have to be told of it")
    with run.bound(ServerSettings(host=host, port=0)) as listener:
        assert run.url(listener).startswith("http://")


@pytest.mark.parametrize("host", ["", "no-such-host.invalid", "999.1.1.1", "203.0.113.7", "a" * 70, "\u00e9" * 300])
def test_addresses_that_are_not_ours(host: str) -> None:
    with pytest.raises(UsageError, match="--host") as caught:
        run.bound(ServerSettings(host=host, port=0, allow_network=True))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_the_url_of_an_ipv6_address_has_brackets() -> None:
    try:
        listener = run.bound(ServerSettings(host="::1", port=0))
    except UsageError:
        pytest.skip("no IPv6 here")
    with listener:
        assert run.url(listener) == f"http://[::1]:{listener.getsockname()[1]}"


def test_two_servers_do_not_share_a_port() -> None:
    with run.bound(ServerSettings(port=0)) as first:
        settings = ServerSettings(port=first.getsockname()[1])
        run.listen(first, settings)
        with pytest.raises(UsageError, match="is in use by another program"):
            run.bound(settings)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from local_llava.cli import app; "
        "assert CliRunner().invoke(app, ['serve', '--help']).exit_code == 0; "
        "print([m for m in ('fastapi', 'uvicorn', 'numpy', 'llama_cpp') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.stdout.strip() == "[]", done.stderr
