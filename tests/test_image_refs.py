"""Pictures that strangers name: what is let in, what is refused, and that nobody is asked for what is refused."""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from picture_server import OK, PICTURE, Server

from local_llava.errors import ImageError, LocalLlavaError, UsageError
from local_llava.pictures import fetch
from local_llava.server import addresses, image_refs
from local_llava.server.backend import Job
from local_llava.server.errors import RequestError
from local_llava.server.image_refs import ImagePolicy
from local_llava.server.settings import ServerSettings
from local_llava.types import Message

DATA_URL = f"data:image/png;base64,{base64.b64encode(PICTURE).decode()}"


def resolved(policy: ImagePolicy, *pictures: Any) -> list[Any]:
    job = asyncio.run(policy.resolve(Job([Message("system", "s"), Message("user", "?", pictures)], {"seed": 3})))
    assert job.options == {"seed": 3} and [m.text for m in job.messages] == ["s", "?"]
    return list(job.messages[1].images)


def refused(policy: ImagePolicy, *pictures: Any, error: type[LocalLlavaError] = ImageError) -> str:
    with pytest.raises(error) as caught:
        resolved(policy, *pictures)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 500, message
    return message


def test_data_urls_and_bytes_are_always_accepted() -> None:
    policy = ImagePolicy(ServerSettings())
    loud = DATA_URL[:5].upper() + DATA_URL[5:]
    assert resolved(policy, DATA_URL, b"as it is", loud) == [PICTURE, b"as it is", PICTURE]
    assert resolved(policy) == []
    assert refused(policy, "data:image/png;base64,*") == "data URL: not valid base64"
    assert refused(policy, DATA_URL, "data:image/png").startswith("picture 2: data URL: no comma")


def test_turns_keep_their_own_pictures() -> None:
    turns = [Message("user", "a", (DATA_URL, b"1")), Message("assistant", "b"), Message("user", "c", (b"2", "data:,3"))]
    job = asyncio.run(ImagePolicy(ServerSettings()).resolve(Job(turns)))
    assert [m.images for m in job.messages] == [(PICTURE, b"1"), (), (b"2", b"3")]


def test_how_many_and_how_much() -> None:
    policy = ImagePolicy(ServerSettings(max_images=2, max_body_bytes=len(PICTURE) + 1))
    assert "3 pictures; at most 2" in refused(policy, b"", b"", b"", error=RequestError)
    # The same picture twice is held once.
    assert resolved(policy, DATA_URL, DATA_URL) == [PICTURE, PICTURE]
    with pytest.raises(RequestError, match="larger than") as caught:
        resolved(policy, DATA_URL, "data:,too much")
    assert caught.value.status == 413


_noted: list[tuple[str, str]] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _noted is not None and event in ("socket.getaddrinfo", "socket.connect", "open", "os.listdir"):
        _noted.append((event, repr(arguments)))


sys.addaudithook(_note)  # there is no way to take it away again


@pytest.fixture
def asked() -> Iterator[list[tuple[str, str]]]:
    """What the system is asked for: names, connections, files."""
    global _noted
    _noted = []
    yield _noted
    _noted = None


@pytest.mark.parametrize("name", [
    "http://127.0.0.1/a.png", "HTTPS://127.0.0.1/a.png", "file:///etc/hostname", "/etc/hostname", "etc/hostname", "-",
    "", "clipboard:", "ftp://127.0.0.1/a", "gopher://a", "//server/share/a.png", r"\\server\share\a.png", "C:\\a.png",
    "\0", "javascript:alert(1)", "a\nb", "iVBORw0KGgo", "x" * 100_000, "\ud800", "\u202e" + "a", "http://" + "a" * 9000,
    "jar:file:///a!/b", "~/a.png", "blob:http://a/b", "about:blank", "file://[", "http://[", "http:/127.0.0.1/",
])  # fmt: skip
def test_nothing_else_without_being_told(name: str, asked: list[tuple[str, str]]) -> None:
    assert "accepted are data URLs (data:image/png;base64,...)" in refused(ImagePolicy(ServerSettings()), name)
    assert asked == []


# --- from the network


