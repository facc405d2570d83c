"""`local-llava repair`: a published GGUF with its faults put right. `local-llava export-ollama`: a pair for Ollama."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from local_llava.commands import console
from local_llava.errors import UsageError
from local_llava.text_file import read_text


def repair(
    file: Annotated[Path, typer.Argument(metavar="FILE.gguf", help="A language model, or a LLaVA's mmproj.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The file to be made.")] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Replace FILE.gguf, when the new file is complete.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", "--dry-run", help="Only report; exit code 0 if nothing is wrong, else 1.")
    ] = False,
    chat_template: Annotated[
        Path | None, typer.Option("--chat-template", help="File with a Jinja chat template to be stored.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Correct what is wrong in a GGUF: chat template, special tokens, names. Tensor data stay as they are."""
    from local_llava.convert.repair import prepare_repair

    if (out is not None) + in_place + check != 1:
        raise UsageError("give one of -o OUT.gguf, --in-place and --check")
    template = None if chat_template is None else read_text(chat_template, "a file with a Jinja template")
    prepared = prepare_repair(file, out, chat_template=template, overwrite=force)
    for correction in prepared.result.corrections:
        print(f"{file}: {correction}")
    for note in prepared.result.notes:
        console.note(f"Note: {file}: {note}")
    if not prepared.result.corrections:
        print(f"{file}: nothing to correct")
    elif check:
        raise typer.Exit(1)
    else:
        with console.ConvertProgress() as progress:
            print(prepared.write(progress.start(file, prepared.size)))


def export_ollama(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A GGUF, a directory with a pair, a checkpoint, or a model's name.")
    ],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Directory for the Modelfile. Default: that of the model.")
    ] = None,
    mmproj: Annotated[Path | None, typer.Option(help="Tower and projector, if not beside the model.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt of the Ollama model.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing Modelfile.")] = False,
) -> None:
    """Write a Modelfile, from which `ollama create NAME -f Modelfile` makes a model of a pair."""
    from local_llava import hub, ollama
    from local_llava.corrections import corrected
    from local_llava.gguf_file import GGUFFile

    with console.ConvertProgress() as progress:
        files = hub.resolve(model, mmproj, on_convert=progress.start)
    for file in (files.model, files.mmproj):
        if corrected(GGUFFile.open(file)).corrections:
            console.note(f"Note: {file} has faults, which Ollama does not correct: run local-llava repair first")
    print(ollama.export(files, out or files.model.parent, system, force))
