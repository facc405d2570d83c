"""`local-llava repair`: what comes out is right, its tensors are the same bytes, and nothing is ever half done."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import faulty_ggufs as faults
import gguf_bytes
import mmproj_files
import numpy as np
import pytest
import scenes
from faulty_ggufs import FAULTS, TEMPLATE, faulty, good
from llava_checkpoints import TINY

from local_llava import Llava
from local_llava.commands.repair import repair as repair_command
from local_llava.convert import convert
from local_llava.convert.repair import Repair, prepare_repair, repair_gguf
from local_llava.corrections import corrected
from local_llava.errors import ModelFileError, OutputError, PromptError, UsageError
from local_llava.gguf_file import TYPES, GGUFFile
from local_llava.llm_file import check_llm
from local_llava.types import ModelFiles
from local_llava.vision import VisionTower


def tensor_bytes(path: Path) -> list[bytes]:
    """The data of each tensor, in the order of the file."""
    data = path.read_bytes()
    return [data[t.offset : t.offset + t.nbytes] for t in GGUFFile.open(path).tensors.values()]


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault(name: str, tmp_path: Path) -> None:
    """Written out: the good file, byte for byte but for the order of the metadata."""
    source, right, target = (tmp_path / f"{n}.gguf" for n in ("source", "right", "target"))
    source.write_bytes(faulty(name).bytes)
    right.write_bytes(good().bytes)
    before = source.read_bytes()
    result = repair_gguf(source, target)
    assert {c.key for c in result.corrections} == FAULTS[name][1].keys()
    assert source.read_bytes() == before
    ours, expected = GGUFFile.open(target), GGUFFile.open(right)
    assert dict(ours.metadata) == dict(expected.metadata)
    assert dict(ours.types) == dict(expected.types)
    assert {n: (t.shape, t.type) for n, t in ours.tensors.items()} == {
        n: (t.shape, t.type) for n, t in expected.tensors.items()
    }
    assert tensor_bytes(target) == tensor_bytes(source)
    check_llm(ours)
    assert prepare_repair(target).result.corrections == (), "nothing is left to be put right"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["right.gguf", "source.gguf", "target.gguf"]


def test_a_file_without_faults_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(good().bytes)

    def state() -> tuple[int, ...]:
        now = path.stat()  # but for the time of reading
        return now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns

    before = state()
    assert repair_gguf(path).corrections == ()
    assert state() == before
    assert repair_gguf(path, tmp_path / "new.gguf").corrections == ()
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("swap", [True, False])
def test_a_legacy_mmproj(swap: bool, tmp_path: Path) -> None:
    """After the repair the names and keys are those of a file of today, and the features transformers'."""
    tower = mmproj_files.Reference(n_blocks=4)
    metadata, tensors = tower.metadata(), tower.tensors()
    for key in ("clip.vision.feature_layer", "clip.projector_type"):
        del metadata[key]
    metadata["clip.vision.block_count"] = 3
    metadata["general.architecture"] = "llama"
    other = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"} if swap else {}
    tensors = {".".join(other.get(p, p) for p in k.split(".")): v for k, v in tensors.items() if ".3." not in k}
    path = mmproj_files.write_gguf(tmp_path / "p.gguf", metadata, tensors)
    before = tensor_bytes(path)
    repair_gguf(path)
    assert tensor_bytes(path) == before
    repaired = GGUFFile.open(path)
    keys = ("general.architecture", "clip.projector_type", "clip.vision.feature_layer", "general.file_type")
    assert [repaired.metadata[key] for key in keys] == ["clip", "mlp", [3], 0]
    assert repaired.types["clip.vision.feature_layer"] == "arr[i32]"
    assert repaired.tensors["v.blk.0.ffn_up.weight"].shape == (tower.n_ff, tower.n_embd)
    pixels = tower.pixels(1)
    with VisionTower.load(path, n_threads=1) as ours:
        assert mmproj_files.relative_error(ours.encode(pixels), tower.features(pixels)) < 1e-5


