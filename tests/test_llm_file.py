"""llm_file's architectures besides llama: what llama.cpp loads passes, what it aborts on or gets wrong does not."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from gguf_bytes import TinyLLM
from test_gguf_file import load_all, refusal, write

from local_llava.errors import ModelFileError
from local_llava.gguf_file import GGUFFile
from local_llava.llm_file import LLMConfig, check_llm


def llama() -> TinyLLM:
    return TinyLLM()


def phi3(factors: bool = False) -> TinyLLM:
    """As llama.cpp's converter makes it of a Phi-3: 4 heads of 16, 2 for keys and values."""
    model = renamed("phi3")
    model.entries["phi3.attention.sliding_window"] = ("u32", 0)
    for i in range(model.n_layer):
        for name in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up"):
            del model.tensors[f"blk.{i}.{name}.weight"]
        model.add(f"blk.{i}.attn_qkv.weight", 128, 64)
        model.add(f"blk.{i}.ffn_up.weight", 192, 64)
    if factors:
        model.entries["phi3.context_length"] = ("u32", 131072)
        model.entries["phi3.rope.scaling.original_context_length"] = ("u32", 4096)
        model.entries["phi3.rope.scaling.attn_factor"] = ("f32", 1.19)
        model.entries["phi3.attention.sliding_window"] = ("u32", 262144)
        model.add("rope_factors_long.weight", 8)
        model.add("rope_factors_short.weight", 8)
    return model


def qwen2() -> TinyLLM:
    model = renamed("qwen2")
    for i in range(model.n_layer):
        for name, size in (("attn_q", 64), ("attn_k", 32), ("attn_v", 32)):
            model.add(f"blk.{i}.{name}.bias", size)
    return model


def renamed(architecture: str) -> TinyLLM:
    model = TinyLLM()
    model.entries["general.architecture"] = ("str", architecture)
    model.entries = {key.replace("llama.", f"{architecture}.", 1): value for key, value in model.entries.items()}
    return model


def edited(model: TinyLLM, **entries: tuple[str, Any] | None) -> TinyLLM:
    """With entries set or, for None, removed; two underscores stand for a dot."""
    for key, value in entries.items():
        name = key.replace("__", ".")
        if value is None:
            del model.entries[name]
        else:
            model.entries[name] = value
    return model


def without(model: TinyLLM, *tensors: str) -> TinyLLM:
    for name in tensors:
        del model.tensors[name]
    return model


def added(model: TinyLLM, name: str, *shape: int, type: int | None = None) -> TinyLLM:
    model.add(name, *shape, type=type)
    return model


def check(path: Path) -> LLMConfig:
    return check_llm(GGUFFile.open(path))


