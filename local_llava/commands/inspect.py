"""`local-llava inspect`: what a GGUF or a checkpoint holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def inspect(
    file: Annotated[Path, typer.Argument(help="A GGUF file, or the directory of a checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show the metadata, tensor types and sizes of a GGUF or a checkpoint."""
    from local_llava.inspection import describe, read

    contents = read(file)
    if as_json:
        # ASCII, since texts of a GGUF may be any bytes, which no terminal or pipe takes.
        print(json.dumps(contents.as_json(), indent=2))
    else:
        for line in describe(contents):
            print(line)
