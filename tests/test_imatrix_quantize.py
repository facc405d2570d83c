"""Quantizing under an importance matrix, against `llama_model_quantize` under the same one, and what is refused."""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_quantize import UNGUIDED, Model, compare, contents, llama_quantize, quiet, same_files, tensor
from llava_checkpoints import random_model, save
from numpy.typing import NDArray

from local_llava import ggml, ggml_rows, imatrix
from local_llava.convert import Overrides, convert, quantize, quantize_gguf
from local_llava.convert.imatrix import ImportanceMatrix, read_imatrix
from local_llava.convert.mixes import FLOATS, LLM_MIXES
from local_llava.convert.tensor_types import _role
from local_llava.convert.write import write
from local_llava.errors import CheckpointError, ModelFileError, UsageError


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    with quiet():
        yield


MODELS = {
    "grouped by four": Model(n_ff=256, n_layer=16),
    "tied": Model(n_layer=8, tied=True),
    "phi3": Model(n_layer=9, n_head_kv=8, architecture="phi3"),
}
LARGE = Model(n_ff=256, n_layer=80, n_head=64, n_head_kv=8)
QUANTIZED = [name for name, mix in LLM_MIXES.items() if mix.base not in FLOATS]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("quant", QUANTIZED)
def test_whole_files_equal_those_of_llama_cpp(name: str, quant: str, tmp_path: Path) -> None:
    compare(MODELS[name], quant, tmp_path, matrix=MODELS[name].matrix())


@pytest.mark.parametrize("quant", [name for name in LLM_MIXES if name not in UNGUIDED])
def test_rows_that_blocks_do_not_divide(quant: str, tmp_path: Path) -> None:
    model = Model(n_embd=320, n_ff=352, n_layer=8)
    compare(model, quant, tmp_path, matrix=model.matrix())


@pytest.mark.parametrize("quant", ["Q4_K_M", "Q2_K_S", "IQ3_XXS", "IQ3_XS", "IQ2_XS"])
def test_a_model_of_70b(quant: str, tmp_path: Path) -> None:
    compare(LARGE, quant, tmp_path, matrix=LARGE.matrix())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    model=st.builds(
        Model,
        n_embd=st.sampled_from([256, 288, 512]),
        n_ff=st.sampled_from([40, 256, 768]),
        n_layer=st.integers(1, 24),
        n_head=st.just(16),
        n_head_kv=st.sampled_from([1, 4, 8, 16]),
        tied=st.booleans(),
        architecture=st.sampled_from(["llama", "phi3", "qwen2"]),
    ),
    quant=st.sampled_from(QUANTIZED),
    seed=st.integers(0, 1000),
    types=st.dictionaries(
        st.sampled_from(["attn_v", "ffn_down", r"blk\.[13]\.", "ffn_(up|gate)"]),
        st.sampled_from(["IQ2_XXS", "IQ1_S", "IQ1_M", "Q4_K", "IQ3_S", "Q2_K"]),
        max_size=2,
    ),
)
def test_any_model_equals_llama_cpp(model: Model, quant: str, seed: int, types: dict[str, str], tmp_path: Path) -> None:
    compare(model, quant, tmp_path, Overrides(types), model.matrix(seed))


def test_the_matrix_and_the_rules_do_something() -> None:
    """Guards the comparisons above: each rule that a matrix brings decides about a tensor, and the bytes differ."""
    made = [(model, model.tensors(), model.matrix()) for model in MODELS.values()]
    for name, mix in LLM_MIXES.items():
        expected = {
            (role, type) for role in {*mix.rules, *mix.guided_rules} for _, type in mix.rules_of(role, guided=True)
        }
        met = set()
        for model, tensors, matrix in made:
            types = model.types(name, tensors, matrix=matrix).types
            met |= {(_role(tensor), type) for tensor, type in types.items()}
        assert expected <= met, name
    model, rows = MODELS["tied"], np.random.default_rng(0).standard_normal((2, 256)).astype(np.float32)
    importance = model.matrix().importance["blk.0.attn_q.weight"]
    for number in (10, 11, 12, 13, 14, 2, 3, 6, 7, 20, 21, 23):
        plain, guided = (ggml_rows.quantize_chunk(number, rows, i) for i in (None, importance))
        assert not np.array_equal(plain, guided), ggml_rows.QUANTIZABLE[number]