GOOD: dict[str, tuple[Callable[[], TinyLLM], int]] = {
    # What makes the file -> the longest context that llama.cpp computes as the model was trained.
    "phi3": (phi3, 256),
    "phi3 of before the window was written": (
        lambda: edited(phi3(), phi3__attention__sliding_window=None, phi3__rope__dimension_count=None),
        256,
    ),
    "phi3 with a window": (lambda: edited(phi3(), phi3__attention__sliding_window=("u32", 47)), 47),
    "phi3 with two sets of factors": (lambda: phi3(factors=True), 4096),
    "phi3 of an odd original context": (
        lambda: edited(phi3(True), phi3__rope__scaling__original_context_length=("u32", 4095)),
        3840,
    ),
    "phi3 that says what its factors are": (
        lambda: edited(phi3(True), phi3__rope__scaling__type=("str", "longrope")),
        4096,
    ),
    "phi3 with whole heads": (
        lambda: edited(phi3(), phi3__attention__key_length=("u32", 16), phi3__attention__value_length=("u32", 16)),
        256,
    ),
    "phi3 of which a part is rotated": (lambda: edited(phi3(), phi3__rope__dimension_count=("u32", 12)), 256),
    "phi3 with biases": (lambda: added(added(phi3(), "blk.0.attn_qkv.bias", 128), "blk.1.attn_qkv.bias", 128), 256),
    "phi3, tied": (lambda: without(phi3(), "output.weight"), 256),
    "qwen2": (qwen2, 256),
    "qwen2, tied": (lambda: without(qwen2(), "output.weight"), 256),
    "qwen2 with all biases": (lambda: added(qwen2(), "output.bias", 265), 256),
    "qwen2 without biases": (lambda: renamed("qwen2"), 256),
    "qwen2, stretched": (
        lambda: edited(
            qwen2(),
            qwen2__rope__scaling__type=("str", "yarn"),
            qwen2__rope__scaling__factor=("f32", 4.0),
            qwen2__rope__scaling__original_context_length=("u32", 64),
        ),
        256,
    ),
    "llama 3.1": (lambda: added(llama(), "rope_freqs.weight", 8), 256),
    "llama, stretched": (
        lambda: edited(
            llama(), llama__rope__scaling__type=("str", "linear"), llama__rope__scaling__factor=("f32", 2.0)
        ),
        256,
    ),
    "llama with a window, which llama.cpp does not read": (
        lambda: edited(llama(), llama__attention__sliding_window=("u32", 47)),
        256,
    ),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each file is loaded in a forked process")
def test_files_of_other_tools_pass_and_load(tmp_path: Path) -> None:
    paths = []
    for name, (make, n_ctx) in GOOD.items():
        path = tmp_path / f"{name.replace(' ', '-')}.gguf"
        path.write_bytes(make().bytes)
        config = check(path)
        assert (config.architecture, config.n_ctx_train) == (name.split()[0].rstrip(","), n_ctx), name
        assert (config.n_embd, config.n_head, config.n_head_kv, config.n_embd_head) == (64, 4, 2, 16)
        assert (config.n_ff, config.n_layer, config.tied) == (96, 2, "tied" in name)
        paths.append(path)
    results = load_all(paths)
    assert set(results.values()) == {"loaded"}, results


BAD: dict[str, tuple[Callable[[], TinyLLM], str]] = {
    "other architecture": (lambda: renamed("gemma"), "general.architecture is 'gemma'; supported: llama, phi3, qwen2"),
    "keys of another": (
        lambda: edited(llama(), general__architecture=("str", "phi3")),
        "phi3.context_length is missing; a language model has it, as u32",
    ),
    "experts": (lambda: edited(qwen2(), qwen2__expert_count=("u32", 8)), "qwen2.expert_count is 8: mixtures of"),
    "not causal": (lambda: edited(phi3(), phi3__attention__causal=("bool", False)), "phi3.attention.causal is False"),
    "scaling of phi3": (
        lambda: edited(phi3(), phi3__rope__scaling__type=("str", "yarn")),
        "phi3.rope.scaling.type is 'yarn'; supported: none, linear, longrope",
    ),
    "scaling of qwen2": (
        lambda: edited(qwen2(), qwen2__rope__scaling__type=("str", "longrope")),
        "qwen2.rope.scaling.type is 'longrope'; supported: none, linear, yarn",
    ),
    "odd rotation": (
        lambda: edited(phi3(), phi3__rope__dimension_count=("u32", 7)),
        "phi3.rope.dimension_count is 7; an even number of at most a head's width, 16, is needed",
    ),
    "rotation of more than there is": (
        lambda: edited(phi3(), phi3__rope__dimension_count=("u32", 32)),
        "phi3.rope.dimension_count is 32; an even number",
    ),
    "rotation of a part in qwen2": (
        lambda: edited(qwen2(), qwen2__rope__dimension_count=("u32", 8)),
        "qwen2.rope.dimension_count is 8; a head's width, 16, is needed",
    ),
    "wide heads in phi3": (
        lambda: edited(phi3(), phi3__attention__key_length=("u32", 32), phi3__attention__value_length=("u32", 32)),
        "phi3.attention.key_length is 32; 4 heads must make 64",
    ),
    "wide heads in qwen2": (
        lambda: edited(qwen2(), qwen2__attention__key_length=("u32", 32)),
        "qwen2.attention.key_length is 32; 4 heads must make 64",
    ),
    "wide values": (
        lambda: edited(qwen2(), qwen2__attention__value_length=("u32", 32)),
        "qwen2.attention.value_length is 32; a head's width, 16, is needed",
    ),
    "one set of factors": (
        lambda: without(phi3(factors=True), "rope_factors_short.weight"),
        "tensor rope_factors_short.weight is missing; its shape is [8]",
    ),
    "factors of another size": (
        lambda: edited(phi3(factors=True), phi3__rope__dimension_count=("u32", 12)),
        "tensor rope_factors_long.weight has the shape [8]; it must be [6]",
    ),
    "factors from the first token on": (
        lambda: edited(phi3(True), phi3__rope__scaling__original_context_length=("u32", 255)),
        "phi3.rope.scaling.original_context_length is 255; with rope_factors_long.weight it must be 256 or more",
    ),
    "window of another type": (
        lambda: edited(phi3(), phi3__attention__sliding_window=("i32", 47)),
        "phi3.attention.sliding_window is stored as i32; it must be u32",
    ),
    "separate q, k and v in phi3": (
        lambda: without(phi3(), "blk.1.attn_qkv.weight"),
        "tensor blk.1.attn_qkv.weight is missing; its shape is [128, 64]",
    ),
    "gate apart in phi3": (
        lambda: added(phi3(), "blk.0.ffn_gate.weight", 96, 64),
        "tensor 'blk.0.ffn_gate.weight' is not part of a phi3 model of 2 layers",
    ),
    "half of gate and up": (
        lambda: added(phi3(), "blk.0.ffn_up.weight", 96, 64),
        "tensor blk.0.ffn_up.weight has the shape [96, 64]; it must be [192, 64]",
    ),
    "bias of another type": (
        lambda: added(qwen2(), "blk.0.attn_k.bias", 32, type=1),
        "tensor blk.0.attn_k.bias is F16; accepted: F32",
    ),
    "bias that qwen2 has not": (
        lambda: added(qwen2(), "blk.0.attn_output.bias", 64),
        "tensor 'blk.0.attn_output.bias' is not part of a qwen2 model",
    ),
    "factors in qwen2": (
        lambda: added(qwen2(), "rope_freqs.weight", 8),
        "tensor 'rope_freqs.weight' is not part of a qwen2 model",
    ),
    "long factors in llama": (
        lambda: added(llama(), "rope_factors_long.weight", 8),
        "tensor 'rope_factors_long.weight' is not part of a llama model",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(case: str, tmp_path: Path) -> None:
    make, problem = BAD[case]
    path = write(tmp_path, make().bytes)
    assert refusal(partial(check, path), path).startswith(problem)


def variants() -> Iterator[TinyLLM]:
    """Odd models that may pass: one or two values at random in each."""
    rng = random.Random(4)
    odd: dict[str, list[Any]] = {
        "u32": [0, 1, 2, 4, 8, 12, 14, 16, 32, 64, 96, 255, 256, 264, 2**16, 2**27, 2**31, 2**32 - 1],
        "f32": [0.0, -1.0, 1e-12, 1e-5, 0.1, 1.0, 1e4, 1e12, 1e30],
        "str": ["", "default", "none", "yarn", "linear", "longrope"],
    }
    optional = {
        "rope.scaling.type": "str",
        "rope.scaling.factor": "f32",
        "rope.scaling.original_context_length": "u32",
        "rope.scaling.attn_factor": "f32",
        "attention.key_length": "u32",
        "attention.value_length": "u32",
        "attention.sliding_window": "u32",
        "vocab_size": "u32",
    }
    while True:
        model = rng.choice([phi3, lambda: phi3(True), qwen2])()
        prefix = model.entries["general.architecture"][1] + "."
        for _ in range(rng.choice([1, 1, 2])):
            kinds = {k: kind for k, (kind, _) in model.entries.items() if kind in odd and k.startswith(prefix)}
            kinds |= {prefix + key: kind for key, kind in optional.items()}
            key = rng.choice(sorted(kinds))
            model.entries[key] = (kinds[key], rng.choice(odd[kinds[key]]))
        yield model


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each file is loaded in a forked process")
def test_what_passes_does_not_bring_llama_cpp_down(tmp_path: Path) -> None:
    paths: list[Path] = []
    for model in variants():
        path = tmp_path / f"{len(paths)}.gguf"
        path.write_bytes(model.bytes)
        try:
            check(path)
        except ModelFileError:
            continue
        paths.append(path)
        if len(paths) == 60:
            break
    results = load_all(paths)
    assert set(results.values()) == {"loaded"}, results


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each file is loaded in a forked process")
def test_what_is_refused_would_bring_it_down(tmp_path: Path) -> None:
    """The reason for the checks. When one no longer aborts llama.cpp, its check may be relaxed."""
    cases = {
        "separate": without(phi3(), "blk.1.attn_qkv.weight"),
        "rotation": edited(phi3(), phi3__rope__dimension_count=("u32", 32)),
        "part": edited(qwen2(), qwen2__rope__dimension_count=("u32", 8)),
    }
    paths = []
    for name, model in cases.items():
        paths.append(tmp_path / f"{name}.gguf")
        paths[-1].write_bytes(model.bytes)
        refusal(partial(check, paths[-1]), paths[-1])
    results = load_all(paths)
    assert {result.split()[0] for result in results.values()} <= {"died", "refused"}, results
    assert sum(result.startswith("died") for result in results.values()) >= 2, results
