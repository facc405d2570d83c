"""One GGUF from another, in another type: `local-llava quantize`.

Knows which files can be quantized, and what of them changes: the types of tensors, and the two metadata entries that
name them. A language model comes out as llama.cpp's `llama_model_quantize` writes it, tensors in its order.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from local_llava import ggml_rows
from local_llava.convert import mixes, tensor_types, write
from local_llava.convert.imatrix import ImportanceMatrix, read_imatrix
from local_llava.convert.mixes import Mix
from local_llava.convert.overrides import NO_OVERRIDES, Overrides
from local_llava.convert.plan import Field, GGUFPlan, TensorPlan
from local_llava.convert.tensor_types import Assignment, Tensor
from local_llava.errors import CheckpointError, ModelFileError, OutputError, UsageError
from local_llava.gguf_file import TYPES, GGUFFile, TensorInfo
from local_llava.llm_file import ARCHITECTURES
from local_llava.mmproj import check_mmproj

MAX_ROW = 1 << 24
"""Values of a row, the least that is read at a time."""
MAX_LAYERS = 512
"""LLAMA_MAX_LAYERS."""

_VALUE_TYPES = {
    "u8": GGUFValueType.UINT8,
    "i8": GGUFValueType.INT8,
    "u16": GGUFValueType.UINT16,
    "i16": GGUFValueType.INT16,
    "u32": GGUFValueType.UINT32,
    "i32": GGUFValueType.INT32,
    "f32": GGUFValueType.FLOAT32,
    "bool": GGUFValueType.BOOL,
    "u64": GGUFValueType.UINT64,
    "i64": GGUFValueType.INT64,
    "f64": GGUFValueType.FLOAT64,
    "str": GGUFValueType.STRING,
}
"""As `GGUFFile.types` names them."""

_SOURCES = frozenset(map(int, GGMLQuantizationType))

_REPLACED = {"general.quantization_version", "general.file_type", "split.no", "split.count", "split.tensors.count"}
_IMATRIX = "quantize.imatrix."


@dataclass(frozen=True)
class Requantization:
    """A GGUF to be made of another, checked."""

    source: Path
    target: Path
    plan: GGUFPlan
    overwrite: bool

    @property
    def size(self) -> int:
        """Bytes of the new file."""
        return write.output_size(self.plan)

    def write(self, progress: write.Progress | None = None, threads: int | None = None) -> Path:
        """Write the file; it appears when it is complete, and on any error nothing is left.

        Args:
            progress: Called with the bytes written since the last call; they add up to `size`.
            threads: Threads that read and quantize; None for one a processor.

        Raises:
            OutputError: The file exists, its directory cannot be written, or the disk is full.
            ModelFileError: A tensor cannot be read, or holds what cannot be quantized.
        """
        write.check_writable([(self.target, self.size)], self.overwrite)
        try:
            write.write(self.plan, self.target, threads=threads, progress=progress, overwrite=self.overwrite)
        except CheckpointError as e:
            raise ModelFileError(str(e)) from e
        return self.target


def quantize_gguf(
    source: str | Path,
    target: str | Path,
    quant: str,
    *,
    overrides: Overrides = NO_OVERRIDES,
    imatrix: str | Path | None = None,
    allow_requantize: bool = False,
    overwrite: bool = False,
    progress: write.Progress | None = None,
    threads: int | None = None,
) -> Path:
    """Quantize a language model or an mmproj.

    Args:
        source: A GGUF of a language model (llama, phi3, qwen2), or LLaVA's mmproj, better of F32, F16 or BF16.
        target: The new file.
        quant: A type that `convert` takes for a file of this kind.
        overrides: Types of single tensors of a language model.
        imatrix: An importance matrix of a language model (see `convert.imatrix`).
        allow_requantize: Take a source that is quantized already. What was lost then is not found again.
        overwrite: Replace an existing file.
        progress: Called with the bytes written since the last call.
        threads: Threads that read and quantize; None for one a processor.

    Returns:
        `target`.

    Raises:
        ModelFileError: The source cannot be read or quantized; or the importance matrix is damaged or of another model.
        OutputError: The target cannot be written.
        UsageError: An unknown type, one that does not fit a tensor it was named for or needs an importance matrix, or a
            source that is quantized.
    """
    prepared = prepare_gguf(
        source,
        target,
        quant,
        overrides=overrides,
        imatrix=imatrix,
        allow_requantize=allow_requantize,
        overwrite=overwrite,
    )
    return prepared.write(progress, threads)


def prepare_gguf(
    source: str | Path,
    target: str | Path,
    quant: str,
    *,
    overrides: Overrides = NO_OVERRIDES,
    imatrix: str | Path | None = None,
    allow_requantize: bool = False,
    overwrite: bool = False,
) -> Requantization:
    """Decide and check a quantization without writing; arguments and errors as of `quantize_gguf`."""
    source, target = Path(source), Path(target)
    gguf = GGUFFile.open(source)
    if target.exists() and target.samefile(source):
        raise OutputError(f"{target} is the file to be quantized; name another one for the result")
    # First, so that a part of a model is called that, and not a model without layers.
    if gguf.metadata.get("split.count", 1) not in (0, 1):
        raise ModelFileError(f"{source}: is one part of a split model; join the parts with llama-gguf-split --merge")
    tensors = [_tensor(gguf, info) for info in gguf.tensors.values()]
    matrix = None if imatrix is None else read_imatrix(imatrix)
    architecture = gguf.metadata.get("general.architecture")
    if isinstance(architecture, str) and architecture in ARCHITECTURES:
        mix = mixes.get_mix(quant, mixes.LLM_MIXES, guided=matrix is not None)
        tensors.sort(key=lambda tensor: tensor_types.llama_order(tensor.name))
        assignment = _llm_types(gguf, architecture, mix, tensors, overrides, matrix)
    elif architecture == "clip":
        mix = mixes.get_mix(quant, mixes.MMPROJ_MIXES)
        if overrides:
            raise UsageError(f"{source} is an mmproj: types of single tensors can be named for a language model only")
        if matrix is not None:
            raise UsageError(f"{source} is an mmproj: importance matrices are of language models")
        check_mmproj(gguf)
        assignment = tensor_types.mmproj_types(mix, tensors)
    else:
        raise ModelFileError(
            f"{source}: general.architecture is {architecture!a:.80}; supported: {', '.join(ARCHITECTURES)}, clip"
        )
    plans = tuple(_plan(gguf, tensor, assignment) for tensor in tensors)
    if not allow_requantize:
        _refuse_quantized(source, tensors, assignment)
    fields = (*_fields(gguf, matrix), *mixes.type_fields(mix), *(matrix.fields() if matrix else ()))
    plan = GGUFPlan(fields, plans, assignment.notes)
    return Requantization(source, target, plan, overwrite)


def _llm_types(
    gguf: GGUFFile,
    architecture: str,
    mix: Mix,
    tensors: list[Tensor],
    overrides: Overrides,
    matrix: ImportanceMatrix | None,
) -> Assignment:
    def number(key: str, high: int, default: int | None = None) -> int:
        value = gguf.metadata.get(f"{architecture}.{key}", default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= high:
            raise ModelFileError(
                f"{gguf.path}: {architecture}.{key} must be a number from 1 to {high}, not {value!a:.80}"
            )
        return value

    if gguf.metadata.get(f"{architecture}.expert_count", 0) != 0:
        raise ModelFileError(f"{gguf.path}: {architecture}.expert_count: mixtures of experts are not supported")
    n_head = number("attention.head_count", 1 << 16)
    return tensor_types.llm_types(
        mix,
        tensors,
        n_layer=number("block_count", MAX_LAYERS),
        n_head=n_head,
        n_head_kv=number("attention.head_count_kv", n_head, n_head),
        architecture=architecture,
        overrides=overrides,
        matrix=matrix,
    )


def _tensor(gguf: GGUFFile, info: TensorInfo) -> Tensor:
    if info.type not in _SOURCES or not ggml_rows.has_dequantizer(info.type):
        raise ModelFileError(f"{gguf.path}: tensor {info.name!a} is {TYPES[info.type].name}, which is not supported")
    if info.shape[-1] > MAX_ROW:
        raise ModelFileError(
            f"{gguf.path}: tensor {info.name!a} has rows of {info.shape[-1]} values; at most {MAX_ROW} are accepted"
        )
    # ggml does not count outer dimensions of 1, and llama.cpp leaves them out of the file.
    outer = next((i for i, size in enumerate(info.shape[:-1]) if size > 1), len(info.shape) - 1)
    return Tensor(info.name, info.shape[outer:], GGMLQuantizationType(info.type))


def _refuse_quantized(source: Path, tensors: list[Tensor], assignment: Assignment) -> None:
    """As llama.cpp, only where a tensor would change: one that has the type already is copied."""
    for tensor in tensors:
        target = assignment.types[tensor.name]
        if tensor.type not in mixes.FLOATS and tensor.type is not target:
            raise UsageError(
                f"{source}: tensor {tensor.name!a} is {tensor.type.name} already; {target.name} of it is worse than of "
                "the original: take a file of F32, F16 or BF16, or do it all the same with --allow-requantize"
            )


def _plan(gguf: GGUFFile, tensor: Tensor, assignment: Assignment) -> TensorPlan:
    name, target = tensor.name, assignment.types[tensor.name]
    rows = _Rows(gguf, gguf.tensors[name])
    raw = rows.raw if tensor.type is target and target not in mixes.FLOATS else None
    return TensorPlan(name, tensor.shape, target, rows.load, f"{gguf.path}", raw, assignment.importance.get(name))


class _Rows:
    """The rows of a tensor in a file, read when they are asked for."""

    def __init__(self, gguf: GGUFFile, info: TensorInfo) -> None:
        self.path, self.info = gguf.path, info
        self.row_size = info.shape[-1] // TYPES[info.type].block * TYPES[info.type].nbytes

    def raw(self, start: int, stop: int) -> NDArray[np.uint8]:
        count = (stop - start) * self.row_size
        try:
            data = np.fromfile(self.path, np.uint8, count, offset=self.info.offset + start * self.row_size)
        except OSError as e:
            raise ModelFileError(f"{self.path}: cannot be read: {e.strerror or e}") from e
        if data.size != count:
            raise ModelFileError(f"{self.path}: ends inside tensor {self.info.name!a}: it shrank while it was read")
        return data

    def load(self, start: int, stop: int) -> NDArray[np.float32]:
        return ggml_rows.dequantize(self.info.type, self.raw(start, stop)).reshape(stop - start, -1)


def _fields(gguf: GGUFFile, matrix: ImportanceMatrix | None) -> list[Field]:
    """The metadata that stays. Texts keep a zero byte inside, at which llama.cpp ends them."""
    return [
        _field(key, value, gguf.types[key])
        for key, value in gguf.metadata.items()
        if key not in _REPLACED and not (matrix and key.startswith(_IMATRIX))
    ]


def _field(key: str, value: Any, type: str) -> Field:
    if key == "general.alignment":
        value = GGUF_DEFAULT_ALIGNMENT  # as `write` aligns
    if type.startswith("arr["):
        return Field(key, value, GGUFValueType.ARRAY, _VALUE_TYPES[type[4:-1]])
    return Field(key, value, _VALUE_TYPES[type])
