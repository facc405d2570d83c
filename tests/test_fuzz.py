"""A short run of fuzz.py with a seed of its own each time, and proof that nothing that matters would escape it."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fuzz
import pytest
from fuzz_cases import KINDS, Case, Corpus

CASES = {"gguf": 50, "mmproj": 30, "safetensors": 30, "tokenizer": 30, "config": 30, "image": 30}

CHILD = """
import atexit, os, signal, sys, threading, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import fuzz_child
from local_llava.errors import ImageError

kept = []

def refuse(message):
    raise ImageError(message)

DO = {
    "nothing": lambda: None,
    "refuse": lambda: refuse("a clear line"),
    "two lines": lambda: refuse("a line\\nand another"),
    "long line": lambda: refuse("a" * 2000),
    "raise": lambda: 1 // 0,
    "panic": lambda: sys.exit(3),
    "abort": os.abort,
    "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "quit": lambda: os._exit(0),
    "hang": lambda: time.sleep(100),
    "take": lambda: len(b"x" * (100 << 20)),
    "take all": lambda: bytearray(4 << 30),
    "grow": lambda: kept.append(b"x" * (200 << 10)),
    "load once": lambda: kept.append(b"x" * (7 << 20)),
    "file": lambda: Path("left").touch(),
    "descriptor": lambda: kept.append(open(os.devnull)),
    "thread": lambda: threading.Thread(target=time.sleep, args=(100,), daemon=True).start(),
    "abort at the end": lambda: atexit.register(os.abort),
    "stderr": lambda: print("noise", file=sys.stderr),
}

def loader(case, options):
    yield "load", DO[options["do"]]

fuzz_child.serve(loader, int(sys.argv[2]), Path(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(tmp_path_factory.mktemp("corpus"))


def test_damaged_files_give_a_result_or_one_clear_error(corpus: Corpus, tmp_path: Path) -> None:
    seed = random.randrange(1_000_000)
    numbers = {kind: range(n) for kind, n in CASES.items()}
    (tmp_path / "scratch").mkdir()
    tallies = fuzz.fuzz(fuzz.numbered(corpus, numbers, seed, tmp_path / "scratch" / "case"), tmp_path)
    findings = [finding for tally in tallies.values() for finding in tally.findings]
    assert not findings, f"python tests/fuzz.py --seed {seed} --kind KIND --only NUMBER\n" + "\n".join(findings)
    assert {kind: tally.cases for kind, tally in tallies.items()} == CASES
    for kind, tally in tallies.items():
        assert 0 < tally.accepted < tally.cases, f"seed {seed}: {kind}"


def test_a_case_follows_from_its_seed(corpus: Corpus, tmp_path: Path) -> None:
    for kind in KINDS:
        one, two = (corpus.case(kind, 5, 1, tmp_path / name) for name in "ab")
        assert (one.how, one.options) == (two.how, two.options)
        assert contents(one.directory) == contents(two.directory)
        assert contents(corpus.case(kind, 6, 1, tmp_path / "c").directory) != contents(one.directory)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def proof(tmp_path: Path, actions: list[str], **limits: Any) -> fuzz.Tally:
    """What fuzz.py makes of a child that does these things."""
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    command = (sys.executable, str(script), str(Path(fuzz.__file__).parent))

    def cases() -> Iterator[Case]:
        for i, action in enumerate(actions):
            yield Case("proof", i, tmp_path / "scratch", (), {"do": action})

    (tmp_path / "scratch").mkdir()
    return fuzz.fuzz(cases(), tmp_path, command=command, limits=fuzz.Limits(**limits))["proof"]


NOTICED = {
    "two lines": "load: ImageError is not one printable line",
    "long line": "load: ImageError has 2000 characters",
    "raise": "load: raised ZeroDivisionError",
    "panic": "load: raised SystemExit: 3",
    "abort": "died of SIGABRT",
    "segfault": "died of SIGSEGV",
    "quit": "ended with 0",
    "hang": "hung for 1 s",
    "file": "left /",
    "descriptor": "left descriptor",
    "thread": "left thread",
}


def test_every_kind_of_failure_is_noticed(tmp_path: Path) -> None:
    actions = [action for bad in NOTICED for action in (bad, "refuse", "nothing")]
    tally = proof(tmp_path, actions, seconds=1)
    assert [f.split(": ", 1)[0] for f in tally.findings] == [f"proof-{3 * i}" for i in range(len(NOTICED))]
    for finding, problem in zip(tally.findings, NOTICED.values(), strict=True):
        assert finding.split(": ", 1)[1].startswith(problem)
    assert (tally.cases, tally.accepted) == (len(actions), len(NOTICED))


@pytest.mark.skipif(sys.platform != "linux", reason="peaks and limits of memory are Linux's")
def test_memory_is_noticed(tmp_path: Path) -> None:
    tally = proof(tmp_path, ["nothing", "take", "take all", "nothing"], taken=50 << 20, memory=2 << 30)
    took, ran_out = tally.findings
    assert took.startswith("proof-1: took 1")
    assert ran_out.startswith("proof-2: load: raised MemoryError")
    assert tally.accepted == 2


def test_growth_is_noticed(tmp_path: Path) -> None:
    tally = proof(tmp_path, ["grow"] * 45, growth=2 << 20)
    assert len(tally.findings) == 1
    assert tally.findings[0].startswith(("proof-0 and on: grew by 2.", "proof-0 and on: grew by 3."))


def test_no_growth_is_no_finding(tmp_path: Path) -> None:
    actions = ["take", "refuse", "nothing"] * 10
    actions[23] = "load once"
    assert proof(tmp_path, actions, growth=1 << 20).findings == []


def test_noise_is_noticed(tmp_path: Path) -> None:
    assert proof(tmp_path, ["nothing", "stderr"]).findings == ["proof-0 and on: wrote to stderr: noise"]


def test_a_death_after_the_last_case_is_noticed(tmp_path: Path) -> None:
    (finding,) = proof(tmp_path, ["abort at the end", "nothing"]).findings
    assert finding.startswith("proof-0 and on: died of SIGABRT when all was done")