def test_tensors_without_an_importance_are_made_without(tmp_path: Path) -> None:
    """As is the output unless llama-imatrix was told to process it, and a token_embd of another size."""
    model = MODELS["grouped by four"]
    whole = model.matrix()
    ones = np.ones(256, np.float32)
    part = {name: values for name, values in whole.importance.items() if "attn_k" not in name and ".3." not in name}
    for more in ({}, {"output.weight": ones}, {"token_embd.weight": ones[:7]}, {"token_embd.weight": ones}):
        compare(model, "Q3_K_M", tmp_path, matrix=replace(whole, importance={**part, **more}))
    notes = model.types("Q3_K_M", model.tensors(), matrix=replace(whole, importance=part)).notes
    assert notes == ("some/imatrix.gguf has nothing for 22 tensors (blk.0.attn_k.weight, ...): made without",)
    assert model.types("Q3_K_M", model.tensors(), matrix=whole).notes == ()


def test_metadata_without_datasets_and_chunks(tmp_path: Path) -> None:
    model = Model(n_layer=1)
    long = replace(model.matrix(), datasets=(), n_chunks=0, path=Path("a" * 100, "b" * 60))
    compare(model, "Q4_0", tmp_path, matrix=long)
    # llama.cpp cuts a character in two there.
    assert long.fields()[0].value == b"a" * 100 + b"/" + b"b" * 26
    assert replace(long, path=Path("a" * 126 + "é")).fields()[0].value == b"a" * 126
    assert [field.key for field in long.fields()] == ["quantize.imatrix.file", "quantize.imatrix.entries_count"]


# ---- what is refused ----


@pytest.mark.parametrize("quant", [name for name in LLM_MIXES if name not in UNGUIDED])
def test_types_that_llama_cpp_refuses_without_a_matrix(quant: str, tmp_path: Path) -> None:
    model = MODELS["grouped by four"]
    tensors = model.tensors()
    write(model.plan("F32", tensors), tmp_path / "in.gguf")
    assert not llama_quantize(tmp_path / "in.gguf", tmp_path / "theirs.gguf", quant)
    with pytest.raises(
        UsageError, match=rf"quantization type {quant} needs an importance matrix \(local-llava imatrix"
    ):
        quantize_gguf(tmp_path / "in.gguf", tmp_path / "out.gguf", quant)
    with pytest.raises(
        UsageError, match=r"blk\.\d+\.\w+\.weight as \w+ needs an importance matrix: local-llava imatrix"
    ):
        model.types(quant, tensors)


