"""The container's bytes, and what is on the disk after success, failure and interruption."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGUFReader
from gguf import GGMLQuantizationType as T
from gguf import GGUFValueType as V
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from local_llava.convert import chunks
from local_llava.convert import write as module
from local_llava.convert.plan import Field, GGUFPlan, TensorPlan
from local_llava.convert.quantize import encode_rows
from local_llava.convert.write import Pending, check_writable, output_size, write
from local_llava.errors import CheckpointError, OutputError
from local_llava.gguf_file import GGUFFile

ARCHITECTURE = Field("general.architecture", "llama", V.STRING)


def values(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tensor(name: str, value: NDArray[np.float32], type: T = T.F32) -> TensorPlan:
    rows = value.reshape(-1, value.shape[-1])
    return TensorPlan(name, value.shape, type, lambda start, stop: rows[start:stop], f"source of {name}")


def failing(error: BaseException, name: str = "bad") -> TensorPlan:
    def load(start: int, stop: int) -> NDArray[np.float32]:
        raise error

    return TensorPlan(name, (4, 32), T.F32, load, "source")


def small_plan(*extra: TensorPlan) -> GGUFPlan:
    return GGUFPlan((ARCHITECTURE,), (tensor("a", values((3, 32)), T.Q8_0), *extra, tensor("b", values((5,)))))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_BLOCK_VALUES", 1000)
    monkeypatch.setattr(chunks, "_AHEAD_BYTES", 0)


# ---- bytes ----

types = st.sampled_from([T.F32, T.F16, T.BF16, T.Q8_0, T.Q6_K, T.Q4_K, T.Q5_0])
outer = st.lists(st.integers(1, 5), max_size=3).map(tuple)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    specs=st.lists(st.tuples(types, outer, st.integers(1, 3)), max_size=6),
    strings=st.lists(texts, max_size=3),
    odd=st.integers(0, 31),
)
def test_layout(specs: list[tuple[T, tuple[int, ...], int]], strings: list[str], odd: int, tmp_path: Path) -> None:
    tensors = []
    for i, (type, dims, factor) in enumerate(specs):
        block = GGML_QUANT_SIZES[type][0]
        tensors.append(tensor(f"t{i}", values((*dims, factor * (block if block > 1 else 7)), i), type))
    # The name's length moves the end of the header through all remainders of the alignment.
    plan = GGUFPlan((ARCHITECTURE, Field("x" * (odd + 1), strings, V.ARRAY, V.STRING)), tuple(tensors))
    path = tmp_path / "out.gguf"
    written: list[int] = []
    write(plan, path, threads=2, progress=written.append, overwrite=True)

    size = path.stat().st_size
    assert size == output_size(plan) == sum(written)
    assert size % 32 == 0
    data = path.read_bytes()
    reader = GGUFReader(path)
    assert reader.fields["x" * (odd + 1)].contents() == strings
    start = reader.data_offset
    assert start % 32 == 0
    assert [found.name for found in reader.tensors] == [planned.name for planned in tensors]
    for found, planned in zip(reader.tensors, tensors, strict=True):
        assert found.data_offset == start
        assert found.tensor_type is planned.type
        assert tuple(found.shape.tolist())[::-1] == planned.shape
        expected = encode_rows(planned.type, planned.load(0, prod(planned.shape[:-1]))).tobytes()
        assert data[start : start + len(expected)] == expected
        start += len(expected)
        padding = -start % 32
        assert data[start : start + padding] == bytes(padding)
        start += padding
    assert start == size


def test_metadata_of_every_kind(tmp_path: Path) -> None:
    kept: list[tuple[str, Any, V, V | None]] = [
        ("u8", 255, V.UINT8, None),
        ("i8", -128, V.INT8, None),
        ("u16", 65535, V.UINT16, None),
        ("i16", -32768, V.INT16, None),
        ("u32", 2**32 - 1, V.UINT32, None),
        ("i32", -(2**31), V.INT32, None),
        ("u64", 2**64 - 1, V.UINT64, None),
        ("i64", -(2**63), V.INT64, None),
        ("f32", 0.5, V.FLOAT32, None),
        ("f64", 0.1, V.FLOAT64, None),
        ("yes", True, V.BOOL, None),
        ("empty", "", V.STRING, None),
        ("text", "Straße 🦙 \0 {{ x }}", V.STRING, None),
        ("numbers", [1, -2, 3], V.ARRAY, V.INT32),
        ("floats", [0.5, 0.25, 1.0], V.ARRAY, V.FLOAT32),
        ("strings", ["<|eot_id|>", "", "é"], V.ARRAY, V.STRING),
    ]
    path = tmp_path / "out.gguf"
    write(GGUFPlan((ARCHITECTURE, *(Field(*entry) for entry in kept)), ()), path)
    reader = GGUFReader(path)
    for key, value, type, item_type in kept:
        assert reader.fields[key].contents() == value
        assert reader.fields[key].types == [type] + ([item_type] if item_type is not None else [])


def test_strings_that_are_not_utf8_are_written_as_they_were_read(tmp_path: Path) -> None:
    tokens = [b"\xff", "é".encode()[:1], b"\xed\xa0\x80", b"plain"]
    write(GGUFPlan((Field("tokens", tokens, V.ARRAY, V.STRING),), ()), tmp_path / "bytes.gguf")
    read = GGUFFile.open(tmp_path / "bytes.gguf").metadata["tokens"]
    write(GGUFPlan((Field("tokens", read, V.ARRAY, V.STRING),), ()), tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "bytes.gguf").read_bytes()


def test_an_array_without_item_type_is_a_defect(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="k: an array needs an item_type"):
        write(GGUFPlan((Field("k", [1], V.ARRAY),), ()), tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == []


def test_rows_that_blocks_do_not_divide_are_a_defect() -> None:
    with pytest.raises(ValueError, match="a: rows of 40 are no multiple of a Q8_0 block"):
        output_size(GGUFPlan((), (tensor("a", values((2, 40)), T.Q8_0),)))


@pytest.mark.usefixtures("small_blocks")
def test_the_bytes_do_not_depend_on_the_threads(tmp_path: Path) -> None:
    """Loading takes a random time, so that blocks finish out of order."""

    def slow(planned: TensorPlan, seed: int) -> TensorPlan:
        def load(start: int, stop: int) -> NDArray[np.float32]:
            time.sleep(((start * 7919 + seed) % 11) / 5000)
            return planned.load(start, stop)

        return TensorPlan(planned.name, planned.shape, planned.type, load, planned.source)

    parts = [(T.Q4_K, (37, 256)), (T.F16, (61, 50)), (T.Q6_K, (23, 512)), (T.F32, (7,)), (T.Q8_0, (90, 32))]
    plan = GGUFPlan((ARCHITECTURE,), tuple(slow(tensor(f"t{i}", values(s, i), t), i) for i, (t, s) in enumerate(parts)))
    outputs = set()
    for threads in (1, 2, 7):
        path = tmp_path / f"{threads}.gguf"
        write(plan, path, threads=threads)
        outputs.add(path.read_bytes())
    assert len(outputs) == 1


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("threads", [1, 3])
def test_few_blocks_are_held_at_a_time(threads: int, tmp_path: Path) -> None:
    lock = threading.Lock()
    written, loaded, most = 0, 0, 0

    def load(start: int, stop: int) -> NDArray[np.float32]:
        nonlocal loaded, most
        with lock:
            loaded += (stop - start) * 100 * 4
            most = max(most, loaded - written)
        return np.zeros((stop - start, 100), np.float32)

    def progress(size: int) -> None:
        nonlocal written
        written += size
        time.sleep(0.002)  # a disk that is slower than the threads

    write(
        GGUFPlan((), (TensorPlan("a", (400, 100), T.F32, load, "s"),)),
        tmp_path / "o",
        threads=threads,
        progress=progress,
    )
    assert 4000 <= most <= (2 * threads + 1) * 4000


# ---- before the first byte ----


def test_what_can_be_written_passes(tmp_path: Path) -> None:
    check_writable([(tmp_path / "a.gguf", 1000), (tmp_path / "b.gguf", 1000)])
    (tmp_path / "a.gguf").write_bytes(b"old")
    check_writable([(tmp_path / "a.gguf", 1000)], overwrite=True)


def refusal(outputs: list[tuple[Path, int]], overwrite: bool = False) -> str:
    with pytest.raises(OutputError) as raised:
        check_writable(outputs, overwrite)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"old")
    free = tmp_path / "free"
    assert refusal([(free, 1), (file, 1)]) == f"{file} already exists; --force replaces it"
    assert (
        refusal([(tmp_path / "no" / "x", 1)])
        == f"cannot write {tmp_path / 'no' / 'x'}: {tmp_path / 'no'} is not a directory"
    )
    assert refusal([(file / "x", 1)]) == f"cannot write {file / 'x'}: {file} is not a directory"
    directory = tmp_path / "directory"
    directory.mkdir()
    assert refusal([(directory, 1)], overwrite=True) == f"cannot write {directory}: it is a directory"
    assert refusal([(tmp_path / ("n" * 300), 1)]).endswith(": File name too long")


def test_a_dangling_link_is_not_overwritten(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    assert "already exists" in refusal([(link, 1)])


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_a_directory_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        assert "no permission to write" in refusal([(tmp_path / "x", 1)])
    finally:
        tmp_path.chmod(0o700)


def test_too_little_room_is_refused_for_the_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        total: int
        used: int
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**10, 0, 5_000_000_000))
    check_writable([(tmp_path / "a", 4_900_000_000), (tmp_path / "b", 100_000_000)])
    assert refusal([(tmp_path / "a", 4_900_000_000), (tmp_path / "b", 650_000_000)]) == (
        f"not enough room on the disk of {tmp_path}: 5.5 GB needed, 5.0 GB free"
    )


def test_the_real_disk_is_asked(tmp_path: Path) -> None:
    assert "not enough room" in refusal([(tmp_path / "a", 10**18)])


# ---- complete or not at all ----


def test_the_name_appears_when_the_file_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    seen: list[bool] = []
    write(small_plan(), path, progress=lambda _: seen.append(path.exists()))
    assert seen and not any(seen)
    assert [file.name for file in tmp_path.iterdir()] == ["out.gguf"]


@pytest.mark.skipif(sys.platform == "win32", reason="no modes")
def test_the_mode_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(small_plan(), tmp_path / "out.gguf")
    finally:
        os.umask(before)
    assert (tmp_path / "out.gguf").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("error", [CheckpointError("no"), MemoryError(), KeyboardInterrupt()])
@pytest.mark.parametrize("exists", [True, False])
def test_a_failing_loader_leaves_everything_as_it_was(error: BaseException, exists: bool, tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    if exists:
        path.write_bytes(b"old")
    with pytest.raises(type(error)):
        write(small_plan(failing(error)), path, overwrite=True)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == ({"out.gguf": b"old"} if exists else {})


def test_a_bad_value_is_reported_and_leaves_nothing(tmp_path: Path) -> None:
    bad = values((4, 32))
    bad[2, 1] = np.nan
    with pytest.raises(CheckpointError, match=re.escape("source of nan (nan), row 2, column 1: nan")):
        write(small_plan(tensor("nan", bad, T.Q8_0)), tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_kept_without_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    path.write_bytes(b"old")
    with pytest.raises(OutputError, match="--force"):
        write(small_plan(), path)
    write(small_plan(), path, overwrite=True)
    assert path.stat().st_size == output_size(small_plan())
    assert len(list(tmp_path.iterdir())) == 1


def no_links(*_: object, **__: object) -> None:
    raise PermissionError(1, "Operation not permitted")  # what FAT says


@pytest.fixture(params=["links", "no links"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without hard links."""
    if request.param == "no links":
        monkeypatch.setattr(os, "link", no_links)