def test_every_type_of_tensor_and_alignment(tmp_path: Path) -> None:
    """Even types that nothing here can compute with; the data are copied as they lie."""
    model = faulty("no end of turn")
    rng = np.random.default_rng(0)
    tensors = list(model.tensors.values())
    for number, traits in TYPES.items():
        shape = (traits.block * 3, 5)
        size = 3 * 5 * traits.nbytes
        tensors.append(gguf_bytes.Tensor(f"t.{number}", shape, rng.bytes(size), number))
    entries = [("general.alignment", "u32", 256), *((k, *v) for k, v in model.entries.items())]
    entries += [(k, "str", b"\xff\xfe caf\xc3\xa9") for k in ("general.author",)]
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes.gguf(entries, tensors, alignment=256))
    result = corrected(GGUFFile.open(path))
    repair = Repair(path, tmp_path / "new.gguf", result, overwrite=False)
    written: list[int] = []
    repair.write(written.append)
    new = GGUFFile.open(tmp_path / "new.gguf")
    assert sum(written) == repair.size == repair.target.stat().st_size
    assert tensor_bytes(new.path) == tensor_bytes(path)
    assert [(t.name, t.shape, t.type) for t in new.tensors.values()] == [
        (t.name, t.shape, t.type) for t in GGUFFile.open(path).tensors.values()
    ]
    assert new.metadata["general.alignment"] == 256
    assert all(t.offset % 256 == 0 for t in new.tensors.values())
    assert new.metadata["general.author"].encode(errors="surrogateescape") == b"\xff\xfe caf\xc3\xa9"


def test_a_file_of_version_2_and_without_padding_at_its_end(tmp_path: Path) -> None:
    model = faulty("no end of turn")
    data = bytearray(model.bytes)
    data[4:8] = (2).to_bytes(4, "little")
    path = tmp_path / "m.gguf"
    path.write_bytes(bytes(data))
    last = max(t.offset + t.nbytes for t in GGUFFile.open(path).tensors.values())
    path.write_bytes(bytes(data[:last]))
    before = tensor_bytes(path)
    repair_gguf(path)
    assert GGUFFile.open(path).version == 3
    assert tensor_bytes(path) == before


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    """It is stored, EOT follows from it, and it is not judged again."""
    path = tmp_path / "m.gguf"
    path.write_bytes(good().bytes)
    result = repair_gguf(path, chat_template=faults.VICUNA)
    assert [c.key for c in result.corrections] == [TEMPLATE]
    assert repair_gguf(path).corrections == ()
    assert check_llm(corrected(GGUFFile.open(path)).gguf).vocab.chat_template == faults.VICUNA
    assert repair_gguf(path, chat_template=faults.VICUNA).corrections == ()
    path.write_bytes(faulty("Vicuna's chat").bytes)
    assert str(repair_gguf(path, chat_template=faults.VICUNA).corrections[0]).endswith(
        "chat_template was given by hand"
    )
    assert repair_gguf(path).corrections == ()
    path.write_bytes(faulty("no template").bytes)
    ends = "{% for m in messages %}{{ m['content'] }}<|end_of_text|>{% endfor %}"
    repair_gguf(path, chat_template=ends)
    assert GGUFFile.open(path).metadata["tokenizer.ggml.eot_token_id"] == 263
    before = path.read_bytes()
    for broken in ("{{", "hello", "x" * 100_000):
        with pytest.raises(PromptError):
            repair_gguf(path, chat_template=broken)
    tower = mmproj_files.Reference()
    mmproj = mmproj_files.write_gguf(tmp_path / "p.gguf", tower.metadata(), tower.tensors())
    with pytest.raises(UsageError, match="is an mmproj: a chat template belongs to the language model"):
        repair_gguf(mmproj, chat_template=faults.VICUNA)
    assert path.read_bytes() == before


