"""`local-llava compare`: how far models are from a reference, measured on pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from local_llava.commands import console, tables
from local_llava.commands.options import takes_options
from local_llava.errors import LocalLlavaError

if TYPE_CHECKING:
    from local_llava.comparison import Comparison, Progress
    from local_llava.picture_sets import Question

_WITHOUT = (
    *("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "seed", "stop", "json_schema", "overflow"),
    *("speculate", "image_cache", "image_cache_bytes", "logprobs"),
)
"""Fields of `Options` that a comparison has no use for: its answers are greedy."""


@takes_options(*_WITHOUT, max_tokens=64, kv_type="F16")
def compare(
    reference: Annotated[
        str, typer.Argument(metavar="REF", help="What to compare with, as `--model` of ask.", show_default=False)
    ],
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL", help="What to compare, likewise. Vocabulary as REF.", show_default=False),
    ],
    images: Annotated[Path, typer.Option("--images", help="Directory with pictures.", show_default=False)],
    questions: Annotated[
        Path | None,
        typer.Option(
            help="Text file with a question a line, asked about each picture; or .jsonl, each line with image and "
            'question. Default: "Describe the picture."',
            show_default=False,
        ),
    ] = None,
    mmproj: Annotated[
        Path | None,
        typer.Option(help="Tower and projector of all. Default: what is beside each model, or else that of REF."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw sizes and KL divergences into a .png or .svg file.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the plot if it is there already.")] = False,
    *,
    options: dict[str, Any],
) -> None:
    """Compare models with a reference, along the answers that the reference gives about pictures.

    KL is the divergence of the next token's probabilities from the reference's, in nats; SAME TOP how often both find
    the same token likeliest; ANSWERS how many answers would be the same, token by token; PPL RATIO the perplexity of
    the reference's answers, to what it is under the reference; FEATURES the distance of what the towers see. If a model
    fails, the others are compared all the same, and the exit code is 1.
    """
    from local_llava import comparison_plot
    from local_llava.comparison import DEFAULT_QUESTIONS
    from local_llava.picture_sets import questions_about

    if plot is not None:
        comparison_plot.check(plot, force)
    asked = questions_about(images, questions, DEFAULT_QUESTIONS)
    results, failed = _compare(reference, models, asked, mmproj, options)
    if plot is not None:
        comparison_plot.draw(results, plot)
    if as_json:
        print(json.dumps(_as_json(results, failed, asked), indent=2))
    else:
        tables.print_table(_rows(results))
    if failed:
        raise typer.Exit(1)


def _compare(
    reference: str, models: list[str], asked: Sequence[Question], mmproj: Path | None, options: dict[str, Any]
) -> tuple[list[Comparison], list[tuple[str, str]]]:
    """The results; and the models that failed, with what they failed of."""
    from local_llava import comparison

    failed: list[tuple[str, str]] = []
    # The number of threads that was measured for this machine takes the place of a flag that was not given.
    named = {name: value for name, value in options.items() if name != "n_threads" or value is not None}

    def fail(model: str, error: LocalLlavaError) -> None:
        failed.append((model, str(error)))
        console.note(f"{model} is left out: {error}")

    def tell(progress: Progress) -> None:
        doing = "answers" if progress.step == "answers" else "is compared"
        shown.update(f"{progress.model} {doing}", progress.done, progress.total)

    with console.ConvertProgress() as converting, console.StepProgress() as shown:
        results = comparison.compare(
            reference,
            models,
            asked,
            mmproj=mmproj,
            on_progress=tell,
            on_done=lambda result: console.note(f"{result.model}: KL {result.kl_mean:.2g}"),
            on_failure=fail,
            on_convert=converting.start,
            **named,
        )
    return results, failed


def _rows(results: Sequence[Comparison]) -> list[tuple[str, ...]]:
    from local_llava.convert.write import human_size

    heading = ("MODEL", "TYPE", "MATRIX", "SIZE", "MMPROJ", "KL MEAN", "KL 99 %", "SAME TOP", "ANSWERS", "PPL RATIO")
    return [
        (*heading, "FEATURES", "TOKENS/S"),
        *(
            (
                result.model,
                result.quant or "?",
                "yes" if result.matrix else "-",
                human_size(result.model_bytes),
                f"{human_size(result.mmproj_bytes)} {result.mmproj_quant}".rstrip(),
                f"{result.kl_mean:.2g}",
                f"{result.kl_p99:.2g}",
                f"{result.same_top:.2%}",
                f"{result.same_answers:.1%}",
                f"{result.perplexity_ratio:.4f}",
                f"{result.feature_error:.1e}" if result.feature_error else "0",
                f"{result.decode_tokens_per_s:.1f}",
            )
            for result in results
        ),
    ]


def _as_json(results: Sequence[Comparison], failed: list[tuple[str, str]], asked: Sequence[Question]) -> dict[str, Any]:
    reference, *models = [_values(result) for result in results]
    return {
        "pictures": len({question.image for question in asked}),
        "questions": len(asked),
        "positions": results[0].positions,
        "reference": reference,
        "models": models,
        "failed": [{"model": model, "error": error} for model, error in failed],
    }


def _values(result: Comparison) -> dict[str, Any]:
    from dataclasses import asdict

    values = asdict(result)
    del values["positions"]
    return {**values, "files": {"model": str(result.files.model), "mmproj": str(result.files.mmproj)}}
