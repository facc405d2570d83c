"""Types and bytes against `llama_model_quantize` of the pinned llama-cpp-python, and what is refused."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from gguf import GGUFReader, GGUFValueType
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from local_llava import ggml
from local_llava.convert import quantize
from local_llava.convert.plan import Field, GGUFPlan, TensorPlan
from local_llava.convert.quantize import LLM_MIXES, MMPROJ_MIXES
from local_llava.convert.write import write
from local_llava.errors import CheckpointError, UsageError

Tensors = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Model:
    """The parts of a Llama that decide on types. llama_model_quantize does not look at the number of rows."""

    n_embd: int = 256
    n_ff: int = 512
    n_layer: int = 4
    n_head: int = 8
    n_head_kv: int = 2
    tied: bool = False

    def tensors(self) -> Tensors:
        rng = np.random.default_rng(self.n_layer * self.n_embd)
        shapes: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (9, self.n_embd),
            "output_norm.weight": (self.n_embd,),
        }
        if not self.tied:
            shapes["output.weight"] = (9, self.n_embd)
        for i in range(self.n_layer):
            shapes |= {
                f"blk.{i}.attn_norm.weight": (self.n_embd,),
                f"blk.{i}.attn_q.weight": (4, self.n_embd),
                f"blk.{i}.attn_q.bias": (4,),
                f"blk.{i}.attn_k.weight": (2, self.n_embd),
                # ggml takes a matrix of one row for a vector
                f"blk.{i}.attn_v.weight": (1 if i == 2 else 2, self.n_embd),
                f"blk.{i}.attn_output.weight": (3, self.n_embd),
                f"blk.{i}.ffn_norm.weight": (self.n_embd,),
                f"blk.{i}.ffn_gate.weight": (2, self.n_embd),
                f"blk.{i}.ffn_up.weight": (2, self.n_embd),
                f"blk.{i}.ffn_down.weight": (2, self.n_ff),
                f"blk.{i}.ffn_down.bias": (2,),
            }
        return {name: _weights(rng, shape) for name, shape in shapes.items()}

    def fields(self) -> tuple[Field, ...]:
        numbers = {
            "block_count": self.n_layer,
            "context_length": 128,
            "embedding_length": self.n_embd,
            "feed_forward_length": self.n_ff,
            "attention.head_count": self.n_head,
            "attention.head_count_kv": self.n_head_kv,
        }
        return (
            Field("general.architecture", "llama", GGUFValueType.STRING),
            *(Field(f"llama.{key}", value, GGUFValueType.UINT32) for key, value in numbers.items()),
            Field("llama.attention.layer_norm_rms_epsilon", 1e-5, GGUFValueType.FLOAT32),
        )

    def plan(self, quant: str, tensors: Tensors) -> GGUFPlan:
        types = quantize.llm_types(
            LLM_MIXES[quant],
            [(name, value.shape) for name, value in tensors.items()],
            n_layer=self.n_layer,
            n_head=self.n_head,
            n_head_kv=self.n_head_kv,
        )
        return GGUFPlan(
            (*self.fields(), *quantize.type_fields(LLM_MIXES[quant])),
            tuple(tensor(name, value, types[name]) for name, value in tensors.items()),
        )


def _weights(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Mostly as in a model, with zeros, and some of any magnitude that F16 holds: ties, subnormals, signed zeros."""
    usual = rng.standard_normal(shape) * rng.choice([0.02, 1.0, 0.0], size=shape, p=[0.8, 0.15, 0.05])
    bits = rng.integers(0, 2**32, size=shape, dtype=np.uint32)
    bits = np.where(rng.random(shape) < 0.5, bits & np.uint32(0xFFFFF000), bits)
    any_size = bits.view(np.float32)
    odd = (rng.random(shape) < 0.05) & (np.abs(any_size) < 60000)  # false for NaN
    return np.where(odd, any_size, usual).astype(np.float32)


def tensor(name: str, value: NDArray[np.float32], type: T) -> TensorPlan:
    rows = value.reshape(-1, value.shape[-1])
    return TensorPlan(name, value.shape, type, lambda start, stop: rows[start:stop], "model.safetensors: source")


