"""Thousands of damaged files through the loaders, in child processes: each must give a result or one clear error.

    python tests/fuzz.py --count 10000 [--seed N] [--kind gguf|mmproj|safetensors|tokenizer|config|image]
    python tests/fuzz.py --seed N --kind gguf --only 17        # one case again
    python tests/fuzz_child.py build/fuzz/N/gguf-17             # a kept case, with its traceback

Whatever else happens is a finding: another exception, an unclear message, the death of the process, more time or memory
than the limits below, memory that grows from case to case, a file, thread or descriptor left behind. The file is kept,
and the next child goes on behind it. Every file follows from the seed, its kind and its number.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz_cases import KINDS, Case, Corpus

COMMAND = (sys.executable, str(Path(__file__).with_name("fuzz_child.py")))

START_S = 60
"""Seconds that a child may take besides, to start."""


@dataclass(frozen=True)
class Limits:
    """What a child may take."""

    seconds: float = 30
    """For one case."""
    memory: int = 2 << 30
    """Bytes of address space. A child with everything imported takes 0.3 GB of it."""
    batch: int = 150
    """Cases of one child."""
    taken: int = 768 << 20
    """Bytes by which resident memory may rise while a case is loaded."""
    growth: int = 4 << 20
    """Bytes by which a child's resident memory may rise from the second third of a batch to the last."""


@dataclass
class Tally:
    """What became of the cases of a kind."""

    cases: int = 0
    accepted: int = 0
    findings: list[str] = field(default_factory=list)
    steps: Counter[str] = field(default_factory=Counter)
    """How often each step of a loader was tried and refused."""
    slowest: float = 0
    """Seconds."""
    peak: int = 0
    """Bytes that one case took at most."""
    growths: list[float] = field(default_factory=list)
    """Bytes a case, of each batch."""


