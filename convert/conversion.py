"""One conversion from end to end: checkpoint in, plan, files out.

Knows the order of the steps, and what both output files say about where they come from.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from gguf import GGUFValueType

from local_llava.convert import mixes, tensor_types, weights, write
from local_llava.convert.checkpoint import ReadWeights
from local_llava.convert.companions import NO_COMPANIONS, Companions
from local_llava.convert.families import Decoder, Parts, Row, Tower, open_checkpoint
from local_llava.convert.families.decoders import read_decoder
from local_llava.convert.families.towers import read_tower
from local_llava.convert.imatrix import ImportanceMatrix, read_imatrix
from local_llava.convert.overrides import NO_OVERRIDES, Overrides
from local_llava.convert.plan import Field, GGUFPlan, Load, TensorPlan
from local_llava.convert.preprocessing import CLIP_MEAN, CLIP_STD, read_preprocessing
from local_llava.convert.source import FLOATS, SourceTensor
from local_llava.convert.tokenizer import read_tokenizer
from local_llava.errors import CheckpointError, OutputError
from local_llava.llm_vocab import PHI3_TOKENS, is_named_phi3
from local_llava.preprocessing import GRID_RULE, Preprocessing, fits_grid
from local_llava.types import DEFAULT_MMPROJ_QUANT, DEFAULT_QUANT, PAIR_KEY, ModelFiles

_UNUSED = re.compile(
    r".*(rotary_emb\.inv_freq|position_ids|post_layernorm\.\w+|visual_projection\.weight"
    r"|\bhead\.(probe|(attention|layernorm|mlp)\..*))$"
)
"""Tensors that checkpoints carry and LLaVA does not use; the last ones pool SigLIP's patches."""


