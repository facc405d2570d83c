"""`local-llava imatrix`, and `--imatrix` of convert and quantize, as users type them."""

from __future__ import annotations

import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import scenes
from gguf import GGUFReader

from local_llava.commands import imatrix as command_module
from local_llava.convert.imatrix import read_imatrix
from local_llava.picture_sets import Question
from local_llava.types import ModelFiles


def command(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "local_llava.cli", *map(str, args)], capture_output=True, text=True, timeout=180, cwd=cwd
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pictures")
    scenes.write(directory, seed=3, count=3, questions=2)
    return directory


def test_from_pictures_to_a_quantized_model(pictures: Path, tiny: ModelFiles, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one two three " * 50)
    (tmp_path / "questions.txt").write_text("What do you see?\n\nHow many?\n")
    options = ("--images", pictures, "--questions", "questions.txt", "--text", "text.txt", "--max-tokens", 2)
    more = ("--max-images", 2, "--max-chunks", 1, "-o", "out.gguf", "--threads", 1, "--gpu-layers", 0)
    done = command("imatrix", "--model", tiny.model, *options, *more, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "out.gguf\n"), done.stderr
    reading, summary = done.stderr.splitlines()
    assert reading == "Reading for out.gguf" and summary.startswith("28 matrices, by ")
    matrix = read_imatrix(tmp_path / "out.gguf")
    assert matrix.datasets == (str(pictures), "questions.txt", "text.txt")
    quantized = command("quantize", tiny.model, "q.gguf", "IQ3_XS", "--imatrix", "out.gguf", cwd=tmp_path)
    assert quantized.returncode == 0, quantized.stderr
    shown = command(
        "convert", Path(__file__).parent.parent / "models" / "tiny-llava", "--quant", "iq2_xs", "--imatrix", "out.gguf",
        "--dry-run", cwd=tmp_path,
    )  # fmt: skip
    assert "IQ2_XS)" in shown.stdout or "IQ2_XS," in shown.stdout, shown.stderr
    fields = GGUFReader(tmp_path / "q.gguf").fields
    assert fields["quantize.imatrix.file"].contents() == "out.gguf"
    assert fields["quantize.imatrix.dataset"].contents() == str(pictures)[:127]
    again = command("imatrix", "--model", tiny.model, *options, "-o", "out.gguf", cwd=tmp_path)
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr == "local-llava: out.gguf already exists; --force replaces it\n"


def test_pictures_are_picked_evenly() -> None:
    asked = [Question(Path(str(i)), text) for i in range(10) for text in "ab"]
    assert [(int(str(q.image)), q.text) for q in command_module._of_some(asked, 3)] == [
        *((0, "a"), (0, "b"), (3, "a"), (3, "b"), (6, "a"), (6, "b"))
    ]
    assert command_module._of_some(asked, 10) == command_module._of_some(asked, None) == asked


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_leaves_nothing(tiny: ModelFiles, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one two three " * 200_000)
    args = ["imatrix", "--model", str(tiny.model), "--text", "text.txt", "-o", "out.gguf", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "local_llava.cli", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "Reading for out.gguf\n"
    time.sleep(0.3)
    asked = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out, errors) == (130, "", "local-llava: interrupted\n")
    assert time.monotonic() - asked < 20
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


ERRORS: list[tuple[tuple[str, ...], int, str]] = [
    ((), 2, "--images DIR names pictures to learn from; --text FILE is read as well, or alone"),
    (("--questions", "q.txt", "--text", "t.txt"), 2, "--images DIR names pictures to learn from"),
    (("--images", "nowhere"), 1, "nowhere: cannot be read: No such file or directory"),
    (("--images", "empty"), 1, "empty: there are no pictures"),
    (("--images", "bad"), 1, "bad.png"),
    (("--text", "nowhere.txt"), 2, "nowhere.txt: cannot be read: No such file or directory; a text file is wanted"),
    (("--text", "bad/bad.png"), 2, "bad/bad.png: cannot be read: it is not UTF-8 text"),
    (("--text", "empty.txt"), 2, "empty.txt: is empty"),
    (("--text", "t.txt", "--max-chunks", "0"), 2, "--max-chunks must be 1 or more, not 0"),
    (("--text", "t.txt", "--max-tokens", "-1"), 2, "--max-tokens must be 0 or more, not -1"),
    (("--text", "t.txt", "--max-images", "0"), 2, "--max-images must be 1 or more, not 0"),
    (("--text", "t.txt", "-o", "no/where.gguf"), 1, "cannot write no/where.gguf: no is not a directory"),
    (("--text", "t.txt", "--n-ctx", "0"), 2, "--n-ctx must be 1 to"),
    (("--text", "t.txt", "--model", "t.txt"), 1, "t.txt: no mmproj is beside it"),
]


@pytest.mark.parametrize(("args", "code", "expected"), ERRORS)
def test_errors(args: tuple[str, ...], code: int, expected: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n\xff")
    (tmp_path / "t.txt").write_text("one two")
    (tmp_path / "empty.txt").write_text("")
    before = sorted(tmp_path.rglob("*"))
    done = command("imatrix", *args, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    lines = [line for line in done.stderr.splitlines() if "No --model was named" not in line]
    assert len(lines) == 1 and lines[0].startswith("local-llava: ") and expected in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("which", ["quantize", "convert"])
def test_bad_matrices(which: str, tiny: ModelFiles, tmp_path: Path) -> None:
    (tmp_path / "bad.dat").write_bytes(struct.pack("<ii", 1, 2**31 - 1))
    checkpoint = Path(__file__).parent.parent / "models" / "tiny-llava"
    source = (tiny.model, "out.gguf", "IQ2_XS") if which == "quantize" else (checkpoint, "--quant", "IQ2_XS")
    for extra, code, expected in (
        (("--imatrix", "bad.dat"), 1, "bad.dat: entry 0 has a name of 2147483647 bytes"),
        (("--imatrix", "nowhere"), 1, "nowhere: cannot be read"),
        ((), 2, "quantization type IQ2_XS needs an importance matrix (local-llava imatrix makes one"),
    ):
        done = command(which, *source, *extra, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (code, "")
        assert done.stderr.startswith("local-llava: ") and expected in done.stderr and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bad.dat"]
