"""`local-llava quantize`: whole files against `llama_model_quantize` on the same input, mmproj files, and bad input."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from gguf import GGUFValueType as V
from gguf_bytes import Tensor, gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_quantize import UNGUIDED, Model, contents, llama_quantize, quiet, same_files, tensor
from mmproj_files import Reference, relative_error, write_gguf

from local_llava import ggml_rows
from local_llava.convert import Overrides, prepare_gguf, quantize_gguf
from local_llava.convert.mixes import MMPROJ_MIXES
from local_llava.convert.plan import Field, GGUFPlan
from local_llava.convert.write import write
from local_llava.errors import LocalLlavaError, ModelFileError, OutputError, UsageError
from local_llava.gguf_file import GGUFFile
from local_llava.vision import VisionTower

MODEL = Model(n_layer=9, n_ff=320)


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    with quiet():
        yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The model as a file of a type, made once."""
    directory, tensors = tmp_path_factory.mktemp("sources"), MODEL.tensors()

    def source(quant: str) -> Path:
        path = directory / f"{quant}.gguf"
        if not path.exists():
            write(MODEL.plan(quant, tensors), path)
        return path

    return source


def equal_to_llama_cpp(source: Path, quant: str, directory: Path, overrides: Overrides | None = None) -> Path:
    overrides = overrides or Overrides()
    ours, theirs = directory / "ours.gguf", directory / "theirs.gguf"
    named = (overrides.tensor_types, overrides.output_type, overrides.embedding_type)
    assert llama_quantize(source, theirs, quant, *named, allow_requantize=True)
    quantize_gguf(source, ours, quant, overrides=overrides, allow_requantize=True, overwrite=True, threads=2)
    same_files(ours, theirs)
    return ours


# ---- language models ----


