#!/usr/bin/env python3
"""The engine beside its peers: what an answer costs, alone and among others, for the first time and again.

    python benchmarks/engine.py ROW --shape 8b|1b --directory /big/disk [--repeats N]

Rows:

- answers: time to the first token about a new picture, and of a second question about it in the same process. Peers:
  llama-mtmd-cli after it has loaded (first question), llama-cpp-python's own chat handler, llama-server.
- process: the same picture in a new process, after loading, from our image cache (kv). Peer: llama-mtmd-cli.
- decode: tokens per second of one answer, what of it is spent outside llama.cpp. Peer: llama-bench at the same depth.
- clients: eight clients at once, about one picture and about eight, new and then known. Peer: llama-server -np 8, with
  and without unified KV; memory of both after it.
- tower: pictures per second, one and eight at a time. Peer: libmtmd.
- memory: resident memory beyond the mapped files after the same work. Peer: llama-server.
- stall: how long a running answer stands still while another's picture is read. Peer: llama-server.

The models are `shapes.py`'s: random weights, and answers as long as asked for. Sides take turns, in alternating order;
figures are medians, with the least and the most. All get the same threads and context; peers are release builds
of the llama.cpp that the pinned llama-cpp-python carries. Run it on a machine that does nothing else. DIRECTORY gets
the models (5.6 GB for 8b, 1.4 GB for 1b), pictures and logs.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import clients
import engine_peers
import machine
import shapes
from clients import QUESTIONS, Pictures, Request, spread
from engine_peers import Side

from local_llava.types import ModelFiles

PICTURE_TOKENS = 576
"""Of one picture, with both shapes."""


@dataclass(frozen=True)
class Setting:
    """What a row runs with."""

    files: ModelFiles
    directory: Path
    pictures: Pictures
    repeats: int
    threads: int
    slots: int
    n: int
    """Tokens of an answer that is generated."""


def turns(sides: Sequence[Side], repeat: int) -> Sequence[Side]:
    """Who comes first changes."""
    return sides if repeat % 2 == 0 else sides[::-1]


def ratio(what: str, ours: Sequence[float], peer: str, theirs: Sequence[float], bar: str, unit: str = "s") -> None:
    """Print a line of the table."""
    value = statistics.median(ours) / statistics.median(theirs)
    both = f"ours {spread(ours, unit)}, {peer} {spread(theirs, unit)}"
    print(f"{what}: {both}: ratio {value:.3f} (bar {bar})", flush=True)


def require(held: bool, what: str) -> None:
    """What was not computed again shows in the counters; a time that was not measured on it means nothing."""
    if not held:
        raise SystemExit(f"not what was to be measured: {what}")


def answers(s: Setting) -> None:
    """Time to the first token of a picture's first and second question. Two sides at a time, for the memory's sake."""
    for peer in ("llama-server", "stock", "llama-mtmd-cli"):
        first: dict[str, list[float]] = {}
        second: dict[str, list[float]] = {}
        with ExitStack() as stack:
            ours = stack.enter_context(engine_peers.child("ours", s.files, s.directory, s.threads, parallel=s.slots))
            sides: list[Side] = [ours]
            if peer == "llama-server":
                sides.append(stack.enter_context(engine_peers.server(s.files, s.directory, s.threads, s.slots)))
            elif peer == "stock":
                sides.append(stack.enter_context(engine_peers.child("stock", s.files, s.directory, s.threads)))
            else:
                sides.append(engine_peers.MtmdCli(s.files, s.threads))
            for side in sides[: 1 if peer == "llama-mtmd-cli" else 2]:
                side.ask(Request("Hello!", None, 1))  # pages of the weights that were not touched yet
            for repeat in range(s.repeats):
                for side in turns(sides, repeat):
                    _two_questions(side, s.pictures.new(), repeat, first, second)
        ratio("first answer about a new picture", first["ours"], peer, first[peer], "<= 1.0")
        if peer in second:
            bar = "<= 0.05" if peer == "stock" else "<= 1.0"
            ratio("second question about it", second["ours"], peer, second[peer], bar)


def _two_questions(
    side: Side, picture: str, repeat: int, first: dict[str, list[float]], second: dict[str, list[float]]
) -> None:
    one = side.ask(Request(QUESTIONS[0], picture, 1))[0]
    first.setdefault(side.name, []).append(one.first_s)
    if isinstance(side, engine_peers.MtmdCli):
        return
    two = side.ask(Request(QUESTIONS[1 + repeat % (len(QUESTIONS) - 1)], picture, 1))[0]
    second.setdefault(side.name, []).append(two.first_s)
    if side.name == "ours":
        require(one.counters["images_encoded"] == 1, f"a new picture: {one.counters}")
        require(two.counters["reused_tokens"] > PICTURE_TOKENS, f"a known picture: {two.counters}")


def process(s: Setting) -> None:
    """The same picture in a new process."""
    ours: list[float] = []
    theirs: list[clients.Answer] = []
    peer = engine_peers.MtmdCli(s.files, s.threads)
    shutil.rmtree(s.directory / "pictures-cache", ignore_errors=True)

    def ask(picture: str, question: str) -> clients.Answer:
        with engine_peers.child("ours", s.files, s.directory, s.threads, parallel=s.slots, image_cache="kv") as side:
            return side.ask(Request(question, picture, 1))[0]

    for repeat in range(s.repeats):
        picture = s.pictures.new()
        before = ask(picture, QUESTIONS[0])
        if repeat % 2:
            theirs += peer.ask(Request(QUESTIONS[1], picture, 1))
        again = ask(picture, QUESTIONS[1])
        if not repeat % 2:
            theirs += peer.ask(Request(QUESTIONS[1], picture, 1))
        require(again.counters["images_encoded"] == 0, f"a picture on disk: {again.counters}")
        require(again.counters["restored_tokens"] > PICTURE_TOKENS, f"a picture on disk: {again.counters}")
        print(f"  {repeat + 1}: first process {before.first_s:.2f} s, second {again.first_s:.2f} s", flush=True)
        ours.append(again.first_s)
    kept = sum(p.stat().st_size for p in (s.directory / "pictures-cache").rglob("*") if p.is_file())
    print(f"  image cache: {kept / 1e6 / s.repeats:.1f} MB a picture")
    ratio("same picture, new process", ours, peer.name, [a.first_s for a in theirs], "<= 0.10")


def decode(s: Setting) -> None:
    """One answer, and what of its time llama.cpp did not spend."""
    ours, theirs, outside = [], [], []
    with engine_peers.child("ours", s.files, s.directory, s.threads, parallel=s.slots) as side:
        request = Request(QUESTIONS[0], s.pictures.new(), s.n)
        depth = side.ask(replace(request, max_tokens=1))[0].counters["prompt_tokens"]
        for repeat in range(s.repeats):
            if repeat % 2:
                theirs.append(engine_peers.bench(s.files, s.threads, s.n, depth))
            answer = side.ask(request)[0]
            if not repeat % 2:
                theirs.append(engine_peers.bench(s.files, s.threads, s.n, depth))
            require(len(answer.arrivals) == s.n, f"{s.n} tokens: {len(answer.arrivals)}")
            ours.append(clients.decode_tokens_per_s(answer))
            inside: Mapping[str, float] = answer.counters["inside"]
            period = answer.arrivals[-1] - answer.arrivals[0]
            outside.append(1000 * (period - sum(inside.values())) / (s.n - 1))
            shares = ", ".join(f"{name} {seconds / period:.1%}" for name, seconds in inside.items())
            print(f"  {repeat + 1}: {shares} of the time", flush=True)
    token = statistics.median(outside)
    share = token * statistics.median(ours) / 1000
    print(f"outside llama.cpp: {spread(outside, 'ms', 3)} a token, {share:.2%} of its time (bar < 1 %)")
    ratio(f"decode at depth {depth}, one sequence", ours, "llama-bench", theirs, ">= 0.97", "tokens/s")


def eight_clients(s: Setting) -> None:
    """Several clients at once: about one picture and about as many as they are, new and then known."""
    results: dict[str, dict[str, list[float]]] = {}
    memory: dict[str, str] = {}

    def run(side: Side) -> None:
        one, mixed = [s.pictures.new()] * s.slots, [s.pictures.new() for _ in range(s.slots)]
        for kind, pictures in (("one picture", one), (f"{s.slots} pictures", mixed)):
            for age, shift in (("new", 0), ("known", s.slots)):
                questions = [QUESTIONS[(i + shift) % len(QUESTIONS)] for i in range(s.slots)]
                done = side.ask(*(Request(q, p, s.n) for q, p in zip(questions, pictures, strict=True)))
                speed = clients.tokens_per_s(done)
                results.setdefault(f"{kind}, {age}", {}).setdefault(side.name, []).append(speed)
                print(f"  {side.name}, {kind}, {age}: {speed:.2f} tokens/s{_computed(done)}", flush=True)
        memory[side.name] = str(side.memory())

    def load_and_run(number: int) -> None:
        """Ours, or the server with unified KV, or as it is by default."""
        with ExitStack() as stack:
            if number == 0:
                run(stack.enter_context(engine_peers.child("ours", s.files, s.directory, s.threads, parallel=s.slots)))
            else:
                unified = ("--kv-unified",) if number == 1 else ()
                run(stack.enter_context(engine_peers.server(s.files, s.directory, s.threads, s.slots, *unified)))

    for repeat in range(s.repeats):
        for number in (0, 1, 2) if repeat % 2 == 0 else (2, 1, 0):
            load_and_run(number)
    for what, speeds in results.items():
        for peer in sorted(speeds.keys() - {"ours"}):
            ratio(f"{s.slots} clients, {what}", speeds["ours"], peer, speeds[peer], ">= 1.0", "tokens/s")
    for name, text in memory.items():
        print(f"memory after it, {name}: {text}")


def _computed(answers: Sequence[clients.Answer]) -> str:
    """What the counters say of reuse, ours or llama-server's."""
    counters = [a.counters for a in answers]
    if "images_encoded" in counters[0]:
        read = sum(c["prompt_tokens"] - c["reused_tokens"] for c in counters)
        return f", {sum(c['images_encoded'] for c in counters)} pictures encoded, {read} tokens of prompts read"
    return f", {sum(c['prompt_n'] for c in counters)} tokens of prompts read"


