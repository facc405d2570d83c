"""What is kept of pictures on disk: never a wrong byte, never too much, never for other eyes, and never in the way."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from local_llava import image_cache
from local_llava.errors import OutputError
from local_llava.image_cache import ImageCache, directory, entry

POSIX = hasattr(os, "geteuid")
ROOT = POSIX and os.geteuid() == 0
KEY, OTHER = "0a" * 16, "1b" * 16
ABOUT = {"model": "llava-q4.gguf", "tokens": 581}
NOBODY = 65534


@pytest.fixture(autouse=True)
def whatever_is_free(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(directory, "KEEP_FREE", 0)
    caplog.set_level(logging.DEBUG, "local_llava")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "pictures"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = ROOT and _quietly("mount", "-t", "tmpfs", "-o", "size=2m,mode=0700", "tmpfs", disk)
    if not mounted:
        pytest.skip("only root can mount a disk, and not everywhere")
    yield disk
    _quietly("umount", disk)


def _quietly(*command: object) -> bool:
    try:
        return subprocess.run([str(c) for c in command], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def keep(place: Path, payload: bytes, key: str = KEY, kind: image_cache.Kind = "kv", **values: int) -> Path:
    cache = ImageCache(place, **values)
    cache.put(kind, key, payload, ABOUT)
    cache.close()
    return place / f"{key}.{kind}"


def names(place: Path) -> list[str]:
    """Of all files but the lock's."""
    return sorted(path.name for path in place.iterdir() if path.name != ".lock")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def python(script: str, *args: object, **values: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **values,  # type: ignore[call-overload]
    )


def test_nothing_is_made_before_something_is_kept(place: Path) -> None:
    with contextlib.closing(ImageCache(place)) as cache:
        assert cache.get("kv", KEY) is None and not cache.has("kv", KEY)
        cache.flush()
    assert not place.exists()
    assert image_cache.entries(place) == [] and image_cache.clear(place) == (0, 0)


def test_the_place_is_the_users_or_the_one_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_LLAVA_CACHE", str(place))
    assert image_cache.default_dir() == place == ImageCache().directory
    monkeypatch.delenv("LOCAL_LLAVA_CACHE")
    default = image_cache.default_dir()
    assert default.name == "pictures" and "local-llava" in default.parts and default.is_absolute()


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"x",
        bytearray(b"abc"),
        memoryview(b"abcdef")[::2],
        np.arange(12, dtype=np.float16).reshape(3, 4),
        np.arange(12, dtype=np.float32).reshape(3, 4).T,
        np.zeros((0, 3)),
        np.random.default_rng(0).integers(0, 256, 9_000_001, np.uint8),
    ],
    ids=["empty", "byte", "bytearray", "strided", "float16", "transposed", "no-rows", "blocks"],
)
def test_what_is_put_comes_back(place: Path, payload: bytes) -> None:
    expected = payload.tobytes() if isinstance(payload, (np.ndarray, memoryview)) else bytes(payload)
    cache = ImageCache(place)
    cache.put("embeddings", KEY, payload, ABOUT)
    cache.flush()
    assert cache.has("embeddings", KEY) and not cache.has("kv", KEY) and cache.get("kv", KEY) is None
    for reader in (cache, ImageCache(place)):
        found = reader.get("embeddings", KEY)
        assert found is not None and found == expected and found.readonly
    assert names(place) == [f"{KEY}.embeddings"]
    (kept,) = image_cache.entries(place)
    assert (kept.kind, kept.key, kept.about) == ("embeddings", KEY, ABOUT)
    assert kept.size == (place / f"{KEY}.embeddings").stat().st_size == len(expected) + 24 + 32 + len(json.dumps(ABOUT))
    assert abs(kept.last_used.timestamp() - time.time()) < 60
    cache.close()
    cache.put("kv", KEY, b"late", ABOUT)
    assert cache.get("embeddings", KEY) is None and not cache.has("embeddings", KEY) and len(names(place)) == 1


