"""What `local-llava tune` finds, keeps, and changes of how a pair is loaded."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from llava_checkpoints import TINY

from local_llava import Options, OutputError, UsageError, measuring, tuning
from local_llava.convert import convert
from local_llava.errors import EngineError
from local_llava.measuring import Measurement, Tuner
from local_llava.types import ModelFiles


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return convert(TINY, tmp_path_factory.mktemp("pair"), quant="F16")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOCAL_LLAVA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


# --- what is kept ---


def test_what_was_kept_takes_the_place_of_defaults(files: ModelFiles) -> None:
    assert tuning.apply(Options(), {}, files) == Options()
    where = tuning.save(files, {"n_threads": 3, "n_batch": 64, "flash_attention": True, "kv_type": "Q8_0"}, {"s": 1})
    assert where == tuning.path(files) and where.parent == tuning.directory()
    assert tuning.apply(Options(), {}, files) == Options(n_threads=3, n_batch=64, flash_attention=True, kv_type="Q8_0")
    assert [path.name for path in where.parent.iterdir()] == [where.name], "nothing unfinished is left"


def test_what_the_user_named_stays(files: ModelFiles) -> None:
    tuning.save(files, {"n_threads": 3, "n_batch": 64}, {})
    named = {"n_threads": 2, "n_batch": None}
    assert tuning.apply(Options().updated(named), named, files) == Options(n_threads=2)


def test_nothing_that_rounds_comes_beside_float32(files: ModelFiles) -> None:
    tuning.save(files, {"n_threads": 3, "flash_attention": True, "kv_type": "Q8_0"}, {})
    named = {"kv_type": "F32"}
    assert tuning.apply(Options(kv_type="F32"), named, files) == Options(kv_type="F32", n_threads=3)


def test_what_llama_cpp_cannot_have_comes_of_nothing_that_was_kept(files: ModelFiles) -> None:
    """A KV cache in Q8_0 takes flash attention: what the user named is possible with it."""
    kept: list[dict[str, Any]] = [{"flash_attention": False}, {"kv_type": "Q8_0"}]
    for stored, named in (kept, kept[::-1]):
        tuning.save(files, {"n_threads": 3, **stored}, {})
        assert tuning.apply(Options().updated(named), named, files) == Options().updated({"n_threads": 3, **named})
    tuning.save(files, {"n_threads": 3, **kept[0], **kept[1]}, {})
    assert tuning.apply(Options(), {}, files) == Options(n_threads=3)


def test_another_machine_or_pair_finds_nothing(
    files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning.save(files, {"n_threads": 3}, {})
    changed = tmp_path / "changed.gguf"
    raw = bytearray(files.model.read_bytes())
    raw[200] ^= 1
    changed.write_bytes(raw)
    assert tuning.read(ModelFiles(changed, files.mmproj)) == {}
    moved = tmp_path / "moved.gguf"
    moved.write_bytes(files.model.read_bytes())
    assert tuning.read(ModelFiles(moved, files.mmproj)) == {"n_threads": 3}, "a copy is the same model"
    here = tuning.machine()
    for name, value in (("cores", 99), ("devices", ["CUDA: another"]), ("llama-cpp-python", "0.0.1")):
        monkeypatch.setattr(tuning, "machine", lambda name=name, value=value: {**here, name: value})
        assert tuning.read(files) == {}, name


DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"\x00\xff{",
    "too deep": b"[" * 100_000,
    "another format": b'{"format": 2, "options": {}}',
    "no mapping": b"[1, 2]",
    "no options": b'{"format": 1}',
    "options that are none": b'{"format": 1, "options": [1]}',
    "an option of others": b'{"format": 1, "options": {"max_tokens": 5}}',
    "out of range": b'{"format": 1, "options": {"n_threads": 100000}}',
    "another type": b'{"format": 1, "options": {"n_batch": "64"}}',
    "no such KV type": b'{"format": 1, "options": {"kv_type": "Q2_K"}}',
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_ignored_with_a_line(case: str, files: ModelFiles, caplog: pytest.LogCaptureFixture) -> None:
    where = tuning.path(files)
    where.parent.mkdir(parents=True)
    where.write_bytes(DAMAGED[case])
    with caplog.at_level(logging.WARNING, "local_llava"):
        assert tuning.apply(Options(), {}, files) == Options()
    (record,) = caplog.records
    assert str(where) in record.message and "damaged" in record.message and len(record.message) < 500


def test_a_place_that_cannot_be_written_is_named(files: ModelFiles, home: Path) -> None:
    home.write_text("a file")
    with pytest.raises(OutputError, match=r"cannot write .*LOCAL_LLAVA_HOME names another place"):
        tuning.save(files, {"n_threads": 3}, {})
    assert tuning.apply(Options(), {}, files) == Options()


def test_it_can_be_forgotten(files: ModelFiles) -> None:
    assert not tuning.forget(files)
    tuning.save(files, {"n_threads": 3}, {})
    assert tuning.forget(files) and tuning.read(files) == {}


# --- how it is found ---


@pytest.fixture
def scripted(files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tuner whose measurements are made up: seconds a prompt token, by settings; every measurement takes a second."""
    clock = [0.0]

    def make(cost: Any, seconds: float = 1000, rounding_kv: bool = False, prompt: int = 512) -> Tuner:
        monkeypatch.setattr(measuring.time, "monotonic", lambda: clock[0])
        monkeypatch.setattr(measuring.devices, "physical_cores", lambda: 4)
        monkeypatch.setattr(measuring.ggml, "available_cpus", lambda: 8)
        tuner = Tuner(files, seconds, rounding_kv)
        tuner._prompt = prompt

        def measure(measured: Measurement, first: bool = False) -> None:
            clock[0] += 1
            tuner._longest = 1
            value = cost(measured.settings)
            if value is None:
                raise EngineError("no memory")
            measured.picture_s.append(0)
            measured.prefill_s.append(value)
            measured.decode_s.append(0)
            if measured not in tuner.tried:
                tuner.tried.append(measured)

        monkeypatch.setattr(tuner, "_measure", measure)
        return tuner

    return make