class Net:
    """Two servers: 127.0.0.2 is as good as public, 127.0.0.1 is not. What a name means, `names` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: dict[str, list[list[str]]] = {}
        self.lookups: list[str] = []
        self.inside, self.outside = Server(), Server("127.0.0.2")
        self.policy = ImagePolicy(ServerSettings(allow_remote_images=True))
        monkeypatch.setattr(image_refs, "is_public", lambda address: str(address) == "127.0.0.2")
        self._getaddrinfo = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self._look_up)

    def _look_up(self, host: str, port: int, *args: Any, **options: Any) -> list[Any]:
        self.lookups.append(host)
        answers = self.names.get(host, [[host]])
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        return [place for address in found for place in self._getaddrinfo(address, port, *args, **options)]


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> Iterator[Net]:
    made = Net(monkeypatch)
    yield made
    made.inside.close()
    made.outside.close()


def test_from_a_public_server(net: Net) -> None:
    net.names["pictures.example"] = [["127.0.0.2"]]
    url = net.outside.url("/a.png?key=1", "pictures.example")
    assert resolved(net.policy, url, DATA_URL, url) == [PICTURE] * 3
    (request,) = net.outside.requests  # named twice, fetched once
    assert f"\r\nHost: pictures.example:{net.outside.port}\r\n".encode() in request
    assert resolved(net.policy, net.outside.url()) == [PICTURE]


def test_a_name_is_looked_up_once(net: Net) -> None:
    net.names["rebinds.example"] = [["127.0.0.2"], ["127.0.0.1"]]
    assert resolved(net.policy, net.outside.url(host="rebinds.example")) == [PICTURE]
    assert net.lookups.count("rebinds.example") == 1 and len(net.outside.requests) == 1


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["127.0.0.2", "127.0.0.1"], ["::1"], ["169.254.169.254"]])
def test_names_of_what_is_not_public(net: Net, addresses: list[str], asked: list[tuple[str, str]]) -> None:
    net.names["rebinds.example"] = [addresses]
    url = net.inside.url("/a.png?key=SECRET", "rebinds.example")
    shown = url.partition("?")[0]
    assert (
        refused(net.policy, url)
        == f"{shown}: pictures are fetched from public addresses only, and this server has another one"
    )
    assert not [event for event, _ in asked if event == "socket.connect"]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1", "0x7f.1", "2130706433", "0177.0.0.1", "localhost", "0",
                                  "[::1]", "[::ffff:127.0.0.1]", "127.0.0.1.", "user:pass@127.0.0.1",
                                  "\uff11\uff12\uff17.0.0.1"])  # fmt: skip
def test_other_spellings_of_this_computer(net: Net, host: str) -> None:
    message = refused(net.policy, f"http://{host}:{net.inside.port}/a.png")
    # Some resolvers do not take all of them for addresses.
    assert "public addresses only" in message or "name cannot be found" in message or "not a valid URL" in message
    assert net.inside.requests == []


def test_redirects_are_checked_like_the_first(net: Net) -> None:
    net.names["elsewhere.example"] = [["127.0.0.1"]]
    for target in (net.inside.url(), net.inside.url(host="elsewhere.example"), "http://[::1]/", "//127.0.0.1/"):
        net.outside.answer = b"HTTP/1.1 302 Found\r\nLocation: %s\r\n\r\n" % target.encode()
        assert "public addresses only" in refused(net.policy, net.outside.url())
    for target in ("file:///etc/hostname", "data:,x", "gopher://127.0.0.1/"):
        net.outside.answer = b"HTTP/1.1 302 Found\r\nLocation: %s\r\n\r\n" % target.encode()
        assert "other than http and https" in refused(net.policy, net.outside.url())
    assert net.inside.requests == []

    def moved(request: bytes, connection: socket.socket) -> None:
        there = b"HTTP/1.1 302 Found\r\nLocation: /there\r\n\r\n"
        connection.sendall(OK if request.startswith(b"GET /there ") else there)

    net.outside.answer = moved
    assert resolved(net.policy, net.outside.url()) == [PICTURE]


def test_proxies_look_names_up_themselves_so_there_are_none(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{net.inside.port}")
    assert resolved(net.policy, net.outside.url()) == [PICTURE]
    assert net.inside.requests == []


def test_certificates_are_the_names(net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(net.outside.speak_tls(tmp_path)))
    net.names = {"localhost": [["127.0.0.2"]], "other.example": [["127.0.0.2"]]}
    assert resolved(net.policy, net.outside.url(host="localhost")) == [PICTURE]
    assert "not trusted" in refused(net.policy, net.outside.url(host="other.example"))


def test_sizes_and_times(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = ImagePolicy(ServerSettings(allow_remote_images=True, max_body_bytes=3 * len(PICTURE)))
    urls = [net.outside.url(f"/{i}") for i in range(5)]
    assert resolved(policy, *urls[:3]) == [PICTURE] * 3
    assert "picture 4" in refused(policy, *urls)  # all pictures of a request together are limited
    monkeypatch.setattr(fetch, "MAX_SECONDS", 0.6)
    net.outside.answer = lambda request, connection: time.sleep(0.25) or connection.sendall(OK)  # type: ignore[func-returns-value]
    began = time.monotonic()
    assert "within the time" in refused(policy, *urls[:3])
    assert time.monotonic() - began < 3


def test_a_client_that_goes_does_not_wait_for_a_slow_server(net: Net) -> None:
    net.outside.answer = lambda request, connection: time.sleep(1.5)

    async def leave() -> float:
        began = time.monotonic()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(net.policy.resolve(Job([Message("user", "", (net.outside.url(),))])), 0.2)
        return time.monotonic() - began

    assert asyncio.run(leave()) < 1


PUBLIC = ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "2a00:1450:4001:80b::200e", "::ffff:8.8.8.8",
          "64:ff9b::8.8.8.8", "2002:808:808::1"]  # fmt: skip
NOT_PUBLIC = [
    "127.0.0.1", "127.255.0.9", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1",
    "169.254.1.1", "169.254.169.254", "100.64.0.1", "100.100.100.200", "168.63.129.16", "192.0.0.192", "192.0.2.1",
    "198.18.0.1", "198.51.100.1", "203.0.113.1", "192.88.99.1", "224.0.0.1", "239.255.255.250", "240.0.0.1",
    "255.255.255.255", "::", "::1", "fe80::1", "fc00::1", "fd00:ec2::254", "fd20:ce::254", "fec0::1", "ff02::1",
    "2001:db8::1", "3fff::1", "5f00::1", "100::1", "2001::1", "2001:0:7f00:1::1", "::127.0.0.1", "::8.8.8.8",
    "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:0:8.8.8.8", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::808:808", "2002:7f00:1::1", "2002:a9fe:a9fe::", "2002:c0a8:101::1", "2606:4700::5efe:a00:1", "4000::1",
]  # fmt: skip


@pytest.mark.parametrize("text", PUBLIC + NOT_PUBLIC)
def test_which_addresses_are_public(text: str) -> None:
    assert addresses.is_public(ipaddress.ip_address(text)) is (text in PUBLIC)


def test_neighbours_are_not_public(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = {"eth0": [("2a00:1450:4001:80b::5", "ffff:ffff:ffff:ffff::"), ("8.8.8.9", "255.255.255.0")],
             "tun0": [("02:fc", None), ("1.2.3.4", "128.0.0.0"), ("fe80::1%tun0", None)]}  # fmt: skip
    made = {name: [SimpleNamespace(address=a, netmask=m) for a, m in several] for name, several in cards.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: made)
    public = {text for text in PUBLIC if addresses.is_public(ipaddress.ip_address(text))}
    assert public == {"1.1.1.1", "2606:4700:4700::1111"}


# --- from this computer


@pytest.fixture
def root(tmp_path: Path) -> Path:
    directory = tmp_path / "media"
    (directory / "sub dir").mkdir(parents=True)
    (directory / "a.png").write_bytes(PICTURE)
    (directory / "sub dir" / "b#.png").write_bytes(b"b")
    (directory / "inside.png").symlink_to("a.png")
    (directory / "outside.png").symlink_to(tmp_path / "secret.png")
    (directory / "up").symlink_to(tmp_path)
    (directory / "zero").symlink_to("/dev/zero")
    (directory / "loop").symlink_to("loop")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "media2").mkdir()
    (tmp_path / "media2" / "a.png").write_bytes(b"secret")
    os.mkfifo(directory / "pipe")
    return directory


def test_files_below_the_media_root(root: Path) -> None:
    policy = ImagePolicy(ServerSettings(media_root=root))
    names = ["a.png", "./a.png", str(root / "a.png"), f"file://{root}/a.png", f"FILE://localhost{root}/a.png",
             "up/media/a.png", "file:a.png", "inside.png", "a.png#page=1"]  # fmt: skip
    assert resolved(policy, *names) == [PICTURE] * len(names)
    assert resolved(policy, "sub dir/b#.png", f"file://{root}/sub%20dir/b%23.png") == [b"b", b"b"]
    link = root.parent / "link"
    link.symlink_to(root)
    assert resolved(ImagePolicy(ServerSettings(media_root=link)), "a.png") == [PICTURE]


@pytest.mark.parametrize("name", [
    "../secret.png", "sub dir/../a.png", "sub dir/../../secret.png", "outside.png", "up/secret.png",
    "/etc/hostname", "/dev/zero", "zero", "pipe", ".", "", "sub dir", "file:///etc/hostname", "file:../secret.png",
    "..", "/", "//a/b",
    "file:%2e%2e/secret.png", "file:////etc/hostname", r"\\server\share\a.png", r"/\server\a.png",
    "{root}/../secret.png", "{root}2/a.png", "/proc/self/environ", "/dev/stdin",
])  # fmt: skip
def test_nothing_beside_the_media_root(root: Path, name: str, asked: list[tuple[str, str]]) -> None:
    message = refused(ImagePolicy(ServerSettings(media_root=root)), name.replace("{root}", str(root)))
    assert message.endswith(": not a file below the directory that --media-root names")
    assert not [arguments for event, arguments in asked if event == "open"]


def test_files_that_are_none(root: Path) -> None:
    policy = ImagePolicy(ServerSettings(media_root=root, max_body_bytes=100))
    expected = {
        "missing.png": "No such file",
        "a\0b": "no name of a file",
        "loop": "cannot be read",
        "\ud800": "cannot be read",
        "a.png/b": "Not a directory",
        "x" * 4000: "too long",
        "file:%ff": "not a valid",
        "file://[": "not a valid",
        "file://server/a.png": "of another computer",
        "file:a.png?x=1": "more than a path",
        "a.png#page=2": "the first page is shown",
    }
    for name, what in expected.items():
        assert what in refused(policy, name), name
    assert "larger than 100 bytes" in refused(policy, "a.png", error=RequestError)
    assert "accepted are data URLs (data:image/png;base64,...), files below" in refused(
        policy, "http://127.0.0.1/a.png"
    )
    with pytest.raises(UsageError, match="no directory"):
        ImagePolicy(ServerSettings(media_root=root / "a.png"))
