"""Pictures by path, bytes, file object, data URL, standard input and clipboard; what is none of them is named."""

from __future__ import annotations

import base64
import io
import os
import pty
import subprocess
import sys
import urllib.parse
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pytest
from picture_files import pdf, photo, saved
from PIL import Image, ImageGrab

from local_llava.errors import ImageError
from local_llava.images import load_image
from local_llava.pictures import clipboard, sources

PNG = saved(photo(), "PNG")
BASE64 = base64.b64encode(PNG).decode()
COLOURED = pdf([b"1 0 0 rg 0 0 200 100 re f", b"0 1 0 rg 0 0 200 100 re f"])
RED, GREEN = (255, 0, 0), (0, 255, 0)


def same(source: Any) -> bool:
    image = load_image(source)
    return image.mode == "RGB" and image.tobytes() == photo().tobytes()


class Drops(io.BytesIO):
    """Gives less than is asked for, as a pipe or a socket does."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(min(size or 0, 700))


def refused(source: Any, **options: bool) -> str:
    with pytest.raises(ImageError) as caught:
        load_image(source, **options)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_what_a_picture_can_be_given_as(tmp_path: Path) -> None:
    path = tmp_path / "no picture's name.txt"
    path.write_bytes(PNG)
    assert all(map(same, (path, str(path), PNG, bytearray(PNG), memoryview(PNG), io.BytesIO(PNG), photo())))
    assert same(np.asarray(photo()))
    with path.open("rb") as file:
        assert same(file) and not file.closed
    assert same(Drops(PNG))
    later = io.BytesIO(b"head" + PNG)
    later.seek(4)
    assert same(later)
    assert all(type(load_image(x)) is Image.Image for x in (path, photo()))
    kept = photo()
    load_image(kept).putpixel((0, 0), (1, 2, 3))
    assert kept.getpixel((0, 0)) != (1, 2, 3)


def test_data_urls() -> None:
    assert same(f"data:image/png;base64,{BASE64}")
    assert same(f"DATA:text/html;charset=x;BASE64,{BASE64}")  # the content decides
    assert same(f"data:;base64,{urllib.parse.quote(BASE64, safe='')}")
    assert same("data:image/png;base64,\n" + "\n".join(BASE64[i : i + 76] for i in range(0, len(BASE64), 76)))
    assert same(f"data:image/png;base64,{base64.urlsafe_b64encode(PNG).decode().rstrip('=')}")
    assert same(f"data:,{urllib.parse.quote_from_bytes(PNG)}")
    # Escapes lie across the borders of the pieces that are read.
    assert all(same(f"data:,{urllib.parse.quote_from_bytes(PNG)}{'a' * i}" + "%20" * 700_000) for i in range(3))
    assert "base64" in refused(f"data:image/png;base64,{BASE64}*")
    assert "base64" in refused("data:image/png;base64,A")
    assert "no comma" in refused("data:image/png;base64")
    assert "empty" in refused("data:,")
    assert "not a picture" in refused("data:,hello")


def test_names_of_nothing(tmp_path: Path) -> None:
    missing = tmp_path / "missing.png"
    assert refused(missing) == f"{missing}: cannot be read: No such file or directory"
    assert "a directory" in refused(tmp_path)
    assert "cannot be the name of a file" in refused("a\0b.png")
    assert "a?b.png" in refused("a\nb.png")
    assert "ftp URL" in refused("ftp://127.0.0.1/a.png")
    assert "file URL" in refused("file:///etc/hostname")
    assert "No such file" in refused("") or "directory" in refused("")
    assert "File name too long" in refused("x" * 5000)
    # Text has meanings that a path has not.
    for name in ("-", "clipboard:", "data:,x", "http://127.0.0.1/"):
        assert "No such file" in refused(Path(name)), name


@pytest.mark.parametrize("thing", [None, 5, 2.5, [1, 2], {"a": 1}, object(), photo])
def test_what_is_no_picture_is_named(thing: object) -> None:
    assert f"given as {type(thing).__name__}" in refused(thing)


def test_file_objects_that_give_no_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    assert "binary mode" in refused(io.StringIO("text"))
    with path.open(encoding="utf-8") as text:
        assert "cannot be read" in refused(text)
    with path.open("ab") as written:
        assert f"{path}: cannot be read" in refused(written)
    closed = io.BytesIO(PNG)
    closed.close()
    assert "closed" in refused(closed)


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huge = tmp_path / "huge.png"
    with huge.open("wb") as file:
        file.truncate(sources.MAX_BYTES + 1)
    assert "larger than 256 MiB" in refused(huge)
    monkeypatch.setattr(sources, "MAX_BYTES", 1 << 20)
    at_most = PNG + bytes((1 << 20) - len(PNG))
    assert same(at_most) and same(io.BytesIO(at_most))
    for source in (
        at_most + b"x",
        io.BytesIO(at_most + b"x"),
        "data:;base64," + "A" * 1400000,
        "data:," + "%00" * 1048577,
    ):
        assert "larger than 1 MiB" in refused(source)
    for endless in ("/dev/zero", Path("/dev/zero")):
        assert "larger than 1 MiB" in refused(endless)


def test_pages_of_a_pdf(tmp_path: Path) -> None:
    path = tmp_path / "a.pdf"
    path.write_bytes(COLOURED)
    first = load_image(path)
    assert first.size == (1536, 768) and first.getpixel((9, 9)) == RED
    assert load_image(f"{path}#page=2").getpixel((9, 9)) == GREEN
    assert load_image(Path(f"{path}#page=2")).getpixel((9, 9)) == GREEN
    assert load_image(COLOURED).getpixel((9, 9)) == RED
    for page in ("0", "3", "999999999"):
        assert f"has 2 page(s), counted from 1; there is no page {page}" in refused(f"{path}#page={page}")
    for name in (f"{path}#page=", f"{path}#page=-1", f"{path}#page=1234567890", f"{path}#2"):
        assert "No such file" in refused(name)
    # A file of that very name wins.
    Path(f"{path}#page=2").write_bytes(PNG)
    assert same(f"{path}#page=2")
    picture = tmp_path / "a.png"
    picture.write_bytes(PNG)
    assert "page of a PDF" in refused(f"{picture}#page=2")


def test_extras_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, extra, data in (
        ("pypdfium2", "pdf", COLOURED),
        ("pillow_heif", "heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        assert refused(data).endswith(f"needs an extra: pip install 'local-llava[{extra}]'")


def test_what_strangers_may_not_name(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    for source in (str(path), path, "-", "clipboard:", "missing.png", "file:///etc/passwd"):
        message = refused(source, local=False)
        assert "not accepted here" in message and "etc" not in message
    assert "not fetched" in refused("http://127.0.0.1:1/a.png", local=False, remote=False)
    for source in (f"data:image/png;base64,{BASE64}", PNG, io.BytesIO(PNG)):
        assert load_image(source, local=False, remote=False).size == photo().size


LOAD_STDIN = """
import sys
from local_llava.errors import ImageError
from local_llava.images import load_image
try:
    print(load_image("-").size)
