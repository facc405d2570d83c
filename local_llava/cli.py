"""The `local-llava` command: parse -> types -> one call -> print.

Knows the terminal. Answers go to stdout; notes, progress and errors to stderr. Exit codes: 0, 1 failure, 2 usage.
Everything heavy is imported inside the commands, so that `--help` is quick.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer

from local_llava.errors import LocalLlavaError, UsageError
from local_llava.types import DEFAULT_MMPROJ_QUANT, DEFAULT_QUANT

if TYPE_CHECKING:
    from collections.abc import Callable

    from local_llava.convert import Conversion
    from local_llava.types import KVType, Reply

app = typer.Typer(
    help="Ask LLaVA questions about your own pictures, on your own computer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

USAGE, FAILURE = 2, 1

_quiet = False


def main() -> None:
    """Run the command; errors that a user can mend become one line."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character shows another, rather than that the answer is lost.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        code = app(standalone_mode=False)
        _flush()
        sys.exit(code)
    except LocalLlavaError as e:
        _fail(str(e), USAGE if isinstance(e, UsageError) else FAILURE)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader went away, as `head` does. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILURE)
    except MemoryError:
        _fail("not enough memory", FAILURE)
    except Exception as e:
        if hasattr(e, "exit_code") and hasattr(e, "show"):  # a usage error of the parser
            e.show()
            sys.exit(e.exit_code)
        raise


def _flush() -> None:
    try:
        sys.stdout.flush()
    except OSError as e:
        if isinstance(e, BrokenPipeError):
            raise
        _fail(f"standard output cannot be written: {e.strerror}", FAILURE)


def _fail(message: str, code: int) -> NoReturn:
    print(f"local-llava: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _note(message: str) -> None:
    if not _quiet:
        print(message, file=sys.stderr)


def _show_version(wanted: bool) -> None:
    if wanted:
        from local_llava import __version__

        print(f"local-llava {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Show the log on stderr.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No notes and no progress on stderr.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    global _quiet
    _quiet = quiet
    level = logging.DEBUG if verbose else logging.ERROR if quiet else logging.WARNING
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("local_llava").setLevel(level)


@app.command()
def ask(
    inputs: Annotated[
        list[str], typer.Argument(metavar="[IMAGE]... QUESTION", help="Pictures (PNG or JPEG), then the question.")
    ],
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            "-m",
            help="A GGUF, a directory with a pair, or a checkpoint, which is converted once and kept. "
            "Default: the built-in model, which knows coloured shapes only.",
        ),
    ] = None,
    mmproj: Annotated[Path | None, typer.Option(help="Tower and projector, if not beside the model.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer with tokens and timings as JSON.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token; higher varies more.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among so many of the likeliest tokens; 0 for all.")] = 40,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens of this total probability.")] = 0.95,
    min_p: Annotated[float, typer.Option(help="Drop tokens below this share of the likeliest's probability.")] = 0.05,
    repeat_penalty: Annotated[float, typer.Option(help="Above 1, makes recent tokens less likely.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed for a temperature above 0.")] = 0,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    n_ctx: Annotated[int | None, typer.Option(help="Context length in tokens.")] = None,
    kv_type: Annotated[str, typer.Option(help="Type of the KV cache: F32, F16 or Q8_0.")] = "F16",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    gpu_layers: Annotated[int, typer.Option(help="Layers to put on the GPU, if there is one; -1 for all.")] = -1,
) -> None:
    """Ask a question about pictures."""
    from local_llava import hub
    from local_llava.types import Options

    options: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repeat_penalty": repeat_penalty,
        "seed": seed,
        "system": system,
    }
    Options(**options)  # refuses bad values before anything is loaded
    *images, question = inputs
    if not images and Path(question).is_file():
        raise UsageError(f"{question} is a file: a question must follow the pictures")
    if threads is not None and threads < 1:
        raise UsageError(f"--threads must be 1 or more, not {threads}")
    if model is None:
        _note("No --model was named: the built-in tiny-llava answers. It knows coloured shapes, nothing else.")
    from local_llava.engine import Llava
    from local_llava.images import load_image

    pictures = [load_image(image) for image in images]
    with _ConvertProgress() as convert_progress:
        files = hub.resolve(model, mmproj, on_convert=convert_progress.start)
    with (
        Llava.load(
            files.model,
            files.mmproj,
            n_ctx=n_ctx,
            kv_type=cast("KVType", kv_type),  # load checks it
            n_threads=threads,
            n_gpu_layers=gpu_layers,
        ) as llava,
        _PrefillProgress() as prefill,
    ):
        reply = llava.ask(question, images=pictures, on_prefill=prefill.update, **options)
    print(json.dumps(_as_json(reply), ensure_ascii=False) if as_json else reply.text)