# llama.cpp keeps the pointer, so it lives as long as the module. It would log a line for every tensor.
_silence = llama_cpp.llama_log_callback(lambda level, text, data: None)


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    before, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    llama_cpp.llama_log_set(_silence, None)
    yield
    llama_cpp.llama_log_set(before, data)


def quantized_by_llama_cpp(source: Path, target: Path, quant: str) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = int(LLM_MIXES[quant].file_type)
    params.nthread = 2
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    assert code == 0


def contents(path: Path) -> tuple[dict[str, tuple[str, bytes]], list[object]]:
    """Type and bytes by tensor name, and what the metadata says about the quantization."""
    reader = GGUFReader(path)
    entries = [reader.fields[f"general.{key}"] for key in ("file_type", "quantization_version")]
    tensors = {t.name: (t.tensor_type.name, t.data.tobytes()) for t in reader.tensors}
    return tensors, [(entry.types, entry.contents()) for entry in entries]


def compare(model: Model, quant: str, directory: Path) -> dict[str, T]:
    tensors = model.tensors()
    base, theirs, ours = (directory / name for name in ("base.gguf", "theirs.gguf", "ours.gguf"))
    write(model.plan("F32", tensors), base, threads=1, overwrite=True)
    quantized_by_llama_cpp(base, theirs, quant)
    write(model.plan(quant, tensors), ours, threads=2, overwrite=True)
    (found, about), (expected, about_theirs) = contents(ours), contents(theirs)
    assert about == about_theirs
    types = {name: type for name, (type, _) in found.items()}
    assert types == {name: type for name, (type, _) in expected.items()}
    assert [name for name in found if found[name] != expected[name]] == []
    return {name: T[type] for name, type in types.items()}


# Each with what decides about it: blocks of 256 fit, only blocks of 32 fit, none fits.
MODELS = {
    "256": Model(),
    "256, MHA": Model(n_head_kv=8, n_layer=13),
    "256, tied, 32 layers": Model(tied=True, n_layer=32),
    "320": Model(n_embd=320, n_ff=352, n_layer=7),
    "320, tied": Model(n_embd=320, tied=True),
    "80": Model(n_embd=80, n_ff=176, n_layer=9),
    "80, tied": Model(n_embd=80, tied=True),
    "256, narrow ffn": Model(n_ff=176, n_layer=16),
    "40 layers": Model(n_ff=256, n_layer=40),
    "70B": Model(n_ff=256, n_layer=80, n_head=64, n_head_kv=8),
    "70B of 320 columns": Model(n_embd=320, n_layer=80, n_head=64, n_head_kv=8),
    "65B": Model(n_ff=256, n_layer=80, n_head=64, n_head_kv=64),
}


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        *((name, "Q4_K_M") for name in MODELS),
        *((name, quant) for name in MODELS for quant in ("Q6_K", "Q8_0") if MODELS[name].n_layer < 20),
        *((name, quant) for name in ("256", "80, tied") for quant in ("F32", "F16", "BF16")),
    ],
)
def test_types_and_bytes_equal_those_of_llama_cpp(name: str, quant: str, tmp_path: Path) -> None:
    compare(MODELS[name], quant, tmp_path)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    model=st.builds(
        Model,
        n_embd=st.sampled_from([32, 48, 256, 288, 512]),
        n_ff=st.sampled_from([32, 40, 256, 320, 768]),
        n_layer=st.integers(1, 48),
        n_head=st.just(16),
        n_head_kv=st.sampled_from([1, 2, 4, 8, 16]),
        tied=st.booleans(),
    ),
    quant=st.sampled_from(["Q4_K_M", "Q4_K_M", "Q6_K", "Q8_0"]),
)
@example(model=Model(n_layer=80, n_head=8, n_head_kv=1, n_ff=32), quant="Q4_K_M")
def test_any_model_equals_llama_cpp(model: Model, quant: str, tmp_path: Path) -> None:
    compare(model, quant, tmp_path)


