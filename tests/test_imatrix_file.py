"""Files with importance matrices: both of llama.cpp's formats, and what is wrong with them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from gguf_bytes import Tensor, gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from local_llava import imatrix
from local_llava.convert.imatrix import read_imatrix
from local_llava.errors import LocalLlavaError, ModelFileError, OutputError

Q, DOWN = "blk.0.attn_q.weight", "blk.0.ffn_down.weight"
METADATA: list[tuple[str, str, Any]] = [
    ("general.type", "str", "imatrix"),
    ("imatrix.datasets", "arr[str]", ["a.txt", "b.txt"]),
    ("imatrix.chunk_count", "u32", 3),
    ("imatrix.chunk_size", "u32", 512),
]


def f32(name: str, values: Sequence[float], n_matrices: int = 1) -> Tensor:
    """A tensor of a GGUF, in the shape that llama-imatrix gives it."""
    ne = (len(values) // n_matrices, n_matrices) if n_matrices > 1 else (len(values),)
    return Tensor(name, ne, struct.pack(f"<{len(values)}f", *values))


def entry(name: str, sums: Sequence[float], counts: Sequence[float] = (4,)) -> list[Tensor]:
    return [f32(f"{name}.in_sum2", sums, len(counts)), f32(f"{name}.counts", counts, len(counts))]


def gguf_of(*entries: list[Tensor], metadata: list[tuple[str, str, Any]] = METADATA) -> bytes:
    return gguf(metadata, [tensor for entry in entries for tensor in entry])


def legacy(*entries: tuple[str, int, Sequence[float]], end: bytes = b"", n: int | None = None) -> bytes:
    data = struct.pack("<i", len(entries) if n is None else n)
    for name, n_calls, values in entries:
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", n_calls, len(values))
        data += struct.pack(f"<{len(values)}f", *values)
    return data + end


def chunks(n: int, dataset: str) -> bytes:
    return struct.pack("<ii", n, len(dataset)) + dataset.encode()


def test_gguf(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_of(entry(Q, [1, 2, 0, 5]), entry(DOWN, [3, 1], [3]), entry("never", [0, 7], [0])))
    matrix = read_imatrix(path)
    assert (matrix.path, matrix.datasets, matrix.n_chunks) == (path, ("a.txt", "b.txt"), 3)
    assert {name: values.tolist() for name, values in matrix.importance.items()} == {
        DOWN: [1, np.float32(1) / np.float32(3)],
        Q: [0.25, 0.5, 0, 1.25],
        "never": [1, 1],
    }
    assert all(v.dtype == np.float32 and v.flags.c_contiguous for v in matrix.importance.values())


def test_experts_are_one_after_the_other(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(gguf_of(entry("blk.0.ffn_up_exps.weight", [2, 4, 6, 8, 9, 9], [2, 4, 0])))
    assert read_imatrix(tmp_path / "a").importance["blk.0.ffn_up_exps.weight"].tolist() == [1, 2, 1.5, 2, 1, 1]


def test_counts_are_rounded_as_llama_cpp_does(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(gguf_of(entry(Q, [6, 6], [2.5]), entry(DOWN, [6], [0.4])))
    assert {k: v.tolist() for k, v in read_imatrix(tmp_path / "a").importance.items()} == {Q: [2, 2], DOWN: [1]}


@pytest.mark.parametrize(
    ("end", "datasets", "n_chunks"),
    [(b"", (), 0), (chunks(7, "wiki.txt"), ("wiki.txt",), 7), (chunks(2, ""), (), 2)],
)
def test_the_older_format(end: bytes, datasets: tuple[str, ...], n_chunks: int, tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(legacy((Q, 3, [6, 1, 0]), (DOWN, 0, [6, 5]), end=end))
    matrix = read_imatrix(path)
    assert (matrix.datasets, matrix.n_chunks) == (datasets, n_chunks)
    third = float(np.float32(1) / np.float32(3))
    assert {name: values.tolist() for name, values in matrix.importance.items()} == {Q: [2, third, 0], DOWN: [6, 5]}


def test_what_is_saved_is_what_llama_cpp_reads(tmp_path: Path) -> None:
    """llama-quantize of the pinned version made the same bytes of such a file; here, what its reader wants."""
    sums = {Q: np.array([0.5, 2], np.float32), DOWN: np.array([1, 2, 3], np.float32)}
    matrix = imatrix.Imatrix(sums, {Q: 1300, DOWN: 1024}, ("pictures", "Fragen ü.txt"))
    matrix.save(tmp_path / "a.gguf")
    reader = GGUFReader(tmp_path / "a.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert fields == {
        "general.type": "imatrix",
        "imatrix.datasets": ["pictures", "Fragen ü.txt"],
        "imatrix.chunk_count": 2,
        "imatrix.chunk_size": 512,
    }
    assert [(t.name, t.tensor_type.name, t.shape.tolist(), t.data.reshape(-1).tolist()) for t in reader.tensors] == [
        (f"{Q}.in_sum2", "F32", [2], [0.5, 2]),
        (f"{Q}.counts", "F32", [1], [1300]),
        (f"{DOWN}.in_sum2", "F32", [3], [1, 2, 3]),
        (f"{DOWN}.counts", "F32", [1], [1024]),
    ]
    assert read_imatrix(tmp_path / "a.gguf").importance[Q].tolist() == (sums[Q] / np.float32(1300)).tolist()
    with pytest.raises(OutputError, match="already exists; --force replaces it"):
        matrix.save(tmp_path / "a.gguf")
    matrix.save(tmp_path / "a.gguf", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


NAN, INF = float("nan"), float("inf")
WRONG_KEYS = [METADATA[0], *METADATA[2:]]
WRONG_TYPE = [*METADATA[:2], ("imatrix.chunk_count", "i32", 3), METADATA[3]]
WHOLE = legacy((Q, 3, [6, 1, 0]), (DOWN, 3, [6, 5]), end=chunks(3, "a.txt"))

BAD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "ends inside the number of entries: cut short, or no importance matrix"),
    "text": (
        b"What is in the picture?\n",
        "is not an importance matrix, neither as GGUF nor in llama.cpp's older form",
    ),
    "zeros": (bytes(64), "is not an importance matrix"),
    "a model": (
        gguf([("general.architecture", "str", "llama")]),
        "is a GGUF, but no importance matrix: imatrix.datasets, imatrix.chunk_count and",
    ),
    "no datasets": (gguf_of(entry(Q, [1]), metadata=WRONG_KEYS), "is a GGUF, but no importance matrix"),
    "chunks of another type": (gguf_of(entry(Q, [1]), metadata=WRONG_TYPE), "is a GGUF, but no importance matrix"),
    "no tensors": (gguf_of(), "is an importance matrix without tensors"),
    "no counts": (gguf_of(entry(Q, [1])[:1]), f"tensor '{Q}.counts' is missing"),
    "no sums": (gguf_of(entry(Q, [1])[1:]), f"tensor '{Q}.in_sum2' is missing"),
    "another type": (
        gguf_of([Tensor(f"{Q}.in_sum2", (2,), bytes(4), 1), entry(Q, [1])[1]]),
        f"tensor '{Q}.in_sum2' is F16; F32 is wanted",
    ),
    "counts that do not divide": (
        gguf_of([f32(f"{Q}.in_sum2", [1, 2, 3]), f32(f"{Q}.counts", [1, 2])]),
        f"'{Q}.in_sum2' has 3 values, for 2 matrices",
    ),
    "NaN": (gguf_of(entry(Q, [1, NAN])), f"tensor '{Q}.in_sum2' has values that are no sums of squares; damaged"),
    "infinity": (gguf_of(entry(Q, [1, INF])), "no sums of squares"),
    "negative": (gguf_of(entry(Q, [1, -1])), "no sums of squares"),
    "NaN counts": (gguf_of(entry(Q, [1], [NAN])), f"tensor '{Q}.counts' has values that are no sums of squares"),
    "negative counts": (gguf_of(entry(Q, [1], [-1])), f"tensor '{Q}.counts' has values"),
    "too large": (
        gguf_of(entry(Q, [1, 8e12])),
        f"'{Q}', column 1: 2e+12 is no importance; 0 to 1.1e+12 are accepted",
    ),
    "cut": (gguf_of(entry(Q, [1] * 64))[:-64], "cut short"),
    "legacy: many entries": (legacy((Q, 1, [1]), n=65537), "is not an importance matrix"),
    "legacy: fewer entries": (legacy((Q, 1, [1]), n=2), "ends inside entry 1: cut short"),
    "legacy: twice": (legacy((Q, 1, [1]), (Q, 1, [1])), "a tensor appears twice"),
    "legacy: no name": (legacy(("", 1, [1])), "entry 0 has a name of 0 bytes; 1 to 63 are accepted"),
    "legacy: a long name": (legacy(("a" * 64, 1, [1])), "entry 0 has a name of 64 bytes"),
    "legacy: a name with a line's end": (legacy(("a\nb", 1, [1])), "entry 0 is called 'a\\nb', which is no tensor's"),
    "legacy: a name that is long by far": (struct.pack("<ii", 1, 2**31 - 1), "entry 0 has a name of 2147483647 bytes"),
    "legacy: no values": (legacy((Q, 1, [])), f"entry '{Q}' has 0 values of 1 calls; damaged"),
    "legacy: negative calls": (legacy((Q, -1, [1])), "1 values of -1 calls; damaged"),
    "legacy: values without end": (
        struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 2**31 - 1),
        "ends inside entry 'a': cut short",
    ),
    "legacy: NaN": (legacy((Q, 1, [1, NAN])), f"'{Q}', column 1: nan is no importance"),
    "legacy: negative": (legacy((Q, 1, [-1])), "column 0: -1 is no importance"),
    "legacy: infinity": (legacy((Q, 0, [INF])), "column 0: inf is no importance"),
    "legacy: negative chunks": (legacy((Q, 1, [1]), end=chunks(-1, "a")), "says nothing that can be"),
    "legacy: a dataset without end": (legacy((Q, 1, [1]), end=chunks(1, "abc")[:-1]), "says nothing that can be"),
    "legacy: half a number": (legacy((Q, 1, [1]), end=b"\1\0"), "ends inside the number of chunks"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_line(case: str, tmp_path: Path) -> None:
    data, expected = BAD[case]
    path = tmp_path / "in.imatrix"
    path.write_bytes(data)
    with pytest.raises(ModelFileError) as raised:
        read_imatrix(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: ") and expected in message and "\n" not in message


def test_files_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelFileError, match="cannot be read: No such file"):
        read_imatrix(tmp_path / "nowhere")
    with pytest.raises(ModelFileError, match="is a directory"):
        read_imatrix(tmp_path)
    monkeypatch.setattr("local_llava.convert.imatrix.MAX_BYTES", 100)
    (tmp_path / "large").write_bytes(bytes(101))
    with pytest.raises(ModelFileError, match="has more than 0 MiB: no importance matrix"):
        read_imatrix(tmp_path / "large")


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.sampled_from([gguf_of(entry(Q, [1, 2, 3, 4]), entry(DOWN, [3, 1], [3, 1])), WHOLE]),
    at=st.floats(0, 1, exclude_max=True),
    new=st.binary(min_size=0, max_size=4),
    cut=st.booleans(),
)
def test_damaged_files_are_an_error_of_ours_or_numbers_that_ggml_takes(
    data: bytes, at: float, new: bytes, cut: bool, tmp_path: Path
) -> None:
    start = int(at * len(data))
    (tmp_path / "a").write_bytes(data[:start] + new + (b"" if cut else data[start + len(new) :]))
    try:
        matrix = read_imatrix(tmp_path / "a")
    except LocalLlavaError as error:
        assert "\n" not in str(error)
    else:
        assert all(
            np.isfinite(v).all() and (v >= 0).all() and v.dtype == np.float32 for v in matrix.importance.values()
        )
