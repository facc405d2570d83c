"""`local-llava ask`: a question about pictures, and the answer."""

from __future__ import annotations

import json
import os
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from local_llava.commands import console
from local_llava.commands.options import MmprojOption, ModelOption, loaded, takes_options
from local_llava.errors import UsageError

if TYPE_CHECKING:
    from local_llava.engine import Llava
    from local_llava.types import Reply


@takes_options(image_cache="kv")
def ask(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="[IMAGE]... QUESTION",
            help="Pictures, then the question. A picture is a file, a URL, - for standard input, or clipboard:",
            show_default=False,
        ),
    ],
    model: ModelOption = None,
    mmproj: MmprojOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer with tokens and timings as JSON.")] = False,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream", help="Print the answer as it comes. Default: on a terminal.", show_default=False
        ),
    ] = None,
    *,
    options: dict[str, Any],
) -> None:
    """Ask a question about pictures."""
    *images, question = inputs
    if as_json and stream:
        raise UsageError("--json prints the whole answer at once; leave out --stream")
    if options["logprobs"] is not None and not as_json:
        raise UsageError("--logprobs are reported with --json only")
    _refuse_picture(question)
    from local_llava.images import load_image

    pictures = [load_image(image) for image in images]
    with loaded(model, mmproj, options) as llava:
        if as_json or not (sys.stdout.isatty() if stream is None else stream):
            with console.PrefillProgress() as prefill:
                reply = llava.ask(question, pictures, on_prefill=prefill.update)
            print(json.dumps(_as_json(reply), ensure_ascii=False) if as_json else reply.text)
        else:
            _stream(llava, question, pictures)


def _refuse_picture(question: str) -> None:
    """A question that is a picture means that the question was forgotten."""
    is_file = os.path.isfile(question)  # noqa: PTH113 - unlike Path's, False for what can be no path
    if is_file or question == "-" or question.startswith(("http://", "https://", "data:image/", "clipboard:")):
        kind = "a file" if is_file else "a picture"
        raise UsageError(f"{question[:80]} is {kind}: a question must follow the pictures")


def _stream(llava: Llava, question: str, pictures: list[Any]) -> None:
    with (
        console.PrefillProgress() as prefill,
        closing(llava.stream(question, pictures, on_prefill=prefill.update)) as chunks,
    ):
        for chunk in chunks:
            print(chunk.text, end="", flush=True)
    print()


def _as_json(reply: Reply) -> dict[str, object]:
    from dataclasses import asdict

    timings = {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(reply.timings).items()}
    timings["prefill_tokens_per_s"] = round(reply.timings.prefill_tokens_per_s, 2)
    timings["decode_tokens_per_s"] = round(reply.timings.decode_tokens_per_s, 2)
    fields = {k: v for k, v in asdict(reply).items() if v is not None or k not in ("logprobs", "parsed")}
    return {**fields, "timings": timings}