def tower(s: Setting) -> None:
    """Pictures per second, from files to embeddings."""
    speeds: dict[tuple[str, int], list[float]] = {}
    with ExitStack() as stack:
        child = functools.partial(engine_peers.child, files=s.files, directory=s.directory, threads=s.threads)
        sides = [stack.enter_context(child(kind)) for kind in ("ours", "libmtmd")]
        for side in sides:
            side.encode([s.pictures.new()])
        for repeat in range(s.repeats):
            for n in (1, 8):
                for side in sides if repeat % 2 == 0 else sides[::-1]:
                    seconds = side.encode([s.pictures.new() for _ in range(n)])
                    speeds.setdefault((side.name, n), []).append(n / seconds)
    for n in (1, 8):
        ratio(f"tower, batch {n}", speeds["ours", n], "libmtmd", speeds["libmtmd", n], ">= 1.0", "pictures/s")


def memory(s: Setting) -> None:
    """Of a process that has answered about two pictures, one after the other, and then twice at a time."""

    def work(side: Side) -> clients.Memory:
        seen = [s.pictures.new() for _ in range(2)]
        for picture in seen:
            side.ask(Request(QUESTIONS[0], picture, 8))
        side.ask(*(Request(QUESTIONS[1], picture, 8) for picture in seen))
        return side.memory()

    def ours() -> clients.Memory:
        with engine_peers.child("ours", s.files, s.directory, s.threads, parallel=s.slots) as side:
            return work(side)

    def theirs() -> clients.Memory:
        with engine_peers.server(s.files, s.directory, s.threads, s.slots) as side:
            return work(side)

    private: dict[str, list[float]] = {"ours": [], "llama-server": []}
    for repeat in range(s.repeats):
        both = (("ours", ours), ("llama-server", theirs))
        for name, measure in both if repeat % 2 == 0 else both[::-1]:
            used = measure()
            print(f"  {name}: {used}", flush=True)
            private[name].append(used.private / 1e6)
    peer = "llama-server"
    ratio(f"memory beyond the mapped files, {s.slots} slots", private["ours"], peer, private[peer], "<= 1.0", "MB")


