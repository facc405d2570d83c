"""What the commands that ask a model have in common: its files, and a flag for each field of `Options`.

The defaults are those of `Options`; nothing here repeats them.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from local_llava.commands import console
from local_llava.errors import UsageError
from local_llava.text_file import read_text
from local_llava.types import Options

if TYPE_CHECKING:
    from local_llava.engine import Llava

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="A GGUF, a directory with a pair, a checkpoint (converted once and kept), or NAME[:TYPE] as `local-llava "
        "models` lists. Default: the built-in model, which knows coloured shapes only.",
    ),
]
MmprojOption = Annotated[Path | None, typer.Option(help="Tower and projector, if not beside the model.")]

_FLAGS: dict[str, tuple[Any, str, str]] = {
    # field of Options: type, flag, help
    "max_tokens": (int, "--max-tokens", "Most tokens to generate."),
    "temperature": (float, "--temperature", "0 takes the most likely token; higher varies more."),
    "top_k": (int, "--top-k", "Sample among so many of the likeliest tokens; 0 for all."),
    "top_p": (float, "--top-p", "Sample among the likeliest tokens of this total probability."),
    "min_p": (float, "--min-p", "Drop tokens below this share of the likeliest's probability."),
    "repeat_penalty": (float, "--repeat-penalty", "Above 1, makes recent tokens less likely."),
    "seed": (int, "--seed", "Seed for a temperature above 0."),
    "stop": (list[str], "--stop", "A text that ends the answer; may be given several times."),
    "system": (str | None, "--system", "System prompt."),
    "json_schema": (Path | None, "--schema", "File with a JSON schema that the answer must follow."),
    "preprocess": (str, "--preprocess", "What the model sees: pad (all), crop (the middle), or checkpoint."),
    "overflow": (str, "--overflow", "When the conversation outgrows the context: error, or drop_oldest (turns)."),
    "speculate": (bool | None, "--speculate/--no-speculate", "Guess tokens ahead. Default: for --schema."),
    "n_ctx": (int | None, "--n-ctx", "Context length in tokens. Default: what model and memory allow, up to 8192."),
    "kv_type": (str, "--kv-type", "Type of the KV cache: F32, F16, Q8_0, or auto (F16 where it fits)."),
    "n_gpu_layers": (str, "--gpu-layers", "Layers to put on the GPU, if there is one: a number, -1 for all, or auto."),
    "n_threads": (int | None, "--threads", "CPU threads. Default: one a physical core."),
    "n_batch": (int | None, "--batch-size", "Tokens that are evaluated at once."),
    "flash_attention": (bool | None, "--flash-attention/--no-flash-attention", "Default: llama.cpp's choice."),
    "image_cache": (str, "--image-cache", "What to keep of pictures on disk: off, embeddings, kv (also the KV cache)."),
    "image_cache_bytes": (str, "--image-cache-size", "Most to keep, such as 500MB."),
    "logprobs": (int | None, "--logprobs", "With --json: also report so many of the likeliest tokens at each step."),
}

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def takes_options(*without: str, **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags of `_FLAGS`; it gets their values as the keyword `options`.

    Args:
        without: Fields that the command has no flag for.
        defaults: Of fields that have another one here than in `Options`.
    """
    flags = {name: flag for name, flag in _FLAGS.items() if name not in without}

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(**values: Any) -> None:
            function(**{name: v for name, v in values.items() if name not in flags}, options=_checked(values, flags))

        own = inspect.signature(function, eval_str=True).parameters.values()
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in own if p.name != "options"]
        for name, (kind, flag, text) in flags.items():
            default = defaults.get(name, getattr(Options(), name))
            default = _size(default) if name == "image_cache_bytes" else default
            shown: Any = Annotated[
                kind,
                typer.Option(
                    flag,
                    help=text,
                    show_default=default not in (None, ()),
                    autocompletion=_completer(get_args(Options.CHOICES.get(name))),
                ),
            ]
            default = [] if default == () else default
            parameters.append(
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=shown)
            )
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def _completer(choices: tuple[str, ...]) -> Callable[[str], list[str]] | None:
    """What shells complete the values of a flag with."""
    if not choices:
        return None
    return lambda incomplete: [choice for choice in choices if choice.startswith(incomplete)]


def _checked(values: dict[str, Any], flags: dict[str, tuple[Any, str, str]]) -> dict[str, Any]:
    """The options, refused here if they cannot be: before anything is loaded."""
    options = {name: values[name] for name in flags}
    if options.get("json_schema") is not None:
        options["json_schema"] = _read_schema(options["json_schema"])
    if "image_cache_bytes" in options:
        options["image_cache_bytes"] = as_bytes(options["image_cache_bytes"], flags["image_cache_bytes"][1])
    with contextlib.suppress(ValueError):  # "auto"; anything else Options refuses
        options["n_gpu_layers"] = int(options["n_gpu_layers"])
    try:
        Options(**options)
    except UsageError as e:
        # The message begins with the field's name; the user knows the flag's.
        name, _, rest = str(e).partition(" ")
        raise UsageError(f"{_FLAGS[name][1].partition('/')[0]} {rest}" if name in _FLAGS else str(e)) from None
    return options


def as_bytes(text: str, flag: str) -> int:
    """A size that a person wrote.

    Raises:
        UsageError: It is none; the message names the flag.
    """
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([KMGT]?B)?", text.strip().upper())
    if match is None:
        raise UsageError(f"{flag} must be a size such as 500MB or 4GB, not {text!r:.40}")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def _size(n: int) -> str:
    return next(f"{n // size:d}{unit}" for unit, size in reversed(_UNITS.items()) if n % size == 0)


def _read_schema(path: Path) -> str:
    from local_llava.schema.compiler import compile_schema

    text = read_text(path, "a file with a JSON schema")
    try:
        return compile_schema(text)
    except UsageError as e:
        raise UsageError(f"{path}: {e}") from e


@contextlib.contextmanager
def loaded(model: str | None, mmproj: Path | None, options: dict[str, Any]) -> Iterator[Llava]:
    """The model that the user named, ready to be asked."""
    from local_llava import hub
    from local_llava.engine import Llava

    if model is None:
        console.note("No --model was named: the built-in tiny-llava answers. It knows coloured shapes, nothing else.")
    with console.ConvertProgress() as progress:
        files = hub.resolve(model, mmproj, on_convert=progress.start)
    with Llava.load(files.model, files.mmproj, **named(options)) as llava:
        yield llava


def named(options: dict[str, Any]) -> dict[str, Any]:
    """Those that were named: what was measured for this machine may take the place of a flag that was not given."""
    return {name: value for name, value in options.items() if value != getattr(Options(), name)}
