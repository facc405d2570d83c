"""PyTorch's files: read as torch.load does, and nothing of them run."""

from __future__ import annotations

import collections
import copyreg
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fuzz_pickle
import numpy as np
import pytest
import torch

from local_llava.convert import pickle_machine
from local_llava.convert.pickle_file import read_pickle
from local_llava.convert.source import FLOATS, StoredTensor
from local_llava.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def saved(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def check(found: Mapping[str, StoredTensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        tensor, value = found[name], value.detach().contiguous()
        assert (tensor.name, tensor.shape, DTYPES[tensor.dtype]) == (name, tuple(value.shape), value.dtype)
        assert str(tensor) == f"{tensor.path}: {name}"
        n_rows = int(np.prod(value.shape[:-1]))
        raw = value.reshape(-1).view(torch.uint8).numpy() if value.numel() else np.zeros(0, np.uint8)
        assert tensor.nbytes == raw.nbytes
        if value.numel():
            assert tensor.raw_rows(0, n_rows).tobytes() == raw.tobytes()
        if value.numel() and tensor.dtype in FLOATS:
            assert np.array_equal(tensor.rows(0, n_rows).ravel(), value.float().numpy().ravel())


def state_dict(seed: int = 0) -> collections.OrderedDict[str, torch.Tensor]:
    """All that a state dict may hold: views, ties, parameters with attributes, scalars, nothing."""
    torch.manual_seed(seed)
    weight = torch.randn(8, 6)
    tagged = torch.nn.Parameter(torch.randn(3))
    tagged.tag = "x"  # type: ignore[attr-defined]
    tagged_tensor = torch.randn(2, 2)
    tagged_tensor.tag = {"deep": [1, 2]}  # type: ignore[attr-defined]
    return collections.OrderedDict(
        weight=weight,
        tied=weight,
        rows=weight[2:5],
        column_of_one=torch.randn(4, 1).T,
        one=weight[3:4, 1:2],
        parameter=torch.nn.Parameter(weight.half()),
        tagged=tagged,
        tagged_tensor=tagged_tensor,
        scalar=torch.tensor(2.5, dtype=torch.bfloat16),
        element=weight[2, 3],
        empty=torch.zeros(0, 5),
        end=weight.ravel()[48:],
        transposed_empty=torch.zeros(5, 0).T,
        five=torch.randn(1, 2, 3, 2, 1),
        **{"名.weight": torch.arange(3)},
    )


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes(tmp_path: Path, name: str) -> None:
    values = torch.arange(24, dtype=torch.uint8).reshape(3, 8) % 2
    state = {"a": values.view(DTYPES[name]), "b": values.view(DTYPES[name])[1], "p": values.to(DTYPES[name])}
    found = read_pickle(saved(tmp_path / "x.bin", state))
    check(found, torch.load(tmp_path / "x.bin"))
    assert found["a"].dtype == name


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_state_dicts_as_torch_reads_them(tmp_path: Path, protocol: int) -> None:
    path = saved(tmp_path / "x.bin", state_dict(protocol), pickle_protocol=protocol)
    found = read_pickle(path)
    check(found, torch.load(path, weights_only=False))
    assert found["tied"].offset == found["weight"].offset


def test_modules(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.LayerNorm(5), torch.nn.Embedding(3, 2)).half()
    path = saved(tmp_path / "x.bin", model.state_dict())
    check(read_pickle(path), model.state_dict())
    assert "0.weight" in read_pickle(path)


@pytest.mark.parametrize("key", ["state_dict", "module"])
def test_nested_state_dicts(tmp_path: Path, key: str) -> None:
    around = {"meta": {"epoch": 3, "size": torch.Size([1, 2]), 5: [None, 1.5]}, "optimizer": [torch.zeros(2)]}
    check(read_pickle(saved(tmp_path / "x.bin", {**around, key: state_dict()})), state_dict())
    # Where the top has tensors, it is the state dict.
    both = {"w": torch.ones(2), **around, key: state_dict()}
    check(read_pickle(saved(tmp_path / "x.bin", both)), {"w": torch.ones(2)})


def test_large_and_padded_entries(tmp_path: Path) -> None:
    """The local header of an entry is not as long as the directory says, with padding or with 64-bit sizes."""
    pickled, entries = parts(state_dict())
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        for i, (name, data) in enumerate(entries.items()):
            entry = zipfile.ZipInfo(f"x/{name}")
            entry.extra = struct.pack("<HH", 0x4246, i) + b"Z" * i
            with archive.open(entry, "w", force_zip64=True) as file:
                file.write(data)
    check(read_pickle(path), state_dict())


def test_checksums_that_were_not_computed(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path / "x.bin", state_dict())
    finally:
        torch.serialization.set_crc32_options(True)
    check(read_pickle(path), state_dict())


def parts(value: Any) -> tuple[bytes, dict[str, bytes]]:
    """The pickle that torch writes, and the other entries."""
    data = io.BytesIO()
    torch.save(value, data)
    with zipfile.ZipFile(data) as archive:
        entries = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    return entries.pop("data.pkl"), entries


def zipped(path: Path, pickled: bytes, entries: Mapping[str, bytes] = {}, **options: Any) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("x/data.pkl", pickled)
        for name, data in entries.items():
            archive.writestr(f"x/{name}", data)
    return path


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_pickle(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and message.isprintable() and len(message) < len(str(path)) + 300
    return message[len(str(path)) + 2 :]


def hostile_pickles(command: str) -> dict[str, bytes]:
    """Pickles that run a shell command when `pickle` loads them, one for each way to call something."""
    text = b"X" + struct.pack("<I", len(command)) + command.encode()
    code = f"import os; os.system({command!r})".encode()
    system, popen = b"cos\nsystem\n", b"csubprocess\nPopen\n"
    shell = b"\x94]\x94(X\x02\0\0\0shX\x02\0\0\0-c" + text + b"e"
    by_name = b"\x8c\x02os\x8c\x06system\x93"
    setstate = b"\x80\x02(cargparse\nNamespace\no}X\x0c\0\0\0__setstate__" + system + b"sb" + text + b"b."
    return {
        "GLOBAL, REDUCE": b"\x80\x02" + system + text + b"\x85R.",
        "STACK_GLOBAL": b"\x80\x04" + by_name + text + b"\x85R.",
        "INST": b"\x80\x02(" + text + b"ios\nsystem\n.",
        "OBJ": b"\x80\x02(" + popen + shell.replace(b"\x94", b"") + b"o.",
        "NEWOBJ": b"\x80\x02csubprocess\nPopen\n)\x81cos\nsystem\n" + text + b"\x85R.",
        "BUILD": setstate,
        "EXT1": b"\x80\x02\x82\xf0" + text + b"\x85R.",
        "EXT2": b"\x80\x02\x83\xf0\0" + text + b"\x85R.",
        "EXT4": b"\x80\x02\x84\xf0\0\0\0" + text + b"\x85R.",
        "builtins": b"\x80\x02cbuiltins\nexec\nX" + struct.pack("<I", len(code)) + code + b"\x85R.",
    }


@pytest.fixture
def extension() -> Any:
    copyreg.add_extension("os", "system", 0xF0)  # type: ignore[no-untyped-call]
    yield
    copyreg.remove_extension("os", "system", 0xF0)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("name", hostile_pickles(""))
def test_hostile_pickles(tmp_path: Path, extension: None, name: str) -> None:
    marker = tmp_path / "ran"
    pickled = hostile_pickles(f"echo > {marker}")[name]
    state, entries = parts(state_dict())
    # Alone, in front of a good pickle, and as a value inside one.
    inside = state[:2] + b"}X\x01\0\0\0x" + pickled[2:-1] + b"s0" + state[2:]
    for data in (pickled, pickled[:-1] + b"0" + state[2:], inside):
        message = refused(zipped(tmp_path / "x.bin", data, entries))
        assert "pickle" in message and not marker.exists()
        assert any(word in message for word in ("os.system", "subprocess.Popen", "argparse", "exec", "opcode"))
        assert "INST 'os system'" in message if name == "INST" else True
    process = pickle.loads(pickled)  # which shows that it was dangerous
    if hasattr(process, "wait"):
        process.wait()
    assert marker.exists()


def test_globals_that_are_known_cannot_be_misused(tmp_path: Path) -> None:
    call = b"X\x01\0\0\0aX\x01\0\0\0b"
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    for pickled, reason in {
        b"ctorch\nFloatStorage\n)R.": "calls what is no function",
        b"ctorch\nTensor\n)R.": "calls what is no function",
        b"K\x01)R.": "calls what is no function",
        b"ccollections\nOrderedDict\nK\x05R.": "calls what is no function",
        b"ccollections\nOrderedDict\n" + call + b"\x86R.": "OrderedDict has arguments",
        rebuild + b")R.": "a tensor is not described",
        b"ctorch._utils\n_rebuild_parameter\n" + call + b"\x86R.": "a parameter is not described",
        b"ctorch._tensor\n_rebuild_from_type_v2\n(" + rebuild + b"K\x00)NtR.": "with attributes is not described",
        b"X\x01\0\0\0aQ.": "a storage is not described",
        b"(X\x07\0\0\0storagectorch\nfloat32\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ.": "a storage is not described",
        rebuild + b"}b.": "sets the state of an object",
        b"K\x01K\x01K\x02s.": "sets items of what is no",
        b"K\x01K\x01a.": "appends to what is no list",
        b"(K\x01l.": "uses the opcode LIST",
        b"Pos\n.": "uses the opcode PERSID 'os'",
        b"\x8c\x02osK\x01\x93.": "asks for a value",
        b"ctorch\nload\n.": "asks for torch.load",
        b"ctorch\nComplexFloatStorage\n.": "asks for torch.ComplexFloatStorage",
        b"ctorch._utils\n_rebuild_sparse_tensor\n.": "asks for torch._utils._rebuild_sparse_tensor",
        b"c\x1b[2J\nx\n.": r"asks for \x1b[2J.x",
    }.items():
        assert reason in refused(zipped(tmp_path / "x.bin", b"\x80\x04" + pickled)), pickled


def test_what_a_hostile_pickle_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deep, long and self-containing ones: bounded by the number of opcodes."""
    monkeypatch.setattr(pickle_machine, "MAX_OPCODES", most := 100_000)  # a tenth, for the tests' sake
    nested, n = tmp_path / "x.bin", most - 3
    for pickled, reason in {
        b"}" * most + b".": f"more than {most} opcodes",
        b"(" * n + b".": "a value is missing",
        b")" + b"\x85" * (n - 1) + b".": "holds a tuple",
        b"]" * (n // 2) + b"a" * (n // 2 - 1) + b".": "holds a list",
        b"]q\0h\0a.": "holds a list",
        b"}q\0X\x05\0\0\0\0\0\0\0ah\0s.": "no tensors by name",
        b"I" + b"9" * 100_000 + b"\n.": "damaged",
        b"\x8b\xff\xff\xff\x7f.": "damaged",
        b"\x8d" + b"\xff" * 7 + b"\x7f.": "damaged",
        # A key of a dictionary, whose hash takes for ever.
        b"})" + b"q\0h\0\x86" * 60 + b"K\x01s.": "no tensors by name",
    }.items():
        assert reason in refused(zipped(nested, b"\x80\x02" + pickled)), pickled[:40]
    assert "16777217 bytes, more than" in refused(zipped(nested, bytes((16 << 20) + 1)))


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    weight = torch.randn(4, 6)
    for value, reason in {
        weight.T: "w is a view whose values do not lie one after the other; save",
        weight[:, 2:]: "w is a view",
        weight[0].expand(3, 6): "w is a view",
        torch.zeros(4, dtype=torch.complex64): "asks for torch.ComplexFloatStorage",
        torch.zeros(4, dtype=torch.complex64).conj().imag: "negated",
        weight.to_sparse(): "asks for torch._utils._rebuild_sparse_tensor",
    }.items():
        assert reason in refused(saved(path, {"w": value}))
    pickled, entries = parts({"w": torch.zeros(4, 6)})
    sizes = b"K\x04K\x06\x86"
    assert pickled.count(sizes) == 1 and pickled.count(b"K\x18t") == 1
    for old, new, reason in (
        (sizes, b"K\x05K\x06\x86", "w ends outside its storage of 96 bytes"),
        (sizes, b"J\xff\xff\xff\xffK\x06\x86", "w has the sizes (-1, 6)"),
        (sizes, b"K\x00\x8a\x09" + b"\xff" * 8 + b"\0\x86", "w has the sizes (0, 18446744073709551615)"),
        (sizes, b"\x88K\x06\x86", "the sizes and strides"),
        (sizes, b"K\x04\x85", "the sizes and strides"),
        (b"K\x18t", b"K\x19t", "w is of a storage that is larger than its entry of 96 bytes"),
        (b"K\x18t", b"J\xff\xff\xff\xfft", "larger than its entry"),
        (b"K\x18t", b"K\x17t", "w ends outside its storage of 92 bytes"),
        (b"X\x01\0\0\x000", b"X\x01\0\0\x001", "has its values in an entry '1', which is missing"),
        (b"X\x01\0\0\0w", b"X\0\0\0\0", "names a tensor ''; names of 1 to 200"),
        (b"X\x01\0\0\0w", b"X\x02\0\0\0w\n", r"names a tensor 'w\n'"),
        (b"X\x01\0\0\0w", b"X\xc9\0\0\0" + b"w" * 201, "names a tensor 'www"),
        (b"X\x01\0\0\0w", b"X\x03\0\0\0\xed\xa0\x80", "names a tensor '\\ud800'"),
    ):
        assert reason in refused(zipped(path, pickled.replace(old, new), entries)), reason
    assert read_pickle(zipped(path, pickled, entries))["w"].shape == (4, 6)


def test_damaged_archives(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    pickled, entries = parts({"w": torch.zeros(4, 6), "v": torch.zeros(3)})
    assert "compressed" in refused(zipped(path, pickled, entries, compression=zipfile.ZIP_DEFLATED))
    assert "its byte order is b'big'; little" in refused(zipped(path, pickled, {**entries, "byteorder": b"big"}))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/other", b"")
    assert "0 entries are called data.pkl" in refused(path)
    with zipfile.ZipFile(zipped(path, pickled, entries), "a") as archive:
        archive.writestr("y/data.pkl", pickled)
    assert "2 entries are called data.pkl" in refused(path)
    with zipfile.ZipFile(zipped(path, pickled, entries), "a") as archive, pytest.warns(UserWarning):
        archive.writestr("x/data/0", bytes(96))
    assert "two entries have the same name" in refused(path)

    whole = zipped(path, pickled, entries).read_bytes()
    flags = whole.index(b"x/data/0") - 24
    path.write_bytes(whole[:flags] + b"\1" + whole[flags + 1 :])
    assert "encrypted" in refused(path)
    directory = whole.index(b"PK\1\2")
    places = {name: whole.index(name, directory) - 4 for name in (b"x/data/0", b"x/data/1")}
    offsets = [whole[at : at + 4] for at in places.values()]
    swap = places[b"x/data/1"]
    path.write_bytes(whole[:swap] + offsets[0] + whole[swap + 4 :])
    assert "two entries overlap" in refused(path)
    path.write_bytes(whole[:swap] + struct.pack("<I", 5) + whole[swap + 4 :])
    assert "x/data/1 has no header" in refused(path)
    sizes = swap - 22
    path.write_bytes(whole[:sizes] + struct.pack("<II", 10**9, 10**9) + whole[sizes + 8 :])
    assert "x/data/1 ends behind the end of the file" in refused(path)
    for cut in range(0, len(whole), 7):
        path.write_bytes(whole[:cut])
        refused(path)


def test_a_directory_that_claims_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    with path.open("wb") as file:
        file.write(b"PK\3\4")
        file.truncate(2 << 30)
        file.seek(0, io.SEEK_END)
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 9, 9, 1 << 30, 1 << 30, 0))
    assert "its directory has 1073741824 bytes, more than" in refused(path)


def test_other_formats_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    legacy = saved(path, state_dict(), _use_new_zipfile_serialization=False)
    assert "before 1.6; load it where you trust it and save" in refused(legacy)
    for data, reason in {
        pickle.dumps({"w": [1]}): "is a plain pickle",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n": "is a Git LFS pointer",
        b"": "not a PyTorch file",
        b"GGUF\3\0\0\0": "not a PyTorch file",
        b"PK\3\4": "not a whole PyTorch file",
    }.items():
        path.write_bytes(data)
        assert reason in refused(path)
    assert "holds one tensor; a dictionary" in refused(saved(path, torch.zeros(2)))
    assert "holds a list" in refused(saved(path, [torch.zeros(2)]))
    for nothing in ({}, {"a": 1}, {"model": {"w": torch.zeros(2)}}, {5: torch.zeros(2)}, {"state_dict": {}}):
        assert "holds no tensors by name, neither at the top nor under state_dict" in refused(saved(path, nothing))
    assert "asks for torch.nn.modules.linear.Linear" in refused(saved(path, torch.nn.Linear(2, 2)))
    script = b"\x80\x02c__torch__.torch.nn.modules.linear\nLinear\n)\x81."  # as torch.jit.save begins
    assert "asks for __torch__.torch.nn.modules.linear.Linear" in refused(zipped(path, script))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, tmp_path / "missing.bin"):
        assert "is not a regular file" in refused(path)


def test_files_that_change(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.bin", {"w": torch.zeros(4, 6)})
    tensor = read_pickle(path)["w"]
    os.truncate(path, tensor.offset + 10)
    with pytest.raises(CheckpointError, match="the file ended before the tensor did"):
        tensor.rows(0, 4)


def test_fuzz() -> None:
    """By hand: python tests/fuzz_pickle.py --count 20000."""
    outcomes, wrong = fuzz_pickle.run(seed=0, count=800)
    assert not wrong and sum(outcomes.values()) == 800
    assert all(outcomes[f"{kind} {outcome}"] for kind in ("file", "pickle") for outcome in ("tensors", "error"))