@dataclass(frozen=True)
class Conversion:
    """A conversion that was checked and can be written."""

    files: ModelFiles
    model: GGUFPlan
    mmproj: GGUFPlan
    overwrite: bool
    source_notes: tuple[str, ...] = ()
    """Of the checkpoint."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user may not expect of the checkpoint and the two files, one line each."""
        return (*self.source_notes, *self.model.notes, *self.mmproj.notes)

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of the two files."""
        return write.output_size(self.model), write.output_size(self.mmproj)

    def write(self, progress: write.Progress | None = None, threads: int | None = None) -> ModelFiles:
        """Write both files; they appear when both are complete, and on any error nothing is left.

        Args:
            progress: Called with the bytes written since the last call; they add up to `sizes`.
            threads: Threads that read and quantize; None for one a processor.

        Raises:
            OutputError: A file exists, its directory cannot be written, or the disk is full.
            CheckpointError: A tensor cannot be read, or holds what cannot be converted.
        """
        created = _make_directories(self.files.model.parent)
        try:
            paths = (self.files.model, self.files.mmproj)
            write.check_writable(list(zip(paths, self.sizes, strict=True)), self.overwrite)
            with write.Pending(overwrite=self.overwrite) as pending:
                for plan, path in zip((self.model, self.mmproj), paths, strict=True):
                    pending.write(plan, path, threads=threads, progress=progress)
        except BaseException:
            for directory in created:
                if not any(directory.iterdir()):
                    directory.rmdir()
            raise
        return self.files


def convert(
    source: str | Path,
    out: str | Path | None = None,
    *,
    quant: str = DEFAULT_QUANT,
    mmproj_quant: str = DEFAULT_MMPROJ_QUANT,
    overrides: Overrides = NO_OVERRIDES,
    imatrix: str | Path | None = None,
    companions: Companions = NO_COMPANIONS,
    overwrite: bool = False,
    progress: write.Progress | None = None,
    threads: int | None = None,
) -> ModelFiles:
    """Convert a LLaVA checkpoint to a quantized GGUF language model and an mmproj.

    One pass over the weights, with a few megabytes of them in memory at a time.

    Args:
        source: Directory of a checkpoint.
        out: Directory for the files, made if it is missing; None for `<model>-gguf` in the current directory.
        quant: Type of the language model, in upper or lower case: F32, F16, BF16, Q8_0, Q6_K, Q5_K_M, Q5_K_S, Q5_1,
            Q5_0, Q4_K_M, Q4_K_S, Q4_1, Q4_0, IQ4_NL, IQ4_XS, Q3_K_L, Q3_K_M, Q3_K_S, IQ3_M, IQ3_S or Q2_K; with an
            importance matrix also IQ3_XS, IQ3_XXS, Q2_K_S, IQ2_M, IQ2_S, IQ2_XS, IQ2_XXS, IQ1_M or IQ1_S.
        mmproj_quant: Type of the tower and projector: F32, F16, BF16, Q8_0, Q6_K, Q5_K or Q4_K.
        overrides: Types of single tensors of the language model.
        imatrix: An importance matrix of the language model (see `convert.imatrix`).
        companions: Where the parts are that the checkpoint does not carry, if not where it says.
        overwrite: Replace existing files.
        progress: Called with the bytes written since the last call.
        threads: Threads that read and quantize; None for one a processor.

    Returns:
        The paths of the two files.

    Raises:
        CheckpointError: The checkpoint cannot be converted.
        OutputError: The files cannot be written.
        UsageError: An unknown type, one that does not fit a tensor it was named for, or one that needs an importance
            matrix.
        ModelFileError: The importance matrix is damaged or of another model.
    """
    conversion = prepare(
        source,
        out,
        quant=quant,
        mmproj_quant=mmproj_quant,
        overrides=overrides,
        imatrix=imatrix,
        companions=companions,
        overwrite=overwrite,
    )
    return conversion.write(progress, threads)


def prepare(
    source: str | Path,
    out: str | Path | None = None,
    *,
    quant: str = DEFAULT_QUANT,
    mmproj_quant: str = DEFAULT_MMPROJ_QUANT,
    overrides: Overrides = NO_OVERRIDES,
    imatrix: str | Path | None = None,
    companions: Companions = NO_COMPANIONS,
    overwrite: bool = False,
    read_weights: ReadWeights = weights.read_weights,
) -> Conversion:
    """Decide and check a whole conversion without writing; arguments and errors as of `convert`.

    Args:
        read_weights: What reads the headers of a directory's weight files. The weights themselves are read by `write`,
            but for the projector's, of which both files carry a digest.
    """
    mix = mixes.get_mix(quant, mixes.LLM_MIXES, guided=imatrix is not None)
    mmproj_mix = mixes.get_mix(mmproj_quant, mixes.MMPROJ_MIXES)
    matrix = None if imatrix is None else read_imatrix(imatrix)
    parts = open_checkpoint(Path(source), companions, read_weights)
    name = model_name(parts.directory)
    directory = Path(f"{name}-gguf") if out is None else Path(out)
    files = ModelFiles(directory / f"{name}-{mix.name}.gguf", directory / f"{name}-mmproj-{mmproj_mix.name}.gguf")
    decoder = read_decoder(parts.text, parts.tied)
    tower = read_tower(parts, decoder.n_embd)
    _check(parts, decoder, tower)
    preprocessing = _preprocessing(parts, tower)
    tokenizer = read_tokenizer(parts.tokenizer, decoder.n_vocab, parts.top)

    text_types = decoder_types(mix, decoder, overrides, matrix)
    mmproj_types = tensor_types.mmproj_types(mmproj_mix, _named([*tower.rows, *tower.projector_rows]))
    shared = [
        *_origin(parts.directory, _loadable(name, tokenizer.tokens)),
        Field(PAIR_KEY, _pair_id(parts.projector_tensors), GGUFValueType.STRING),
    ]
    model = GGUFPlan(
        metadata=(
            Field("general.architecture", decoder.architecture, GGUFValueType.STRING),
            Field("general.type", "model", GGUFValueType.STRING),
            *shared,
            *mixes.type_fields(mix),
            *decoder.fields,
            *tokenizer.fields(),
            *(matrix.fields() if matrix else ()),
        ),
        tensors=_tensors(decoder.rows, parts.text_tensors, text_types),
        notes=text_types.notes,
    )
    mmproj = GGUFPlan(
        metadata=(
            Field("general.architecture", "clip", GGUFValueType.STRING),
            Field("general.type", "mmproj", GGUFValueType.STRING),
            *shared,
            *mixes.type_fields(mmproj_mix),
            *tower.fields(preprocessing),
        ),
        tensors=(
            *_tensors(tower.rows, parts.vision_tensors, mmproj_types),
            *_tensors(tower.projector_rows, parts.projector_tensors, mmproj_types),
        ),
        notes=mmproj_types.notes,
    )
    return Conversion(files, model, mmproj, overwrite, (*map(str, parts.outside), *parts.notes, *decoder.notes))


def model_name(directory: Path) -> str:
    """The name of a checkpoint, from its directory or from the repository whose snapshot in the Hub's cache it is."""
    directory = directory.resolve()
    name = directory.name
    if directory.parent.name == "snapshots" and directory.parent.parent.name.startswith("models--"):
        name = directory.parent.parent.name.rpartition("--")[2]
    return re.sub(r"-(transformers|hf)$", "", name) or "model"


def decoder_types(
    mix: mixes.Mix,
    decoder: Decoder,
    overrides: Overrides = NO_OVERRIDES,
    matrix: ImportanceMatrix | None = None,
) -> tensor_types.Assignment:
    """The type of every tensor of a language model; arguments and errors as of `tensor_types.llm_types`."""
    return tensor_types.llm_types(
        mix,
        _named(decoder.rows),
        n_layer=decoder.n_layer,
        n_head=decoder.n_head,
        n_head_kv=decoder.n_head_kv,
        overrides=overrides,
        architecture=decoder.architecture,
        matrix=matrix,
    )