class Child:
    """A process that takes cases until it dies."""

    def __init__(self, command: Sequence[str], work: Path, limits: Limits, first: Case) -> None:
        self.limits, self.first = limits, first
        self.sizes: list[int] = []
        """Resident bytes after each case."""
        self.died = self.killed = False
        scratch = work / "scratch"
        for name in ("home", "tmp", "cwd"):
            shutil.rmtree(scratch / name, ignore_errors=True)
            (scratch / name).mkdir(parents=True)
        env = {"TMPDIR": str(scratch / "tmp"), "LOCAL_LLAVA_HOME": str(scratch / "home")}
        # ggml starts a debugger for a backtrace when it aborts, which takes seconds.
        env["GGML_NO_BACKTRACE"] = "1"
        # What glibc keeps for each thread, or of large blocks that were freed, would look like growth.
        env |= {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
        self.errors = (work / "stderr").open("w+b")
        self.process = subprocess.Popen(
            [*command, str(limits.memory), str(scratch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            cwd=scratch / "cwd",
            env=os.environ | env,
            text=True,
        )

    def take(self, case: Case) -> dict[str, Any]:
        """The child's answer. Where it gives none, one that says how it died, and the child takes no more."""
        assert self.process.stdin and self.process.stdout
        timer = threading.Timer(self.limits.seconds + (0 if self.sizes else START_S), self._kill)
        timer.start()
        try:
            print(json.dumps({"directory": str(case.directory), "options": case.options}), file=self.process.stdin)
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if line.endswith("\n"):
            answer: dict[str, Any] = json.loads(line)
            self.sizes.append(answer["rss"])
            if answer["taken"] > self.limits.taken:
                answer["findings"].append(f"took {answer['taken'] / 1e6:.0f} MB of memory")
            return answer
        self.died, how = True, ending(self.process.wait())
        how = f"hung for {self.limits.seconds:g} s" if self.killed else how
        return {"steps": {}, "findings": [f"{how}: {self.last_words()}"], "seconds": 0.0, "taken": 0}

    def _kill(self) -> None:
        self.killed = True
        self.process.kill()

    def last_words(self) -> str:
        """The end of what it wrote to stderr."""
        self.errors.seek(0)
        return self.errors.read()[-800:].decode(errors="replace").strip()

    def close(self) -> str:
        """End the process; returns its last words."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        try:
            self.process.wait(self.limits.seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        words = self.last_words()
        self.errors.close()
        return words

    @property
    def full(self) -> bool:
        return self.died or len(self.sizes) >= self.limits.batch

    @property
    def growth(self) -> float:
        """Bytes by which its resident memory rose from the second third of its cases to the last; 0 for too few.

        Without the largest single step: what Python loads when it is first needed (7 MB with jinja's first error) comes
        once, and growth comes again.
        """
        third = len(self.sizes) // 3
        if third < 5:
            return 0
        sizes = self.sizes[-2 * third :]
        steps = [after - before for before, after in itertools.pairwise(sizes)]
        largest = max(steps)
        at = steps.index(largest) + 1
        sizes = sizes[:at] + [size - max(0, largest) for size in sizes[at:]]
        return statistics.median(sizes[third:]) - statistics.median(sizes[:third])


def ending(code: int) -> str:
    """How a process ended."""
    return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"


def fuzz(
    cases: Iterable[Case],
    work: Path,
    *,
    command: Sequence[str] = COMMAND,
    limits: Limits = Limits(),
    on_result: Callable[[Case, dict[str, Any]], None] = lambda case, answer: None,
) -> dict[str, Tally]:
    """Put cases through loaders.

    Args:
        cases: Written when they are asked for; each may use the directory of the one before.
        work: For what the children write.
        command: Of a child; it gets the limit of memory and its directory as further arguments.
        limits: Of a child.
        on_result: Called with each case and the child's answer, while the case's files are there.

    Returns:
        By kind.
    """
    tallies: dict[str, Tally] = {}
    child: Child | None = None
    for case in cases:
        if child is None or child.full or child.first.kind != case.kind:
            if child:
                settle(tallies[child.first.kind], child)
            child = Child(command, work, limits, case)
        answer = child.take(case)
        count(tallies.setdefault(case.kind, Tally()), case, answer)
        on_result(case, answer)
    if child:
        settle(tallies[child.first.kind], child)
    return tallies


def settle(tally: Tally, child: Child) -> None:
    """Close a child, and add what shows only over all its cases."""
    words = child.close()
    name, n = f"{child.first.name} and on", len(child.sizes)
    if child.died:
        return  # which its last case tells
    if code := child.process.returncode:
        tally.findings.append(f"{name}: {ending(code)} when all was done: {words}")
    elif words:
        tally.findings.append(f"{name}: wrote to stderr: {words}")
    if child.growth > child.limits.growth:
        tally.findings.append(f"{name}: grew by {child.growth / 1e6:.1f} MB over a third of {n} cases")
    if n >= 15:
        tally.growths.append(child.growth / (n // 3))


def count(tally: Tally, case: Case, answer: dict[str, Any]) -> None:
    """Add a case. What decides whether it was accepted is the conversion, or else the last step."""
    steps = answer["steps"]
    decisive = "convert" if "convert" in steps else next(reversed(steps), None)
    tally.cases += 1
    tally.accepted += not answer["findings"] and decisive is not None and steps[decisive] is None
    tally.findings += [f"{case.name}: {finding}" for finding in answer["findings"]]
    tally.slowest, tally.peak = max(tally.slowest, answer["seconds"]), max(tally.peak, answer["taken"])
    for step, refusal in steps.items():
        tally.steps[step] += 1
        tally.steps[f"{step} refused"] += refusal is not None


def keep(case: Case, answer: dict[str, Any], directory: Path) -> None:
    """Copy a case, with what was done to it and what came of it."""

    def special(top: str, names: list[str]) -> list[str]:
        paths = [Path(top, name) for name in names]
        return [p.name for p in paths if not (p.is_symlink() or p.is_file() or p.is_dir())]

    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(case.directory, directory, symlinks=True, ignore=special)
    state = {"name": case.name, "how": case.how, "options": case.options, **answer}
    (directory / "case.json").write_text(json.dumps(state, indent=1))


def numbered(corpus: Corpus, kinds: Mapping[str, Iterable[int]], seed: int, directory: Path) -> Iterator[Case]:
    for kind, numbers in kinds.items():
        for number in numbers:
            yield corpus.case(kind, number, seed, directory)


def report(tallies: dict[str, Tally]) -> Iterator[str]:
    """The table, and then every finding."""
    yield "kind            cases  accepted   refused  findings  slowest    taken  growth a case"
    for kind, t in tallies.items():
        bad = len({finding.split(":")[0] for finding in t.findings})
        grown = statistics.mean(t.growths or [0]) / 1e3
        yield (
            f"{kind:12} {t.cases:8} {t.accepted:9} {t.cases - t.accepted - bad:9} {bad:9} "
            f"{t.slowest:6.1f} s {t.peak / 1e6:5.0f} MB {grown:11.1f} kB"
        )
        tried = {step: n for step, n in t.steps.items() if not step.endswith("refused")}
        yield "    " + ", ".join(f"{step}: {n}, refused {t.steps[step + ' refused']}" for step, n in tried.items())
    for t in tallies.values():
        yield from (finding.splitlines()[0] for finding in t.findings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="cases in all")
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    parser.add_argument("--kind", choices=KINDS, help="only these, all of the count")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="only this case of the kind")
    parser.add_argument("--keep", type=Path, default=Path("build/fuzz"), help="where findings are kept, by seed")
    parser.add_argument("--log", type=Path, help="write a line of JSON for each case")
    given = parser.parse_args()
    if given.only is not None and given.kind is None:
        parser.error("--only needs --kind")
    shares = {given.kind: 100} if given.kind else KINDS
    kinds: dict[str, Iterable[int]] = {kind: range(given.count * share // 100) for kind, share in shares.items()}
    if given.only is not None:
        kinds = {given.kind: [given.only]}
    kept, log = given.keep / str(given.seed), given.log.open("w") if given.log else None
    print(f"seed {given.seed}", flush=True)

    def on_result(case: Case, answer: dict[str, Any]) -> None:
        if log:
            print(json.dumps({"name": case.name, "how": case.how, **answer}), file=log, flush=True)
        if answer["findings"]:
            keep(case, answer, kept / case.name)

    with tempfile.TemporaryDirectory(prefix="local-llava-fuzz-") as folder:
        corpus = Corpus(Path(folder))
        work = Path(folder)
        (work / "scratch").mkdir()
        tallies = fuzz(numbered(corpus, kinds, given.seed, work / "scratch" / "case"), work, on_result=on_result)
    print(*report(tallies), sep="\n")
    if any(t.findings for t in tallies.values()):
        sys.exit(f"what was found is kept in {kept}")


if __name__ == "__main__":
    main()
