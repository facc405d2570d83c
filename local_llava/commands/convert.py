"""`local-llava convert`: a checkpoint becomes a pair of GGUF files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from local_llava.commands import console
from local_llava.errors import UsageError
from local_llava.types import DEFAULT_MMPROJ_QUANT, DEFAULT_QUANT

if TYPE_CHECKING:
    from local_llava.convert import Conversion


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
    with console.ConvertProgress() as progress:
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
