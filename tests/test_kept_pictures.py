"""What is kept of pictures on disk: what the next process need not compute, and what it must never take."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llava_checkpoints import TINY
from tiny_world import QUESTION, at_once, fresh_seed, is_idle, picture, questions

from local_llava import Llava, Message, Reply
from local_llava.convert import convert
from local_llava.types import ModelFiles

OTHER = "Is there a star?"


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where it is kept: nothing is there yet."""
    directory = tmp_path / "kept"
    monkeypatch.setenv("LOCAL_LLAVA_CACHE", str(directory))
    return directory


@pytest.fixture
def load(tiny: ModelFiles) -> Callable[..., Llava]:
    def load(files: ModelFiles = tiny, **options: Any) -> Llava:
        return Llava.load(files.model, files.mmproj, **{"kv_type": "F32", "n_threads": 1, **options})

    return load


Load = Callable[..., Llava]


def ask(load: Load, question: str = QUESTION, images: Any = None, loading: Any = None, **options: Any) -> Reply:
    """In a process of its own, as far as what is kept goes."""
    with load(**{"image_cache": "kv", **(loading or {})}) as llava:
        reply = llava.ask(question, picture(3) if images is None else images, **options)
        assert is_idle(llava)
    return reply


def counts(reply: Reply) -> tuple[int, int, int]:
    return reply.timings.images_encoded, reply.timings.reused_tokens, reply.timings.restored_tokens


def names(directory: Path, kind: str = "*") -> list[str]:
    return sorted(path.name for path in directory.glob(f"[!.]*.{kind}")) if directory.is_dir() else []


N_BEFORE, N_IMAGE = 5, 36
"""Tokens of tiny-llava's prompt before the picture, and of the picture."""


@pytest.fixture
def expected(load: Load) -> Reply:
    return ask(load, loading={"image_cache": "off"})


def test_nothing_is_kept_unasked(load: Load, kept: Path, expected: Reply) -> None:
    assert counts(expected) == (1, 0, 0) and not kept.exists()


def test_the_second_process_computes_neither_picture_nor_prompt(load: Load, kept: Path, expected: Reply) -> None:
    first = ask(load)
    assert counts(first) == (1, 0, 0) and first.tokens == expected.tokens
    assert len(names(kept, "kv")) == len(names(kept, "embeddings")) == 1
    second = ask(load)
    assert second.tokens == expected.tokens
    assert counts(second) == (0, N_BEFORE + N_IMAGE, N_BEFORE + N_IMAGE)
    other = ask(load, OTHER)
    assert counts(other) == (0, N_BEFORE + N_IMAGE, N_BEFORE + N_IMAGE)
    assert other.tokens == ask(load, OTHER, loading={"image_cache": "off"}).tokens
    assert len(names(kept)) == 2, "nothing is kept twice"


def test_real_processes(tiny: ModelFiles, kept: Path) -> None:
    script = (
        "import sys, json; from PIL import Image; from local_llava import Llava\n"
        "with Llava.load(sys.argv[1], sys.argv[2], image_cache='kv', n_threads=1) as llava:\n"
        "    t = llava.ask('What do you see?', sys.argv[3])\n"
        "    print(json.dumps([t.text, t.timings.images_encoded, t.timings.restored_tokens]))\n"
    )
    path = kept.parent / "scene.png"
    picture(3).save(path)
    command = [sys.executable, "-c", script, str(tiny.model), str(tiny.mmproj), str(path)]
    first, second = (
        json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)
        for _ in range(2)
    )
    assert first[0] == second[0] and first[1:] == [1, 0] and second[1:] == [0, N_BEFORE + N_IMAGE]


def test_embeddings_alone(load: Load, kept: Path, expected: Reply) -> None:
    loading = {"image_cache": "embeddings"}
    for i in range(2):
        reply = ask(load, loading=loading)
        assert reply.tokens == expected.tokens and counts(reply) == (1 - i, 0, 0)
    assert len(names(kept, "embeddings")) == 1 and not names(kept, "kv")
    assert counts(ask(load)) == (0, 0, 0), "they serve who keeps more, too"


def test_within_a_process_memory_comes_first(load: Load, kept: Path) -> None:
    with load(image_cache="kv") as llava:
        replies = [llava.ask(q, picture(3)) for q in (QUESTION, OTHER, QUESTION)]
    assert [r.timings.restored_tokens for r in replies] == [0, 0, 0]
    assert all(r.timings.reused_tokens > N_IMAGE for r in replies[1:])


