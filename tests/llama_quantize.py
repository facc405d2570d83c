"""Small language models as F32 files, and llama.cpp's own `llama_model_quantize` to compare with."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType as T
from gguf import GGUFReader, GGUFValueType
from numpy.typing import NDArray

from local_llava.convert import mixes, tensor_types
from local_llava.convert.imatrix import ImportanceMatrix
from local_llava.convert.mixes import LLM_MIXES
from local_llava.convert.overrides import NO_OVERRIDES, Overrides
from local_llava.convert.plan import Field, GGUFPlan, TensorPlan
from local_llava.convert.tensor_types import Assignment, Tensor
from local_llava.convert.write import write

Tensors = dict[str, NDArray[np.float32]]

UNGUIDED = tuple(name for name, mix in LLM_MIXES.items() if not mix.guided)
"""Those that are made without an importance matrix, too."""


@dataclass(frozen=True)
class Model:
    """The parts of a model that decide on types. llama_model_quantize does not look at the number of rows."""

    n_embd: int = 256
    n_ff: int = 512
    n_layer: int = 4
    n_head: int = 8
    n_head_kv: int = 2
    tied: bool = False
    architecture: str = "llama"

    def tensors(self) -> Tensors:
        rng = np.random.default_rng(self.n_layer * self.n_embd)
        shapes: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (9, self.n_embd),
            "output_norm.weight": (self.n_embd,),
        }
        if not self.tied:
            shapes["output.weight"] = (9, self.n_embd)
        if self.architecture == "phi3":
            shapes |= {f"rope_factors_{name}.weight": (16,) for name in ("long", "short")}
        for i in range(self.n_layer):
            shapes |= {f"blk.{i}.{name}": shape for name, shape in self.layer(i).items()}
        return {name: weights(rng, shape) for name, shape in shapes.items()}

    def layer(self, i: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (self.n_embd,),
            "attn_output.weight": (3, self.n_embd),
            "ffn_norm.weight": (self.n_embd,),
            "ffn_up.weight": (2, self.n_embd),
            "ffn_down.weight": (2, self.n_ff),
        }
        # ggml takes a matrix of one row for a vector
        rows = 1 if i == 2 else 2
        if self.architecture == "phi3":
            return shapes | {"attn_qkv.weight": (rows, self.n_embd)}
        shapes |= {
            "attn_q.weight": (4, self.n_embd),
            "attn_q.bias": (4,),
            "attn_k.weight": (2, self.n_embd),
            "attn_v.weight": (rows, self.n_embd),
            "ffn_gate.weight": (2, self.n_embd),
        }
        own = {"ffn_down.bias": (2,)} if self.architecture == "llama" else {"attn_k.bias": (2,), "attn_v.bias": (rows,)}
        return shapes | own

    def fields(self) -> tuple[Field, ...]:
        numbers = {
            "block_count": self.n_layer,
            "context_length": 128,
            "embedding_length": self.n_embd,
            "feed_forward_length": self.n_ff,
            "attention.head_count": self.n_head,
            "attention.head_count_kv": self.n_head_kv,
        }
        return (
            Field("general.architecture", self.architecture, GGUFValueType.STRING),
            *(Field(f"{self.architecture}.{key}", value, GGUFValueType.UINT32) for key, value in numbers.items()),
            Field(f"{self.architecture}.attention.layer_norm_rms_epsilon", 1e-5, GGUFValueType.FLOAT32),
        )

    def types(
        self,
        quant: str,
        tensors: Tensors,
        overrides: Overrides = NO_OVERRIDES,
        matrix: ImportanceMatrix | None = None,
    ) -> Assignment:
        return tensor_types.llm_types(
            LLM_MIXES[quant],
            [Tensor(name, value.shape) for name, value in tensors.items()],
            n_layer=self.n_layer,
            n_head=self.n_head,
            n_head_kv=self.n_head_kv,
            architecture=self.architecture,
            overrides=overrides,
            matrix=matrix,
        )

    def plan(
        self,
        quant: str,
        tensors: Tensors,
        overrides: Overrides = NO_OVERRIDES,
        matrix: ImportanceMatrix | None = None,
    ) -> GGUFPlan:
        """The tensors in llama.cpp's order, so that whole files can be compared."""
        made = self.types(quant, tensors, overrides, matrix)
        return GGUFPlan(
            (*self.fields(), *mixes.type_fields(LLM_MIXES[quant]), *(matrix.fields() if matrix else ())),
            tuple(
                replace(tensor(name, tensors[name], made.types[name]), importance=made.importance.get(name))
                for name in sorted(tensors, key=tensor_types.llama_order)
            ),
        )

    def matrix(self, seed: int = 0, datasets: tuple[str, ...] = ("pictures",)) -> ImportanceMatrix:
        """For all matrices but the embeddings and the output, as llama-imatrix makes it: of any size, some of it 0."""
        rng = np.random.default_rng(seed)
        importance = {}
        for name, value in self.tensors().items():
            if value.ndim == 2 and name.startswith("blk."):
                n = value.shape[-1]
                squares = rng.standard_normal(n) ** 2 * 10 ** rng.uniform(-6, 6)
                squares *= rng.choice([1, 1e3, 1e-3, 0], n, p=[0.8, 0.05, 0.1, 0.05])
                importance[name] = squares.astype(np.float32)
        return ImportanceMatrix(Path("some/imatrix.gguf"), importance, datasets, 7)


