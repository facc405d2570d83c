"""The command as a user runs it: a process each."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import gguf_bytes
import numpy as np
import pytest
from llava_checkpoints import TINY, random_model, save

import local_llava
from local_llava.convert import convert
from local_llava.types import ModelFiles


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return convert(TINY, tmp_path_factory.mktemp("pair"), quant="Q8_0")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import scenes

    directory = tmp_path_factory.mktemp("scene")
    scenes.write(directory, seed=3, count=1)
    return directory / "0000.png"


def run(home: Path, *args: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "local_llava.cli", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "LOCAL_LLAVA_HOME": str(home)},
    )
    assert done.returncode == code, f"{done.returncode}: {done.stderr}"
    assert "Traceback" not in done.stderr
    return done


def test_version_and_help(home: Path) -> None:
    assert run(home, "--version").stdout.strip() == f"local-llava {local_llava.__version__}"
    for args in (("--help",), ("ask", "--help"), ("convert", "-h"), ("inspect", "-h")):
        assert "Usage" in run(home, *args).stdout


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from local_llava.cli import app; app(['--help'], standalone_mode=False);"
        "print(sorted({'llama_cpp', 'numpy', 'gguf', 'PIL', 'jinja2', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_public_names_are_there() -> None:
    assert local_llava.__all__ == sorted(local_llava.__all__)
    for name in local_llava.__all__:
        assert getattr(local_llava, name).__name__ == name


def test_ask_the_built_in_model(home: Path, scene: Path) -> None:
    first = run(home, "ask", scene, "How many shapes are there?")
    assert first.stdout.strip() in ("One.", "Two.", "Three.")
    assert "built-in" in first.stderr and "Converting" in first.stderr
    second = run(home, "ask", scene, "How many shapes are there?")
    assert second.stdout == first.stdout
    assert "Converting" not in second.stderr  # kept
    assert run(home, "-q", "ask", scene, "How many shapes are there?").stderr == ""


def test_ask_as_json(home: Path, pair: ModelFiles, scene: Path) -> None:
    done = run(home, "ask", "--model", pair.model, "--json", scene, "Describe the picture.")
    reply = json.loads(done.stdout)
    assert done.stderr == ""
    assert reply["finish_reason"] == "stop" and reply["text"].endswith(".")
    assert reply["timings"]["image_tokens"] == 36
    assert reply["timings"]["completion_tokens"] == len(reply["tokens"]) + 1
    short = json.loads(run(home, "ask", "-m", pair.model, "--json", "--max-tokens", 2, scene, "Describe it.").stdout)
    assert short["finish_reason"] == "length" and len(short["tokens"]) == 2


def test_ask_with_a_directory_both_files_or_a_checkpoint(home: Path, pair: ModelFiles, scene: Path) -> None:
    question = (scene, "Describe the picture.")
    answer = run(home, "ask", "-m", pair.model.parent, *question).stdout
    assert run(home, "ask", "-m", pair.model, "--mmproj", pair.mmproj, *question).stdout == answer
    assert run(home, "ask", "-m", TINY, *question).stdout
    assert run(home, "ask", "-m", pair.model, "Is there a circle?").stdout  # no picture at all


def test_temperature_and_seed(home: Path, pair: ModelFiles, scene: Path) -> None:
    def sample(seed: int) -> str:
        options = ("--temperature", 9, "--top-k", 0, "--top-p", 1, "--min-p", 0, "--max-tokens", 12, "--seed", seed)
        return run(home, "ask", "-m", pair.model, *options, scene, "Hello").stdout

    assert sample(1) == sample(1)
    assert len({sample(s) for s in range(4)}) > 1


def test_usage_errors(home: Path, pair: ModelFiles, scene: Path) -> None:
    for args in (
        ("ask",),
        ("nonsense",),
        ("ask", "--no-such-option", "x"),
        ("ask", "--max-tokens", "0", "x"),
        ("ask", "--temperature", "-1", "x"),
        ("ask", "--top-p", "1.5", "x"),
        ("ask", "--threads", "0", "x"),
        ("ask", "-m", pair.model, "--kv-type", "Q3", "x"),
        ("ask", "-m", pair.model, "--n-ctx", "99999999", "x"),
        ("ask", "--mmproj", pair.mmproj, "x"),
        ("ask", scene),
        ("ask", "-m", pair.model, scene, b"caf\xe9".decode("utf-8", "surrogateescape")),
    ):
        assert run(home, *args, code=2).stderr


def test_inspect(home: Path, pair: ModelFiles) -> None:
    text = run(home, "inspect", pair.model).stdout
    assert "general.architecture = 'llama'" in text and "blk.0.attn_q.weight" in text and "Q8_0" in text
    contents = json.loads(run(home, "inspect", "--json", pair.mmproj).stdout)
    assert contents["metadata"]["clip.projector_type"] == "mlp"
    assert {"name": "mm.2.weight", "type": "F16", "shape": [256, 256], "bytes": 131072} in contents["tensors"]
    assert "vision_tower" in run(home, "inspect", TINY).stdout


def test_inspect_a_file_whose_texts_are_no_text(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_bytes.gguf([("a", "str", b"\xff"), ("b", "arr[str]", [b"\xc3", "\u00e9"])]))
    assert r"a = '\udcff'" in run(home, "inspect", path).stdout
    metadata = json.loads(run(home, "inspect", "--json", path).stdout)["metadata"]
    assert metadata == {"a": "\udcff", "b": ["\udcc3", "\u00e9"]}


def test_a_closed_pipe_is_no_crash(home: Path, pair: ModelFiles) -> None:
    script = f"{sys.executable} -m local_llava.cli inspect {pair.model} | head -1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert "GGUF version 3" in done.stdout and "Traceback" not in done.stderr and "Exception" not in done.stderr


# --- bad input ---


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def change_u32(key: str, value: int) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        at = data.index(struct.pack("<Q", len(key)) + key.encode()) + 8 + len(key) + 4
        return data[:at] + struct.pack("<I", value) + data[at + 4 :]

    return change


def change_tensor(name: str, offset: int, code: str, value: int) -> Callable[[bytes], bytes]:
    """`offset` counts from the end of the tensor's name: 0 number of dimensions, 4 the first, 20 type, 24 position."""

    def change(data: bytes) -> bytes:
        at = data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name) + offset
        return data[:at] + struct.pack(code, value) + data[at + struct.calcsize(code) :]

    return change


