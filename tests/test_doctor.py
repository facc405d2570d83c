"""`local-llava doctor`: what it tells, as people and programs read it, and its test of the computer."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llava_checkpoints import TINY
from typer.testing import CliRunner

from local_llava import cli, devices, diagnosis, graphics, memory, selftest, tuning
from local_llava.convert import convert
from local_llava.devices import Device
from local_llava.graphics import Graphics
from local_llava.types import ModelFiles, Options

CARD = Device(1, "CUDA0", "NVIDIA GeForce RTX 4090", "gpu", "CUDA", 20 * 10**9, 24 * 10**9, "0000:01:00.0")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return convert(TINY, tmp_path_factory.mktemp("pair"), quant="F16")


def doctor(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "local_llava.cli", "doctor", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "LOCAL_LLAVA_HOME": str(home)},
        timeout=300,
    )


def test_it_tells_what_there_is(files: ModelFiles, tmp_path: Path) -> None:
    done = doctor(tmp_path, "--model", str(files.model))
    assert done.returncode == 0 and not done.stderr
    for pattern in (
        r"^local-llava \S+, llama-cpp-python \S+, Python 3\.",
        r"^llama\.cpp has: .*CPU",
        r"^CPU: .+ threads, of .+ of memory free$",
        r"m?\.gguf:\n    context 1024 tokens, 8 answers at the same time, KV cache F16 of 5632 tokens\n",
        r"    memory of the computer: [\d.]+ MB \(weights [\d.]+ MB, KV cache 12\.1 MB, computing ",
    ):
        assert re.search(pattern, done.stdout, re.MULTILINE), (pattern, done.stdout)


def test_json_holds_all_of_it(files: ModelFiles, tmp_path: Path) -> None:
    done = doctor(tmp_path, "--model", str(files.model), "--json")
    told = json.loads(done.stdout)
    assert done.returncode == 0 and not done.stderr
    assert told["cores"] == devices.physical_cores() and "CPU" in told["backends"] and told["free"] > 0
    (plan,) = told["plans"]
    placed = plan["placement"]
    assert (plan["n_layers"], placed["n_ctx"], placed["parallel"], placed["kv_type"]) == (5, 1024, 8, "F16")
    assert all("handle" not in device for device in told["devices"])


def test_kept_models_and_else_the_built_in_one_are_planned_for(tmp_path: Path) -> None:
    first = json.loads(doctor(tmp_path, "--json").stdout)
    assert [plan["name"] for plan in first["plans"]] == ["the built-in model"]
    then = json.loads(doctor(tmp_path, "--json").stdout)
    assert [plan["name"] for plan in then["plans"]] == ["tiny-llava (Q4_K_M + F16)"], "it was converted, and kept"


def test_a_model_that_is_none(tmp_path: Path) -> None:
    done = doctor(tmp_path, "--model", str(tmp_path / "nothing.gguf"))
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "nothing.gguf" in done.stderr


def test_damaged_and_too_large_models_have_a_line_in_the_plan(
    files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(files.model.read_bytes()[:1000])
    pairs = [("a", ModelFiles(damaged, files.mmproj)), ("b", files)]
    monkeypatch.setattr(memory, "available", lambda: 1_000_000)
    told = "\n".join(diagnosis.lines(diagnosis.diagnose(pairs, Options())))
    assert re.search(r"a:\n    cannot be loaded: .*damaged\.gguf", told)
    assert re.search(r"b:\n    cannot be loaded: .*of memory are needed for a context of 1024 tokens", told)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, files: ModelFiles) -> Any:
    """What is told of a computer with other hardware, and another build of llama-cpp-python."""

    def lines(seen: list[Graphics], known: list[Device], backends: list[str]) -> str:
        cpu = next(device for device in devices.devices() if device.kind == "cpu")
        with monkeypatch.context() as patch:
            patch.setattr(graphics, "visible", lambda: seen)
            patch.setattr(devices, "devices", lambda: [*known, cpu])
            patch.setattr(devices, "backends", lambda: [*backends, "CPU"])
            return "\n".join(diagnosis.lines(diagnosis.diagnose([("it", files)], Options())))

    return lines


def test_a_gpu_that_is_not_used_gets_the_command(told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    text = told([Graphics("NVIDIA", "NVIDIA GeForce RTX 4090")], [], [])
    assert "GPU: none that llama.cpp can use" in text
    assert "There is a GPU that is not used: NVIDIA GeForce RTX 4090" in text
    command = 'CMAKE_ARGS="-DGGML_CUDA=on" pip install --force-reinstall --no-cache-dir llama-cpp-python=='
    assert command in text and "-DGGML_VULKAN=on" in text
    text = told([Graphics("AMD", "AMD GPU 744c")], [], [])
    assert "-DGGML_HIP=on" in text and "-DGGML_VULKAN=on" in text and "CUDA" not in text
    monkeypatch.setattr(sys, "platform", "win32")
    text = told([Graphics("Intel", "Intel GPU")], [], [])
    assert '$env:CMAKE_ARGS="-DGGML_VULKAN=on"; pip install' in text


def test_what_can_be_built_now_comes_first(told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda tool: tool if tool == "glslc" else None)
    text = told([Graphics("NVIDIA", "NVIDIA GPU")], [], [])
    assert text.index("GGML_VULKAN") < text.index("GGML_CUDA")


def test_a_driver_that_finds_nothing_is_told(told: Any) -> None:
    text = told([Graphics("NVIDIA", "NVIDIA GPU")], [], ["CUDA"])
    assert "llama-cpp-python has CUDA, but finds no GPU with it: look at the driver" in text
    assert "pip install" not in text


def test_a_gpu_that_is_used_needs_no_advice(told: Any) -> None:
    seen = [Graphics("Intel", "Intel GPU"), Graphics("NVIDIA", "NVIDIA GeForce RTX 4090")]
    text = told(seen, [CARD], ["CUDA"])
    assert "not used" not in text
    assert "GPU: CUDA0, NVIDIA GeForce RTX 4090; 20.0 GB of 24.0 GB free" in text
    assert "    5 of 5 layers on the GPU; the tower on the GPU" in text
    assert re.search(r"    memory of CUDA0: [\d.]+ MB \(weights", text)


def test_what_was_tuned_is_told(told: Any, files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_LLAVA_HOME", str(tmp_path))
    tuning.save(files, {"n_batch": 64}, {})
    # Another computer finds nothing, so this one is asked.
    text = "\n".join(diagnosis.lines(diagnosis.diagnose([("it", files)], Options())))
    assert "    measured by tune: n_batch 64" in text


# --- the self-test ---


def test_the_self_test_passes_here(tmp_path: Path) -> None:
    done = doctor(tmp_path, "--self-test", "--json")
    checks = json.loads(done.stdout)["self_test"]
    assert done.returncode == 0 and len(checks) >= 2 and all(check["passed"] for check in checks), checks


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("LOCAL_LLAVA_HOME", str(tmp_path))
    monkeypatch.setattr(selftest, "N_SCENES", 2)
    return lambda: CliRunner().invoke(cli.app, ["doctor", "--self-test"])


def test_wrong_answers_fail_it(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = selftest._questions
    monkeypatch.setattr(
        selftest, "_questions", lambda: [selftest._Question(q.picture, q.text, "Purple.") for q in asked()]
    )
    result = run()
    assert result.exit_code == 1 and "FAILED: answers of the CPU: 0 of 6 are right" in result.output


@pytest.mark.parametrize("wrong", ["image embeddings", "logits", "answers", "nothing"])
def test_a_gpu_that_computes_otherwise_fails_it(wrong: str, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none here: the CPU stands in, and what it gives is changed."""
    compute = selftest._answers
    computed: list[Any] = []

    def changed(files: ModelFiles, questions: Any, layers: selftest.Layers) -> Any:
        if not computed:
            computed.append(compute(files, questions, "none"))
        given = computed[0]
        features, logits, texts = given.features, given.logits, given.texts
        if layers == "all":
            features = features * np.float32(1.01) if wrong == "image embeddings" else features
            logits = logits + np.float32(0.2) if wrong == "logits" else logits
            texts = [text.upper() for text in texts] if wrong == "answers" else texts
        return selftest._Answers(features, logits, texts)

    monkeypatch.setattr(selftest, "_answers", changed)
    monkeypatch.setattr(selftest, "_reuse", lambda *_: iter(()))
    monkeypatch.setattr(selftest.devices, "gpus", lambda: [CARD])
    result = run()
    failed = [line for line in result.output.splitlines() if line.startswith("FAILED")]
    assert result.exit_code == (wrong != "nothing")
    assert [line.startswith(f"FAILED: {wrong} (GPU, all") for line in failed] == [True] * (wrong != "nothing")
