"""Where the parts outside of a checkpoint are looked for, and where they are not."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from official_checkpoints import into_cache

from local_llava.convert.companions import LLM, TOWER, find, find_known, refuse
from local_llava.errors import CheckpointError


@pytest.fixture
def near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint, far from any cache of the Hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    return checkpoint(tmp_path / "models" / "llava")


def checkpoint(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    return directory


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("openai/clip-tiny", "models/clip-tiny"),
        ("openai/clip-tiny", "models/openai/clip-tiny"),
        ("openai/clip-tiny", "models/llava/clip-tiny"),
        ("clip-tiny", "models/clip-tiny"),
        ("./clip-tiny", "models/llava/clip-tiny"),
        ("../clip-tiny", "clip-tiny"),
        ("/data/models/clip-tiny/", "models/clip-tiny"),
        (r"C:\models\clip-tiny", "models/clip-tiny"),
    ],
)
def test_names_that_checkpoints_give(name: str, place: str, near: Path, tmp_path: Path) -> None:
    assert find_known(name, near) is None
    found = checkpoint(tmp_path / place)
    for directory in (near, tmp_path / "models" / ".." / "models" / "llava"):
        result = find_known(name, directory)
        assert result is not None and result.resolve() == found


def test_an_absolute_path(near: Path, tmp_path: Path) -> None:
    assert find_known(str(tmp_path / "x" / "clip"), near) is None
    assert find_known(str(checkpoint(tmp_path / "x" / "clip")), near) == tmp_path / "x" / "clip"


def test_directories_come_before_the_cache(near: Path, tmp_path: Path) -> None:
    snapshot = into_cache(checkpoint(tmp_path / "new"), tmp_path / "hf", "openai/clip-tiny")
    assert find_known("openai/clip-tiny", near) == snapshot
    assert find(TOWER, "openai/clip-tiny", "other", near, "") == snapshot
    beside = checkpoint(near.parent / "clip-tiny")
    assert find_known("openai/clip-tiny", near) == beside
    # The user's word is taken as it is.
    assert find(TOWER, "openai/clip-tiny", "other", near, "") == snapshot
    assert find(TOWER, str(beside), "other", near, "") == beside


def test_the_users_directory_is_found_from_where_the_user_is(
    near: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tmp_path / "here" / "clip")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    assert find(TOWER, "clip", None, near, "").resolve() == tmp_path / "here" / "clip"
    assert find(TOWER, "~/clip", None, near, "") == tmp_path / "here" / "clip"


NOWHERE = [
    "",
    ".",
    "..",
    "/",
    "llava",
    "../llava",
    "a/../llava",
    "\0",
    "a\nb",
    "x" * 5000,
    "x" * 300,
    "~nobody/x",
    "loop",
]
NOWHERE += ["//host/share/x", r"\\host\share\x", "../hf", "openai/..", "a--b/c", "a/b/c", "models--openai--clip"]


@pytest.mark.parametrize("name", NOWHERE)
def test_names_that_lead_nowhere(name: str, near: Path) -> None:
    (near / "loop").symlink_to(near / "loop")
    assert find_known(name, near) is None
    with pytest.raises(CheckpointError) as caught:
        find(TOWER, None, name, near, "config.json: mm_vision_tower")
    message = str(caught.value)
    assert message.startswith("config.json: mm_vision_tower: the vision tower ") and "--vision-tower" in message
    assert message.isprintable() and len(message) < 800


def test_what_errors_say(near: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        find(LLM, "~nobody1/x", "y", near, "")
    cache = tmp_path / "hf" / "hub"
    assert str(caught.value) == f"--llm '~nobody1/x': neither a directory nor a repository in the Hub's cache ({cache})"
    with pytest.raises(CheckpointError) as caught:
        find(LLM, None, None, near, "")
    assert str(caught.value) == (
        f"{near}: the language model is not in this checkpoint, and it does not say which one belongs to it; name it "
        "with --llm DIR|NAME"
    )
    refuse(TOWER, None)
    with pytest.raises(CheckpointError, match=r"^--vision-tower 'x': the checkpoint has its own vision tower"):
        refuse(TOWER, "x")


def test_a_damaged_cache(near: Path, tmp_path: Path) -> None:
    snapshot = into_cache(checkpoint(tmp_path / "new"), tmp_path / "hf", "a/b")
    assert find_known("a/b", near) == snapshot
    reference = snapshot.parent.parent / "refs" / "main"
    commit = reference.read_bytes()
    for damaged in (b"", b"0", b"\xff\xfe", b"a" * 5000):
        reference.write_bytes(damaged)
        assert find_known("a/b", near) is None
    reference.write_bytes(commit)
    (snapshot / "config.json").unlink()
    assert find_known("a/b", near) is None


def test_nothing_asks_the_network(near: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*args: Any) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    assert find_known("openai/clip-vit-large-patch14-336", near) is None
    with pytest.raises(CheckpointError):
        find(LLM, "lmsys/vicuna-7b-v1.5", None, near, "")


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE"])
def test_the_cache_is_where_the_environment_says(variable: str, tmp_path: Path) -> None:
    snapshot = into_cache(checkpoint(tmp_path / "new"), tmp_path / "home", "a/b")
    code = (
        "import os, sys; from pathlib import Path; from local_llava.convert.companions import find_known;"
        "print(find_known('a/b', Path(sys.argv[1])))"
    )
    value = tmp_path / "home" / ("hub" if variable == "HF_HUB_CACHE" else "")
    environment = {"PATH": "", "HOME": str(tmp_path), variable: str(value)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == str(snapshot)