def test_the_reference_does_use_the_special_rules(tmp_path: Path) -> None:
    """Guards the comparison above: were the shapes to miss the rules, it would compare nothing but the base type."""
    small = compare(Model(n_layer=32), "Q4_K_M", tmp_path)
    assert small["output.weight"] is T.Q6_K
    assert [i for i in range(32) if small[f"blk.{i}.ffn_down.weight"] is T.Q6_K] == [
        *(0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27),
        *(28, 29, 30, 31),
    ]
    large = compare(MODELS["70B"], "Q4_K_M", tmp_path)
    assert {large[f"blk.{i}.attn_v.weight"] for i in range(80)} == {T.Q5_K, T.Q6_K, T.F32}
    odd = compare(MODELS["80"], "Q4_K_M", tmp_path)
    assert set(odd.values()) == {T.F16, T.F32}


def test_the_order_of_tensors_does_not_matter() -> None:
    model = Model(n_layer=12)
    shapes = [(name, value.shape) for name, value in model.tensors().items()]
    mix = LLM_MIXES["Q4_K_M"]
    sizes = {"n_layer": 12, "n_head": 8, "n_head_kv": 2}
    assert quantize.llm_types(mix, shapes[::-1], **sizes) == quantize.llm_types(mix, shapes, **sizes)


def test_a_whole_file_equals_that_of_llama_cpp(tmp_path: Path) -> None:
    """Offsets and padding too: with tensors in llama.cpp's order and one set of metadata, every byte."""
    model = Model(n_layer=2, n_embd=84, n_ff=48)  # rows whose sizes are no multiples of the alignment
    tensors = model.tensors()
    order = sorted(tensors, key=lambda name: (name.startswith("blk."), name))
    plan = model.plan("F16", {name: tensors[name] for name in order})
    base, theirs, ours = (tmp_path / name for name in ("base.gguf", "theirs.gguf", "ours.gguf"))
    write(GGUFPlan(plan.metadata, tuple(tensor(t.name, tensors[t.name], T.F32) for t in plan.tensors)), base)
    quantized_by_llama_cpp(base, theirs, "F16")
    write(plan, ours)
    assert ours.read_bytes() == theirs.read_bytes()


MMPROJ = [
    ("v.class_embd", (64,)),
    ("v.patch_embd.weight", (64, 3, 14, 14)),
    ("v.position_embd.weight", (17, 64)),
    ("v.pre_ln.weight", (64,)),
    ("v.blk.0.attn_q.weight", (64, 64)),
    ("v.blk.0.attn_q.bias", (64,)),
    ("v.blk.0.ffn_down.weight", (64, 144)),
    ("mm.0.weight", (256, 64)),
    ("mm.0.bias", (256,)),
]


@pytest.mark.parametrize(
    ("quant", "matrix", "narrow", "patches"),
    [("F32", T.F32, T.F32, T.F32), ("F16", T.F16, T.F16, T.F16), ("Q8_0", T.Q8_0, T.F16, T.F16)],
)
def test_mmproj_types(quant: str, matrix: T, narrow: T, patches: T) -> None:
    assert quantize.mmproj_types(MMPROJ_MIXES[quant], MMPROJ) == {
        "v.class_embd": T.F32,
        "v.patch_embd.weight": patches,
        "v.position_embd.weight": T.F32,
        "v.pre_ln.weight": T.F32,
        "v.blk.0.attn_q.weight": matrix,
        "v.blk.0.attn_q.bias": T.F32,
        "v.blk.0.ffn_down.weight": narrow,
        "mm.0.weight": matrix,
        "mm.0.bias": T.F32,
    }


def test_patches_whose_rows_fit_a_block_are_not_quantized() -> None:
    assert quantize.mmproj_types(MMPROJ_MIXES["Q8_0"], [("v.patch_embd.weight", (64, 3, 32, 32))]) == {
        "v.patch_embd.weight": T.F16
    }


def test_an_unknown_type_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="'Q4_K': use one of F32, F16, BF16, Q8_0, Q6_K, Q4_K_M"):
        quantize.get_mix("Q4_K", LLM_MIXES)
    with pytest.raises(UsageError, match="'BF16': use one of F32, F16, Q8_0"):
        quantize.get_mix("BF16", MMPROJ_MIXES)
    assert quantize.get_mix("Q8_0", MMPROJ_MIXES).base is T.Q8_0


ALL_TYPES = [T.F32, T.F16, T.BF16, T.Q8_0, T.Q5_0, T.Q5_1, T.Q4_K, T.Q5_K, T.Q6_K]