def test_many_questions_restore_once(load: Load, kept: Path) -> None:
    texts = [QUESTION, OTHER, "How many shapes are there?", "Describe this image."]
    expected = [ask(load, text).tokens for text in texts]
    with load(image_cache="kv") as llava:
        replies = at_once([lambda t=t: llava.ask(t, picture(3)) for t in texts * 2])  # type: ignore[misc]
    assert [r.tokens for r in replies] == expected * 2
    assert sum(r.timings.images_encoded for r in replies) == 0
    assert sum(r.timings.restored_tokens for r in replies) == N_BEFORE + N_IMAGE
    assert all(r.timings.reused_tokens >= N_BEFORE + N_IMAGE for r in replies)


def test_two_pictures_and_a_chat(load: Load, kept: Path) -> None:
    a, b = picture(3), picture(8)
    first = ask(load, images=[a, b])
    turns = [Message("user", QUESTION, (a, b)), Message("assistant", first.text), Message("user", OTHER)]
    with load(image_cache="kv") as llava:
        second = llava.chat(turns)
        longer = [*turns, Message("assistant", second.text), Message("user", "And here?", (picture(9),))]
        third = llava.chat(longer)
    assert second.timings.images_encoded == 0 and second.timings.restored_tokens >= N_BEFORE + 2 * N_IMAGE
    assert third.timings.images_encoded == 1
    with load(image_cache="kv") as llava:
        again = llava.chat(longer)
        n_kept = again.timings.restored_tokens
        assert again.timings.images_encoded == 0 and n_kept > third.timings.reused_tokens
        assert again.tokens == third.tokens
    turned = ask(load, images=[b, a])
    assert counts(turned) == (0, 0, 0)


def test_the_prompt_may_be_restored_into_other_cells(load: Load, kept: Path, expected: Reply) -> None:
    """The size of the KV cache, and the number of sequences, have no part in what is kept."""
    ask(load)
    with load(image_cache="kv", n_ctx=256, parallel=2, n_batch=16) as llava:
        for i in range(3):
            llava.ask(QUESTION, picture(20 + i))
        reply = llava.ask(QUESTION, picture(3))
    assert reply.tokens == expected.tokens and reply.timings.restored_tokens == N_BEFORE + N_IMAGE


@pytest.fixture(scope="module")
def others(tiny: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelFiles]:
    """The same model, rounded otherwise, with the names of the first."""
    directory = tmp_path_factory.mktemp("others")
    rounded = convert(TINY, directory / "rounded", quant="F16", mmproj_quant="F16")
    found = {}
    for name, model, mmproj in (("model", rounded.model, tiny.mmproj), ("mmproj", tiny.model, rounded.mmproj)):
        (directory / name).mkdir()
        files = ModelFiles(directory / name / tiny.model.name, directory / name / tiny.mmproj.name)
        shutil.copy2(model, files.model)
        shutil.copy2(mmproj, files.mmproj)
        found[name] = files
    return found


