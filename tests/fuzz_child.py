"""A child process of fuzz.py: loads what it is told to, one case after the other, and says how each ended.

Knows the loaders of local-llava and what may come of them: a result, or a LocalLlavaError of one clear line. A request
is a line of JSON on standard input, the answer another on standard output. Knows nothing of how files are damaged.

    python tests/fuzz_child.py DIRECTORY     # loads here a case that fuzz.py kept, with the traceback of what it raises
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import psutil
from PIL import Image

from local_llava import Llava, inspection
from local_llava.commands.inspect import inspect
from local_llava.convert import prepare, prepare_gguf
from local_llava.errors import LocalLlavaError

Step: TypeAlias = "tuple[str, Callable[[], object]]"
Steps: TypeAlias = "Generator[Step, None, None]"
Loader: TypeAlias = "Callable[[Path, dict[str, Any]], Steps]"
"""Steps by name. One that is refused does not keep the next from being tried, unless the loader says so."""

LONGEST_MESSAGE = 1000
QUESTION = "What is in it, <|eot_id|></s><image> h\u00e9 \U0001f600?\n"


def main() -> None:
    if len(sys.argv) == 2:
        again(Path(sys.argv[1]))
    else:
        serve(load, int(sys.argv[1]), Path(sys.argv[2]))


def serve(loader: Loader, memory: int, scratch: Path) -> None:
    """Answer requests to the end of standard input.

    Args:
        loader: Gives the steps for a case.
        memory: Limit of the address space in bytes, where the system has one.
        scratch: Everything that may be written lies under it; what a case leaves there is reported.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what C code prints must not come between the answers
    logging.getLogger("local_llava").addHandler(logging.NullHandler())
    limit_memory(memory)
    for line in sys.stdin:
        request = json.loads(line)
        out.write(json.dumps(attempt(loader, Path(request["directory"]), request["options"], scratch)) + "\n")
        out.flush()


