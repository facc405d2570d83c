"""The place where models are kept: complete pairs only, one maker at a time, and nothing lost or left behind."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from local_llava import store
from local_llava.errors import CheckpointError, ModelFileError, OutputError
from local_llava.store import Leftover
from local_llava.store import digest as digests
from local_llava.store.origin import Origin, Pair
from local_llava.types import ModelFiles

KEY, OTHER = "0" * 24, "1" * 24


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOCAL_LLAVA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def origin(name: str = "llava-1.5-7b", quant: str = "Q4_K_M", **values: str) -> Origin:
    kind = "downloaded" if "repository" in values else "converted"
    return Origin(kind=kind, name=name, quant=quant, mmproj_quant="F16", source=f"/models/{name}", **values)


def write_files(directory: Path) -> ModelFiles:
    files = ModelFiles(directory / "x-Q4_K_M.gguf", directory / "x-mmproj-F16.gguf")
    files.model.write_bytes(b"m" * 100)
    files.mmproj.write_bytes(b"p" * 11)
    return files


def keep(key: str = KEY, what: Origin | None = None) -> Pair:
    with store.new_pair(key, "x") as new:
        assert new.pair is None
        return new.publish(what or origin(), write_files(new.directory))


def test_the_place_is_the_users_or_the_one_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.models_dir() == home
    monkeypatch.delenv("LOCAL_LLAVA_HOME")
    assert store.models_dir().name == "local-llava" and store.models_dir().is_absolute()


def test_a_pair_is_kept_with_its_origin(home: Path) -> None:
    assert store.pairs() == [] == store.leftovers()
    what = origin(repository="a/b", revision="0" * 40, digest="d" * 64, model_sha256="e" * 64)
    pair = keep(KEY, what)
    assert store.pairs() == [pair] and store.get(KEY) == pair and store.get(OTHER) is None
    assert pair.origin == what and pair.size == 111 and pair.directory == home / "pairs" / KEY
    assert pair.files.model.read_bytes() == b"m" * 100
    assert abs(pair.created.timestamp() - time.time()) < 10
    assert sorted(path.name for path in pair.directory.iterdir()) == [
        "origin.json",
        "x-Q4_K_M.gguf",
        "x-mmproj-F16.gguf",
    ]
    assert store.leftovers() == []


def test_what_is_there_is_not_made_again() -> None:
    pair = keep()
    with store.new_pair(KEY, "x") as new:
        assert new.pair == pair
    assert store.get(KEY) == pair


def test_a_failure_leaves_nothing(home: Path) -> None:
    with pytest.raises(CheckpointError), store.new_pair(KEY, "x") as new:
        write_files(new.directory)
        raise CheckpointError("no")
    assert store.pairs() == [] == store.leftovers()
    assert not (home / "pairs" / KEY).exists()


def test_a_resumable_failure_leaves_what_was_there() -> None:
    for n in range(2):
        with pytest.raises(KeyboardInterrupt), store.new_pair(KEY, "llava", resumable=True) as new:
            assert len(list(new.directory.glob("part*"))) == n
            (new.directory / f"part{n}").write_bytes(b"1234")
            raise KeyboardInterrupt
        assert store.pairs() == []
        (left,) = store.leftovers()
        assert (left.name, left.state, left.resumable) == ("llava", "unfinished", True)
        assert left.size >= 4 * (n + 1)
    keep(OTHER)  # which cleans up only what cannot be resumed
    assert len(store.leftovers()) == 1
    with store.new_pair(KEY, "llava", resumable=True) as new:
        new.publish(origin(), write_files(new.directory))
        assert not list(new.directory.glob("part*"))
    assert len(store.pairs()) == 2 and store.leftovers() == []


def test_a_resumable_failure_without_content_leaves_nothing() -> None:
    with store.new_pair(KEY, "llava", resumable=True):
        pass
    assert store.leftovers() == []


def test_what_is_resumed_must_be_resumable() -> None:
    with store.new_pair(KEY, "x", resumable=True) as new:
        (new.directory / "part").touch()
    with store.new_pair(KEY, "x") as new:
        assert not (new.directory / "part").exists()


def test_publishing_files_that_are_not_there(home: Path) -> None:
    with pytest.raises(OutputError, match="cannot be kept"), store.new_pair(KEY, "x") as new:
        files = write_files(new.directory)
        files.mmproj.unlink()
        new.publish(origin(), files)
    assert store.pairs() == [] and not (home / "pairs" / KEY).exists()


MAKE = """
import os, signal, sys, time
from pathlib import Path
from local_llava import store
from local_llava.store.origin import Origin
from local_llava.types import ModelFiles
key, seconds, end = sys.argv[1], float(sys.argv[2]), sys.argv[3]
with store.new_pair(key, "raced", resumable=end == "kill-resumable") as new:
    if new.pair is not None:
        print("found", flush=True)
        sys.exit()
    files = ModelFiles(new.directory / "a.gguf", new.directory / "b.gguf")
    files.model.write_bytes(b"1")
    print("making", flush=True)
    time.sleep(seconds)
    if end.startswith("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    files.mmproj.write_bytes(b"2")
    new.publish(Origin("converted", "raced", "Q4_K_M", "F16", "/x"), files)
print("made", flush=True)
"""


def make(seconds: float, end: str = "", key: str = KEY) -> subprocess.Popen[str]:
    args = [sys.executable, "-c", MAKE, key, str(seconds), end]
    return subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def making() -> Iterator[subprocess.Popen[str]]:
    """A process in the midst of it."""
    process = make(60)
    assert process.stdout is not None and process.stdout.readline() == "making\n"
    yield process
    process.kill()
    process.communicate()


def test_processes_make_a_pair_once() -> None:
    processes = [make(0.5) for _ in range(4)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert sorted(out for out, _ in outputs) == ["found\n"] * 3 + ["making\nmade\n"]
    assert sum("Waiting for another process, which is making raced" in err for _, err in outputs) >= 1
    assert [pair.key for pair in store.pairs()] == [KEY] and store.leftovers() == []


def test_who_waits_is_told_and_goes_on_when_the_other_dies(making: subprocess.Popen[str]) -> None:
    def on_wait() -> None:
        waits.append(1)
        threading.Timer(0.2, making.kill).start()

    waits: list[int] = []
    (left,) = store.leftovers()
    assert (left.state, left.name) == ("being made now", "raced")
    with store.new_pair(KEY, "x", on_wait=on_wait) as new:
        assert new.pair is None and not list(new.directory.glob("*.gguf"))
    assert waits == [1]


@pytest.mark.parametrize("key", [KEY, OTHER])
@pytest.mark.parametrize("end", ["kill", "kill-resumable"])
def test_what_a_killed_process_leaves(key: str, end: str) -> None:
    process = make(0, end)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert store.pairs() == [] and store.get(KEY) is None
    (left,) = store.leftovers()
    assert (left.name, left.state, left.resumable) == ("raced", "unfinished", end == "kill-resumable")
    keep(key)  # the same one, or any other
    assert [item.key for item in store.leftovers()] == [KEY] * (end == "kill-resumable" and key == OTHER)


def test_a_pair_that_is_being_made_stays(making: subprocess.Popen[str]) -> None:
    (left,) = store.leftovers()
    with pytest.raises(OutputError, match="another process is at it now"):
        store.remove(left)
    keep(OTHER)
    assert [item.key for item in store.leftovers()] == [KEY]
    assert making.poll() is None


def test_removing(home: Path) -> None:
    pair, other = keep(), keep(OTHER)
    assert store.remove(pair) > pair.size
    assert store.pairs() == [other] and not pair.directory.exists()
    (other.directory / "notes.txt").write_text("mine")
    store.remove(other)
    assert store.pairs() == [] == store.leftovers()
    assert [path.name for path in other.directory.iterdir()] == ["notes.txt"]


def test_a_running_pair_may_be_removed() -> None:
    pair = keep()
    with pair.files.model.open("rb") as file:
        if sys.platform == "win32":
            pytest.skip("Windows keeps files that are open")
        store.remove(pair)
        assert file.read() == b"m" * 100


def test_finding_by_name_repository_and_key() -> None:
    downloaded = keep("a" * 24, origin("llava-1.5-7b", repository="llava-hf/llava-1.5-7b-hf"))
    other = keep("b" * 24, origin("llava-1.5-7b", "Q8_0", repository="liuhaotian/llava-v1.5-7b"))
    own = keep("c" * 24, origin("llava-1.5-7b"))  # a checkpoint in a directory of that name
    mine = keep("d" * 24, origin("my-llava"))
    unlisted = keep("e" * 24, origin("you/yours", repository="you/yours"))

    def keys(*args: str | None) -> set[str]:
        return {pair.key[0] for pair in store.find(*args)}  # type: ignore[arg-type]

    assert keys("llava-1.5-7b") == keys("LLaVA-v1.5-7B") == {downloaded.key[0], other.key[0]}
    assert keys("llava-1.5-7b", "Q8_0") == {other.key[0]} and keys("llava-1.5-7b", "Q2_K") == set()
    assert keys("llava-1.5-7b", None, "Q8_0") == set()
    assert keys("Llava-hf/llava-1.5-7b-hf") == {downloaded.key[0]}
    assert keys("my-llava") == {mine.key[0]} and keys("you/yours") == {unlisted.key[0]}
    assert keys(own.key) == keys("cccccc") == {own.key[0]} and keys("ccccc") == set()
    assert keys("yours") == keys("other/yours") == set()


DAMAGE = {
    "no JSON": b"{",
    "no text": b"\xff\xfe",
    "nested": b"[" * 9000,
    "a list": b"[]",
    "empty": b"",
    "large": b" " * 70000,
    "another format": {"format": 2},
    "no name": {"name": None},
    "a number": {"quant": 4},
    "a long text": {"source": "x" * 5000},
    "an unknown kind": {"kind": "stolen"},
    "a path": {"model": {"file": "../../secret.gguf", "bytes": 6}},
    "an absolute path": {"model": {"file": "/etc/passwd", "bytes": 6}},
    "no bytes": {"mmproj": {"file": "x-mmproj-F16.gguf"}},
    "other bytes": {"mmproj": {"file": "x-mmproj-F16.gguf", "bytes": 12}},
    "a file that is not there": {"model": {"file": "y.gguf", "bytes": 100}},
    "no date": {"created": "yesterday"},
    "a directory": None,
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_pair_is_passed_over_and_can_be_replaced(case: str, caplog: pytest.LogCaptureFixture) -> None:
    pair, good = keep(), keep(OTHER)
    (store.models_dir() / "secret.gguf").write_bytes(b"secret")
    path, damage = pair.directory / "origin.json", DAMAGE[case]
    if damage is None:
        pair.files.model.unlink()
        pair.files.model.mkdir()
    else:
        path.write_bytes(
            damage if isinstance(damage, bytes) else json.dumps({**json.loads(path.read_text()), **damage}).encode()
        )
    with caplog.at_level(logging.INFO, "local_llava"):
        assert store.pairs() == [good] and store.get(KEY) is None
    assert KEY in caplog.text and "Traceback" not in caplog.text
    (left,) = store.leftovers()
    assert left.key == KEY and left.state.startswith("damaged: ")
    assert keep().key == KEY
    assert len(store.pairs()) == 2 and store.leftovers() == []


def test_a_damaged_pair_can_be_removed() -> None:
    pair = keep()
    (pair.directory / "origin.json").write_text("{")
    (left,) = store.leftovers()
    assert store.remove(left) == 112
    assert store.leftovers() == [] and not pair.directory.exists()


def test_what_is_not_ours_stays_and_is_no_obstacle(home: Path) -> None:
    pair = keep()
    (home / "pairs" / "README").write_text("mine")
    (home / "pairs" / "photos").mkdir()
    (home / "pairs" / "photos" / "a.jpg").write_text("mine")
    (home / "pairs" / OTHER).symlink_to(home / "nowhere")
    (home / "pairs" / "strange name").mkdir()
    assert store.pairs() == [pair] and store.leftovers() == []
    keep("2" * 24)
    assert (home / "pairs" / "photos" / "a.jpg").exists() and (home / "pairs" / "README").exists()
    with pytest.raises(OutputError, match="is in the way"), store.new_pair("photos", "x"):
        pass
    assert (home / "pairs" / "photos" / "a.jpg").exists()


def test_conversions_of_the_first_version_are_left_over(home: Path) -> None:
    old = home / "converted" / ("a" * 24)
    old.mkdir(parents=True)
    write_files(old)
    assert store.pairs() == []
    (left,) = store.leftovers()
    assert (left.name, left.size) == ("x-Q4_K_M", 111) and "0.1.0" in left.state
    assert store.remove(left) == 111 and not old.exists()


@pytest.fixture
def nobodys_home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Tests that run as root go on as a user whom permissions bind; pytest's own directories are closed to that one."""
    with tempfile.TemporaryDirectory() as directory:
        monkeypatch.setenv("LOCAL_LLAVA_HOME", directory)
        is_root = os.geteuid() == 0
        if is_root:
            os.chown(directory, 65534, -1)
            os.seteuid(65534)
        try:
            yield Path(directory)
        finally:
            if is_root:
                os.seteuid(0)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_a_read_only_place(nobodys_home: Path) -> None:
    home, pair = nobodys_home, keep()
    for path in (home / "locks", home / "pairs", pair.directory, home):
        path.chmod(0o555)
    assert store.pairs() == [pair] == store.find(KEY) and store.leftovers() == []
    with pytest.raises(OutputError, match=r"cannot write .*Permission denied; LOCAL_LLAVA_HOME"):
        keep(OTHER)
    with pytest.raises(OutputError, match=r"cannot be removed: Permission denied"):
        store.remove(pair)
    assert store.pairs() == [pair]
    (home / "pairs").chmod(0o000)
    with pytest.raises(ModelFileError, match="cannot be read: Permission denied; LOCAL_LLAVA_HOME"):
        store.pairs()
    for path in (home, home / "locks", home / "pairs", pair.directory):
        path.chmod(0o755)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk(home: Path) -> None:
    with pytest.raises(OutputError, match="No space left"), store.new_pair(KEY, "x") as new:
        (new.directory / ".origin.json.partial").symlink_to("/dev/full")
        new.publish(origin(), write_files(new.directory))
    assert store.pairs() == [] == store.leftovers()


@pytest.mark.parametrize("where", ["home", "home/pairs", "home/locks"])
def test_a_file_in_the_place_of_a_directory(tmp_path: Path, where: str) -> None:
    (tmp_path / where).parent.mkdir(exist_ok=True)
    (tmp_path / where).write_text("")
    assert store.pairs() == []
    with pytest.raises(OutputError, match=r"cannot write .*LOCAL_LLAVA_HOME"):
        keep()


@pytest.mark.parametrize("key", ["", "..", "a/b", ".hidden", "x" * 101, "a\0b"])
def test_keys_are_names(key: str) -> None:
    with pytest.raises(ValueError, match="is no key"):
        store.get(key)


# The digest of a checkpoint.


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small files, and weights that count as large."""
    monkeypatch.setattr(digests, "_WHOLE_BYTES", 1 << 16)
    monkeypatch.setattr(digests, "_HEADER_BYTES", 1 << 10)
    directory = tmp_path / "checkpoint"
    (directory / "llm").mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(os.urandom(3 << 20))
    (directory / "llm" / "model.bin").write_bytes(b"small")
    return directory


def test_the_digest_is_of_the_content_alone(checkpoint: Path, tmp_path: Path) -> None:
    before = store.source_digest(checkpoint)
    assert len(before) == 64 and store.source_digest(checkpoint) == before
    copied = Path(shutil.copytree(checkpoint, tmp_path / "elsewhere"))
    os.utime(copied / "model.safetensors", (1, 1))
    (copied / "notes.pdf").write_text("not read by a conversion")
    (copied / ".git").mkdir()
    (copied / ".git" / "x.json").write_text("{}")
    assert store.source_digest(copied) == before
    assert store.source_digest(checkpoint, copied) != before


@pytest.mark.parametrize("place", [0, 1000, 3 << 19, (3 << 20) - 1])
def test_the_digest_sees_changes_of_weights(checkpoint: Path, place: int) -> None:
    before = store.source_digest(checkpoint)
    path = checkpoint / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    assert store.source_digest(checkpoint) != before


def test_the_digest_sees_other_changes(checkpoint: Path) -> None:
    seen = {store.source_digest(checkpoint)}
    (checkpoint / "config.json").write_text("{ }")
    seen.add(store.source_digest(checkpoint))
    (checkpoint / "llm" / "model.bin").write_bytes(b"smalm")
    seen.add(store.source_digest(checkpoint))
    (checkpoint / "chat_template.jinja").write_text("")
    seen.add(store.source_digest(checkpoint))
    (checkpoint / "config.json").rename(checkpoint / "configs.json")
    seen.add(store.source_digest(checkpoint))
    with (checkpoint / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    seen.add(store.source_digest(checkpoint))
    assert len(seen) == 6


def test_the_digest_of_a_cached_weight_file_is_its_blobs_name(checkpoint: Path, tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / ("a" * 64)
    blob.parent.mkdir()
    (checkpoint / "model.safetensors").rename(blob)
    (checkpoint / "model.safetensors").symlink_to(blob)
    before = store.source_digest(checkpoint)
    blob.write_bytes(os.urandom(3 << 20))  # which the Hub's cache never does
    assert store.source_digest(checkpoint) == before
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors").symlink_to(blob.rename(blob.with_name("b" * 64)))
    assert store.source_digest(checkpoint) != before


def test_a_digest_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: cannot be read"):
        store.source_digest(tmp_path / "nowhere")


def test_leftovers_and_pairs_are_what_takes_room(home: Path) -> None:
    keep()
    with store.new_pair(OTHER, "y", resumable=True) as new:
        (new.directory / "part").write_bytes(b"12345")
    items: list[Pair | Leftover] = [*store.pairs(), *store.leftovers()]
    assert sum(map(store.remove, items)) > 116
    assert list((home / "pairs").iterdir()) == []


# The digest of a model file.


@pytest.mark.parametrize("whole", [True, False])
def test_the_digest_of_a_file_sees_content_size_and_time(
    whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not whole:
        monkeypatch.setattr(digests, "_WHOLE_BYTES", 1 << 16)
        monkeypatch.setattr(digests, "_HEADER_BYTES", 1 << 10)
    path = tmp_path / "model.gguf"
    path.write_bytes(os.urandom(3 << 20))
    os.utime(path, ns=(0, 10**18))
    before = digests.file_digest(path)
    assert len(before) == 64 and digests.file_digest(path) == before
    moved = path.rename(tmp_path / "other.gguf")
    assert digests.file_digest(moved) == before, "its name is no part of it"
    (tmp_path / "link.gguf").symlink_to(moved)
    assert digests.file_digest(tmp_path / "link.gguf") == before
    seen = {before}
    data = moved.read_bytes()
    for place in (0, 3 << 19, (3 << 20) - 1):
        moved.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        os.utime(moved, ns=(0, 10**18))
        seen.add(digests.file_digest(moved))
    moved.write_bytes(data + b"\0")
    os.utime(moved, ns=(0, 10**18))
    seen.add(digests.file_digest(moved))
    # Between the blocks that are read of a large file, the time tells.
    moved.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    os.utime(moved, ns=(0, 10**18 + 100))
    seen.add(digests.file_digest(moved))
    assert len(seen) == 6


def test_the_digest_of_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"model\.gguf: cannot be read: No such file"):
        digests.file_digest(tmp_path / "model.gguf")