def _preprocessing(parts: Parts, tower: Tower) -> Preprocessing:
    """What the image processor's configuration says, and the family."""
    if parts.processor is None:
        how = Preprocessing(tower.image_size, CLIP_MEAN, CLIP_STD)
    else:
        how = read_preprocessing(parts.processor, tower.image_size)
    for height, width in parts.grid:
        if not fits_grid(height, width, tower.image_size):
            raise CheckpointError(
                f"{parts.directory}: image_grid_pinpoints has {height} x {width}; accepted are {GRID_RULE}, "
                f"here {tower.image_size}"
            )
    return replace(how, mode=parts.mode or how.mode, grid=parts.grid)


def _check(parts: Parts, decoder: Decoder, tower: Tower) -> None:
    """Check that the checkpoint has every tensor, of the right shape, and nothing that nobody asks for."""
    problems: list[str] = []
    for rows, tensors, used_anyway in (
        (decoder.rows, parts.text_tensors, {"lm_head.weight"}),  # a tied output may be saved all the same
        (tower.rows, parts.vision_tensors, set()),
        (tower.projector_rows, parts.projector_tensors, set()),
    ):
        for row in rows:
            if row.source is None:
                continue
            tensor = tensors.get(row.source)
            if tensor is None:
                problems.append(f"{row.source} is missing")
            elif tensor.shape != row.shape:
                problems.append(
                    f"{tensor.name} has shape {list(tensor.shape)}, config.json calls for {list(row.shape)}"
                )
            elif tensor.dtype not in FLOATS:
                problems.append(f"{tensor.name} has dtype {tensor.dtype}; supported: {', '.join(FLOATS)}")
        expected = {row.source for row in rows} | used_anyway
        problems += [f"{t.name} is unknown" for own, t in tensors.items() if own not in expected and not _unused(t)]
    problems += [f"{name} is unknown" for name in parts.unknown if not _UNUSED.match(name)]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{parts.directory}: {'; '.join(problems[:3])}{more}")


def _unused(tensor: SourceTensor) -> bool:
    return _UNUSED.match(tensor.name) is not None


def _named(rows: Sequence[Row]) -> list[tensor_types.Tensor]:
    return [tensor_types.Tensor(row.target, row.shape) for row in rows]


def _tensors(
    rows: Sequence[Row], tensors: Mapping[str, SourceTensor], assignment: tensor_types.Assignment
) -> tuple[TensorPlan, ...]:
    def plan(row: Row) -> TensorPlan:
        load: Load
        if row.source is None:
            load, source = _constant(row), "config.json"
        else:
            tensor = tensors[row.source]
            load, source = row.load(tensor), str(tensor)
        importance = assignment.importance.get(row.target)
        return TensorPlan(row.target, row.shape, assignment.types[row.target], load, source, importance=importance)

    return tuple(plan(row) for row in rows)


def _constant(row: Row) -> Load:
    """Rows of a tensor that no checkpoint holds."""
    if row.value is None:
        return lambda start, stop: np.zeros((stop - start, row.shape[-1]), np.float32)
    value = row.value.reshape(-1, row.shape[-1])
    return lambda start, stop: value[start:stop]


def _pair_id(projector: Mapping[str, SourceTensor]) -> str:
    """A digest of the projector: no two training runs have the same."""
    digest = hashlib.sha256()
    for name in sorted(projector):
        tensor = projector[name]
        n_rows = int(np.prod(tensor.shape[:-1], dtype=np.int64))
        for start in range(0, n_rows, 256):
            digest.update(tensor.rows(start, min(start + 256, n_rows)).tobytes())
    return digest.hexdigest()[:32]


def _loadable(name: str, tokens: Collection[str]) -> str:
    """A name under which llama.cpp loads the model: to what is called Phi 3 it gives rules that need Phi 3's tokens."""
    if not is_named_phi3({"general.name": name}) or set(PHI3_TOKENS) <= set(tokens):
        return name
    return re.sub("phi-?3", "phi_3", name, flags=re.IGNORECASE)


def _origin(directory: Path, name: str) -> list[Field]:
    """What is known of where the checkpoint comes from: its model card's header, and its place in the Hub's cache."""
    text = GGUFValueType.STRING
    fields = [Field("general.name", name, text)]
    card = directory / "README.md"
    header = ""
    if card.is_file():
        with card.open(encoding="utf-8", errors="replace") as file:
            start = file.read(1 << 16)
        header = start.split("\n---", 1)[0] if start.startswith("---\n") else ""
    if match := re.search(r"^license:\s*[\"']?([\w.-]+)", header, re.MULTILINE):
        fields.append(Field("general.license", match[1], text))
    repository = directory.resolve().parent.parent.name
    if repository.startswith("models--"):
        url = "https://huggingface.co/" + repository.removeprefix("models--").replace("--", "/", 1)
        fields += [Field("general.source.url", url, text), Field("general.source.repo_url", url, text)]
    return fields


def _make_directories(directory: Path) -> list[Path]:
    """Make a directory and those above it; returns those that were missing, innermost first."""
    missing = []
    while not directory.exists():
        missing.append(directory)
        directory = directory.parent
    try:
        for path in reversed(missing):
            path.mkdir()
    except OSError as e:
        raise OutputError(f"{missing[0]}: the directory cannot be made: {e.strerror}") from e
    return missing
