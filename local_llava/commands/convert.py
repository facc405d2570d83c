"""`local-llava convert`: a checkpoint becomes a pair of GGUF files. `local-llava quantize`: a GGUF becomes another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from local_llava.commands import console
from local_llava.errors import UsageError
from local_llava.types import DEFAULT_MMPROJ_QUANT, DEFAULT_QUANT

if TYPE_CHECKING:
    from local_llava.convert.plan import GGUFPlan

LLM_TYPES = (
    "F32, F16, BF16, Q8_0, Q6_K, Q5_K_M, Q5_K_S, Q5_1, Q5_0, Q4_K_M, Q4_K_S, Q4_1, Q4_0, IQ4_NL, IQ4_XS, Q3_K_L, "
    "Q3_K_M, Q3_K_S, IQ3_M, IQ3_S or Q2_K"
)
GUIDED_TYPES = "IQ3_XS, IQ3_XXS, Q2_K_S, IQ2_M, IQ2_S, IQ2_XS, IQ2_XXS, IQ1_M or IQ1_S"
MMPROJ_TYPES = "F32, F16, BF16, Q8_0, Q6_K, Q5_K or Q4_K"

TensorTypes = Annotated[
    list[str] | None,
    typer.Option(
        "--tensor-type",
        metavar="PATTERN=TYPE",
        help="Type of the language model's matrices in whose names a regular expression is found, such as "
        "attn_v=Q8_0; repeatable, the first that is found decides. As in llama-quantize, as are the next two.",
    ),
]
OutputType = Annotated[str | None, typer.Option("--output-type", metavar="TYPE", help="Type of the output matrix.")]
EmbeddingType = Annotated[
    str | None, typer.Option("--embedding-type", metavar="TYPE", help="Type of the token embeddings.")
]
Imatrix = Annotated[
    Path | None,
    typer.Option(
        "--imatrix",
        metavar="FILE",
        help="Importance matrix of the language model, from `local-llava imatrix` or llama-imatrix. Makes types of few "
        f"bits better, and {GUIDED_TYPES} possible.",
        show_default=False,
    ),
]
VisionTower = Annotated[
    str | None,
    typer.Option(
        metavar="DIR|NAME",
        help="Checkpoint of the vision tower, for a LLaVA that does not carry its own; a directory, or a name in the "
        "Hugging Face cache. Default: the one that the checkpoint names, beside it or in that cache.",
    ),
]
BaseLLM = Annotated[
    str | None,
    typer.Option(
        "--llm", metavar="DIR|NAME", help="Checkpoint of the language model that an adapter belongs to; likewise."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace existing files.")]
Threads = Annotated[int | None, typer.Option(help="Threads that quantize.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and show what would be written.")]


def convert(
    source: Annotated[
        str, typer.Argument(help="Directory of a LLaVA checkpoint, or the name of one in the Hugging Face cache.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Directory for both files. Default: MODEL-gguf in the current directory."),
    ] = None,
    quant: Annotated[str, typer.Option(help=f"Type of the language model: {LLM_TYPES}.")] = DEFAULT_QUANT,
    mmproj_quant: Annotated[
        str,
        typer.Option(
            help=f"Type of tower and projector: {MMPROJ_TYPES}. Those after Q8_0 change image features by 2 to 13 %."
        ),
    ] = DEFAULT_MMPROJ_QUANT,
    tensor_type: TensorTypes = None,
    output_type: OutputType = None,
    embedding_type: EmbeddingType = None,
    imatrix: Imatrix = None,
    vision_tower: VisionTower = None,
    llm: BaseLLM = None,
    dry_run: DryRun = False,
    force: Force = False,
    threads: Threads = None,
) -> None:
    """Make a quantized GGUF language model and an mmproj of a checkpoint."""
    from local_llava import hub
    from local_llava.convert import Companions, Overrides, prepare

    _check_threads(threads)
    checkpoint = hub.find_checkpoint(source)
    conversion = prepare(
        checkpoint,
        out,
        quant=quant,
        mmproj_quant=mmproj_quant,
        overrides=Overrides.parse(tensor_type or (), output_type, embedding_type),
        imatrix=imatrix,
        companions=Companions(vision_tower, llm),
        overwrite=force,
    )
    if dry_run:
        _show(conversion.files.model, conversion.model)
        _show(conversion.files.mmproj, conversion.mmproj)
        return
    for note in conversion.notes:
        console.note(f"Note: {note}")
    with console.ConvertProgress() as progress:
        files = conversion.write(progress.start(checkpoint, sum(conversion.sizes)), threads)
    print(files.model)
    print(files.mmproj)


def quantize(
    source: Annotated[Path, typer.Argument(metavar="IN.gguf", help="A language model, or a LLaVA's mmproj.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The file to be made.")],
    quant: Annotated[
        str, typer.Argument(metavar="TYPE", help=f"Of a language model: {LLM_TYPES}. Of an mmproj: {MMPROJ_TYPES}.")
    ],
    tensor_type: TensorTypes = None,
    output_type: OutputType = None,
    embedding_type: EmbeddingType = None,
    imatrix: Imatrix = None,
    allow_requantize: Annotated[
        bool,
        typer.Option("--allow-requantize", help="Take a file that is quantized already: worse than from the original."),
    ] = False,
    dry_run: DryRun = False,
    force: Force = False,
    threads: Threads = None,
) -> None:
    """Make a GGUF of another type from a GGUF of F32, F16 or BF16."""
    from local_llava.convert import Overrides, prepare_gguf

    _check_threads(threads)
    overrides = Overrides.parse(tensor_type or (), output_type, embedding_type)
    prepared = prepare_gguf(
        source,
        target,
        quant,
        overrides=overrides,
        imatrix=imatrix,
        allow_requantize=allow_requantize,
        overwrite=force,
    )
    if dry_run:
        _show(target, prepared.plan)
        return
    for note in prepared.plan.notes:
        console.note(f"Note: {note}")
    with console.ConvertProgress() as progress:
        prepared.write(progress.start(source, prepared.size), threads)
    print(target)


def _check_threads(threads: int | None) -> None:
    if threads is not None and threads < 1:
        raise UsageError(f"--threads must be 1 or more, not {threads}")


def _show(path: Path, plan: GGUFPlan) -> None:
    from collections import Counter

    from local_llava.convert.write import human_size, output_size

    types = Counter(t.type.name for t in plan.tensors)
    kinds = ", ".join(f"{n} {name}" for name, n in types.most_common())
    print(f"{path}: {human_size(output_size(plan))}, {len(plan.tensors)} tensors ({kinds})")
    for note in plan.notes:
        print(f"  {note}")
