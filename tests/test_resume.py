"""A file that is written in several goes has the bytes of one that is not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from gguf import GGUFValueType as V
from numpy.typing import NDArray

from local_llava.convert import chunks, resume
from local_llava.convert.plan import Field, GGUFPlan, TensorPlan
from local_llava.convert.resume import safe_tensors, write_resumable
from local_llava.convert.write import output_size, write
from local_llava.errors import OutputError

N_TENSORS = 7


class Cut(BaseException):
    pass


def plan(loaded: list[str] | None = None, name: str = "llama", tensors: int = N_TENSORS) -> GGUFPlan:
    def tensor(number: int) -> TensorPlan:
        rows = np.random.default_rng(number).standard_normal((5 + number, 64)).astype(np.float32)

        def load(start: int, stop: int) -> NDArray[np.float32]:
            if loaded is not None:
                loaded.append(f"t{number}")
            return rows[start:stop]

        return TensorPlan(f"t{number}", rows.shape, (T.Q8_0, T.F16, T.F32)[number % 3], load, f"source {number}")

    return GGUFPlan((Field("general.architecture", name, V.STRING),), tuple(tensor(i) for i in range(tensors)))


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "SYNC_BYTES", 0)
    monkeypatch.setattr(chunks, "_BLOCK_VALUES", 128)


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    write(plan(), tmp_path / "whole.gguf")
    return (tmp_path / "whole.gguf").read_bytes()


def cut_after(path: Path, size: int) -> None:
    """A first go that ends when so many bytes are written."""
    left = size

    def progress(count: int) -> None:
        nonlocal left
        left -= count
        if left <= 0:
            raise Cut

    with pytest.raises(Cut):
        write_resumable(plan(), path, threads=2, progress=progress)
    assert not path.exists()


def test_each_cut_leads_to_the_same_bytes(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    safe: list[int] = []
    for size in range(1, len(whole), 300):
        cut_after(path, size)
        safe.append(safe_tensors(plan(), path))
        loaded: list[str] = []
        written: list[int] = []
        told: list[int] = []
        write_resumable(plan(loaded), path, threads=2, progress=written.append, on_safe=told.append)
        assert path.read_bytes() == whole
        assert sum(written) == len(whole)
        assert told == list(range(safe[-1], N_TENSORS + 1))
        # What was safe is not read again.
        assert {*loaded} == {f"t{i}" for i in range(safe[-1], N_TENSORS)}
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith("out")] == ["out.gguf"]
        path.unlink()
    assert {*safe} >= {0, 1, N_TENSORS - 1} and safe == sorted(safe)


def test_many_cuts_of_one_file(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    for size in range(500, len(whole), 500):
        cut_after(path, size)
    write_resumable(plan(), path)
    assert path.read_bytes() == whole


def damage(path: Path) -> Iterator[str]:
    """Ways in which the left-overs of a go can be wrong, each of which is seen."""
    partial, journal = path.with_name("out.gguf.partial"), path.with_name("out.gguf.journal")
    content, lines = partial.read_bytes(), journal.read_bytes()
    for what, changed, changed_lines in (
        ("no journal", content, None),
        ("no file", None, lines),
        ("torn line", content, lines + b"6"),
        ("no number", content, lines + b"six\n"),
        ("too many", content, lines + b"99\n"),
        ("huge", content, lines + b"9" * 5000 + b"\n"),
        ("shorter than the journal says", content[:700], lines),
        ("another header", b"GGUF" + bytes(len(content) - 4), lines),
        ("longer", content + b"x" * 5000, lines),
    ):
        partial.unlink(missing_ok=True)
        journal.unlink(missing_ok=True)
        if changed is not None:
            partial.write_bytes(changed)
        if changed_lines is not None:
            journal.write_bytes(changed_lines)
        yield what


def test_what_is_left_is_not_trusted(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    cut_after(path, len(whole) * 2 // 3)
    assert safe_tensors(plan(), path) > 2
    for what in damage(path):
        write_resumable(plan(), path)
        assert path.read_bytes() == whole, what
        path.unlink()


def test_another_plan_begins_anew(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    cut_after(path, len(whole) // 2)
    other = plan(name="qwen2")
    write_resumable(other, path)
    write(other, tmp_path / "other.gguf")
    assert path.read_bytes() == (tmp_path / "other.gguf").read_bytes() != whole


def test_a_complete_file_is_not_written_again(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    path.write_bytes(whole)
    loaded: list[str] = []
    told: list[int] = []
    write_resumable(plan(loaded), path, on_safe=told.append)
    assert loaded == [] and told == [N_TENSORS] and safe_tensors(plan(), path) == N_TENSORS
    path.write_bytes(b"something else")
    write_resumable(plan(), path)
    assert path.read_bytes() == whole


def test_a_plan_without_tensors(tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    write_resumable(plan(tensors=0), path)
    assert path.stat().st_size == output_size(plan(tensors=0))


def test_the_threads_are_let_go_before_they_are_waited_for(tmp_path: Path) -> None:
    """A loader that waits would otherwise keep an interrupt waiting."""
    import threading

    released = threading.Event()

    def load(start: int, stop: int) -> NDArray[np.float32]:
        if start:
            assert released.wait(20)
        return np.zeros((stop - start, 64), np.float32)

    stuck = GGUFPlan((), (TensorPlan("a", (100, 64), T.F32, load, "s"),))

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resume._append(stuck, tmp_path / "x", 0, 2, interrupt, lambda _: None, released.set)
    assert released.is_set()


def test_errors_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "out.gguf.partial").mkdir()
    with pytest.raises(OutputError, match=r"out\.gguf: Is a directory"):
        write_resumable(plan(), tmp_path / "out.gguf")