def _as_json(reply: Reply) -> dict[str, object]:
    from dataclasses import asdict

    timings = {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(reply.timings).items()}
    timings["prefill_tokens_per_s"] = round(reply.timings.prefill_tokens_per_s, 2)
    timings["decode_tokens_per_s"] = round(reply.timings.decode_tokens_per_s, 2)
    return {**asdict(reply), "timings": timings}


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Directory of a LLaVA checkpoint in transformers format.")],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Directory for both files. Default: MODEL-gguf in the current directory."),
    ] = None,
    quant: Annotated[
        str, typer.Option(help="Type of the language model: F32, F16, BF16, Q8_0, Q6_K or Q4_K_M.")
    ] = DEFAULT_QUANT,
    mmproj_quant: Annotated[
        str, typer.Option(help="Type of tower and projector: F32, F16 or Q8_0.")
    ] = DEFAULT_MMPROJ_QUANT,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the checkpoint and show what would be written.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
    threads: Annotated[int | None, typer.Option(help="Threads that quantize.")] = None,
) -> None:
    """Make a quantized GGUF language model and an mmproj of a checkpoint."""
    from local_llava.convert import prepare

    if threads is not None and threads < 1:
        raise UsageError(f"--threads must be 1 or more, not {threads}")
    conversion = prepare(source, out, quant=quant, mmproj_quant=mmproj_quant, overwrite=force)
    if dry_run:
        _show_plan(conversion)
        return
    with _ConvertProgress() as progress:
        files = conversion.write(progress.start(source, sum(conversion.sizes)), threads)
    print(files.model)
    print(files.mmproj)


def _show_plan(conversion: Conversion) -> None:
    from collections import Counter

    from local_llava.convert.write import human_size

    files = (conversion.files.model, conversion.files.mmproj)
    for path, plan, size in zip(files, (conversion.model, conversion.mmproj), conversion.sizes, strict=True):
        types = Counter(t.type.name for t in plan.tensors)
        kinds = ", ".join(f"{n} {name}" for name, n in types.most_common())
        print(f"{path}: {human_size(size)}, {len(plan.tensors)} tensors ({kinds})")


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A GGUF file, or the directory of a checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show the metadata, tensor types and sizes of a GGUF or a checkpoint."""
    from local_llava.inspection import describe, read

    contents = read(file)
    if as_json:
        print(json.dumps(contents.as_json(), ensure_ascii=False, indent=2))
    else:
        for line in describe(contents):
            print(line)


class _ConvertProgress:
    """A bar with bytes and time left, on a terminal's stderr."""

    def __enter__(self) -> _ConvertProgress:
        self._bar: Any = None
        return self

    def start(self, source: Path, total: int) -> Callable[[int], None]:
        """Announce a conversion of `total` bytes; returns what to call with the bytes written."""
        if _quiet:
            return lambda _: None
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        if not console.is_terminal:
            _note(f"Converting {source}")
            return lambda _: None
        columns = (TextColumn("Converting {task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        bar = self._bar = Progress(*columns, console=console, transient=True)
        task = bar.add_task(source.name, total=total)
        bar.start()
        return lambda count: bar.advance(task, count)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


class _PrefillProgress:
    """A line on a terminal's stderr that counts prompt tokens, where reading the prompt takes long."""

    DELAY_S = 1.0

    def __enter__(self) -> _PrefillProgress:
        import time

        self._clock, self._started, self._shown = time.monotonic, time.monotonic(), False
        return self

    def update(self, done: int, total: int) -> None:
        if _quiet or not sys.stderr.isatty() or self._clock() - self._started < self.DELAY_S:
            return
        if done < total:
            print(f"\rReading the prompt: {done} of {total} tokens", end="", file=sys.stderr, flush=True)
            self._shown = True
        else:
            self.__exit__()

    def __exit__(self, *_: object) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._shown = False


if __name__ == "__main__":
    main()