def weights(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Mostly as in a model, with zeros, and some of any magnitude that F16 holds: ties, subnormals, signed zeros."""
    usual = rng.standard_normal(shape) * rng.choice([0.02, 1.0, 0.0], size=shape, p=[0.8, 0.15, 0.05])
    bits = rng.integers(0, 2**32, size=shape, dtype=np.uint32)
    bits = np.where(rng.random(shape) < 0.5, bits & np.uint32(0xFFFFF000), bits)
    any_size = bits.view(np.float32)
    odd = (rng.random(shape) < 0.05) & (np.abs(any_size) < 60000)  # false for NaN
    return np.where(odd, any_size, usual).astype(np.float32)


def tensor(name: str, value: NDArray[np.float32], type: T) -> TensorPlan:
    rows = value.reshape(-1, value.shape[-1])
    shape = value.shape if len(rows) > 1 else value.shape[-1:]  # as ggml counts dimensions
    return TensorPlan(name, shape, type, lambda start, stop: rows[start:stop], "model.safetensors: source")


# llama.cpp keeps the pointer, so it lives as long as the module. It would log a line for every tensor.
_silence = llama_cpp.llama_log_callback(lambda level, text, data: None)


@contextmanager
def quiet() -> Iterator[None]:
    """No log of llama.cpp."""
    before, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    llama_cpp.llama_log_set(_silence, None)
    try:
        yield
    finally:
        llama_cpp.llama_log_set(before, data)


def llama_quantize(
    source: Path,
    target: Path,
    quant: str,
    tensor_types: Mapping[str, str] = MappingProxyType({}),
    output_type: str | None = None,
    embedding_type: str | None = None,
    allow_requantize: bool = False,
    matrix: ImportanceMatrix | None = None,
) -> bool:
    """Whether llama.cpp could quantize, called as its llama-quantize calls it."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = int(LLM_MIXES[quant].file_type)
    params.nthread = 2
    params.allow_requantize = allow_requantize
    if output_type is not None:
        params.output_tensor_type = int(T[output_type.upper()])
    if embedding_type is not None:
        params.token_embedding_type = int(T[embedding_type.upper()])
    if tensor_types:
        # llama-quantize puts patterns in lower case.
        entries = [(pattern.lower().encode(), int(T[name.upper()])) for pattern, name in tensor_types.items()]
        params.tt_overrides = (llama_cpp.llama_model_tensor_override * (len(entries) + 1))(*entries, (None, 0))
    if matrix is not None:
        params.imatrix = imatrix_data(matrix)
        params.kv_overrides = imatrix_overrides(matrix)
    return llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) == 0


def imatrix_data(matrix: ImportanceMatrix) -> ctypes.Array[llama_cpp.llama_model_imatrix_data]:
    """The numbers as llama_model_quantize takes them; the list ends with a null pointer."""
    entries = [
        (name.encode(), values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), len(values))
        for name, values in matrix.importance.items()
    ]
    return (llama_cpp.llama_model_imatrix_data * (len(entries) + 1))(*entries, (None, None, 0))


def imatrix_overrides(matrix: ImportanceMatrix) -> ctypes.Array[llama_cpp.llama_model_kv_override]:
    """What llama-quantize has llama_model_quantize write about the matrix (`llama_quantize` in its quantize.cpp)."""
    said: list[tuple[str, str | int]] = [("file", str(matrix.path))]
    said += [("dataset", matrix.datasets[0])] if matrix.datasets else []
    said += [("entries_count", len(matrix.importance))]
    said += [("chunks_count", matrix.n_chunks)] if matrix.n_chunks > 0 else []
    array = (llama_cpp.llama_model_kv_override * (len(said) + 1))()
    for entry, (key, value) in zip(array, said, strict=False):
        entry.key = f"quantize.imatrix.{key}".encode()
        if isinstance(value, str):
            entry.tag, entry.value.val_str = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()[:127]
        else:
            entry.tag, entry.value.val_i64 = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT, value
    return array


def contents(path: Path) -> tuple[dict[str, tuple[str, bytes]], dict[str, object]]:
    """Type and bytes by tensor name, and the metadata."""
    reader = GGUFReader(path)
    fields: dict[str, object] = {key: (field.types, field.contents()) for key, field in reader.fields.items()}
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in reader.tensors}, fields


def same_files(ours: Path, theirs: Path) -> None:
    """Byte by byte; where they differ, what differs."""
    if ours.read_bytes() == theirs.read_bytes():
        return
    (found, about), (expected, about_theirs) = contents(ours), contents(theirs)
    assert about == about_theirs
    assert {name: type for name, (type, _) in found.items()} == {name: type for name, (type, _) in expected.items()}
    assert [name for name in found if found[name] != expected[name]] == []
    raise AssertionError(f"{ours} and {theirs} differ in their order or padding")


def compare(
    model: Model,
    quant: str,
    directory: Path,
    overrides: Overrides = NO_OVERRIDES,
    matrix: ImportanceMatrix | None = None,
) -> dict[str, T]:
    """Quantize by both, and compare. Returns the types."""
    tensors = model.tensors()
    base, theirs, ours = (directory / name for name in ("base.gguf", "theirs.gguf", "ours.gguf"))
    write(model.plan("F32", tensors), base, threads=1, overwrite=True)
    named = (overrides.tensor_types, overrides.output_type, overrides.embedding_type)
    assert llama_quantize(base, theirs, quant, *named, matrix=matrix)
    plan = model.plan(quant, tensors, overrides, matrix)
    write(plan, ours, threads=2, overwrite=True)
    same_files(ours, theirs)
    return {t.name: t.type for t in plan.tensors}
