"""The pairs that are to be compared, found and looked at before anything is computed.

Knows headers: what makes two models incomparable is told at once, and not after the first hour.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from local_llava import hub
from local_llava.corrections import open_model
from local_llava.errors import ModelFileError
from local_llava.gguf_file import GGUFFile
from local_llava.images import load_image, with_mode
from local_llava.llm_file import check_llm, check_pair, quant_of
from local_llava.mmproj import TowerConfig, check_mmproj
from local_llava.pictures import anyres
from local_llava.store.digest import file_digest
from local_llava.types import ModelFiles, PreprocessChoice

log = logging.getLogger("local_llava")

_TOKENS, _TEMPLATE = "tokenizer.ggml.tokens", "tokenizer.chat_template"


@dataclass(frozen=True)
class Matrix:
    """The importance matrix that a language model was quantized with, as its file tells."""

    file: str
    dataset: str


@dataclass(frozen=True)
class Pair:
    """A pair to be compared."""

    name: str
    """As the user named it."""
    files: ModelFiles
    quant: str
    """Type of the language model; "" where the file does not say."""
    mmproj_quant: str
    matrix: Matrix | None
    n_vocab: int
    tower: TowerConfig
    tower_digest: str
    """Of the mmproj's content."""


def find(
    reference: str | os.PathLike[str],
    models: Sequence[str | os.PathLike[str]],
    mmproj: str | os.PathLike[str] | None,
    on_convert: hub.OnConvert | None,
) -> list[Pair]:
    """The reference and the models, which all have its vocabulary.

    Args:
        reference: As of `Llava.load`.
        models: Likewise. For language models that have no mmproj beside them, the reference's is taken.
        mmproj: That of all of them; None for their own.
        on_convert: As of `hub.resolve`.

    Raises:
        ModelFileError: A file cannot be used, or has another vocabulary than the reference.
        CheckpointError: A checkpoint cannot be converted.
    """
    files = hub.resolve(reference, mmproj, on_convert)
    pair, first = _look(str(reference), files)
    pairs = [pair]
    for model in models:
        files = hub.resolve(model, mmproj, on_convert, other_mmproj=pair.files.mmproj)
        other, gguf = _look(str(model), files)
        _check_vocabulary(other.name, gguf, pair.name, first)
        pairs.append(other)
    return pairs


def check_pictures(pairs: Sequence[Pair], images: Sequence[Path], preprocess: PreprocessChoice) -> None:
    """See that all pictures can be read, and take as many tokens of each model as of the first one.

    Raises:
        ImageError: A picture cannot be read.
        ModelFileError: They do not.
    """
    # The first of each kind: models that share a tower, or have one of the same kind, see pictures alike.
    kinds = {(pair.tower.preprocessing, pair.tower.n_tokens): pair for pair in reversed(pairs)}
    for image in images:
        size = load_image(image).size
        wanted = _n_tokens(pairs[0].tower, size, preprocess)
        for pair in kinds.values():
            if (n := _n_tokens(pair.tower, size, preprocess)) != wanted:
                raise ModelFileError(
                    f"{pair.name} cannot be compared with {pairs[0].name}: {image} takes {n} tokens of the one, "
                    f"{wanted} of the other"
                )


def _look(name: str, files: ModelFiles) -> tuple[Pair, GGUFFile]:
    gguf, mmproj = open_model(files.model), open_model(files.mmproj)
    config, tower = check_llm(gguf), check_mmproj(mmproj)
    check_pair(config, files.mmproj, tower.n_out)
    hub.check_pair_ids(gguf, mmproj)
    types = quant_of(gguf), quant_of(mmproj)
    pair = Pair(name, files, *types, _matrix(gguf.metadata), config.n_vocab, tower, file_digest(files.mmproj))
    return pair, gguf


def _matrix(metadata: Mapping[str, object]) -> Matrix | None:
    """What llama.cpp and our own converter note of it."""
    file, dataset = (metadata.get(f"quantize.imatrix.{key}") for key in ("file", "dataset"))
    return Matrix(str(file or ""), str(dataset or "")) if file or dataset else None


def _check_vocabulary(name: str, gguf: GGUFFile, reference_name: str, reference: GGUFFile) -> None:
    ours, wanted = gguf.metadata[_TOKENS], reference.metadata[_TOKENS]
    if len(ours) != len(wanted):
        raise ModelFileError(
            f"{name} cannot be compared with {reference_name}: it has {len(ours)} tokens, not {len(wanted)}"
        )
    for i, (a, b) in enumerate(zip(ours, wanted, strict=True)):
        if a != b:
            raise ModelFileError(
                f"{name} cannot be compared with {reference_name}: its token {i} is {a!a:.40}, not {b!a:.40}"
            )
    if gguf.metadata.get(_TEMPLATE) != reference.metadata.get(_TEMPLATE):
        log.warning("%s has another chat template than %s: it is given that one's prompts", name, reference_name)


def _n_tokens(tower: TowerConfig, size: tuple[int, int], preprocess: PreprocessChoice) -> int:
    how = with_mode(tower.preprocessing, preprocess)
    return anyres.arrangement(size[1], size[0], how, tower.n_tokens, bool(tower.preprocessing.grid)).n_tokens