@pytest.mark.parametrize(
    ("first", "change", "encodes"),
    [
        ({}, {"kv_type": "F16"}, True),  # whose embeddings are kept as float16
        ({"kv_type": "F16"}, {"kv_type": "Q8_0"}, False),
        ({}, {"flash_attention": True}, True),  # of the tower, too
        ({}, {"system": "Be brief."}, False),
        ({}, {"files": "model"}, False),
        ({}, {"files": "mmproj"}, True),
    ],
    ids=str,
)
def test_nothing_is_taken_that_depends_on_something_else(
    load: Load,
    kept: Path,
    others: dict[str, ModelFiles],
    first: dict[str, Any],
    change: dict[str, Any],
    encodes: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("local_llava.hub.check_pair_ids", lambda *_: None)
    ask(load, loading=first)
    before = names(kept, "kv")
    loading = {**change, "files": others[change["files"]]} if "files" in change else change
    right = ask(load, loading={**loading, "image_cache": "off"})
    reply = ask(load, loading=loading)
    assert counts(reply) == (int(encodes), 0, 0)
    assert reply.tokens == right.tokens
    assert len(names(kept, "kv")) == 2 and set(before) <= set(names(kept, "kv")), "both are kept side by side"
    assert counts(ask(load, loading=loading))[2] > N_IMAGE
    assert counts(ask(load, loading=first))[2] == N_BEFORE + N_IMAGE


def test_another_version_takes_nothing(load: Load, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of llama-cpp-python, whose kernels may round otherwise."""
    from local_llava import loading

    ask(load)
    version = loading.version
    monkeypatch.setattr(loading, "version", lambda name: version(name) + ".post1")
    assert counts(ask(load)) == (1, 0, 0)


def test_a_model_that_was_written_anew_is_another_one(load: Load, kept: Path, tiny: ModelFiles, tmp_path: Path) -> None:
    copies = [Path(shutil.copy2(path, tmp_path / path.name)) for path in (tiny.model, tiny.mmproj)]
    files = ModelFiles(*copies)
    ask(load, loading={"files": files})
    data = bytearray(files.model.read_bytes())
    data[-2000] ^= 0x40  # a weight
    files.model.write_bytes(data)
    assert counts(ask(load, loading={"files": files})) == (0, 0, 0)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "a flipped bit": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
    ),
    "cut": lambda data: data[:-1000],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"x",
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("kind", ["kv", "embeddings"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_entries_are_dropped(
    load: Load, kept: Path, expected: Reply, damage: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    mode = {"image_cache": kind}
    ask(load, loading=mode)
    (name,) = names(kept, kind)
    good = (kept / name).read_bytes()
    (kept / name).write_bytes(DAMAGE[damage](good))
    for entry in names(kept, "embeddings" if kind == "kv" else "kv"):
        (kept / entry).unlink()
    with caplog.at_level(logging.WARNING, "local_llava"):
        reply = ask(load, loading=mode)
    assert reply.tokens == expected.tokens and counts(reply) == (1, 0, 0)
    assert any(name in record.message for record in caplog.records)
    assert (kept / name).read_bytes() == good, "and written anew, the same bytes"


def test_an_entry_under_the_name_of_another_one(load: Load, kept: Path) -> None:
    ask(load)
    (one,) = names(kept, "kv")
    ask(load, images=picture(8))
    (two,) = set(names(kept, "kv")) - {one}
    shutil.copy(kept / one, kept / two)
    reply = ask(load, images=picture(8))
    assert reply.timings.restored_tokens == 0
    assert reply.tokens == ask(load, images=picture(8), loading={"image_cache": "off"}).tokens


def test_only_pictures_that_are_asked_about_again(load: Load, kept: Path) -> None:
    with load(image_cache="kv", image_cache_after=2) as llava:
        llava.ask(QUESTION, picture(3))
        llava.ask(QUESTION, picture(8))
        llava._scheduler._store._cache.flush()  # type: ignore[union-attr]
        assert not names(kept, "kv") and len(names(kept, "embeddings")) == 2
        llava.ask(OTHER, picture(3))
    assert len(names(kept, "kv")) == 1
    assert counts(ask(load))[2] == N_BEFORE + N_IMAGE


def test_the_cap_holds_and_what_was_used_last_stays(load: Load, kept: Path) -> None:
    ask(load, loading={"image_cache": "kv"})
    size = sum(path.stat().st_size for path in kept.glob("[!.]*.*"))
    cap = 3 * size
    loading = {"image_cache_bytes": cap}
    for seed in range(30, 36):
        assert ask(load, images=picture(3), loading=loading).timings.restored_tokens
        ask(load, images=picture(seed), loading=loading)
        assert sum(path.stat().st_size for path in kept.glob("[!.]*.*")) <= cap
    assert ask(load, images=picture(35), loading=loading).timings.restored_tokens
    assert not ask(load, images=picture(30), loading=loading).timings.restored_tokens
    shutil.rmtree(kept)
    assert ask(load, loading={"image_cache_bytes": 1000}).tokens and not names(kept)


def test_a_place_that_cannot_be_used(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: Reply, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOCAL_LLAVA_CACHE", str(tmp_path / "file" / "kept"))
    for _ in range(2):
        with caplog.at_level(logging.WARNING, "local_llava"), load(image_cache="kv") as llava:
            replies = [llava.ask(QUESTION, picture(i)) for i in (3, 8, 3)]
        assert replies[0].tokens == replies[2].tokens == expected.tokens
        assert counts(replies[0]) == (1, 0, 0)
    lines = [r.message for r in caplog.records if "image cache" in r.message]
    assert 1 <= len(lines) <= 2 * 2, "said once, not for each picture"


def test_a_disk_that_fills_up(
    load: Load, kept: Path, expected: Reply, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from local_llava.image_cache import entry

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(entry, "_write_all", full)
    with caplog.at_level(logging.WARNING, "local_llava"), load(image_cache="kv") as llava:
        replies = [llava.ask(QUESTION, picture(i)) for i in (3, 8, 3, 9)]
    assert replies[0].tokens == replies[2].tokens == expected.tokens
    assert not names(kept)
    assert len([r for r in caplog.records if "No space left" in r.message]) == 1


def test_fresh_questions_get_the_same_answers(load: Load, kept: Path) -> None:
    """Rounded KV too: what comes from disk is what was computed, bit for bit."""
    seed = fresh_seed()
    asked = questions(seed, 10, 2)
    for kv_type in ("F16", "Q8_0"):
        results = []
        for _ in range(2):
            with load(image_cache="kv", kv_type=kv_type) as llava:
                results.append([llava.ask(a.question, a.picture) for a in asked])
        first, second = results
        assert [r.tokens for r in first] == [r.tokens for r in second], seed
        assert sum(r.timings.images_encoded for r in second) == 0
        assert sum(r.timings.restored_tokens for r in second) >= 10 * N_IMAGE