def test_what_waits_for_the_disk_is_there(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = [f"{i:032x}" for i in range(12)]
    cache = ImageCache(place)
    directory.make(place)
    with directory._locked(place):  # the first entry can't get its name
        for key in keys:
            cache.put("kv", key, key.encode(), {})
            cache.put("kv", key, b"again", {})
        waiting = [key for key in keys if cache.has("kv", key)]
        assert waiting == keys[: image_cache.MAX_WAITING]
        assert cache.get("kv", keys[0]) == keys[0].encode()
        assert ImageCache(place).get("kv", keys[0]) is None
    cache.flush()
    assert {e.key for e in image_cache.entries(place)} == set(waiting)
    assert warnings(caplog) == [] and "does not keep up" in caplog.text
    cache.put("kv", keys[-1], b"later", {})  # another thread, since the first one has ended
    cache.close()
    assert len(names(place)) == len(waiting) + 1


def test_bytes_that_wait_are_bounded(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_cache, "MAX_WAITING_BYTES", 1000)
    cache = ImageCache(place)
    directory.make(place)
    with directory._locked(place):
        cache.put("kv", KEY, bytes(5000), {})  # nothing waits before it
        cache.put("kv", OTHER, bytes(10), {})
    cache.close()
    assert names(place) == [f"{KEY}.kv"]


def test_keys_and_kinds_cannot_be_paths(place: Path) -> None:
    cache = ImageCache(place)
    for key in ("", "../../etc/passwd", "0" * 7, "0" * 129, "A" * 32, "0" * 32 + ".kv", "0" * 32 + "\n"):
        for call in (cache.get, cache.has, lambda kind, key: cache.put(kind, key, b"", {})):
            with pytest.raises(ValueError, match="hex digits"):
                call("kv", key)
    with pytest.raises(ValueError, match="hex digits"):
        cache.get("other", KEY)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="about"):
        cache.put("kv", KEY, b"", {"model": "x" * 70_000})