def limit_memory(limit: int) -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows; macOS
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def attempt(loader: Loader, case: Path, options: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """What each step of a case came to (None, or the message that refused it), and what is wrong with that."""
    steps: dict[str, str | None] = {}
    findings: list[str] = []
    tries = loader(case, options)
    before, size, started = state(scratch), start_of_peak(), time.perf_counter()
    try:
        with contextlib.closing(tries):
            for name, step in tries:
                steps[name] = None
                try:
                    step()
                except LocalLlavaError as e:
                    steps[name] = str(e)
                    if problem := unclear(str(e)):
                        findings.append(f"{name}: {type(e).__name__} {problem}: {str(e)[:300]!a}")
    # BaseException: panics of Rust code are.
    except BaseException as e:
        frames = "".join(traceback.format_tb(e.__traceback__))[-1500:]
        findings.append(f"{next(reversed(steps), 'start')}: raised {type(e).__name__}: {str(e)[:200]}\n{frames}")
    seconds, taken = time.perf_counter() - started, peak_rss() - size
    gc.collect()
    after = state(scratch)
    findings += [f"left {what}" for what in sorted(after - before)]
    return {"steps": steps, "findings": findings, "seconds": seconds, "taken": taken, "rss": settled_rss()}


def unclear(message: str) -> str:
    """What keeps a message from being one clear line; empty if nothing does."""
    if not message.isprintable():
        return "is not one printable line"
    if not 1 <= len(message) <= LONGEST_MESSAGE:
        return f"has {len(message)} characters"
    return ""


def state(scratch: Path) -> set[str]:
    """What a case could leave behind: files, open descriptors, threads."""
    found = {str(path) for path in scratch.rglob("*")}
    process = psutil.Process()
    found |= {f"descriptor {i}" for i in range(process.num_fds() if hasattr(process, "num_fds") else 0)}
    return found | {f"thread {i}" for i in range(threading.active_count())}


@cache
def allocator() -> Any:
    return ctypes.CDLL(None)


def settled_rss() -> int:
    """Resident bytes without what the allocator only keeps for later."""
    if sys.platform == "linux":
        allocator().malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def start_of_peak() -> int:
    """Resident bytes now, from which `peak_rss` measures anew."""
    with contextlib.suppress(OSError):  # Linux has it
        Path("/proc/self/clear_refs").write_text("5")
    return int(psutil.Process().memory_info().rss)


def peak_rss() -> int:
    """The most resident bytes since; those of now where the system does not tell."""
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
    return int(psutil.Process().memory_info().rss)


def load(case: Path, options: dict[str, Any]) -> Steps:
    """The loaders proper, by what the case's directory holds."""
    if (case / "checkpoint").exists():
        return load_checkpoint(case, options)
    if (case / "pair").exists():
        return load_pair(case / "pair", options)
    return load_picture(case / "picture", options)


def load_pair(pair: Path, options: dict[str, Any]) -> Steps:
    """A language model and an mmproj: listed, quantized, asked. `options` has the arguments."""
    model, mmproj = pair / "model.gguf", pair / "mmproj.gguf"
    damaged = pair / options["damaged"]
    yield "inspect", lambda: listed(damaged)
    if options["quant"]:
        yield "quantize", lambda: quantized(damaged, pair / "quantized.gguf", options["quant"])
    by_directory = options["by_directory"]
    yield "ask", lambda: asked(pair if by_directory else model, None if by_directory else mmproj, options)


def load_checkpoint(case: Path, options: dict[str, Any]) -> Steps:
    """A checkpoint: listed, converted, and what came out asked."""
    source, out = case / "checkpoint", case / "out" / "deep"
    done = []
    yield "inspect", lambda: listed(source)
    yield "convert", lambda: done.append(converted(source, out, options))
    if done:
        try:
            yield "ask", lambda: asked(*done[0], options)
        finally:
            for path in done[0]:
                path.unlink()
            out.rmdir()
            out.parent.rmdir()


def load_picture(picture: Path, options: dict[str, Any]) -> Steps:
    """A picture, through a model that stays."""
    llava = watcher(Path(options["pair"]), options["preprocess"])
    return (step for step in [("embed", lambda: llava.embed_images([picture]))])


@cache
def watcher(pair: Path, preprocess: str) -> Llava:
    """One model for all pictures of a child; nobody closes it."""
    return Llava.load(pair, n_threads=1, n_gpu_layers=0, preprocess=preprocess)


def listed(path: Path) -> None:
    """As `local-llava inspect` prints it, to a terminal of UTF-8."""
    with io.TextIOWrapper(io.BytesIO(), encoding="utf-8") as out, contextlib.redirect_stdout(out):
        inspect(path, as_json=False)
        inspect(path, as_json=True)


def quantized(source: Path, target: Path, quant: str) -> None:
    prepare_gguf(source, target, quant, allow_requantize=True).write(threads=1)
    inspection.read(target)
    target.unlink()


def converted(source: Path, out: Path, options: dict[str, Any]) -> tuple[Path, Path]:
    conversion = prepare(source, out, quant=options["quant"], mmproj_quant=options["mmproj_quant"])
    files = conversion.write(threads=1)
    sizes = files.model.stat().st_size, files.mmproj.stat().st_size
    if sizes != conversion.sizes:
        raise AssertionError(f"the files have {sizes} bytes, not the promised {conversion.sizes}")
    return files.model, files.mmproj


def asked(model: Path, mmproj: Path | None, options: dict[str, Any]) -> None:
    with Llava.load(model, mmproj, n_threads=1, n_gpu_layers=0, **options["load"]) as llava:
        picture = Image.linear_gradient("L").convert("RGB").resize((40, 30))
        reply = llava.ask(QUESTION, picture, **options["ask"])
        reply.text.encode()


def again(kept: Path) -> None:
    """Load a kept case in this process."""
    case = json.loads((kept / "case.json").read_text())
    print(case["name"], *case["how"], sep="\n  ")
    for name, step in load(kept, case["options"]):
        try:
            print(name, step())
        except LocalLlavaError as e:
            print(name, "refused:", e, unclear(str(e)) and f"[{unclear(str(e))}]")


if __name__ == "__main__":
    main()