BAD_FILES: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    # which file of the pair, what is done to it -> what the line must say besides the file's name
    "truncated model": ("model", cut, "truncated"),
    "truncated mmproj": ("mmproj", cut, "truncated"),
    "header only": ("model", lambda d: d[:100], "cut short"),
    "empty": ("model", lambda d: b"", "empty"),
    "random bytes": ("model", lambda d: np.random.default_rng(0).bytes(5000), "GGUF"),
    "a picture": ("mmproj", lambda d: b"\x89PNG\r\n\x1a\n" + bytes(99), "PNG"),
    "a web page": ("model", lambda d: b"<!DOCTYPE html><html></html>", "HTML"),
    "a pointer of git-lfs": ("model", lambda d: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "LFS"),
    "version 99": ("model", lambda d: d[:4] + struct.pack("<I", 99) + d[8:], "version"),
    "too many tensors": ("model", lambda d: d[:8] + struct.pack("<Q", 1 << 60) + d[16:], "tensors"),
    "too many entries": ("model", lambda d: d[:16] + struct.pack("<Q", 1 << 60) + d[24:], ""),
    "no layers": ("model", change_u32("llama.block_count", 0), "llama.block_count"),
    "too many layers": ("model", change_u32("llama.block_count", 5), "blk.4"),
    "heads that do not divide": ("model", change_u32("llama.attention.head_count", 3), "head_count"),
    "no kv heads": ("model", change_u32("llama.attention.head_count_kv", 0), "head_count_kv"),
    "another width": ("model", change_u32("llama.embedding_length", 512), "shape"),
    "eos out of range": ("model", change_u32("tokenizer.ggml.eos_token_id", 9999), "eos_token_id"),
    "tensor larger than the file": ("model", change_tensor("output.weight", 4, "<Q", 1 << 40), "output.weight"),
    "tensor of unknown type": ("model", change_tensor("output.weight", 20, "<I", 999), "output.weight"),
    "tensor beyond the file": ("mmproj", change_tensor("mm.0.weight", 24, "<Q", 1 << 50), "mm.0.weight"),
    "tower without blocks": ("mmproj", change_u32("clip.vision.block_count", 0), "block_count"),
    "tower of other heads": ("mmproj", change_u32("clip.vision.attention.head_count", 7), "head_count"),
    "huge pictures": ("mmproj", change_u32("clip.vision.image_size", 1 << 30), "image_size"),
    "patches of nothing": ("mmproj", change_u32("clip.vision.patch_size", 0), "patch_size"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_ggufs(case: str, home: Path, pair: ModelFiles, scene: Path, tmp_path: Path) -> None:
    which, damage, said = BAD_FILES[case]
    files = {"model": tmp_path / "m.gguf", "mmproj": tmp_path / "m-mmproj.gguf"}
    shutil.copy(pair.model, files["model"])
    shutil.copy(pair.mmproj, files["mmproj"])
    files[which].write_bytes(damage(files[which].read_bytes()))
    done = run(home, "ask", "-m", files["model"], "--mmproj", files["mmproj"], scene, "What?", code=1)
    assert len(done.stderr.splitlines()) == 1
    assert files[which].name in done.stderr and said in done.stderr, done.stderr
    run(home, "inspect", files[which], code=0 if case in INTACT else 1)


INTACT = {name for name, (_, damage, _) in BAD_FILES.items() if "change_u32" in damage.__qualname__}
"""Files that are whole, and wrong only about the model."""


def test_files_that_do_not_belong_together(home: Path, pair: ModelFiles, scene: Path, tmp_path: Path) -> None:
    other = convert(save(random_model(), tmp_path / "other"), tmp_path / "out")
    retrained = random_model(
        text={"hidden_size": 256, "num_attention_heads": 4}, vision={"image_size": 96, "patch_size": 16}
    )
    twin = convert(save(retrained, tmp_path / "twin"), tmp_path / "twin-out")
    for model, mmproj, said in (
        (pair.model, other.mmproj, "width 64"),
        (pair.model, twin.mmproj, "same checkpoint"),
        (pair.model, pair.model, "give the mmproj"),
        (pair.mmproj, pair.mmproj, "mmproj"),
        (pair.mmproj, pair.model, ""),
    ):
        done = run(home, "ask", "-m", model, "--mmproj", mmproj, scene, "What?", code=1)
        assert len(done.stderr.splitlines()) == 1 and said in done.stderr, done.stderr


def test_models_that_are_not_there(home: Path, pair: ModelFiles, scene: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    lonely = tmp_path / "lonely" / "model.gguf"
    lonely.parent.mkdir()
    shutil.copy(pair.model, lonely)
    for model, said in (
        (tmp_path / "nowhere.gguf", "no such file"),
        (tmp_path / "empty", "neither GGUF"),
        (lonely, "no mmproj"),
        (lonely.parent, "no mmproj"),
    ):
        done = run(home, "ask", "-m", model, scene, "What?", code=1)
        assert str(model) in done.stderr and said in done.stderr


def test_a_directory_with_two_models(home: Path, pair: ModelFiles, scene: Path, tmp_path: Path) -> None:
    for path in (pair.model, pair.mmproj):
        shutil.copy(path, tmp_path)
    shutil.copy(pair.model, tmp_path / "second.gguf")
    assert "name the file" in run(home, "ask", "-m", tmp_path, scene, "What?", code=1).stderr
    run(home, "ask", "-m", tmp_path / "second.gguf", scene, "What?")


def test_bad_pictures(home: Path, pair: ModelFiles, scene: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "cut.png").write_bytes(scene.read_bytes()[:-200])
    for name, said in (("text.png", "accepted are PNG, JPEG"), ("cut.png", "truncated"), ("none.png", "No such file")):
        done = run(home, "ask", "-m", pair.model, tmp_path / name, "What?", code=1)
        assert len(done.stderr.splitlines()) == 1 and name in done.stderr and said in done.stderr


def test_a_prompt_that_does_not_fit(home: Path, pair: ModelFiles, scene: Path) -> None:
    done = run(home, "ask", "-m", pair.model, "--n-ctx", 64, scene, "word " * 100, code=1)
    assert "context 64" in done.stderr and "36 of them for pictures" in done.stderr


def test_a_home_that_cannot_be_written(scene: Path) -> None:
    done = run(Path("/proc/nowhere"), "ask", scene, "What?", code=1)
    assert "/proc/nowhere" in done.stderr


def test_hostile_chat_template(home: Path, pair: ModelFiles, scene: Path, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(pair.model)
    template = reader.get_field("tokenizer.chat_template")
    assert template is not None
    raw = pair.model.read_bytes()
    old = bytes(template.parts[-1])
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    model = tmp_path / "hostile.gguf"
    model.write_bytes(raw.replace(old, loop.encode().ljust(len(old)), 1))
    done = run(home, "ask", "-m", model, "--mmproj", pair.mmproj, scene, "What?", code=1)
    assert "chat template" in done.stderr and len(done.stderr.splitlines()) == 1