def test_the_least_recently_used_go_first(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = [f"{i:032x}" for i in range(6)]
    size = keep(place, bytes(1000), keys[0]).stat().st_size
    cache = ImageCache(place, max_bytes=3 * size)
    for key in keys[1:3]:
        cache.put("kv", key, bytes(1000), ABOUT)
        cache.flush()
    assert [e.key for e in image_cache.entries(place)] == [keys[2], keys[1], keys[0]]
    assert cache.get("kv", keys[0]) is not None  # used, so it stays
    assert cache.has("kv", keys[1])  # which is no use
    cache.put("kv", keys[3], bytes(1000), ABOUT)
    cache.flush()
    assert [e.key for e in image_cache.entries(place)] == [keys[3], keys[0], keys[2]]
    cache.put("kv", keys[2], bytes(1000), ABOUT)  # there already: used, and not written again
    cache.put("kv", keys[4], bytes(size + 1000), ABOUT)  # takes as much as two of them
    cache.flush()
    assert [e.key for e in image_cache.entries(place)] == [keys[4], keys[2]]
    assert sum(path.stat().st_size for path in place.glob("*.kv")) == 3 * size
    cache.get("kv", keys[4])
    cache.put("kv", keys[0], bytes(1001), ABOUT)  # one byte too much for anything beside it
    cache.flush()
    assert [e.key for e in image_cache.entries(place)] == [keys[0]]
    cache.put("kv", keys[5], bytes(4000), ABOUT)
    cache.close()
    assert names(place) == [f"{keys[0]}.kv"] and "more than the cache may have" in caplog.text


def test_entries_of_other_kinds_and_caps_count(place: Path) -> None:
    keep(place, bytes(5000), KEY, "embeddings")
    keep(place, bytes(5000), OTHER, max_bytes=6000)
    assert names(place) == [f"{OTHER}.kv"]
    keep(place, bytes(10), KEY, max_bytes=0)
    assert names(place) == [f"{OTHER}.kv"]


def test_a_flipped_bit_is_noticed_wherever_it_is(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = keep(place, bytes(range(40)))
    good, cache = path.read_bytes(), ImageCache(place)
    assert 120 < len(good) < 200
    for offset in range(len(good)):
        for mask in (0x01, 0x80, 0xFF):
            bad = bytearray(good)
            bad[offset] ^= mask
            path.write_bytes(bad)
            caplog.clear()
            assert cache.get("kv", KEY) is None, offset
            assert not path.exists() and len(warnings(caplog)) == 1
    path.write_bytes(good)
    assert cache.get("kv", KEY) == bytes(range(40))


def test_a_cut_or_longer_entry_is_noticed(place: Path) -> None:
    path = keep(place, bytes(range(40)))
    good, cache = path.read_bytes(), ImageCache(place)
    for bad in [good[:length] for length in range(len(good))] + [good + b"\0", good + good]:
        path.write_bytes(bad)
        assert not cache.has("kv", KEY) and cache.get("kv", KEY) is None and not path.exists()


def test_garbage_is_noticed(place: Path) -> None:
    path, cache = keep(place, b"abc"), ImageCache(place)
    good = path.read_bytes()
    huge = entry._FIXED.pack(entry._MAGIC, entry.VERSION, 2, 2**62) + b"{}"
    long = entry._FIXED.pack(entry._MAGIC, entry.VERSION, 2**32 - 1, 0)
    for bad in (b"", bytes(100), os.urandom(5000), huge, long, b"GGUF" + good[4:]):
        path.write_bytes(bad)
        assert [e.about for e in image_cache.entries(place)] == [{}]
        assert cache.get("kv", KEY) is None and not path.exists()


@pytest.mark.parametrize("about", [b"[]", b"{", b"\xff", b"[" * 50_000, b'{"a": ' + b"9" * 5000 + b"}", b'{"a": [1]}'])
def test_what_an_entry_tells_of_itself_may_be_anything(place: Path, about: bytes) -> None:
    directory.make(place)
    with (place / f"{KEY}.kv").open("wb", buffering=0) as file:
        entry.write(file, entry.Header("kv", KEY, about, 3), memoryview(b"abc"))
    assert [e.about for e in image_cache.entries(place)] == [{}]
    assert ImageCache(place).get("kv", KEY) == b"abc"


def test_another_version_is_not_read(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "VERSION", 2)
    path = keep(place, b"of tomorrow")
    monkeypatch.undo()
    monkeypatch.setattr(directory, "KEEP_FREE", 0)
    assert not ImageCache(place).has("kv", KEY)
    keep(place, b"of today")
    assert ImageCache(place).get("kv", KEY) == b"of today"
    monkeypatch.setattr(entry, "VERSION", 2)
    assert ImageCache(place).get("kv", KEY) is None and not path.exists()


def test_an_entry_belongs_to_its_key_and_kind(place: Path) -> None:
    path = keep(place, b"abc")
    for name in (f"{OTHER}.kv", f"{KEY}.embeddings"):
        (place / name).write_bytes(path.read_bytes())
    cache = ImageCache(place)
    assert cache.get("kv", OTHER) is None and cache.get("embeddings", KEY) is None
    assert cache.get("kv", KEY) == b"abc" and names(place) == [path.name]


@pytest.mark.skipif(not POSIX, reason="links need rights on Windows")
def test_what_is_no_regular_file_is_not_read(place: Path, tmp_path: Path) -> None:
    target = keep(tmp_path / "elsewhere", b"abc")
    path, cache = place / f"{KEY}.kv", ImageCache(place)
    for make in (
        lambda: path.symlink_to(target),
        lambda: path.symlink_to(path),
        lambda: os.mkfifo(path),
    ):
        directory.make(place)
        make()
        assert cache.get("kv", KEY) is None and not cache.has("kv", KEY)
        assert image_cache.entries(place) == [] and image_cache.clear(place) == (0, 0)
        cache.put("kv", KEY, b"mine", {})  # takes the name, not what it points to
        cache.flush()
        assert cache.get("kv", KEY) == b"mine" and path.is_file() and not path.is_symlink()
        path.unlink()
    path.mkdir()
    assert cache.get("kv", KEY) is None and image_cache.entries(place) == []
    assert target.read_bytes().startswith(entry._MAGIC) and b"abc" in target.read_bytes()


def test_other_files_stay(place: Path) -> None:
    path = keep(place, b"abc")
    others = ["notes.txt", "x.kv", f"{KEY}.kv.bak", f"{KEY.upper()}ff.kv", ".hidden"]
    for name in others:
        (place / name).write_bytes(b"x" * 100)
    (place / "0000000000.embeddings").mkdir()
    (place / ".writing-abcd").write_bytes(b"x" * 7)
    assert [e.key for e in image_cache.entries(place)] == [KEY] and image_cache.leftovers(place) == 7
    keep(place, b"abcd", OTHER, max_bytes=250)  # room for both, and not for the others
    size = path.stat().st_size + (place / f"{OTHER}.kv").stat().st_size
    assert image_cache.clear(place) == (2, size + 7)
    assert set(names(place)) == {*others, "0000000000.embeddings"}


def test_a_removed_directory_comes_back(place: Path) -> None:
    cache = ImageCache(place)
    for _ in range(2):
        cache.put("kv", KEY, b"abc", {})
        cache.flush()
        assert cache.get("kv", KEY) == b"abc"
        for path in place.iterdir():
            path.unlink()
        place.rmdir()
        assert cache.get("kv", KEY) is None


def test_processes_share_a_directory(place: Path) -> None:
    script = Path(__file__).with_name("cache_stress.py")
    child = subprocess.run(
        [sys.executable, script, place, "200000", "2.5"], capture_output=True, text=True, timeout=120, check=True
    )
    hits, wrong, cleared = json.loads(child.stdout)
    assert child.stderr == "" and wrong == 0 and hits > 100 and cleared > 0  # no warning of damage either
    assert image_cache.leftovers(place) == 0
    assert 0 < sum(e.size for e in image_cache.entries(place)) <= 200_000


def test_threads_share_a_cache(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache, errors = ImageCache(place, max_bytes=50_000), []

    def use(seed: int) -> None:
        for i in range(150):
            key = hashlib.sha256(b"%d" % ((i * seed) % 12)).hexdigest()
            cache.put("kv", key, key.encode() * 100, {})
            found = cache.get("kv", key)
            if found is not None and found != key.encode() * 100:
                errors.append(key)
            cache.has("kv", key)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in (1, 5, 7, 11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache.close()
    assert errors == [] and warnings(caplog) == [] and 0 < len(image_cache.entries(place)) <= 12
    assert not [t for t in threading.enumerate() if "image cache" in t.name]


WRITE = """
import sys
from pathlib import Path
import numpy as np
from local_llava.image_cache import ImageCache, directory
directory.KEEP_FREE = 0
ImageCache(Path(sys.argv[1])).put("kv", sys.argv[2], np.zeros(int(sys.argv[3]), np.uint8), {})
"""


def test_what_waits_is_written_at_exit(place: Path) -> None:
    assert python(WRITE, place, KEY, 50_000_000).communicate(timeout=60) == ("", "")
    assert ImageCache(place).get("kv", KEY) == bytes(50_000_000)


@pytest.mark.skipif(not POSIX, reason="signals")
def test_a_process_is_killed_while_it_writes(place: Path) -> None:
    child = python(WRITE, place, KEY, 400_000_000)
    while not list(place.glob(".writing-*")):
        assert child.poll() is None
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    (left,) = place.glob(".writing-*")
    assert names(place) == [left.name]
    keep(place, b"abc")
    assert names(place) == sorted([left.name, f"{KEY}.kv"])  # it might be somebody's still
    os.utime(left, (time.time() - 7200,) * 2)
    keep(place, b"abcd", OTHER)
    assert names(place) == [f"{KEY}.kv", f"{OTHER}.kv"]


@pytest.mark.skipif(not POSIX, reason="signals")
def test_a_process_is_killed_while_it_holds_the_lock(place: Path) -> None:
    holds = "import sys, time; from pathlib import Path; from local_llava.image_cache import directory as d\n"
    holds += "d.make(Path(sys.argv[1]))\nwith d._locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    child = python(holds, place)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    started = time.monotonic()
    cache = ImageCache(place)
    cache.put("kv", KEY, b"abc", {})
    time.sleep(0.3)
    assert names(place) != [f"{KEY}.kv"]
    child.send_signal(signal.SIGKILL)
    child.communicate()
    cache.close()
    assert names(place) == [f"{KEY}.kv"] and time.monotonic() - started < 5


def test_a_lock_that_is_never_free_is_not_waited_for(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(directory, "_LOCK_TIMEOUT_S", 0.2)
    cache = ImageCache(place)
    directory.make(place)
    with directory._locked(place):
        cache.put("kv", KEY, b"abc", {})
        cache.flush()
    assert names(place) == [] and warnings(caplog) == []
    cache.put("kv", KEY, b"abc", {})
    cache.close()
    assert names(place) == [f"{KEY}.kv"]


def test_a_write_that_is_cleared_away_is_no_error(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = ImageCache(place)
    directory.make(place)
    with directory._locked(place):
        cache.put("kv", KEY, b"abc", {})
        deadline = time.monotonic() + 10
        while image_cache.leftovers(place) < 50 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert image_cache.clear(place)[0] == 0
    cache.flush()
    assert names(place) == [] and warnings(caplog) == []
    cache.put("kv", KEY, b"abc", {})
    cache.close()
    assert names(place) == [f"{KEY}.kv"]


def test_a_full_disk_ends_the_writing(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = ImageCache(small_disk)
    cache.put("kv", KEY, bytes(500_000), {})
    cache.flush()
    (small_disk / "other").write_bytes(bytes(1_000_000))
    cache.put("kv", OTHER, bytes(1_000_000), {})  # shutil.disk_usage says so
    cache.flush()
    assert warnings(caplog) == [] and "too full" in caplog.text
    directory.KEEP_FREE = -(10**9)  # the fixture puts it back; as if others filled the disk after the look
    for key in (OTHER, "2c" * 16):
        cache.put("kv", key, bytes(1_000_000), {})
        cache.flush()
    assert len(warnings(caplog)) == 1 and "No space left" in warnings(caplog)[0]
    assert names(small_disk) == [f"{KEY}.kv", "other"]
    assert cache.get("kv", KEY) == bytes(500_000)
    cache.close()


@pytest.mark.skipif(not POSIX, reason="limits")
def test_an_error_in_the_middle_ends_the_writing(place: Path) -> None:
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))\n" + WRITE
    limited += "import numpy as n; c = ImageCache(Path(sys.argv[1]))\n"
    limited += "for key in 'ab': c.put('kv', key * 32, n.zeros(5_000_000, n.uint8), {}); c.flush()\n"
    limited += "c.put('kv', 'c' * 32, b'', {}); c.close()"
    stdout, stderr = python(limited, place, KEY, 10).communicate(timeout=60)
    assert stdout == "" and stderr.count("\n") == 1 and "nothing more is kept" in stderr and "large" in stderr
    assert names(place) == [f"{KEY}.kv"]


def test_there_is_room_left_on_the_disk(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert directory.KEEP_FREE == 10**9
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**9 + 1000}))
    keep(place, bytes(1000))
    assert names(place) == []
    keep(place, bytes(800))
    assert names(place) == [f"{KEY}.kv"]


def test_a_disk_that_cannot_be_read_ends_the_cache(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keep(place, b"abc")
    cache = ImageCache(place)

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(entry, "_open", fail)
    assert cache.get("kv", KEY) is None and cache.get("kv", KEY) is None
    monkeypatch.undo()
    cache.put("kv", OTHER, b"abc", {})
    cache.close()
    assert len(warnings(caplog)) == 1 and "it is off" in warnings(caplog)[0]
    assert names(place) == [f"{KEY}.kv"]


@contextlib.contextmanager
def read_only(path: Path) -> Iterator[None]:
    if ROOT:
        if not _quietly("mount", "--bind", path, path) or not _quietly("mount", "-o", "remount,ro,bind", path):
            pytest.skip("root writes in every directory that is not mounted as read-only")
    else:
        path.chmod(0o500)
    try:
        yield
    finally:
        _quietly("umount", path) if ROOT else path.chmod(0o700)


@pytest.mark.skipif(not POSIX, reason="rights")
def test_a_read_only_directory_is_read(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = keep(place, b"abc")
    keep(place, b"abc", OTHER)
    damaged = place / f"{OTHER}.kv"
    damaged.write_bytes(b"damaged")
    cache = ImageCache(place)
    with read_only(place):
        for _ in range(2):
            assert cache.get("kv", KEY) == b"abc"
            cache.put("kv", "2c" * 16, b"more", {})
            cache.flush()
        assert len(warnings(caplog)) == 1 and "nothing more is kept" in warnings(caplog)[0]
        assert cache.get("kv", OTHER) is None and damaged.exists()
        with pytest.raises(OutputError, match="cannot remove"):
            image_cache.clear(place)
    assert cache.get("kv", KEY) == b"abc" and path.exists()


@pytest.mark.parametrize("below", ["", "a/b"])
def test_a_file_in_the_directorys_place(tmp_path: Path, below: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_bytes(b"")
    place = tmp_path / "file" / below
    for first in ("get", "put"):
        caplog.clear()
        cache = ImageCache(place)
        assert first == "put" or cache.get("kv", KEY) is None
        for key in (KEY, OTHER):
            cache.put("kv", key, b"abc", {})
            cache.flush()
        assert cache.get("kv", KEY) is None
        cache.close()
        assert len(warnings(caplog)) in (1, 2)  # a failed write leaves the reading
    with pytest.raises(OutputError, match="cannot read"):
        image_cache.entries(place)


@pytest.mark.skipif(not POSIX, reason="Windows has no such rights")
def test_only_the_user_sees_it(place: Path) -> None:
    old = os.umask(0)
    try:
        path = keep(place, b"abc")
    finally:
        os.umask(old)
    modes = {p.name: p.stat().st_mode & 0o777 for p in (place, *place.iterdir())}
    assert modes.pop("pictures") == 0o700 and set(modes.values()) == {0o600} and path.name in modes


@pytest.mark.skipif(not POSIX, reason="Windows has no such rights")
def test_a_directory_that_was_there_becomes_private_or_is_not_used(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place.mkdir(mode=0o755)
    place.chmod(0o755)
    keep(place, b"abc")
    assert place.stat().st_mode & 0o777 == 0o700
    place.chmod(0o755)
    assert ImageCache(place).get("kv", KEY) == b"abc"
    for mode, other, reason in ((0o777, None, "written by"), (0o770, None, "written by"), (0o755, "x", "other files")):
        if other:
            (place / other).touch()
        place.chmod(mode)
        caplog.clear()
        for first in ("get", "put"):
            cache = ImageCache(place)
            caplog.clear()
            assert first == "put" or cache.get("kv", KEY) is None
            cache.put("kv", OTHER, b"abc", {})
            cache.flush()
            assert cache.get("kv", KEY) is None and not cache.has("kv", KEY)
            assert len(warnings(caplog)) == 1 and reason in warnings(caplog)[0]
        assert place.stat().st_mode & 0o777 == mode
        assert not (place / f"{OTHER}.kv").exists()


@pytest.mark.skipif(not POSIX, reason="Windows has no such rights")
def test_reader_and_writer_say_once_that_it_is_off(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = ImageCache(place)
    directory.make(place)
    with directory._locked(place):
        cache.put("kv", KEY, b"abc", {})
        deadline = time.monotonic() + 10
        while image_cache.leftovers(place) < 50 and time.monotonic() < deadline:
            time.sleep(0.01)
        cache.put("kv", OTHER, b"abc", {})
        place.chmod(0o777)
        assert cache.get("kv", "2c" * 16) is None
    cache.close()
    assert len(warnings(caplog)) == 1 and names(place) == [f"{KEY}.kv"]


@pytest.mark.skipif(not POSIX, reason="Windows has no such rights")
def test_a_directory_of_another_user_is_not_used(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    if ROOT:
        keep(place, b"abc")
        os.chown(place, NOBODY, NOBODY)
    else:
        place = Path("/usr")  # root's
    cache = ImageCache(place)
    assert cache.get("kv", KEY) is None
    cache.put("kv", OTHER, b"abc", {})
    cache.close()
    assert len(warnings(caplog)) == 1 and "belongs to another user" in warnings(caplog)[0]
    assert not (place / f"{OTHER}.kv").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_reading_holds_the_payload_once(place: Path) -> None:
    keep(place, bytes(200_000_000))
    reads = """
import re, sys
from pathlib import Path
from local_llava.image_cache import ImageCache
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
cache, before = ImageCache(Path(sys.argv[1])), peak()
assert len(cache.get("kv", sys.argv[2])) == 200_000_000
print(peak() - before)
"""
    stdout, stderr = python(reads, place, KEY).communicate(timeout=60)
    assert stderr == "" and 200_000_000 <= int(stdout) + 10_000_000 < 230_000_000


def command(place: Path, *args: str, code: int = 0, **values: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "local_llava.cli", *args],
        text=True,
        timeout=60,
        env={**os.environ, "LOCAL_LLAVA_CACHE": str(place), "COLUMNS": "200"},
        **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **values},  # type: ignore[call-overload]
    )
    assert done.returncode == code, f"{done.returncode}: {done.stderr}"
    assert "Traceback" not in (done.stderr or "")
    return done


def test_the_command_lists_and_clears(place: Path) -> None:
    assert command(place, "cache", "ls").stdout == f"0 entries, 0 B of at most 4.0 GB by default in {place}\n"
    shown = command(place, "cache", "dir")
    assert shown.stdout == f"{place}\n" and "reveals the pictures" in shown.stderr and not place.exists()
    keep(place, bytes(2_000_000))
    cache = ImageCache(place)
    cache.put("embeddings", OTHER, bytes(3000), {"model": "x\x1b[31m\n.gguf"})
    cache.close()
    (place / ("2c" * 16 + ".kv")).write_bytes(b"damaged")
    (place / ".writing-1234").write_bytes(bytes(5000))
    (place / "notes.txt").touch()
    lines = command(place, "cache", "ls").stdout.splitlines()
    assert lines[0].split() == ["KEY", "KIND", "SIZE", "TOKENS", "MODEL", "LAST", "USED"]
    assert lines[1].split() == ["2c" * 6, "kv", "7", "B", "-", "-", "just", "now"]
    assert lines[2].split() == ["1b" * 6, "embeddings", "3.1", "kB", "-", "x?[31m?.gguf", "just", "now"]
    assert lines[3].split() == ["0a" * 6, "kv", "2.0", "MB", "581", "llava-q4.gguf", "just", "now"]
    assert lines[4] == f"3 entries, 2.0 MB of at most 4.0 GB by default, and 5.0 kB unfinished in {place}"
    values = json.loads(command(place, "cache", "ls", "--json").stdout)
    assert values["directory"] == str(place) and values["default_max_bytes"] == 4_000_000_000
    assert values["bytes"] == sum(e["bytes"] for e in values["entries"]) and values["unfinished_bytes"] == 5000
    assert values["entries"][2]["about"] == ABOUT and values["entries"][2]["key"] == KEY
    assert "needs --yes" in command(place, "cache", "clear", code=2).stderr and len(names(place)) == 5
    assert command(place, "cache", "clear", "--yes").stdout == "2.0 MB freed\n"
    assert names(place) == ["notes.txt"]


@pytest.mark.skipif(not POSIX, reason="terminals")
@pytest.mark.parametrize(("answer", "code"), [("n", 1), ("y", 0)])
def test_the_command_asks_at_a_terminal(place: Path, answer: str, code: int) -> None:
    path = keep(place, b"abc")
    ours, theirs = os.openpty()
    os.write(ours, f"{answer}\n".encode())
    done = command(place, "cache", "clear", code=code, stdin=theirs)
    os.close(ours)
    os.close(theirs)
    assert "Remove 1 entry, " in done.stderr and path.exists() == (answer == "n")


def test_bad_input_gets_one_line(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_bytes(b"")
    for args, code, words in (
        (("cache", "ls"), 1, "cannot read"),
        (("cache", "clear", KEY), 2, "unexpected extra argument"),
    ):
        assert words in command(place, "--quiet", *args, code=code).stderr
    if POSIX:
        place.unlink()
        place.mkdir()
        place.chmod(0o777)
        assert "Not in use" in command(place, "cache", "ls").stderr
