"""From what a user names to a pair: paths, names, the store and the Hugging Face cache; and models, ls and rm."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from huggingface_hub import constants
from llava_checkpoints import random_model
from official_checkpoints import save_clip, save_official

from local_llava import hub, store
from local_llava.convert import convert
from local_llava.errors import CheckpointError, LocalLlavaError, ModelFileError, UsageError
from local_llava.store import hub_cache
from local_llava.store.origin import Origin, Pair
from local_llava.types import ModelFiles

TINY = Path(__file__).parent.parent / "models" / "tiny-llava"
NAMES = ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store and an empty cache; and no network."""

    def connect(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setenv("LOCAL_LLAVA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """A real pair, to be copied."""
    return convert(TINY, tmp_path_factory.mktemp("gguf"), quant="Q8_0")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "my-llava"
    directory.mkdir()
    for name in (*NAMES, "model.safetensors"):
        shutil.copyfile(TINY / name, directory / name)
    return directory


def keep(gguf: ModelFiles, name: str, quant: str, repository: str | None, mmproj_quant: str = "F16") -> Pair:
    with store.new_pair(store.key_of(name, quant, str(repository), mmproj_quant), name) as new:
        files = ModelFiles(new.directory / "m.gguf", new.directory / "p.gguf")
        shutil.copyfile(gguf.model, files.model)
        shutil.copyfile(gguf.mmproj, files.mmproj)
        return new.publish(Origin("downloaded", name, quant, mmproj_quant, "", repository), files)


def cache(
    repository: str, files: dict[str, Path | bytes], commit: str = "c0ffee", main: bool = True, blobs: bool = True
) -> Path:
    """Put files into the Hugging Face cache as huggingface_hub does: links to blobs, or files."""
    directory = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    snapshot = directory / "snapshots" / commit
    for path in (directory / "refs", directory / "blobs", snapshot):
        path.mkdir(parents=True, exist_ok=True)
    if main:
        (directory / "refs" / "main").write_text(commit)
    for number, (name, content) in enumerate(files.items()):
        blob = directory / "blobs" / f"{commit}{number:058x}"
        data = content if isinstance(content, bytes) else content.read_bytes()
        blob.write_bytes(data)
        target = snapshot / name
        target.parent.mkdir(exist_ok=True)
        if blobs:
            target.symlink_to(Path("../" * name.count("/") + "../..") / "blobs" / blob.name)
        else:
            blob.rename(target)
    return snapshot


def tiny_files(*, weights: bool = True) -> dict[str, Path | bytes]:
    return {name: TINY / name for name in (*NAMES, *["model.safetensors"] * weights)}


def refusal(name: str | Path | None, mmproj: Path | None = None) -> str:
    with pytest.raises(LocalLlavaError) as e:
        hub.resolve(name, mmproj)
    assert "\n" not in str(e.value)
    return str(e.value)


class Conversions:
    """Counts those that begin."""

    def __init__(self) -> None:
        self.sources: list[Path] = []

    def start(self, source: Path, size: int) -> Callable[[int], None]:
        self.sources.append(source)
        assert size > 1_000_000
        return lambda _: None


# Paths.


def test_paths_are_taken_as_they_are(gguf: ModelFiles, tmp_path: Path) -> None:
    assert hub.resolve(gguf.model) == hub.resolve(gguf.model.parent) == gguf
    assert hub.resolve(str(gguf.model), str(gguf.mmproj)) == gguf
    other = tmp_path / "other.gguf"
    assert hub.resolve(gguf.model, other) == ModelFiles(gguf.model, other)
    assert store.pairs() == []


def test_a_path_wins_over_a_name(gguf: ModelFiles, tmp_path: Path) -> None:
    keep(gguf, "llava-1.5-7b", "Q4_K_M", "llava-hf/llava-1.5-7b-hf")
    shutil.copytree(gguf.model.parent, tmp_path / "llava-1.5-7b")
    assert hub.resolve("llava-1.5-7b").model.parent == Path("llava-1.5-7b")
    shutil.copytree(gguf.model.parent, tmp_path / "llava-hf" / "llava-1.5-7b-hf")
    assert hub.resolve("llava-hf/llava-1.5-7b-hf").model.parent == Path("llava-hf/llava-1.5-7b-hf")


@pytest.mark.parametrize(
    "name",
    ["./llava-1.5-7b", "/x/llava-1.5-7b", "a/b/c", "llava-1.5-7b.gguf", "C:\\llava", "x y", "a" * 300 + "/b", "é"],
)
def test_what_can_only_be_a_path(name: str, gguf: ModelFiles) -> None:
    keep(gguf, "llava-1.5-7b", "Q4_K_M", "llava-hf/llava-1.5-7b-hf")
    assert "no such file or directory" in refusal(name)


def test_an_mmproj_alone(gguf: ModelFiles, checkpoint: Path) -> None:
    assert "needs its language model" in refusal(None, gguf.mmproj)
    assert "brings its own tower" in refusal(checkpoint, gguf.mmproj)


# Conversions that are kept.


def test_a_checkpoint_is_converted_once_wherever_it_lies(checkpoint: Path, tmp_path: Path) -> None:
    counter = Conversions()
    first = hub.resolve(checkpoint, on_convert=counter.start)
    moved = checkpoint.rename(tmp_path / "moved")
    os.utime(moved / "model.safetensors", (1, 1))
    assert hub.resolve(moved, on_convert=counter.start) == first
    assert len(counter.sources) == 1
    (pair,) = store.pairs()
    assert (pair.origin.kind, pair.origin.name, pair.origin.quant) == ("converted", "my-llava", "Q4_K_M")
    assert pair.origin.source == str(checkpoint) and pair.origin.repository is None
    assert pair.files == first and first.model.name == "my-llava-Q4_K_M.gguf"


def test_a_checkpoint_that_changed_is_converted_anew(checkpoint: Path) -> None:
    first = hub.resolve(checkpoint)
    path = checkpoint / "chat_template.jinja"
    path.write_text(path.read_text() + " ")
    assert hub.resolve(checkpoint) != first
    assert len(store.pairs()) == 2
    files = hub.converted(checkpoint, quant="Q8_0")
    assert len(store.pairs()) == 3 and "Q8_0" in files.model.name


def test_a_checkpoint_that_cannot_be_converted_leaves_nothing(checkpoint: Path, home: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        hub.resolve(checkpoint)
    assert store.leftovers() == [] and list(home.glob("pairs/*")) == []


RESOLVE = """
import os, signal, sys, time
from pathlib import Path
from local_llava import hub

def start(source, size):
    print("converting", flush=True)
    def progress(count):
        time.sleep(0.002)
        if sys.argv[2] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
    return progress

print(hub.resolve(sys.argv[1], on_convert=start).model, flush=True)
"""


def resolving(checkpoint: Path, end: str = "") -> subprocess.Popen[str]:
    args = [sys.executable, "-c", RESOLVE, str(checkpoint), end]
    return subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_convert_a_checkpoint_once(checkpoint: Path) -> None:
    first, second = resolving(checkpoint), resolving(checkpoint)
    lines = [process.communicate(timeout=60) for process in (first, second)]
    outs = [out.splitlines() for out, _ in lines]
    assert sorted(map(len, outs)) == [1, 2] and outs[0][-1] == outs[1][-1]
    assert "Waiting for another process, which is making my-llava" in lines[0][1] + lines[1][1]
    assert len(store.pairs()) == 1


def test_a_process_that_is_killed_leaves_no_pair(checkpoint: Path) -> None:
    process = resolving(checkpoint, "die")
    assert process.communicate(timeout=60)[0] == "converting\n"
    assert process.returncode == -signal.SIGKILL
    assert store.pairs() == []
    (left,) = store.leftovers()
    assert left.name == "my-llava" and [path.suffix for path in left.directory.glob(".*")] == [".partial"]
    files = hub.resolve(checkpoint)
    assert store.leftovers() == [] and sorted(path.suffix for path in files.model.parent.iterdir()) == [
        ".gguf",
        ".gguf",
        ".json",
    ]


# Names in the store.


def test_a_name_means_the_default_type_or_else_the_only_one(gguf: ModelFiles) -> None:
    small = keep(gguf, "llava-1.5-7b", "Q2_K", "llava-hf/llava-1.5-7b-hf")
    for name in (
        "llava-1.5-7b",
        "LLaVA-v1.5-7b",
        "llava-hf/llava-1.5-7b-hf",
        "llava-1.5-7b:q2_k",
        small.key,
        small.key[:8],
    ):
        assert hub.resolve(name) == small.files
    large = keep(gguf, "llava-1.5-7b", "Q6_K", "llava-hf/llava-1.5-7b-hf")
    message = refusal("llava-1.5-7b")
    assert "say which; there are llava-1.5-7b:Q2_K, llava-1.5-7b:Q6_K" in message
    assert hub.resolve("llava-1.5-7b:Q6_K") == large.files
    normal = keep(gguf, "llava-1.5-7b", "Q4_K_M", "llava-hf/llava-1.5-7b-hf", "Q8_0")
    assert hub.resolve("llava-1.5-7b") == normal.files
    exact = keep(gguf, "llava-1.5-7b", "Q4_K_M", "llava-hf/llava-1.5-7b-hf")
    keep(gguf, "llava-1.5-7b", "Q4_K_M", "llava-hf/llava-1.5-7b-hf", "Q4_K")
    assert hub.resolve("llava-1.5-7b") == exact.files
    assert hub.resolve("llava-1.5-7b", "p.gguf") == ModelFiles(exact.files.model, Path("p.gguf"))


def test_names_that_are_not_on_this_computer(gguf: ModelFiles) -> None:
    assert refusal("llava-phi-3-mini") == (
        "llava-phi-3-mini is not on this computer: `local-llava pull llava-phi-3-mini` downloads it (2.9 GB)"
    )
    assert "pull llava-1.5-7b --quant Q6_K` downloads it (14.1 GB)" in refusal("llava-1.5-7b:Q6_K")
    assert "did you mean llava-phi-3-mini" in refusal("llava-phi-3-minni")
    assert "`local-llava pull you/yours` downloads it from the Hugging Face Hub" in refusal("you/yours")
    assert "did you mean xtuner/llava-phi-3-mini" in refusal("xtuner/llava-phi-3-minni")
    assert "`local-llava models` lists them" in refusal("nonsense")
    keep(gguf, "llava-1.5-7b", "Q4_K_M", "llava-hf/llava-1.5-7b-hf")
    assert "there are llava-1.5-7b:Q4_K_M; `local-llava pull llava-1.5-7b --quant Q6_K`" in refusal("llava-1.5-7b:Q6_K")
    with pytest.raises(UsageError, match="Q9"):
        hub.resolve("llava-1.5-7b:Q9")


# Names in the Hugging Face cache.


def test_a_checkpoint_in_the_cache_is_converted_once(tmp_path: Path) -> None:
    snapshot = cache("llava-hf/llava-1.5-7b-hf", tiny_files())
    counter = Conversions()
    files = hub.resolve("llava-1.5-7b", on_convert=counter.start)
    assert hub.resolve("llava-hf/LLaVA-1.5-7b-hf", on_convert=counter.start) == files
    assert counter.sources == [snapshot]
    (pair,) = store.pairs()
    assert (pair.origin.name, pair.origin.repository) == ("llava-1.5-7b", "llava-hf/llava-1.5-7b-hf")
    assert pair.origin.revision == "c0ffee"
    assert "Q8_0" in hub.resolve("llava-1.5-7b:q8_0", on_convert=counter.start).model.name
    assert len(counter.sources) == 2
    shutil.rmtree(tmp_path / "hf")  # the kept pairs need it no more
    assert hub.resolve("llava-1.5-7b") == files


def test_a_checkpoint_that_was_not_downloaded_as_a_whole() -> None:
    cache("llava-hf/llava-1.5-7b-hf", tiny_files(weights=False))
    assert "is not on this computer" in refusal("llava-1.5-7b")
    index = json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}).encode()
    cache("llava-hf/llava-1.5-7b-hf", {**tiny_files(), "model.safetensors.index.json": index}, "d1d1d1")
    assert "is not on this computer" in refusal("llava-1.5-7b")
    cache("llava-hf/llava-1.5-7b-hf", tiny_files(), "e2e2e2", main=False, blobs=False)  # as on Windows
    assert hub.resolve("llava-1.5-7b").model.is_file()


@pytest.mark.parametrize(
    "index",
    [b"", b"[]", b"{}", b'{"weight_map": 3}', b'{"weight_map": {"a": 3}}', b"[" * 9000, b'{"weight_map": {"a": []}}'],
)
def test_a_damaged_index_in_the_cache(index: bytes) -> None:
    snapshot = cache("a/b", {**tiny_files(), "model.safetensors.index.json": index})
    assert hub_cache.snapshots("A/B") == [snapshot] and not hub_cache.is_complete(snapshot)
    assert "nor a repository that is on this computer" in refusal("a/b")


def test_published_files_in_the_cache(gguf: ModelFiles) -> None:
    names = ("llava-phi-3-mini-int4.gguf", "llava-phi-3-mini-mmproj-f16.gguf")
    snapshot = cache("xtuner/llava-phi-3-mini-gguf", {names[0]: gguf.model})
    assert "is not on this computer" in refusal("llava-phi-3-mini")  # the mmproj is missing
    cache("xtuner/llava-phi-3-mini-gguf", {names[1]: gguf.mmproj}, commit="c0ffee")
    expected = ModelFiles(snapshot / names[0], snapshot / names[1])
    assert hub.resolve("llava-phi-3-mini") == hub.resolve("xtuner/llava-phi-3-mini-gguf:Q4_K_M") == expected
    assert "is not on this computer" in refusal("llava-phi-3-mini:F16")
    assert store.pairs() == []


def test_other_peoples_files_in_the_cache(gguf: ModelFiles, tmp_path: Path) -> None:
    files: dict[str, Path | bytes] = {"a.gguf": gguf.model, "mmproj.gguf": gguf.mmproj, "config.json": b"{}"}
    snapshot = cache("you/yours", files)
    for name in ("you/yours", "you/yours:Q8_0"):
        assert hub.resolve(name) == ModelFiles(snapshot / "a.gguf", snapshot / "mmproj.gguf")
    assert "nor a repository that is on this computer" in refusal("you/yours:Q4_0")
    files["b.gguf"] = convert(TINY, tmp_path / "b", quant="Q6_K").model
    snapshot = cache("you/more", files)
    assert hub.resolve("you/more:q6_k").model == snapshot / "b.gguf"
    assert "there are Q8_0 (a.gguf), Q6_K (b.gguf)" in refusal("you/more")


# The commands.


APP = """
from local_llava import cli
from local_llava.commands import models
names = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
for command in (models.models, models.ls, models.rm):
    if command.__name__ not in names:
        cli.app.command()(command)
cli.main()
"""


def run_process(*args: str, code: int = 0, stdin: int = subprocess.DEVNULL) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", APP, *args], capture_output=True, text=True, timeout=60, stdin=stdin, check=False
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


Run: TypeAlias = Callable[..., Any]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in this process, which is quicker; gives what it writes, as `out` and `err`."""

    def run(*args: str, code: int = 0) -> Any:
        monkeypatch.setattr(sys, "argv", ["local-llava", *args])
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        with pytest.raises(SystemExit) as e:
            exec(APP, {})
        captured = capsys.readouterr()
        assert (e.value.code or 0) == code, captured.err
        return captured

    return run


def test_models_lists_what_there_is(run: Run, gguf: ModelFiles) -> None:
    keep(gguf, "llava-1.5-7b", "Q4_K_M", "llava-hf/llava-1.5-7b-hf")
    cache("xtuner/llava-phi-3-mini-hf", tiny_files())
    lines = run("models").out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    rows = {line.split()[0]: line for line in lines}
    assert rows["llava-1.5-7b"].endswith("Q4_K_M") and rows["llava-1.5-13b"].endswith(" -")
    assert rows["llava-phi-3-mini"].endswith("HF cache")
    assert "5.6 GB" in rows["llava-llama-3-8b"] and "llama3" in rows["llava-llama-3-8b"]
    assert run("-q", "models").err == ""
    assert run_process("models").stdout.splitlines() == lines
    described = json.loads(run("models", "--json").out)
    assert [model["name"] for model in described] == [line.split()[0] for line in lines[1:]]


def test_models_shows_one(run: Run, gguf: ModelFiles) -> None:
    keep(gguf, "llava-llama-3-8b", "Q6_K", "xtuner/llava-llama-3-8b-v1_1-transformers")
    text = run("models", "llava-llama-3-8b-v1_1").out
    assert "xtuner/llava-llama-3-8b-v1_1-gguf" in text and "POPE: 86.4" in text
    (row,) = [line.split() for line in text.splitlines() if line.startswith("Q6_K")]
    assert row[-1] == "yes" and row[-2] == "no"
    one = json.loads(run("models", "llava-llama-3-8b", "--json").out)
    assert one["types"]["Q4_K_M"]["memory"] > one["types"]["Q4_K_M"]["model"] > 4.9e9
    assert one["on_disk"][0]["quant"] == "Q6_K"
    assert "did you mean llava-phi-3-mini" in run("models", "llava-phi-3-minni", code=2).err


def test_ls(run: Run, gguf: ModelFiles, checkpoint: Path) -> None:
    assert run("ls").out.startswith("0 models, 0 B in ")
    pair = keep(gguf, "llava-1.5-7b", "Q4_K_M", "llava-hf/llava-1.5-7b-hf")
    hub.resolve(checkpoint)
    with store.new_pair("0" * 24, "half", resumable=True) as new:
        (new.directory / "part").write_bytes(b"12345")
    text = run("ls").out
    assert "llava-1.5-7b  Q4_K_M + F16" in text and "converted just now" in text
    assert f"from {checkpoint}" in text and f"in {pair.directory}" in text
    assert "half" in text and "unfinished" in text and "2 models, " in text
    values = json.loads(run("ls", "--json").out)
    assert [item["name"] for item in values["pairs"]] == ["my-llava", "llava-1.5-7b"] or len(values["pairs"]) == 2
    assert values["leftovers"][0]["name"] == "half" and values["leftovers"][0]["resumable"]


def test_rm_by_name_type_key_and_path(run: Run, gguf: ModelFiles) -> None:
    pairs = [
        keep(gguf, "llava-1.5-7b", quant, "llava-hf/llava-1.5-7b-hf") for quant in ("Q2_K", "Q4_0", "Q6_K", "Q8_0")
    ]
    assert "--yes" in run("rm", "llava-1.5-7b", code=2).err
    assert len(store.pairs()) == 4
    assert "MB freed" in run("rm", "llava-1.5-7b:q2_k", "--yes").out
    run("rm", "-y", pairs[1].key)
    run("rm", "-y", str(pairs[2].files.model), str(pairs[2].directory))
    assert store.pairs() == [pairs[3]]
    with store.new_pair("0" * 24, "llava-1.5-7b", resumable=True) as new:
        (new.directory / "part").write_bytes(b"12345")
    run("rm", "-y", "llava-v1.5-7b:Q8_0")
    assert store.pairs() == [] and len(store.leftovers()) == 1
    run("rm", "-y", "llava-v1.5-7b")
    assert store.leftovers() == []


def test_rm_refuses_what_is_not_kept(run: Run, gguf: ModelFiles, tmp_path: Path) -> None:
    pair = keep(gguf, "llava-1.5-7b", "Q4_K_M", "llava-hf/llava-1.5-7b-hf")
    snapshot = cache("xtuner/llava-phi-3-mini-hf", tiny_files())
    before = sorted(tmp_path.rglob("*"))
    for name in (
        str(gguf.model),
        str(tmp_path),
        str(pair.directory.parent),
        "nonsense",
        "llava-1.5-7b:Q2_K",
        "..",
        "/",
    ):
        assert "is not among the models" in run("rm", "-y", name, code=2).err
    for name in ("llava-phi-3-mini", "xtuner/llava-phi-3-mini-hf"):
        assert "is in the Hugging Face cache, which local-llava leaves alone" in run("rm", "-y", name, code=2).err
    assert "name what to remove" in run("rm", code=2).err
    assert "name what to remove" in run("rm", "--all", "x", code=2).err
    # All or nothing.
    run("rm", "-y", "llava-1.5-7b", "nonsense", code=2)
    assert sorted(tmp_path.rglob("*")) == before and snapshot.is_dir()


def test_rm_all(run: Run, gguf: ModelFiles, home: Path) -> None:
    keep(gguf, "llava-1.5-7b", "Q4_K_M", "llava-hf/llava-1.5-7b-hf")
    with store.new_pair("0" * 24, "half", resumable=True) as new:
        (new.directory / "part").write_bytes(b"12345")
    old = home / "converted" / ("a" * 24)
    old.mkdir(parents=True)
    shutil.copyfile(gguf.model, old / "tiny-Q4_K_M.gguf")
    assert run("rm", "--all", "--yes").out.count("\n") == 4
    assert store.pairs() == [] == store.leftovers()
    assert run("rm", "--all", "--yes").out == "0 B freed\n"


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
@pytest.mark.parametrize(("answer", "code"), [(b"y\n", 0), (b"n\n", 1), (b"\n", 1)])
def test_rm_asks_at_a_terminal(gguf: ModelFiles, answer: bytes, code: int) -> None:
    pair = keep(gguf, "llava-1.5-7b", "Q4_K_M", "llava-hf/llava-1.5-7b-hf")
    master, slave = os.openpty()
    os.write(master, answer)
    done = run_process("rm", "llava-1.5-7b", code=code, stdin=slave)
    os.close(master)
    os.close(slave)
    assert "Remove 8" in done.stderr
    assert store.pairs() == ([] if code == 0 else [pair])


def test_a_damaged_store_is_no_traceback(run: Run, gguf: ModelFiles, home: Path) -> None:
    pair = keep(gguf, "llava-1.5-7b", "Q4_K_M", "llava-hf/llava-1.5-7b-hf")
    (pair.directory / "origin.json").write_bytes(b"\xff")
    assert f"{pair.key}  " in run("ls").out and "damaged: origin.json is not valid JSON" in run("ls").out
    assert "llava-1.5-7b is not on this computer" in refusal("llava-1.5-7b")
    run("models")
    run("rm", "-y", pair.key)
    assert run("ls").out.startswith("0 models, 0 B")


def test_errors_of_the_library_are_one_line() -> None:
    with pytest.raises(ModelFileError):
        hub.resolve("llava-1.5-7b")


def test_another_tower_beside_a_checkpoint_is_another_conversion(tmp_path: Path, home: Path) -> None:
    model = random_model()
    save_official(model, tmp_path / "llava", tower=False)
    save_clip(model, tmp_path / "clip-vit-tiny")
    first = hub.resolve(tmp_path / "llava")
    assert hub.resolve(tmp_path / "llava") == first
    shutil.rmtree(tmp_path / "clip-vit-tiny")
    save_clip(random_model(seed=1), tmp_path / "clip-vit-tiny")
    second = hub.resolve(tmp_path / "llava")
    assert second.mmproj.read_bytes() != first.mmproj.read_bytes()


def test_a_checkpoint_by_name(tmp_path: Path) -> None:
    """`convert` takes what lies in the cache, whole; anything else is a path, which the converter judges."""
    assert hub.find_checkpoint(str(tmp_path)) == tmp_path
    assert hub.find_checkpoint("no-such-directory") == Path("no-such-directory")
    for name in ("llava-1.5-7b", "llava-hf/llava-1.5-7b-hf"):
        with pytest.raises(ModelFileError, match=rf"{name}: neither a directory.* pull {name}` downloads"):
            hub.find_checkpoint(name)
    snapshot = cache("llava-hf/llava-1.5-7b-hf", tiny_files())
    for name in ("llava-1.5-7b", "llava-hf/llava-1.5-7b-hf"):
        assert hub.find_checkpoint(name) == snapshot