def test_the_best_of_each_option_is_found_and_put_together(scripted: Any) -> None:
    def cost(s: dict[str, Any]) -> float:
        return abs(s["n_threads"] - 3) + abs(s["n_batch"] - 512) / 512 + (s["flash_attention"] is not True) + 1

    result = scripted(cost).run()
    assert result.changes == {"n_threads": 3, "n_batch": 512, "flash_attention": True}
    assert result.skipped == [] and result.gain > 0.5
    tried = [measured.settings for measured in result.tried]
    assert tried[0] == {"n_threads": 4, "n_batch": 256, "flash_attention": None, "kv_type": "auto"}
    assert {s["n_threads"] for s in tried} == {2, 3, 4, 8} and {s["n_batch"] for s in tried} == {64, 128, 256, 512}


def test_what_wins_by_little_is_not_kept(scripted: Any) -> None:
    for win, kept in ((0.025, {}), (0.035, {"n_threads": 8})):
        result = scripted(lambda s, win=win: 1 - win * (s["n_threads"] == 8)).run()
        assert result.changes == kept


def test_what_won_by_chance_is_measured_again(scripted: Any) -> None:
    """The default was disturbed when it was measured first."""
    disturbed = [2.0]
    result = scripted(lambda s: disturbed.pop() if disturbed else 1.0).run()
    assert result.changes == {} and len(result.default.prefill_s) == 3


def test_a_kv_cache_that_rounds_is_measured_and_kept_if_allowed(scripted: Any) -> None:
    for allowed in (False, True):
        result = scripted(lambda s: 1 - 0.5 * (s["kv_type"] == "Q8_0"), rounding_kv=allowed).run()
        assert any(measured.settings["kv_type"] == "Q8_0" for measured in result.tried)
        assert result.changes == ({"kv_type": "Q8_0"} if allowed else {})


def test_what_there_is_no_time_for_is_named(scripted: Any) -> None:
    result = scripted(lambda s: 1.0, seconds=3.5).run()
    assert len(result.tried) == 3 and len(result.skipped) == 7


def test_what_cannot_be_loaded_is_passed_over(scripted: Any) -> None:
    result = scripted(lambda s: None if s["n_batch"] == 512 else 1.0 - 0.1 * (s["n_threads"] == 2)).run()
    assert result.changes == {"n_threads": 2}


def test_a_batch_that_no_prompt_fills_is_not_tried(scripted: Any) -> None:
    result = scripted(lambda s: 1.0, prompt=100).run()
    assert {measured.settings["n_batch"] for measured in result.tried} == {64, 256}


def test_a_pair_is_measured_as_users_ask_it(files: ModelFiles) -> None:
    """Nothing is reused, answers go on, and the picture is a real one."""
    tuner = Tuner(files, 2, False)
    measured = Measurement({"n_threads": 1, "n_batch": 128, "flash_attention": None, "kv_type": "auto"})
    tuner._measure(measured, first=True)
    assert measured.picture_tokens == 36 and measured.total_s > 0
    assert 64 <= tuner._prompt <= 1024 and 8 <= tuner._answer <= 64
    assert all(len(times) == 1 and times[0] > 0 for times in (measured.picture_s, measured.prefill_s))


# --- the command ---


def tune(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "local_llava.cli", "tune", *arguments], capture_output=True, text=True, timeout=300
    )


def test_the_command(files: ModelFiles, home: Path) -> None:
    done = tune(str(files.model), "--seconds", "2", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["measured"] and told["measured"][0]["seconds"] > 0
    assert tuning.read(files) == told["kept"]
    tuning.save(files, {"n_batch": 64}, {})
    asked = subprocess.run(
        [sys.executable, "-m", "local_llava.cli", "-v", "ask", "-m", str(files.model), "What do you see?"],
        capture_output=True,
        text=True,
        env={**os.environ},
    )
    assert asked.returncode == 0 and "measured by local-llava tune: n_batch=64" in asked.stderr
    assert tune(str(files.model), "--reset").stdout == "forgotten\n"
    assert tune(str(files.model), "--reset").stdout == "nothing was kept\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--seconds", "0"), "--seconds must be 1 to 86400, not 0"), (("nothing.gguf",), "nothing.gguf")],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = tune(*arguments)
    assert done.returncode in (1, 2) and done.stderr.count("\n") == 1 and message in done.stderr


def test_a_value_of_no_option_is_refused() -> None:
    with pytest.raises(UsageError):
        Options().updated({"n_batch": 4096})