def stall(s: Setting) -> None:
    """The longest pause of an answer while another client's picture is read."""
    gaps: dict[str, list[float]] = {}
    firsts: dict[str, list[float]] = {}
    with ExitStack() as stack:
        sides: list[Side] = [
            stack.enter_context(engine_peers.child("ours", s.files, s.directory, s.threads, parallel=s.slots)),
            stack.enter_context(engine_peers.server(s.files, s.directory, s.threads, s.slots)),
        ]
        for repeat in range(s.repeats):
            for side in turns(sides, repeat):
                running = Request(QUESTIONS[0], None, engine_peers.N_CTX - 64, until_others=True)
                answer, other = side.ask(running, Request(QUESTIONS[1], s.pictures.new(), 1, follows=8))
                gaps.setdefault(side.name, []).append(answer.longest_gap)
                firsts.setdefault(side.name, []).append(other.first_s)
                print(f"  {side.name}: {len(answer.arrivals)} tokens meanwhile", flush=True)
    peer = "llama-server"
    ratio("stall of a running answer", gaps["ours"], peer, gaps[peer], "none")
    ratio("first token of the other's picture", firsts["ours"], peer, firsts[peer], "none")


ROWS: dict[str, Callable[[Setting], None]] = {
    "answers": answers,
    "process": process,
    "decode": decode,
    "clients": eight_clients,
    "tower": tower,
    "memory": memory,
    "stall": stall,
}