except ImageError as e:
    print(e)
"""


def test_standard_input() -> None:
    def said(**options: Any) -> str:
        done = subprocess.run([sys.executable, "-c", LOAD_STDIN], capture_output=True, **options)
        assert done.stderr == b""
        return done.stdout.decode().strip()

    assert said(input=PNG) == str(photo().size)
    assert said(input=b"").startswith("standard input: an empty file")
    assert said(input=b"hello").startswith("standard input: not a picture")
    assert "pipe a picture in" in said(preexec_fn=lambda: os.close(0))
    terminal, other = pty.openpty()
    assert "pipe a picture in" in said(stdin=other)
    os.close(terminal)
    os.close(other)


@pytest.fixture
def desktop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of programs, which are all that there are; no desktop yet."""
    for name in ("WAYLAND_DISPLAY", "DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "a.png").write_bytes(PNG)
    return tmp_path


def program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="other desktops have their own clipboard")
def test_clipboard_of_linux(desktop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no desktop" in refused("clipboard:")
    monkeypatch.setenv("DISPLAY", ":0")
    assert refused("clipboard:").endswith("xclip is needed to read it: apt install xclip")
    program(desktop / "xclip", f'test "$*" = "-selection clipboard -target image/png -out" && /bin/cat {desktop}/a.png')
    assert same("clipboard:")
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    assert same("clipboard:")  # by way of X, which most Wayland desktops have
    program(desktop / "wl-paste", "echo No selection >&2; exit 1")
    assert "no picture on it" in refused("clipboard:")
    program(desktop / "wl-paste", f'test "$*" = "--no-newline --type image/png" && /bin/cat {desktop}/a.png')
    assert same("clipboard:")
    program(desktop / "wl-paste", "echo Failed to connect to a Wayland server >&2; exit 1")
    assert "cannot reach the desktop" in refused("clipboard:")
    program(desktop / "wl-paste", "echo no picture at all")
    assert refused("clipboard:").startswith("clipboard: not a picture")
    program(desktop / "wl-paste", "exec /bin/sleep 30")
    monkeypatch.setattr(clipboard, "MAX_SECONDS", 0.2)
    assert "no answer within" in refused("clipboard:")


def test_clipboard_by_pillow(desktop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    answers: list[Any] = [photo(), [str(PurePath(desktop, "a.png"))], None, [], ["a", "b"]]
    monkeypatch.setattr(ImageGrab, "grabclipboard", lambda: answers.pop(0))
    assert same("clipboard:") and same("clipboard:")
    assert "no picture on it" in refused("clipboard:")
    assert "0 files are on it" in refused("clipboard:") and "2 files" in refused("clipboard:")
