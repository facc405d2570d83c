"""`local-llava imatrix`: what pictures and questions excite in a language model, for better quantization."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from local_llava.commands import console
from local_llava.commands.options import MmprojOption, ModelOption, named, takes_options
from local_llava.errors import UsageError
from local_llava.text_file import read_text

if TYPE_CHECKING:
    from local_llava.imatrix import Progress
    from local_llava.picture_sets import Question

_WITHOUT = (
    *("max_tokens", "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "seed", "stop", "json_schema"),
    *("overflow", "speculate", "image_cache", "image_cache_bytes", "logprobs"),
)
"""Fields of `Options` that have no use here: answers are greedy, and each picture is read once."""


@takes_options(*_WITHOUT)
def imatrix(
    model: ModelOption = None,
    mmproj: MmprojOption = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="Directory with pictures.", show_default=False)
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(
            help="Text file with a question a line, asked about each picture; or .jsonl, each line with image and "
            "question. Default: three that ask for descriptions.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text file that is read as well, or alone, in pieces of 512 tokens as by llama-imatrix; may be given "
            "several times.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="The file to be made.")] = Path("imatrix.gguf"),
    max_images: Annotated[
        int | None, typer.Option(help="Most pictures, picked evenly. Default: all.", show_default=False)
    ] = None,
    max_chunks: Annotated[
        int | None, typer.Option(help="Most pieces of texts. Default: all.", show_default=False)
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of each answer, which counts as well; 0: none.")] = 64,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    *,
    options: dict[str, Any],
) -> None:
    """Make an importance matrix with pictures, questions and the model's answers.

    Convert and quantize take it with --imatrix, as does llama-quantize: it tells them which columns of the model's
    matrices must be kept most exactly. Best of a model in F16, BF16 or Q8_0; some hundred pictures are plenty.
    """
    for flag, value, least in (
        ("--max-images", max_images, 1),
        ("--max-chunks", max_chunks, 1),
        ("--max-tokens", max_tokens, 0),
    ):
        if value is not None and value < least:
            raise UsageError(f"{flag} must be {least} or more, not {value}")
    if images is None and (questions is not None or not text):
        raise UsageError("--images DIR names pictures to learn from; --text FILE is read as well, or alone")
    from local_llava import hub
    from local_llava.convert import write
    from local_llava.imatrix import QUESTIONS, collect
    from local_llava.picture_sets import questions_about

    asked = [] if images is None else _of_some(questions_about(images, questions, QUESTIONS), max_images)
    texts = [_read(path) for path in text or ()]
    write.check_writable([(out, 0)], force)
    if model is None:
        console.note("No --model was named: it is of the built-in tiny-llava.")
    with console.ConvertProgress() as progress:
        files = hub.resolve(model, mmproj, on_convert=progress.start)

    with console.StepProgress() as steps:

        def show(now: Progress) -> None:
            steps.update(f"Reading for {out}", now.done, now.total)

        matrix = collect(
            files.model,
            files.mmproj,
            questions=[(question.image, question.text) for question in asked],
            texts=texts,
            max_tokens=max_tokens,
            max_chunks=max_chunks,
            datasets=[str(path) for path in (images, questions, *(text or ())) if path is not None],
            on_progress=show,
            **named(options),
        )
    matrix.save(out, overwrite=force)
    console.note(f"{len(matrix.sums)} matrices, by {max(matrix.counts.values())} tokens")
    print(out)


def _of_some(questions: Sequence[Question], most: int | None) -> list[Question]:
    """Those about so many pictures, from the first to the last ones."""
    pictures = list(dict.fromkeys(question.image for question in questions))
    if most is not None and len(pictures) > most:
        pictures = [pictures[i * len(pictures) // most] for i in range(most)]
    chosen = set(pictures)
    return [question for question in questions if question.image in chosen]


def _read(path: Path) -> str:
    text = read_text(path, "a text file")
    if not text:
        raise UsageError(f"{path}: is empty; a text file is wanted")
    return text