@pytest.mark.parametrize("source", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("quant", UNGUIDED)
def test_whole_files_equal_those_of_llama_cpp(
    source: str, quant: str, sources: Callable[[str], Path], tmp_path: Path
) -> None:
    equal_to_llama_cpp(sources(source), quant, tmp_path)


@pytest.mark.parametrize("architecture", ["phi3", "qwen2"])
@pytest.mark.parametrize("quant", UNGUIDED)
def test_other_architectures_equal_those_of_llama_cpp(architecture: str, quant: str, tmp_path: Path) -> None:
    model = Model(n_layer=9, n_ff=320, n_head_kv=1, architecture=architecture)
    write(model.plan("F16", model.tensors()), tmp_path / "in.gguf")
    equal_to_llama_cpp(tmp_path / "in.gguf", quant, tmp_path)


@pytest.mark.parametrize("source", [name for name in UNGUIDED if name not in ("F32", "F16", "BF16")])
@pytest.mark.parametrize("quant", ["F32", "F16", "Q8_0", "Q4_K_M", "IQ3_S"])
def test_quantized_sources_equal_those_of_llama_cpp(
    source: str, quant: str, sources: Callable[[str], Path], tmp_path: Path
) -> None:
    """Those tensors that have the type already are copied."""
    equal_to_llama_cpp(sources(source), quant, tmp_path)


def test_overrides(sources: Callable[[str], Path], tmp_path: Path) -> None:
    overrides = Overrides({r"blk\.[0-3]\.attn_v": "Q8_0", "ffn": "Q3_K"}, output_type="Q5_K", embedding_type="IQ4_NL")
    made = equal_to_llama_cpp(sources("F16"), "Q4_K_M", tmp_path, overrides)
    assert contents(made)[0]["token_embd.weight"][0] == "IQ4_NL"


def test_vectors_keep_the_type_they_have(tmp_path: Path) -> None:
    """Files of other tools have norms of F16, or matrices that are never quantized."""
    values = {**MODEL.tensors(), "blk.0.odd_norm.weight": np.ones((3, 64), np.float32)}
    plans = tuple(tensor(name, np.clip(value, -6e4, 6e4), T.F16) for name, value in values.items())
    write(GGUFPlan(MODEL.fields(), plans), tmp_path / "f16.gguf")
    made = equal_to_llama_cpp(tmp_path / "f16.gguf", "Q4_K_S", tmp_path)
    types = {name: type for name, (type, _) in contents(made)[0].items()}
    assert types["output_norm.weight"] == types["blk.0.odd_norm.weight"] == "F16"


METADATA = (
    Field("general.file_type", 0, V.UINT32),
    Field("general.name", "Straße 🦙", V.STRING),
    Field("general.quantization_version", 1, V.UINT32),
    *(Field(f"x.{v.name}", 7, v) for v in (V.UINT8, V.INT8, V.UINT16, V.INT16, V.UINT32, V.INT32, V.UINT64, V.INT64)),
    Field("x.f32", 0.1, V.FLOAT32),
    Field("x.f64", 0.1, V.FLOAT64),
    Field("x.bool", True, V.BOOL),
    Field("x.empty", "", V.STRING),
    Field("x.numbers", [1, -2, 3], V.ARRAY, V.INT32),
    Field("x.floats", [0.1, float("inf"), -0.0], V.ARRAY, V.FLOAT32),
    Field("x.flags", [True, False], V.ARRAY, V.BOOL),
    Field("x.none", [], V.ARRAY, V.STRING),
    Field("tokenizer.ggml.tokens", ["a", "", "é", b"\xff\xfe", b"\xe2\x96"], V.ARRAY, V.STRING),
    Field("split.no", 0, V.UINT16),
    Field("split.count", 0, V.UINT16),
    Field("split.tensors.count", 100, V.INT32),
    Field("x.last", "end", V.STRING),
)


def with_metadata(path: Path, *fields: Field, model: Model = MODEL) -> Path:
    plan = model.plan("F32", model.tensors())
    write(GGUFPlan((*model.fields(), *fields), plan.tensors), path)
    return path


def test_metadata_is_carried_over(tmp_path: Path) -> None:
    """In its order, every type; what names the quantization goes to the end, and what names splits goes."""
    made = equal_to_llama_cpp(with_metadata(tmp_path / "in.gguf", *METADATA), "Q4_0", tmp_path)
    keys = list(GGUFFile.open(made).metadata)
    assert keys[-2:] == ["general.quantization_version", "general.file_type"]
    assert keys[-3] == "x.last" and not any(key.startswith("split.") for key in keys)


def llama_bytes(*extra: tuple[str, str, object], alignment: int = 32, **changes: object) -> bytes:
    """A small model byte by byte, as another tool may write it."""
    values: dict[str, object] = {"block_count": 1, "attention.head_count": 4, "attention.head_count_kv": 2, **changes}
    entries = [("general.architecture", "str", "llama"), *extra]
    entries += [(f"llama.{key}", "u32", value) for key, value in values.items()]
    shapes = {"token_embd.weight": (64, 3), "blk.0.attn_v.weight": (64, 2), "output_norm.weight": (64,)}
    rng = np.random.default_rng(0)
    tensors = [
        Tensor(name, ne, rng.standard_normal(int(np.prod(ne))).astype(np.float32).tobytes())
        for name, ne in shapes.items()
    ]
    return gguf(entries, tensors, alignment)


def test_an_alignment_of_its_own_is_given_up(tmp_path: Path) -> None:
    """llama.cpp pads to 32 bytes whatever the metadata says, and makes a file that it cannot read."""
    (tmp_path / "in.gguf").write_bytes(llama_bytes(("general.alignment", "u32", 128), alignment=128))
    (tmp_path / "plain.gguf").write_bytes(llama_bytes())
    made = quantize_gguf(tmp_path / "in.gguf", tmp_path / "out.gguf", "Q8_0")
    plain = quantize_gguf(tmp_path / "plain.gguf", tmp_path / "plain-out.gguf", "Q8_0")
    assert GGUFFile.open(made).metadata["general.alignment"] == 32
    assert contents(made)[0] == contents(plain)[0]


def test_heads_without_groups_may_be_left_out(tmp_path: Path) -> None:
    data = llama_bytes(**{"attention.head_count_kv": 4})
    without = data.replace(b"llama.attention.head_count_kv", b"llama.attention.head_count_xx")
    for name, content in (("with", data), ("without", without)):
        (tmp_path / name).write_bytes(content)
        quantize_gguf(tmp_path / name, tmp_path / f"{name}.gguf", "Q2_K")
    assert contents(tmp_path / "with.gguf")[0] == contents(tmp_path / "without.gguf")[0]


# ---- mmproj files ----


@pytest.fixture(scope="module")
def reference() -> Reference:
    """256 columns, as K-quants need; 160 in one matrix of each block, for the fallback."""
    return Reference(n_embd=256, n_ff=160, n_head=4, n_out=256)


@pytest.mark.parametrize(
    ("quant", "worst"),
    [("F32", 1e-5), ("F16", 2e-3), ("BF16", 2e-2), ("Q8_0", 4e-2), ("Q6_K", 0.1), ("Q5_K", 0.2), ("Q4_K", 0.4)],
)
def test_mmproj_types_are_loaded_and_computed(quant: str, worst: float, reference: Reference, tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "f32.gguf", reference.metadata(), reference.tensors())
    made = quantize_gguf(source, tmp_path / "out.gguf", quant.lower())
    file = GGUFFile.open(made)
    assert T(file.tensors["mm.2.weight"].type) is MMPROJ_MIXES[quant].base
    assert file.metadata["general.file_type"] == int(MMPROJ_MIXES[quant].file_type)
    assert list(file.tensors) == list(GGUFFile.open(source).tensors)
    pixels = reference.pixels()
    with VisionTower.load(made, n_threads=1, use_gpu=False) as tower:
        assert relative_error(tower.encode(pixels), reference.features(pixels)) < worst


@pytest.mark.parametrize("type", list(ggml_rows.QUANTIZABLE.values()))
def test_the_tower_computes_with_every_type_of_matrices(type: str, reference: Reference, tmp_path: Path) -> None:
    """Files of llama-quantize may have them."""
    number = T[type]
    tensors = reference.tensors()
    plan = GGUFPlan(
        tuple(_field(key, value) for key, value in reference.metadata().items()),
        tuple(
            tensor(name, value, number if value.ndim == 2 and value.shape[1] == 256 and "embd" not in name else T.F32)
            if value.ndim < 3
            else replace(tensor(name, value, T.F32), shape=value.shape)
            for name, value in tensors.items()
        ),
    )
    write(plan, tmp_path / "a.gguf")
    pixels = reference.pixels(1)
    with VisionTower.load(tmp_path / "a.gguf", n_threads=1, use_gpu=False) as tower:
        assert relative_error(tower.encode(pixels), reference.features(pixels)) < 0.7


def _field(key: str, value: object) -> Field:
    kinds = {bool: V.BOOL, int: V.UINT32, float: V.FLOAT32, str: V.STRING}
    if isinstance(value, list):
        return Field(key, value, V.ARRAY, V.INT32 if isinstance(value[0], int) else V.FLOAT32)
    return Field(key, value, kinds[type(value)])


def test_an_mmproj_takes_no_overrides(reference: Reference, tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "f32.gguf", reference.metadata(), reference.tensors())
    with pytest.raises(UsageError, match="is an mmproj: types of single tensors"):
        prepare_gguf(source, tmp_path / "out.gguf", "Q8_0", overrides=Overrides({"a": "Q8_0"}))


# ---- what is refused ----


def test_a_quantized_source_needs_leave(sources: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'token_embd.weight' is Q4_K already; Q5_K of it is worse .*--allow-requant"):
        quantize_gguf(sources("Q4_K_M"), tmp_path / "out.gguf", "Q5_K_M")
    assert list(tmp_path.iterdir()) == []
    # Nothing is quantized again here.
    made = quantize_gguf(sources("Q4_K_M"), tmp_path / "out.gguf", "Q4_K_M")
    assert made.read_bytes() == sources("Q4_K_M").read_bytes()


def test_the_file_itself_is_not_replaced(sources: Callable[[str], Path], tmp_path: Path) -> None:
    source = tmp_path / "in.gguf"
    source.write_bytes(sources("F16").read_bytes())
    (tmp_path / "link.gguf").symlink_to(source)
    for target in (source, tmp_path / "link.gguf", tmp_path / "." / "in.gguf"):
        with pytest.raises(OutputError, match="is the file to be quantized"):
            quantize_gguf(source, target, "Q8_0", overwrite=True)
    assert source.read_bytes() == sources("F16").read_bytes()


def test_an_existing_file_stays_without_force(sources: Callable[[str], Path], tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    target.write_bytes(b"old")
    with pytest.raises(OutputError, match="already exists; --force replaces it"):
        quantize_gguf(sources("F16"), target, "Q8_0")
    assert target.read_bytes() == b"old"
    quantize_gguf(sources("F16"), target, "Q8_0", overwrite=True)
    assert target.read_bytes()[:4] == b"GGUF"


def nan(value: float, place: int = -4) -> bytes:
    data = bytearray(llama_bytes())
    struct.pack_into("<f", data, len(data) + place - 124, value)
    return bytes(data)


REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not a GGUF but empty"),
    "another kind of file": (b"\x89PNG" + bytes(99), "is not a GGUF but a PNG picture"),
    "cut short in the header": (llama_bytes()[:200], "cut short, or damaged"),
    "cut short in the tensors": (llama_bytes()[:-300], "cut short, or damaged"),
    "big endian": (b"GGUF" + struct.pack(">I", 3) + bytes(99), "big-endian"),
    "another architecture": (
        gguf([("general.architecture", "str", "gpt2")]),
        "general.architecture is 'gpt2'; supported: llama, phi3, qwen2, clip",
    ),
    "no architecture": (gguf(), "general.architecture is None; supported: llama"),
    "architecture of another type": (gguf([("general.architecture", "u32", 3)]), "is 3; supported: llama"),
    "several architectures": (
        gguf([("general.architecture", "arr[str]", ["llama", "phi3"])]),
        "general.architecture is ['llama', 'phi3']; supported: llama",
    ),
    "experts of qwen2": (
        gguf([("general.architecture", "str", "qwen2"), ("qwen2.expert_count", "u32", 60)]),
        "qwen2.expert_count: mixtures of experts are not supported",
    ),
    "phi3 with a llama's numbers": (
        gguf([("general.architecture", "str", "phi3"), ("llama.attention.head_count", "u32", 4)]),
        "phi3.attention.head_count must be a number from 1 to 65536, not None",
    ),
    "a part of a split": (
        llama_bytes(("split.count", "u16", 3)),
        "is one part of a split model; join the parts with llama-gguf-split --merge",
    ),
    "experts": (llama_bytes(expert_count=8), "llama.expert_count: mixtures of experts are not supported"),
    "no layers": (llama_bytes(block_count=0), "llama.block_count must be a number from 1 to 512, not 0"),
    "too many layers": (llama_bytes(block_count=513), "llama.block_count must be a number from 1 to 512, not 513"),
    "no heads": (llama_bytes(**{"attention.head_count": 0}), "llama.attention.head_count must be a number"),
    "more groups than heads": (
        llama_bytes(**{"attention.head_count_kv": 5}),
        "llama.attention.head_count_kv must be a number from 1 to 4, not 5",
    ),
    "heads of another type": (
        gguf(
            [
                ("general.architecture", "str", "llama"),
                ("llama.attention.head_count", "arr[u32]", [4]),
            ]
        ),
        "llama.attention.head_count must be a number from 1 to 65536, not [4]",
    ),
    "a tensor of integers": (
        gguf([("general.architecture", "str", "llama")], [Tensor("a.weight", (4, 2), bytes(32), 26)]),
        "tensor 'a.weight' is I32, which is not supported",
    ),
    "another projector": (
        gguf([("general.architecture", "str", "clip"), ("clip.has_vision_encoder", "bool", True)]),
        "clip.projector_type is None",
    ),
    "NaN": (nan(float("nan")), "in.gguf (output_norm.weight), row 0, column 32: nan is not a weight"),
    "infinity": (nan(float("-inf")), "in.gguf (output_norm.weight), row 0, column 32: -inf is not a weight"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_files_are_one_line_and_leave_nothing(case: str, tmp_path: Path) -> None:
    data, expected = REFUSED[case]
    (tmp_path / "in.gguf").write_bytes(data)
    with pytest.raises(ModelFileError) as raised:
        quantize_gguf(tmp_path / "in.gguf", tmp_path / "out.gguf", "Q8_0", threads=1)
    message = str(raised.value)
    assert message.startswith(str(tmp_path / "in.gguf")) and expected in message and "\n" not in message
    assert [file.name for file in tmp_path.iterdir()] == ["in.gguf"]


def test_rows_longer_than_any_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is the least that is read at a time, and a file may name one of any length."""
    monkeypatch.setattr("local_llava.convert.requantize.MAX_ROW", 63)
    (tmp_path / "in.gguf").write_bytes(llama_bytes())
    with pytest.raises(ModelFileError, match="has rows of 64 values; at most 63 are accepted"):
        quantize_gguf(tmp_path / "in.gguf", tmp_path / "out.gguf", "Q8_0")


def test_damaged_blocks_are_not_copied(sources: Callable[[str], Path], tmp_path: Path) -> None:
    source = tmp_path / "in.gguf"
    data = bytearray(sources("Q8_0").read_bytes())
    info = GGUFFile.open(sources("Q8_0")).tensors["blk.4.attn_q.weight"]
    data[info.offset : info.offset + 2] = b"\xff\x7f"  # the scale of its first block
    source.write_bytes(data)
    for quant in ("Q8_0", "F16"):
        with pytest.raises(ModelFileError, match=r"\(blk\.4\.attn_q\.weight\), row 0, column 0: nan is not a weight"):
            quantize_gguf(source, tmp_path / "out.gguf", quant, allow_requantize=True)


def test_a_file_that_shrinks_while_it_is_read(sources: Callable[[str], Path], tmp_path: Path) -> None:
    source = tmp_path / "in.gguf"
    source.write_bytes(sources("F16").read_bytes())
    prepared = prepare_gguf(source, tmp_path / "out.gguf", "Q8_0")
    os.truncate(source, source.stat().st_size // 2)
    with pytest.raises(ModelFileError, match="it shrank while it was read"):
        prepared.write()
    assert [file.name for file in tmp_path.iterdir()] == ["in.gguf"]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), header=st.booleans())
def test_flipped_bytes_are_an_error_of_ours_or_none(
    at: float, byte: int, header: bool, sources: Callable[[str], Path], tmp_path: Path
) -> None:
    data = bytearray(sources("Q4_K_M").read_bytes())
    end = min(t.offset for t in GGUFFile.open(sources("Q4_K_M")).tensors.values()) if header else len(data)
    data[int(at * end)] = byte
    (tmp_path / "in.gguf").write_bytes(data)
    try:
        quantize_gguf(
            tmp_path / "in.gguf", tmp_path / "out.gguf", "Q2_K", allow_requantize=True, overwrite=True, threads=1
        )
    except LocalLlavaError as error:
        assert "\n" not in str(error)


# ---- the command ----


def command(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "local_llava.cli", "quantize", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command(sources: Callable[[str], Path], tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    options = ("--tensor-type", "attn_v=q8_0", "--output-type", "q5_k", "--embedding-type", "q4_0", "--threads", 1)
    shown = command(sources("F16"), target, "q4_k_s", *options, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert re.match(rf"{target}: [\d.]+ kB, 102 tensors \(", shown.stdout)
    # n_ff is 320
    assert "8 tensors with rows of 320 (blk.1.ffn_down.weight, ...): Q5_0, since Q4_K packs 256 values" in shown.stdout
    assert list(tmp_path.iterdir()) == []
    done = command(sources("F16"), target, "q4_k_s", *options)
    assert (done.returncode, done.stdout) == (0, f"{target}\n"), done.stderr
    named = ({"attn_v": "Q8_0"}, "Q5_K", "Q4_0")
    assert llama_quantize(sources("F16"), tmp_path / "theirs.gguf", "Q4_K_S", *named)
    same_files(target, tmp_path / "theirs.gguf")


@pytest.mark.parametrize(
    ("args", "code", "expected"),
    [
        (("nowhere.gguf", "out.gguf", "Q8_0"), 1, "nowhere.gguf: cannot be read: No such file"),
        ((".", "out.gguf", "Q8_0"), 1, "is a directory"),
        (("in.gguf", "out.gguf", "Q9"), 2, "unknown quantization type 'Q9'"),
        (("in.gguf", "out.gguf", "IQ2_XS"), 2, "needs an importance matrix"),
        (("in.gguf", "out.gguf", "Q8_0", "--threads", "0"), 2, "--threads must be 1 or more"),
        (("in.gguf", "out.gguf", "Q8_0", "--tensor-type", "x"), 2, "must be PATTERN=TYPE"),
        (("in.gguf", "out.gguf", "Q8_0", "--tensor-type", "(=Q8_0"), 2, "a bracket is not closed"),
        (("in.gguf", "out.gguf", "Q8_0", "--embedding-type", "Q4_K"), 2, "no multiple of 256; Q8_0 would fit"),
        (("in.gguf", "no/where/out.gguf", "Q8_0"), 1, "is not a directory"),
        (("in.gguf", "in.gguf", "Q8_0", "--force"), 1, "is the file to be quantized"),
    ],
)
def test_errors_of_the_command(args: tuple[str, ...], code: int, expected: str, tmp_path: Path) -> None:
    (tmp_path / "in.gguf").write_bytes(llama_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "local_llava.cli", "quantize", *args],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout) == (code, "")
    (line,) = (line for line in done.stderr.splitlines() if line != "Converting in.gguf")
    assert line.startswith("local-llava: ") and expected in line
    assert [file.name for file in tmp_path.iterdir()] == ["in.gguf"]
