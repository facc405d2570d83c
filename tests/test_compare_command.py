"""`local-llava compare` as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import many_commands
import pytest
import scenes
from faulty_ggufs import spoil
from PIL import Image

from local_llava.convert import quantize_gguf
from local_llava.types import ModelFiles

ROW = {
    *("model", "files", "quant", "mmproj_quant", "model_bytes", "mmproj_bytes", "matrix", "kl_mean", "kl_p99"),
    *("same_top", "same_answers", "perplexity", "perplexity_ratio", "feature_error", "decode_tokens_per_s"),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pictures")
    scenes.write(directory, seed=4, count=2, questions=2)
    return directory


@pytest.fixture(scope="module")
def quantized(tiny: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model that has no mmproj beside it."""
    return quantize_gguf(tiny.model, tmp_path_factory.mktemp("quantized") / "tiny-Q4_0.gguf", "Q4_0")


def run(*args: object, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "local_llava.cli", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )
    assert done.returncode == code, f"{done.returncode}: {done.stderr}"
    assert "Traceback" not in done.stderr
    return done


def test_json_and_plot(tiny: ModelFiles, quantized: Path, pictures: Path, tmp_path: Path) -> None:
    plot, temporary = tmp_path / "plot.png", tmp_path / "temporary"
    temporary.mkdir()
    questions = pictures / "questions.jsonl"
    done = run(
        *("compare", tiny.model, quantized, tiny.model.parent, "--images", pictures, "--questions", questions),
        *("--json", "--plot", plot, "--max-tokens", 8),
        TMPDIR=str(temporary),
    )
    values = json.loads(done.stdout)
    assert values.keys() == {"pictures", "questions", "positions", "reference", "models", "failed"}
    assert (values["pictures"], values["questions"], values["failed"]) == (2, 4, [])
    assert 8 <= values["positions"] <= 32
    assert all(row.keys() == ROW and row["files"].keys() == {"model", "mmproj"} for row in values["models"])
    assert values["reference"].keys() == ROW and values["reference"]["kl_mean"] == 0
    rounded, same = values["models"]
    assert rounded["quant"] == "Q4_0" and rounded["kl_mean"] > 0 and rounded["files"]["mmproj"] == str(tiny.mmproj)
    assert rounded["model_bytes"] == quantized.stat().st_size and rounded["matrix"] is None
    assert same["kl_mean"] == same["feature_error"] == 0 and same["same_top"] == same["perplexity_ratio"] == 1
    assert f"{tiny.model} answers\n" in done.stderr and f"{quantized} is compared\n" in done.stderr
    with Image.open(plot) as image:
        assert image.format == "PNG"
    assert not list(temporary.iterdir())


def test_a_table(tiny: ModelFiles, quantized: Path, pictures: Path) -> None:
    done = run("-q", "compare", tiny.model, quantized, "--images", pictures, "--mmproj", tiny.mmproj)
    heading, reference, model = done.stdout.splitlines()
    assert heading.split("  ")[0] == "MODEL" and heading.endswith("TOKENS/S")
    assert reference.startswith(str(tiny.model)) and " 100.00%   100.0%   1.0000 " in reference
    assert model.startswith(str(quantized)) and " Q4_0 " in model and done.stderr == ""


def test_one_that_fails_is_left_out(tiny: ModelFiles, pictures: Path, tmp_path: Path) -> None:
    """It passes all checks of its header, but its context is too short for what the reference was asked."""

    def short(entries: dict[str, object]) -> None:
        entries["llama.context_length"] = ("u32", 40)

    model = spoil(tiny.model, tmp_path / "short.gguf", short)  # type: ignore[arg-type]
    done = run("compare", tiny.model, model, tiny.model, "--images", pictures, "--json", code=1)
    values = json.loads(done.stdout)
    assert [failed["model"] for failed in values["failed"]] == [str(model)] and len(values["models"]) == 1
    assert f"{model} is left out: " in done.stderr and "the context" in values["failed"][0]["error"]


def test_bad_input(tiny: ModelFiles, quantized: Path, pictures: Path, tmp_path: Path) -> None:
    empty, torn = tmp_path / "empty", tmp_path / "torn"
    for directory in (empty, torn):
        directory.mkdir()
    (torn / "a.png").write_bytes((pictures / "0000.png").read_bytes()[:200])
    (tmp_path / "none.txt").write_text("\n\n")

    def other(entries: dict[str, tuple[str, list[str]]]) -> None:
        entries["tokenizer.ggml.tokens"][1][300] = "other"

    foreign = spoil(tiny.model, tmp_path / "foreign.gguf", other)  # type: ignore[arg-type]
    good = ("compare", tiny.model, quantized, "--images")
    cases = {
        "no pictures": ((*good, empty), 1, "there are no pictures; names that end with .png"),
        "no directory": ((*good, tmp_path / "no"), 1, "cannot be read: No such file or directory"),
        "torn": ((*good, torn), 1, "a.png"),
        "no questions": ((*good, pictures, "--questions", tmp_path / "none.txt"), 2, "there are no questions in it"),
        "no file": ((*good, pictures, "--questions", tmp_path / "no.txt"), 2, "cannot be read: No such file"),
        "suffix": ((*good, pictures, "--plot", "a.pdf"), 2, "a plot is a .png or a .svg file"),
        "vocabulary": (("compare", tiny.model, foreign, "--images", pictures), 1, "its token 300 is 'other'"),
        "no model": (("compare", tiny.model, tmp_path / "no.gguf", "--images", pictures), 1, "no such file"),
        "no mmproj": (("compare", quantized, tiny.model, "--images", pictures), 1, "no mmproj is beside it"),
        "max tokens": ((*good, pictures, "--max-tokens", 0), 2, "--max-tokens must be 1 to"),
        "one model": (("compare", tiny.model, "--images", pictures), 2, "MODEL"),
        "no images": (("compare", tiny.model, quantized), 2, "--images"),
        "temperature": ((*good, pictures, "--temperature", 1), 2, "No such option"),
    }
    outcomes = many_commands.run({name: case[0] for name, case in cases.items()})
    for name, (_, code, message) in cases.items():
        status, text = outcomes[name]
        assert status == code and message in text and "Traceback" not in text, (name, status, text)
        if "Usage" not in text:
            assert sum(line.startswith("local-llava: ") for line in text.splitlines()) == 1, (name, text)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_ctrl_c(tiny: ModelFiles, pictures: Path, tmp_path: Path) -> None:
    models = [tiny.model] * 40
    process = subprocess.Popen(
        [sys.executable, "-m", "local_llava.cli", "compare", tiny.model, *models, "--images", pictures],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.endswith("is compared\n"):
            break
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(60) == 130 and rest.endswith("local-llava: interrupted\n") and "Traceback" not in rest
    assert not list(tmp_path.iterdir())