@pytest.mark.usefixtures("file_system")
def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"

    def appear(size: int) -> None:
        path.write_bytes(b"theirs")

    with pytest.raises(OutputError, match="already exists; --force"):
        write(small_plan(), path, progress=appear)
    assert [file.name for file in tmp_path.iterdir()] == ["out.gguf"]
    assert path.read_bytes() == b"theirs"


@pytest.mark.usefixtures("file_system")
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_pair_appears_together(overwrite: bool, tmp_path: Path) -> None:
    first, second = tmp_path / "llm.gguf", tmp_path / "mmproj.gguf"
    if overwrite:
        first.write_bytes(b"old")
    with Pending(overwrite=overwrite) as pending:
        pending.write(small_plan(), first)
        pending.write(small_plan(), second)
        assert first.exists() == overwrite and not second.exists()
    assert first.read_bytes() == second.read_bytes() != b"old"
    assert len(list(tmp_path.iterdir())) == 2


def test_the_first_is_not_published_when_the_second_fails(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError), Pending() as pending:
        pending.write(small_plan(), tmp_path / "llm.gguf")
        pending.write(small_plan(failing(CheckpointError("no"))), tmp_path / "mmproj.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("file_system")
@pytest.mark.parametrize("exists", [True, False])
def test_the_first_is_withdrawn_when_the_second_cannot_be_published(exists: bool, tmp_path: Path) -> None:
    first, second = tmp_path / "llm.gguf", tmp_path / "mmproj.gguf"
    if exists:
        first.write_bytes(b"old")
    with (
        pytest.raises(OutputError, match=f"^cannot write {re.escape(str(second))}: "),
        Pending(overwrite=True) as pending,
    ):
        pending.write(small_plan(), first)
        pending.write(small_plan(), second)
        second.mkdir()
        (second / "x").touch()
    second.joinpath("x").unlink()
    second.rmdir()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == ({"llm.gguf": b"old"} if exists else {})


# ---- the system says no ----

SCRIPT = """
import signal, sys, time
from pathlib import Path
import numpy as np
from gguf import GGMLQuantizationType as T
from local_llava.convert.plan import GGUFPlan, TensorPlan
from local_llava.convert.write import write

# What a shell starts in the background ignores the signal, and its children do.
signal.signal(signal.SIGINT, signal.default_int_handler)

def load(start, stop):
    time.sleep({delay})
    return np.ones((stop - start, 1024), np.float32)

plan = GGUFPlan((), (TensorPlan("a", (512 * {blocks}, 1024), T.F32, load, "source"),))
{before}
try:
    write(plan, Path(sys.argv[1]), threads=2, progress=lambda _: print("progress", flush=True))
except Exception as error:
    print(f"{{type(error).__name__}}: {{error}}")
"""


def start(path: Path, blocks: int, delay: float = 0.0, before: str = "") -> subprocess.Popen[str]:
    code = SCRIPT.format(blocks=blocks, delay=delay, before=before)
    return subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.skipif(sys.platform == "win32", reason="no limits")
def test_a_file_that_grows_too_large_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, 5_000_000))"
    out, err = start(path, blocks=16, before=limit).communicate(timeout=60)
    lines = [line for line in out.splitlines() if line != "progress"]
    assert lines == [f"OutputError: cannot write {path}: File too large"], err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's own ENOSPC: the temporary file is a link to /dev/full."""

    class Full(module._File):
        @classmethod
        def beside(cls, path: Path) -> module._File:
            file = super().beside(path)
            opened: Callable[..., Any] = Path.open
            file.partial.symlink_to("/dev/full")
            monkeypatch.setattr(Path, "open", lambda self, mode: opened(self, mode.replace("x", "w")))
            return file

    monkeypatch.setattr(module, "_File", Full)
    path = tmp_path / "out.gguf"
    with pytest.raises(OutputError) as raised:
        write(small_plan(), path)
    assert str(raised.value) == f"cannot write {path}: No space left on device"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to a child")
def test_an_interrupt_stops_soon_and_leaves_nothing(tmp_path: Path) -> None:
    process = start(tmp_path / "out.gguf", blocks=10_000, delay=0.2)
    assert process.stdout is not None
    for _ in range(2):
        assert process.stdout.readline() == "progress\n"
    assert len(list(tmp_path.iterdir())) == 1
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)  # the whole file would take 1000 s
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert list(tmp_path.iterdir()) == []
