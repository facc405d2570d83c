"""Damaged PyTorch files through read_pickle, in child processes: each must give tensors or a CheckpointError.

    python tests/fuzz_pickle.py --count 20000 --seed 1

Half of the files are torch's own with bytes changed anywhere; in the other half only the pickle is, so that it arrives.
Where both read_pickle and torch.load take such a pickle, they must agree on every tensor. A child has a limit of memory
and of time; when it dies or hangs, that file is reported and the next child goes on behind it. Every file follows from
the seed and its number: `--show NUMBER` writes one to standard output.
"""

from __future__ import annotations

import argparse
import collections
import io
import os
import pickletools
import random
import resource
import signal
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

MEMORY = 1 << 30
"""Bytes of address space that a child may take besides what torch takes."""
SECONDS = 20
"""For one file."""


def sample(seed: int) -> bytes:
    """A file of torch.save with a bit of everything."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 4, generator=generator)
    state = collections.OrderedDict(
        {
            "weight": weight,
            "tied": weight,
            "view": weight[2:5],
            "half": torch.nn.Parameter(weight.half()),
            "bfloat16": weight.bfloat16()[0],
            "float8": weight.to(torch.float8_e4m3fn),
            "ids": torch.arange(5),
            "scalar": torch.tensor(1.5),
            "empty": torch.zeros(0, 3),
            "epoch": 3,
            "note": ["text", (1, 2.5, None, True)],
        }
    )
    value = [state, {"state_dict": state, "meta": {"n": 1 << 40}}, dict(state)][seed % 3]
    data = io.BytesIO()
    torch.save(value, data, pickle_protocol=2 + seed % 4)
    return data.getvalue()


def changed(data: bytes, chance: random.Random) -> bytes:
    """A few bytes changed, inserted, removed, doubled or cut off."""
    result = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 16))):
        at, length = chance.randrange(len(result) + 1), chance.choice((1, 1, 2, 4, 8, 40))
        match chance.randrange(6):
            case 0:
                result[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                result[at : at + length] = b""
            case 2:
                result[at:at] = chance.randbytes(length)
            case 3:
                result[at:at] = result[at : at + length]
            case 4:
                result[at : at + length] = chance.choice((b"\xff", b"\0", b"\x7f", b"\x01")) * length
            case _ if chance.random() < 0.2:
                del result[at:]
    return bytes(result)


def shuffled(data: bytes, chance: random.Random) -> bytes:
    """A pickle whose opcodes are dropped, doubled, swapped, or given another argument of their kind."""
    places = [place for _, _, place in pickletools.genops(data) if place is not None]
    codes = [data[a:b] for a, b in zip(places, [*places[1:], len(data)], strict=True)]
    for _ in range(chance.choice((1, 1, 2, 4))):
        at, other = chance.randrange(len(codes)), chance.randrange(len(codes))
        match chance.randrange(5):
            case 0:
                del codes[at]
            case 1:
                codes[at:at] = [codes[other]]
            case 2:
                codes[at], codes[other] = codes[other], codes[at]
            case 3:
                codes[at] = codes[other]
            case _:
                numbers = [i for i, code in enumerate(codes) if code[:1] in b"KMJ"] or [0]
                codes[chance.choice(numbers)] = b"J" + chance.choice((0, 1, 2, 3, 6, 7, 24, -1, 1 << 30)).to_bytes(
                    4, "little", signed=True
                )
    return b"".join(codes)


def with_pickle(data: bytes, pickled: bytes) -> bytes:
    """A torch file with another pickle in it."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(result, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, pickled if entry.filename.endswith("data.pkl") else old.read(entry))
    return result.getvalue()