REPEATS = {"8b": 3, "1b": 7, "tiny": 2}
"""Of rows that say nothing else: at 8b a picture takes half a minute."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", choices=(*ROWS, "all"))
    parser.add_argument("--shape", choices=shapes.SHAPES, default="1b", help="of the models (default 1b)")
    parser.add_argument("--directory", type=Path, required=True, help="where the models may be written")
    parser.add_argument("--repeats", type=int, help="default: 3 with 8b, 7 with 1b; of clients and memory 1 and 3")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads that every side gets (default 2)")
    parser.add_argument("--slots", type=int, default=8, help="answers at a time (default 8)")
    parser.add_argument("--tokens", type=int, help="tokens of a whole answer (default 64; of clients, 32)")
    args = parser.parse_args()
    print(machine.describe())
    files = shapes.pair(args.shape, args.directory)
    print(f"{files.model.name} and {files.mmproj.name}, {args.threads} threads, {args.slots} slots")
    pictures = Pictures(args.directory / "pictures")
    for row in ROWS if args.row == "all" else (args.row,):
        repeats = args.repeats or max(1, REPEATS[args.shape] // (2 if row in ("clients", "memory") else 1))
        n = args.tokens or (32 if row == "clients" else 64)
        setting = Setting(files, args.directory, pictures, repeats, args.threads, args.slots, n)
        print(f"\n{row}, {repeats} times", flush=True)
        ROWS[row](setting)


if __name__ == "__main__":
    main()
