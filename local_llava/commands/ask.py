"""`local-llava ask`: a question about pictures, and the answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from local_llava.commands import console
from local_llava.errors import UsageError

if TYPE_CHECKING:
    from local_llava.types import KVType, Reply


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
        console.note("No --model was named: the built-in tiny-llava answers. It knows coloured shapes, nothing else.")
    from local_llava.engine import Llava
    from local_llava.images import load_image

    pictures = [load_image(image) for image in images]
    with console.ConvertProgress() as convert_progress:
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
        console.PrefillProgress() as prefill,
    ):
        reply = llava.ask(question, images=pictures, on_prefill=prefill.update, **options)
    print(json.dumps(_as_json(reply), ensure_ascii=False) if as_json else reply.text)


def _as_json(reply: Reply) -> dict[str, object]:
    from dataclasses import asdict

    timings = {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(reply.timings).items()}
    timings["prefill_tokens_per_s"] = round(reply.timings.prefill_tokens_per_s, 2)
    timings["decode_tokens_per_s"] = round(reply.timings.decode_tokens_per_s, 2)
    return {**asdict(reply), "timings": timings}