def case(seed: int, number: int, samples: dict[int, bytes]) -> tuple[str, bytes]:
    """Its kind and its bytes."""
    chance = random.Random(f"{seed}/{number}")
    which = chance.randrange(12)
    data = samples.setdefault(which, sample(which))
    if number % 2:
        return "file", changed(data, chance)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        pickled = archive.read("archive/data.pkl")
    return "pickle", with_pickle(data, (changed if chance.random() < 0.3 else shuffled)(pickled, chance))


def differences(path: Path, tensors: Mapping[str, object]) -> str:
    """What torch.load reads otherwise; empty if nothing, or if it refuses the file."""
    try:
        loaded = torch.load(path, weights_only=True)
    except Exception:
        return ""
    if not any(isinstance(value, torch.Tensor) for value in loaded.values()):
        loaded = loaded.get("state_dict", loaded.get("module"))
    expected = {k: v for k, v in loaded.items() if isinstance(v, torch.Tensor) and isinstance(k, str)}
    if expected.keys() != tensors.keys():
        return f"other names: {sorted(expected.keys() ^ tensors.keys())}"
    return " ".join(name for name, value in expected.items() if not same(tensors[name], value))


def same(found: object, value: torch.Tensor) -> bool:
    from local_llava.convert.source import StoredTensor

    assert isinstance(found, StoredTensor)
    data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
    raw = found.path.read_bytes()[found.offset : found.offset + found.nbytes]
    return found.shape == tuple(value.shape) and raw == data


def child(seed: int, start: int, count: int) -> None:
    """Read files `start` to `count`, and say what became of each on standard output."""
    from local_llava.convert.pickle_file import read_pickle
    from local_llava.errors import CheckpointError

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torch's about the pickle's protocol
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = MEMORY + pages * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    samples: dict[int, bytes] = {}
    with tempfile.TemporaryDirectory(prefix="local-llava-fuzz-") as folder:
        path = Path(folder) / "x.bin"
        for number in range(start, count):
            kind, data = case(seed, number, samples)
            path.write_bytes(data)
            print(f"{number} {kind} ", end="", flush=True)
            signal.alarm(SECONDS)
            try:
                tensors = read_pickle(path)
                outside = [t.name for t in tensors.values() if not 0 <= t.offset <= t.offset + t.nbytes <= len(data)]
                differ = differences(path, tensors) if kind == "pickle" else ""
                result = f"OUTSIDE {outside}" if outside else f"DIFFERS {differ}" if differ else "tensors"
            except CheckpointError as e:
                clear = str(e).startswith(f"{path}: ") and str(e).isprintable() and len(str(e)) < 500
                result = "error" if clear else f"UNCLEAR {e!r}"
            except BaseException as e:
                result = f"ESCAPED {type(e).__name__}: {e}"
            signal.alarm(0)
            print(ascii(result)[1:-1], flush=True)


def run(seed: int, count: int) -> tuple[collections.Counter[str], list[str]]:
    """Outcomes by kind, and what went wrong."""
    outcomes: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    start = 0
    while start < count:
        command = [sys.executable, __file__, "--child", str(start), "--seed", str(seed), "--count", str(count)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = done.stdout.splitlines()
        for line in lines:
            number, kind, result = line.split(" ", 2)
            if result:
                outcomes[f"{kind} {result.split()[0]}"] += 1
                start = int(number) + 1
            if result not in ("tensors", "error", ""):
                wrong.append(line)
        if done.stderr or start < count:
            wrong.append(f"{start}: the child ended with {done.returncode}: {done.stderr[-500:]}")
            start += 1
    return outcomes, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, metavar="NUMBER", help="write this file to standard output")
    parser.add_argument("--child", type=int, metavar="START", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        child(given.seed, given.child, given.count)
    elif given.show is not None:
        sys.stdout.buffer.write(case(given.seed, given.show, {})[1])
    else:
        outcomes, wrong = run(given.seed, given.count)
        for outcome, n in sorted(outcomes.items()):
            print(f"{n:7} {outcome}")
        print(*wrong[:50], f"{len(wrong)} wrong", sep="\n")
        sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
