"""The `local-llava` command: parse -> types -> one call -> print.

Knows the terminal. Answers go to stdout; notes, progress and errors to stderr. Exit codes: 0, 1 failure, 2 usage.
Everything heavy is imported inside the commands, so that `--help` is quick.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from typing import Annotated, NoReturn

import typer

from local_llava.commands import (
    ask,
    cache,
    chat,
    compare,
    console,
    convert,
    doctor,
    imatrix,
    inspect,
    models,
    pull,
    repair,
    serve,
    tune,
)
from local_llava.errors import LocalLlavaError, UsageError

app = typer.Typer(
    help="Ask LLaVA questions about your own pictures, on your own computer.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

USAGE, FAILURE, INTERRUPTED = 2, 1, 130


def main() -> None:
    """Run the command; errors that a user can mend become one line."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character shows another, rather than that the answer is lost.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # typer makes an exit of KeyboardInterrupt
            _fail("interrupted", INTERRUPTED)
        _flush()
        sys.exit(code)
    except LocalLlavaError as e:
        _fail(str(e), USAGE if isinstance(e, UsageError) else FAILURE)
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)
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
    console.set_quiet(quiet)
    level = logging.DEBUG if verbose else logging.ERROR if quiet else logging.WARNING
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("local_llava").setLevel(level)


app.command()(ask.ask)
app.command()(chat.chat)
app.command()(serve.serve)
app.command()(convert.convert)
app.command()(convert.quantize)
app.command()(inspect.inspect)
app.command()(imatrix.imatrix)
app.command()(repair.repair)
app.command()(repair.export_ollama)
app.command()(models.models)
app.command()(pull.pull)
app.command()(models.ls)
app.command()(models.rm)
app.add_typer(cache.app, name="cache")
app.command()(doctor.doctor)
app.command()(tune.tune)
app.command()(compare.compare)


if __name__ == "__main__":
    main()