def test_types_that_llama_cpp_does_not_refuse_need_none(tmp_path: Path) -> None:
    """The other way round is what `test_quantize` compares."""
    assert [name for name in LLM_MIXES if name not in UNGUIDED] == [
        *("IQ3_XS", "IQ3_XXS", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")
    ]
    model = Model(n_layer=1)
    # The embeddings and the output are never in a matrix: what can be is made without.
    for type in ("IQ2_S", "IQ3_XXS", "IQ1_M"):
        compare(model, "Q4_K_M", tmp_path, Overrides(embedding_type=type))
    for type in ("IQ2_XXS", "IQ2_XS", "IQ1_S"):  # here ggml would abort
        with pytest.raises(UsageError, match=f"token_embd.weight as {type} needs an importance matrix"):
            model.types("Q4_K_M", model.tensors(), Overrides(embedding_type=type))
        with pytest.raises(UsageError, match=f"imatrix.gguf: has nothing for output.weight, which {type} needs"):
            model.types("Q4_K_M", model.tensors(), Overrides(output_type=type), model.matrix())
        with pytest.raises(UsageError, match=rf"blk\.0\.attn_v\.weight as {type} needs an importance matrix"):
            model.types("Q4_K_M", model.tensors(), Overrides({"attn_v": type}))


def wrong(model: Model, **importance: NDArray[np.float32] | None) -> ImportanceMatrix:
    """The model's matrix with some other entries."""
    matrix = model.matrix()
    changed = {**matrix.importance, **{f"blk.0.{name}.weight": values for name, values in importance.items()}}
    return replace(matrix, importance={name: values for name, values in changed.items() if values is not None})


def test_matrices_of_other_models(tmp_path: Path) -> None:
    model = Model(n_layer=2)
    tensors = model.tensors()
    with pytest.raises(UsageError, match=r"has nothing for blk\.0\.attn_k\.weight, which IQ2_XS needs"):
        model.types("IQ2_XS", tensors, matrix=wrong(model, attn_k=None))
    short = wrong(model, ffn_down=np.ones(256, np.float32))
    with pytest.raises(ModelFileError, match=r"256 values for blk\.0\.ffn_down\.weight, which has 512 columns: it was"):
        model.types("Q4_K_M", tensors, matrix=short)
    with pytest.raises(AssertionError):  # llama.cpp refuses it too
        compare(Model(n_layer=2), "Q4_K_M", tmp_path, matrix=short)
    strange = replace(model.matrix(), importance={"blk.7.attn_q.weight": np.ones(256, np.float32)})
    with pytest.raises(ModelFileError, match="has nothing for this model's tensors: it was made with another model"):
        model.types("Q4_K_M", tensors, matrix=strange)
    larger = Model(n_layer=3).matrix()
    assert model.types("Q4_K_M", tensors, matrix=larger).notes == (
        "some/imatrix.gguf is also of 7 tensors (blk.2.attn_output.weight, ...) that this model lacks: is it the right "
        "one?",
    )
    for quant in ("F16", "Q8_0"):
        notes = model.types(quant, tensors, Overrides(output_type="Q8_0"), model.matrix()).notes
        assert notes[-1] == ("some/imatrix.gguf changes nothing: no type is made here that takes an importance matrix")


def test_weights_that_are_too_large_under_a_matrix() -> None:
    """Where ggml would abort, or its products overflow."""
    rows = np.full((2, 256), 0.5, np.float32)
    rows[1, 3] = 2.0**24
    for type in (T.IQ1_S, T.IQ2_XS, T.Q4_K):
        plan = replace(tensor("blk.0.attn_q.weight", rows, type), importance=np.ones(256, np.float32))
        with pytest.raises(CheckpointError, match=r"row 1, column 3: 1.67772e\+07 does not fit into"):
            quantize.encode(plan, 0, 2)
    with pytest.raises(CheckpointError, match="does not fit into IQ1_M"):
        quantize.encode(tensor("token_embd.weight", rows, T.IQ1_M), 0, 2)


@pytest.mark.parametrize("name", ggml_rows.GUIDED.values())
def test_refused_exactly_when_ggml_finds_the_result_invalid(name: str) -> None:
    type, rng = T[name], np.random.default_rng(1)
    n_valid = n_invalid = 0
    for exponent in np.linspace(4, 8, 40):
        wide = rng.standard_normal((2, 256)) * rng.choice([0, 1], 256) * 10**exponent
        rows = np.clip(wide, -(2**24) + 2, 2**24 - 2).astype(np.float32)
        importance = (rng.standard_normal(256) ** 2).astype(np.float32)
        plan = replace(tensor("a", rows, type), importance=importance)
        if ggml_rows.validate_row_data(int(type), quantize.encode_rows(type, rows, importance)):
            n_valid += 1
            quantize.encode(plan, 0, 2)
        else:
            n_invalid += 1
            with pytest.raises(CheckpointError, match="does not fit into"):
                quantize.encode(plan, 0, 2)
    assert n_valid and (n_invalid or name == "IQ3_XXS")  # which holds what is let through


TOP, MOST = 2.0**24 - 2, ggml_rows.MAX_IMPORTANCE
IMPORTANCES: tuple[Callable[[np.random.Generator], Any], ...] = (
    lambda rng: MOST * rng.choice([0, 1], 256),
    lambda rng: np.repeat(rng.choice([0, 1e-42, MOST], 16), 16),
    lambda rng: 2.0 ** rng.uniform(-149, 39.9, 256),
    lambda rng: np.full(256, rng.choice([0, 1e-45, MOST])),
)
WEIGHTS: tuple[Callable[[np.random.Generator], Any], ...] = (
    lambda rng: TOP * rng.choice([-1, 0, 1], (2, 256)),
    lambda rng: rng.choice([-1, 1], (2, 256)) * 2.0 ** rng.uniform(-100, 23.9, (2, 256)),
    lambda rng: np.clip(rng.standard_normal((2, 256)) * 2.0 ** rng.uniform(-60, 23), -TOP, TOP),
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="ggml's tables, which take seconds to make, are there after a fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("number", [*ggml_rows.GUIDED, 21, 20, 23, 10, 11, 12, 13, 14])
def test_ggml_does_not_abort_on_what_is_let_through(number: int) -> None:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    rng = np.random.default_rng(seed)
    ggml_rows.quantize_chunk(number, np.zeros((1, 256), np.float32), np.ones(256, np.float32))
    child = os.fork()
    if child == 0:
        try:
            for weights, importance, _ in itertools.product(WEIGHTS, IMPORTANCES, range(15)):
                rows, columns = (make(rng).astype(np.float32) for make in (weights, importance))
                ggml_rows.quantize_chunk(number, rows, columns)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0, f"seed {seed}"


def test_ggml_s_list_of_types_is_ours() -> None:
    if sys.platform == "linux":
        needs = ggml._open(ggml.library_dir() / "libllama.so").ggml_quantize_requires_imatrix
        needs.restype = ctypes.c_bool
        made = {*ggml_rows.QUANTIZABLE, *ggml_rows.GUIDED}
        assert {number for number in made if needs(number)} == ggml_rows.ALWAYS_GUIDED


# ---- from the file to the file ----


def saved(path: Path, importance: Mapping[str, NDArray[np.float32]]) -> Path:
    """The mean squares of 1024 rows, so that they are the same again when they are read."""
    sums = {name: values * np.float32(1024) for name, values in importance.items()}
    imatrix.Imatrix(sums, dict.fromkeys(sums, 1024), ("pictures", "more")).save(path)
    return path


def test_quantize_gguf_equals_llama_cpp(tmp_path: Path) -> None:
    model = MODELS["tied"]
    write(model.plan("F16", model.tensors()), tmp_path / "in.gguf")
    matrix = read_imatrix(saved(tmp_path / "imatrix.gguf", model.matrix().importance))
    assert matrix.n_chunks == 2
    for quant in ("IQ2_M", "Q4_0"):
        assert llama_quantize(tmp_path / "in.gguf", tmp_path / "theirs.gguf", quant, matrix=matrix)
        arguments = {"imatrix": tmp_path / "imatrix.gguf", "threads": 2, "overwrite": True}
        quantize_gguf(tmp_path / "in.gguf", tmp_path / "ours.gguf", quant, **arguments)
        same_files(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")
    # Once more, from a file that says what it was made with.
    quantize_gguf(tmp_path / "in.gguf", tmp_path / "q8.gguf", "Q8_0", imatrix=tmp_path / "imatrix.gguf")
    assert llama_quantize(
        tmp_path / "q8.gguf", tmp_path / "theirs.gguf", "Q4_K_S", allow_requantize=True, matrix=matrix
    )
    quantize_gguf(tmp_path / "q8.gguf", tmp_path / "ours.gguf", "Q4_K_S", allow_requantize=True, **arguments)
    same_files(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")


def test_converting_equals_quantizing(tmp_path: Path) -> None:
    """The checkpoint's columns are those of the GGUF, whose rows are in another order; the mmproj does not change."""
    text = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
    checkpoint = save(random_model(text), tmp_path / "model")
    plain = convert(checkpoint, tmp_path / "plain", quant="F32", mmproj_quant="Q8_0")
    rng = np.random.default_rng(0)
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    importance = {
        f"blk.{i}.{name}.weight": (rng.standard_normal(256) ** 2).astype(np.float32) for i in (0, 1) for name in names
    }
    path = saved(tmp_path / "imatrix.gguf", importance)
    made = convert(checkpoint, tmp_path / "made", quant="iq3_xxs", mmproj_quant="Q8_0", imatrix=path)
    assert llama_quantize(plain.model, tmp_path / "theirs.gguf", "IQ3_XXS", matrix=read_imatrix(path))
    (ours, about), (theirs, about_theirs) = contents(made.model), contents(tmp_path / "theirs.gguf")
    assert ours == theirs
    kept = {key: value for key, value in about.items() if key.startswith("quantize.")}
    assert len(kept) == 4 and kept.items() <= about_theirs.items()
    assert made.mmproj.read_bytes() == plain.mmproj.read_bytes()
    with pytest.raises(UsageError, match="is an mmproj: importance matrices are of language models"):
        quantize_gguf(plain.mmproj, tmp_path / "out.gguf", "Q6_K", imatrix=path)