def holding(value: float, type: T) -> TensorPlan:
    """A tensor whose row 3, column 300 has that value; loaded from row 2 on in the tests."""
    rows = np.full((5, 512), 0.5, dtype=np.float32)
    rows[3, 300] = value
    return tensor("blk.0.attn_q.weight", rows, type)


@pytest.mark.parametrize("type", ALL_TYPES)
@pytest.mark.parametrize(("value", "shown"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")])
def test_nan_and_infinity_are_refused(type: T, value: float, shown: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        quantize.encode(holding(value, type), 2, 5)
    assert str(raised.value) == (
        "model.safetensors: source (blk.0.attn_q.weight), row 3, column 300: "
        f"{shown} is not a weight; the checkpoint is damaged"
    )


LARGEST_F32 = float(np.finfo(np.float32).max)


@pytest.mark.parametrize(
    ("type", "fits", "too_large"),
    [
        (T.F16, 65519.996, 65520.0),
        (T.BF16, float(np.array(0x7F7F7FFF, np.uint32).view(np.float32)), LARGEST_F32),
        (T.BF16, 1e38, float(np.array(0x7F7F8000, np.uint32).view(np.float32))),
        (T.F32, LARGEST_F32, np.inf),
        (T.Q8_0, 8e6, 9e6),
        (T.Q6_K, 1e5, 1e9),
        (T.Q4_K, 1e5, 1e9),
        (T.Q5_0, 5e5, 2e6),
        (T.Q5_1, 6e4, 3e6),
        (T.Q5_K, 1e5, 1e9),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_what_a_type_cannot_hold_is_refused(type: T, fits: float, too_large: float, sign: int) -> None:
    data = quantize.encode(holding(sign * fits, type), 2, 5)
    assert ggml.validate_row_data(int(type), data)
    with pytest.raises(
        CheckpointError, match=r"\(blk\.0\.attn_q\.weight\), row 3.* (does not fit into|is not a weight)"
    ):
        quantize.encode(holding(sign * too_large, type), 2, 5)


@pytest.mark.parametrize("type", [T.Q4_K, T.Q5_K, T.Q5_1])
def test_a_minimum_that_overflows_is_refused(type: T) -> None:
    """Equal values need no scale, only the minimum that these types store beside it."""
    with pytest.raises(CheckpointError, match=r"row 0: 1e\+09 does not fit into"):
        quantize.encode(tensor("a", np.full((2, 256), -1e9, np.float32), type), 0, 2)


@settings(max_examples=60, deadline=None)
@given(
    type=st.sampled_from([T.Q8_0, T.Q5_0, T.Q5_1, T.Q4_K, T.Q5_K, T.Q6_K]),
    exponent=st.floats(0, 30),
    seed=st.integers(0, 2**32 - 1),
)
def test_refused_exactly_when_ggml_finds_the_result_invalid(type: T, exponent: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = (rng.standard_normal((2, 256)) * rng.choice([0, 1], 256) * 10**exponent).astype(np.float32)
    valid = ggml.validate_row_data(int(type), quantize.encode_rows(type, rows))
    if valid:
        quantize.encode(tensor("a", rows, type), 0, 2)
    else:
        with pytest.raises(CheckpointError, match="does not fit into"):
            quantize.encode(tensor("a", rows, type), 0, 2)


def test_every_type_that_a_mix_can_give_has_its_check() -> None:
    bases = {mix.base for mix in LLM_MIXES.values()}
    ruled = {type for mix in LLM_MIXES.values() for rules in mix.rules.values() for _, type in rules}
    reachable = bases | ruled | {T.Q6_K, T.Q8_0} | set(quantize._ATTN_V_OF_70B.values())
    reachable |= {quantize._FALLBACK.get(type, type) for type in reachable}
    assert reachable - set(quantize._IS_FLOAT) <= set(quantize._SCALES)


def test_a_loader_that_gives_other_rows_is_a_defect() -> None:
    short = TensorPlan("a", (4, 32), T.F32, lambda start, stop: np.zeros((1, 32), np.float32), "source")
    with pytest.raises(ValueError, match="rows 0 to 4 came as"):
        quantize.encode(short, 0, 4)
