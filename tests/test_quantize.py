"""Types and bytes against `llama_model_quantize` of the pinned llama-cpp-python, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from llama_quantize import UNGUIDED, Model, compare, quiet, tensor

from local_llava import ggml, ggml_rows
from local_llava.convert import mixes, quantize, tensor_types
from local_llava.convert.mixes import LLM_MIXES, MMPROJ_MIXES
from local_llava.convert.plan import TensorPlan
from local_llava.convert.tensor_types import Tensor
from local_llava.errors import CheckpointError, UsageError


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    with quiet():
        yield


# Each with what decides about it: blocks of 256 fit, only blocks of 32 fit, none fits.
MODELS = {
    "256": Model(),
    "256, MHA": Model(n_head_kv=8, n_layer=13),
    "256, pairs": Model(n_head_kv=4, n_layer=17),
    "256, MQA": Model(n_head_kv=1, n_layer=24),
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
    "phi3": Model(n_layer=32, n_head_kv=8, architecture="phi3"),
    "phi3, pairs, tied": Model(n_layer=9, n_head_kv=4, tied=True, architecture="phi3"),
    "phi3 of 80 layers": Model(n_ff=256, n_layer=80, n_head=64, n_head_kv=8, architecture="phi3"),
    "phi3 of 80 columns": Model(n_embd=80, n_ff=352, architecture="phi3"),
    "qwen2": Model(n_layer=24, architecture="qwen2"),
    "qwen2, tied, 320": Model(n_embd=320, n_ff=352, n_layer=7, tied=True, architecture="qwen2"),
    "qwen2 of 72B": Model(n_ff=256, n_layer=80, n_head=64, n_head_kv=64, architecture="qwen2"),
}


QUANTIZED = [name for name in UNGUIDED if LLM_MIXES[name].base not in mixes.FLOATS]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("quant", UNGUIDED)
def test_whole_files_equal_those_of_llama_cpp(name: str, quant: str, tmp_path: Path) -> None:
    """Types, bytes, offsets and padding."""
    compare(MODELS[name], quant, tmp_path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    model=st.builds(
        Model,
        n_embd=st.sampled_from([32, 48, 256, 288, 512]),
        n_ff=st.sampled_from([32, 40, 256, 320, 768]),
        n_layer=st.integers(1, 48),
        n_head=st.just(16),
        n_head_kv=st.sampled_from([1, 2, 4, 8, 16]),
        tied=st.booleans(),
        architecture=st.sampled_from(["llama", "phi3", "qwen2"]),
    ),
    quant=st.sampled_from(QUANTIZED),
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


@pytest.mark.parametrize("quant", [name for name in QUANTIZED if LLM_MIXES[name].rules])
def test_the_models_meet_every_rule(quant: str) -> None:
    """Guards the comparison too: each rule of the table decides about a tensor of one of the models."""
    mix = LLM_MIXES[quant]
    expected = {(role, type) for role, rules in mix.rules.items() for _, type in rules}
    met = set()
    for model in MODELS.values():
        types = model.types(quant, model.tensors()).types
        met |= {(tensor_types._role(name), type) for name, type in types.items()}
    assert expected <= met


def test_the_order_of_tensors_does_not_matter() -> None:
    model = Model(n_layer=12)
    tensors = model.tensors()
    reverse = dict(reversed(tensors.items()))
    assert model.types("Q4_K_M", reverse).types == model.types("Q4_K_M", tensors).types


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
    ("mm.2.weight", (256, 256)),
]


@pytest.mark.parametrize(
    ("quant", "wide", "matrix", "narrow", "patches"),
    [
        ("F32", T.F32, T.F32, T.F32, T.F32),
        ("F16", T.F16, T.F16, T.F16, T.F16),
        ("BF16", T.BF16, T.BF16, T.BF16, T.F32),
        ("Q8_0", T.Q8_0, T.Q8_0, T.F16, T.F16),
        ("Q6_K", T.Q6_K, T.Q8_0, T.F16, T.F16),
        ("Q5_K", T.Q5_K, T.Q5_1, T.F16, T.F16),
        ("Q4_K", T.Q4_K, T.Q5_0, T.F16, T.F16),
    ],
)
def test_mmproj_types(quant: str, wide: T, matrix: T, narrow: T, patches: T) -> None:
    tensors = [Tensor(name, shape) for name, shape in MMPROJ]
    assert tensor_types.mmproj_types(MMPROJ_MIXES[quant], tensors).types == {
        "v.class_embd": T.F32,
        "v.patch_embd.weight": patches,
        "v.position_embd.weight": T.F32,
        "v.pre_ln.weight": T.F32,
        "v.blk.0.attn_q.weight": matrix,
        "v.blk.0.attn_q.bias": T.F32,
        "v.blk.0.ffn_down.weight": narrow,
        "mm.0.weight": matrix,
        "mm.0.bias": T.F32,
        "mm.2.weight": wide,
    }


def test_patches_whose_rows_fit_a_block_are_not_quantized() -> None:
    patches = Tensor("v.patch_embd.weight", (64, 3, 32, 32))
    assert tensor_types.mmproj_types(MMPROJ_MIXES["Q8_0"], [patches]).types == {"v.patch_embd.weight": T.F16}


def test_fallbacks_are_told() -> None:
    tensors = [Tensor(name, shape) for name, shape in MMPROJ]
    assert tensor_types.mmproj_types(MMPROJ_MIXES["F16"], tensors).notes == ()
    assert tensor_types.mmproj_types(MMPROJ_MIXES["Q6_K"], tensors).notes == (
        "2 tensors with rows of 64 (v.blk.0.attn_q.weight, ...): Q8_0, since Q6_K packs 256 values",
        "1 tensor with rows of 144 (v.blk.0.ffn_down.weight): F16, since Q6_K packs 256 values",
        "Q6_K changes image features by 1.5 to 3.5 %, as far as was measured; Q8_0 does by 1 %, F16 by 0.03 %",
    )
    model = Model(n_layer=1, n_ff=288)
    assert model.types("IQ4_XS", model.tensors()).notes == (
        "1 tensor with rows of 288 (blk.0.ffn_down.weight): IQ4_NL, since IQ4_XS packs 256 values",
    )


LLM_NAMES = (
    "F32, F16, BF16, Q8_0, Q6_K, Q5_K_M, Q5_K_S, Q5_1, Q5_0, Q4_K_M, Q4_K_S, Q4_1, Q4_0, IQ4_NL, IQ4_XS, Q3_K_L, "
    "Q3_K_M, Q3_K_S, IQ3_M, IQ3_S, Q2_K"
)


def test_an_unknown_type_lists_the_known_ones() -> None:
    with pytest.raises(UsageError) as raised:
        mixes.get_mix("Q9", LLM_MIXES)
    assert str(raised.value) == f"unknown quantization type 'Q9': use one of {LLM_NAMES}"
    with pytest.raises(UsageError, match=r"'Q4_K_M': use one of F32, F16, BF16, Q8_0, Q6_K, Q5_K, Q4_K$"):
        mixes.get_mix("Q4_K_M", MMPROJ_MIXES)
    with pytest.raises(UsageError, match="unknown quantization type ''"):
        mixes.get_mix("", LLM_MIXES)


def test_names_in_lower_case_and_short_names_are_taken() -> None:
    assert mixes.get_mix("iq4_xs", LLM_MIXES).name == "IQ4_XS"
    assert mixes.get_mix("q5_k", LLM_MIXES).name == "Q5_K_M"
    assert mixes.get_mix("q5_k", MMPROJ_MIXES).name == "Q5_K"


@pytest.mark.parametrize(
    "name", ["IQ1_S", "IQ1_M", "IQ2_XXS", "iq2_xs", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S"]
)
def test_types_that_need_an_importance_matrix_say_so(name: str) -> None:
    with pytest.raises(UsageError) as raised:
        mixes.get_mix(name, LLM_MIXES)
    assert str(raised.value) == (
        f"quantization type {name.upper()} needs an importance matrix (local-llava imatrix makes one, which convert "
        f"and quantize take with --imatrix); without one, use one of {LLM_NAMES}"
    )
    assert mixes.get_mix(name, LLM_MIXES, guided=True).name == name.upper()


ALL_TYPES = [T[name] for name in ggml_rows.QUANTIZABLE.values()]


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
        f"{shown} is not a weight; the file is damaged"
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
        (T.Q5_K, 1e5, 1e9),
        (T.Q5_1, 6e4, 3e6),
        (T.Q5_0, 5e5, 2e6),
        (T.Q4_K, 1e5, 1e9),
        (T.Q4_1, 6e4, 1e6),
        (T.Q4_0, 5e5, 6e5),
        (T.IQ4_NL, 5e6, 1e7),
        (T.IQ4_XS, 1e8, 1e9),
        (T.Q3_K, 5e6, 1e9),
        (T.IQ3_S, 1e5, 1e9),
        (T.IQ3_S, 1e5, 1e20),  # here ggml would abort
        (T.Q2_K, 1e5, 1e9),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_what_a_type_cannot_hold_is_refused(type: T, fits: float, too_large: float, sign: int) -> None:
    data = quantize.encode(holding(sign * fits, type), 2, 5)
    assert ggml_rows.validate_row_data(int(type), data)
    with pytest.raises(
        CheckpointError, match=r"\(blk\.0\.attn_q\.weight\), row 3.* (does not fit into|is not a weight)"
    ):
        quantize.encode(holding(sign * too_large, type), 2, 5)


@pytest.mark.parametrize("type", [T.Q2_K, T.Q4_K, T.Q5_K, T.Q4_1, T.Q5_1])
def test_a_minimum_that_overflows_is_refused(type: T) -> None:
    """Equal values need no scale, only the minimum that these types store beside it."""
    with pytest.raises(CheckpointError, match=r"row 0: 9e\+08 does not fit into"):
        quantize.encode(tensor("a", np.full((2, 256), -9e8, np.float32), type), 0, 2)


@settings(max_examples=150, deadline=None)
@given(
    type=st.sampled_from([T[name] for name in ggml_rows.QUANTIZABLE.values() if T[name] not in mixes.FLOATS]),
    exponent=st.floats(0, 30),
    seed=st.integers(0, 2**32 - 1),
)
def test_refused_exactly_when_ggml_finds_the_result_invalid(type: T, exponent: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = (rng.standard_normal((2, 256)) * rng.choice([0, 1], 256) * 10**exponent).astype(np.float32)
    # From there on ggml makes zeros of some blocks, or aborts.
    valid = np.abs(rows).max() < 2**30 and ggml_rows.validate_row_data(int(type), quantize.encode_rows(type, rows))
    if valid:
        quantize.encode(tensor("a", rows, type), 0, 2)
    else:
        with pytest.raises(CheckpointError, match="does not fit into"):
            quantize.encode(tensor("a", rows, type), 0, 2)


def test_every_type_that_a_mix_can_give_has_its_check() -> None:
    bases = {mix.base for mix in (*LLM_MIXES.values(), *MMPROJ_MIXES.values())}
    tables = [rules for mix in LLM_MIXES.values() for rules in (*mix.rules.values(), *mix.guided_rules.values())]
    ruled = {type for rules in tables for _, type in rules} | {mix.head for mix in LLM_MIXES.values()}
    reachable = bases | ruled | {T.Q8_0} | set(tensor_types._ATTN_V_OF_70B.values())
    reachable |= {tensor_types._FALLBACK.get(type, type) for type in reachable}
    all_types = {*ALL_TYPES, *(T[name] for name in ggml_rows.GUIDED.values())}
    assert reachable <= all_types
    assert all_types - set(mixes.FLOATS) == set(quantize._SCALES)


def test_bytes_that_are_there_are_not_made_anew() -> None:
    rows = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    packed = ggml_rows.quantize_chunk(ggml.Q8_0, rows)
    values = ggml_rows.dequantize(ggml.Q8_0, packed).reshape(4, 64)
    copied = TensorPlan("a", (4, 64), T.Q8_0, lambda a, b: values[a:b], "s", lambda a, b: packed[a:b].reshape(-1))
    assert np.array_equal(quantize.encode(copied, 1, 3), packed[1:3].reshape(-1))
    values[2, 5] = np.nan
    with pytest.raises(CheckpointError, match="row 2, column 5: nan is not a weight"):
        quantize.encode(copied, 1, 3)


def test_a_loader_that_gives_other_rows_is_a_defect() -> None:
    short = TensorPlan("a", (4, 32), T.F32, lambda start, stop: np.zeros((1, 32), np.float32), "source")
    with pytest.raises(ValueError, match="rows 0 to 4 came as"):
        quantize.encode(short, 0, 4)