def test_what_cannot_be_mended(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    model = good()
    model.entries["llama.block_count"] = ("i32", 99)
    path.write_bytes(model.bytes)
    with pytest.raises(ModelFileError, match=r"tensor blk\.2\..* is missing"):
        repair_gguf(path)
    path.write_bytes(faulty("no end of turn").bytes)
    target = tmp_path / "new.gguf"
    target.write_bytes(b"x")
    with pytest.raises(OutputError, match="already exists; --force"):
        repair_gguf(path, target)
    with pytest.raises(OutputError, match="is the file to be repaired"):
        repair_gguf(path, tmp_path / "." / "m.gguf")
    with pytest.raises(OutputError, match="is not a directory"):
        repair_gguf(path, tmp_path / "none" / "m.gguf")
    assert target.read_bytes() == b"x"
    repair_gguf(path, target, overwrite=True)
    assert prepare_repair(target).result.corrections == ()


def test_interruption_leaves_everything_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(faulty("no end of turn").bytes)
    path.chmod(0o600)
    before = path.read_bytes()

    def interrupt(count: int) -> None:
        assert len(list(tmp_path.iterdir())) == 2, "it is under way, beside the file"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repair_gguf(path, progress=interrupt)
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
        with pytest.raises(OutputError, match="not enough room"):
            repair_gguf(path)
    prepared = prepare_repair(path)
    with path.open("r+b") as file:
        file.truncate(len(before) - 5000)
    with pytest.raises(ModelFileError, match="it shrank while it was read"):
        prepared.write()
    path.write_bytes(before)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    repair_gguf(path)
    assert path.stat().st_mode & 0o777 == 0o600 or sys.platform == "win32"
    assert prepare_repair(path).result.corrections == ()
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.skipif(not hasattr(os, "symlink") or sys.platform == "win32", reason="links")
def test_a_link_is_replaced_and_not_what_it_names(tmp_path: Path) -> None:
    """As in the Hub's cache, where other revisions share the file."""
    blob = tmp_path / "blob"
    blob.write_bytes(faulty("no end of turn").bytes)
    before = blob.read_bytes()
    link = tmp_path / "m.gguf"
    link.symlink_to(blob)
    repair_gguf(link)
    assert blob.read_bytes() == before
    assert not link.is_symlink()
    assert prepare_repair(link).result.corrections == ()


# --- the commands ---

COMMAND = (
    "from local_llava import cli\n"
    "from local_llava.commands import repair\n"
    "known = {c.callback for c in cli.app.registered_commands}\n"
    "[cli.app.command()(f) for f in (repair.repair, repair.export_ollama) if f not in known]\n"
    "cli.main()\n"
)


def run(*args: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-c", COMMAND, *map(str, args)], capture_output=True, text=True, timeout=100)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == code, done.stderr
    return done


def test_the_command(tmp_path: Path) -> None:
    path, target = tmp_path / "m.gguf", tmp_path / "new.gguf"
    path.write_bytes(faulty("no pre-tokenizer").bytes)
    line = f"{path}: tokenizer.ggml.pre is missing, taken as 'llama-bpe': the vocabulary is Llama 3's, and files"
    done = run("repair", path, "--check", code=1)
    assert done.stdout.startswith(line)
    assert not target.exists()
    done = run("repair", path, "-o", target)
    assert done.stdout.startswith(line)
    assert done.stdout.endswith(f"\n{target}\n")
    assert run("repair", target, "--check").stdout == f"{target}: nothing to correct\n"
    assert run("repair", path, "--in-place").stdout.endswith(f"\n{path}\n")
    assert path.read_bytes() == target.read_bytes()
    template = tmp_path / "chat.jinja"
    template.write_text(faults.VICUNA)
    assert "another one was given by hand" in run("repair", path, "--check", "--chat-template", template, code=1).stdout


def test_arguments_of_the_command(tmp_path: Path) -> None:
    for out, in_place, check in ((None, False, False), (None, True, True), (tmp_path / "x", True, False)):
        with pytest.raises(UsageError, match=r"give one of -o OUT\.gguf, --in-place and --check"):
            repair_command(tmp_path / "m.gguf", out, in_place, check)
    with pytest.raises(UsageError, match=r"chat\.jinja: cannot be read: No such file"):
        repair_command(tmp_path / "m.gguf", check=True, chat_template=tmp_path / "chat.jinja")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return convert(TINY, tmp_path_factory.mktemp("tiny"), quant="Q8_0")


def last_block_off(entries: faults.Entries) -> None:
    del entries["clip.vision.feature_layer"], entries["clip.projector_type"]
    entries["general.architecture"] = ("str", "llava")


TINY_FAULTS: dict[str, Any] = {
    "no template, no end of turn, no pre-tokenizer": faults.drop(
        TEMPLATE, "tokenizer.ggml.eot_token_id", "tokenizer.ggml.pre"
    ),
    "ChatML and another EOS": lambda entries: entries.update(
        {TEMPLATE: ("str", faults.CHATML), "tokenizer.ggml.eos_token_id": ("u32", 5)}
    ),
    "marks are text": lambda entries: entries.update(
        {faults.TYPES: ("arr[i32]", [1 if t == 3 else t for t in entries[faults.TYPES][1]])}
    ),
    "called llava, with other types": lambda entries: entries.update(
        {"general.architecture": ("str", "llava"), "llama.block_count": ("u64", entries["llama.block_count"][1])}
    ),
}


@pytest.mark.parametrize("name", TINY_FAULTS)
def test_the_answer_of_the_good_file(name: str, tiny: ModelFiles, tmp_path: Path) -> None:
    """A published pair with faults, as it is and repaired."""
    scene, rng = next(scenes.sample_scenes(5, held_out=True))
    picture = scenes.draw(scene)
    questions = [asked.question for asked in scenes.sample_questions(scene, rng, 3)]
    spoiled = ModelFiles(tmp_path / "m.gguf", tmp_path / "p.gguf")
    faults.spoil(tiny.model, spoiled.model, TINY_FAULTS[name])
    faults.spoil(tiny.mmproj, spoiled.mmproj, last_block_off)
    answers = []
    for files in (tiny, spoiled, spoiled):
        with Llava.load(files.model, files.mmproj, n_threads=2, preprocess="pad") as llava:
            answers.append([llava.ask(question, picture, max_tokens=30).tokens for question in questions])
        if len(answers) == 2:
            for path in (spoiled.model, spoiled.mmproj):
                assert repair_gguf(path).corrections
    assert answers[0] == answers[1] == answers[2]
    assert all(reply for reply in answers[0])


def test_a_published_pair_is_asked(tiny: ModelFiles, tmp_path: Path) -> None:
    """Two files of other people in a directory, neither of which says what it is."""
    for source, name in ((tiny.model, "m.gguf"), (tiny.mmproj, "p.gguf")):
        faults.spoil(source, tmp_path / name, faults.drop("general.architecture"))
    scene = next(scenes.sample_scenes(5, held_out=True))[0]
    scenes.draw(scene).save(tmp_path / "scene.png")
    done = run("-v", "ask", "--model", tmp_path, "--max-tokens", 9, tmp_path / "scene.png", "What is in the picture?")
    assert done.stdout.strip()
    for name, kind in (("m.gguf", "llama"), ("p.gguf", "clip")):
        line = f"{name}: general.architecture is missing, taken as '{kind}': its keys and tensors are those of {kind}"
        assert done.stderr.splitlines().count(line) == 1


def test_export_ollama(tiny: ModelFiles, tmp_path: Path) -> None:
    directory = tmp_path / "pair"
    shutil.copytree(tiny.model.parent, directory)
    out = directory / "Modelfile"
    assert run("export-ollama", directory, "--system", "Be brief.").stdout == f"{out}\n"
    text = out.read_text()
    assert f'FROM "./{tiny.model.name}"\nFROM "./{tiny.mmproj.name}"\nTEMPLATE """' in text
    assert 'SYSTEM """Be brief."""' in text
    assert "already exists" in run("export-ollama", directory, code=1).stderr
    faults.spoil(directory / tiny.model.name, directory / "m.gguf", faults.drop(TEMPLATE))
    (directory / tiny.model.name).unlink()
    done = run("export-ollama", directory / "m.gguf", "--force")
    assert "m.gguf has faults, which Ollama does not correct: run local-llava repair first" in done.stderr
    assert "SYSTEM" not in out.read_text().replace("if .System", "")
