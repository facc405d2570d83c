"""The weights of a tower on a device: copied there, or on a CPU used where the file is mapped into memory.

Knows which tensors the graph sees and in which type. Knows nothing of what is computed with them (`vision_graph`).
"""

from __future__ import annotations

import mmap
from contextlib import ExitStack
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from local_llava import ggml, ggml_rows
from local_llava.errors import EngineError, ModelFileError
from local_llava.gguf_file import GGUFFile, TensorInfo
from local_llava.mmproj import NEWLINE, TowerConfig
from local_llava.vision_graph import new_context, new_tensor

_FOLDED = {NEWLINE, "v.class_embd", "v.patch_embd.bias"}
"""Tensors that the graph does not see."""

_POSITIONS = "v.position_embd.weight"
"""Of which the graph sees other values than the file has."""

_ALIGNMENT = 32
"""ggml's TENSOR_ALIGNMENT, which its kernels may count on."""


def load_weights(
    gguf: GGUFFile, config: TowerConfig, backend: int, device: str, mapping_device: int | None, stack: ExitStack
) -> dict[str, int]:
    """Bring the tensors that are used to a device.

    Matrices of the linear layers keep their type; what is only added, and the small patch embedding, becomes F32. On a
    CPU what keeps its type stays in the file, as llama.cpp does it with language models: processes share its memory,
    and the system may take it back. A file that is cut off meanwhile ends the process in both cases.

    Args:
        backend: A ggml backend.
        device: Its name, for errors.
        mapping_device: Its ggml device, where that computes in the host's memory.
        stack: Frees what is made here.

    Returns:
        Name -> tensor.

    Raises:
        ModelFileError: The file cannot be read, or shrank since it was checked.
        EngineError: The device has no memory for them.
    """
    g = ggml.functions()
    shapes = {name: shape for name, shape in config.shapes().items() if name not in _FOLDED}
    shapes["v.patch_embd.weight"] = (config.n_embd, 3 * config.patch_size**2)
    context = stack.enter_context(new_context((len(shapes) + 1) * g.tensor_overhead()))
    weights = {name: new_tensor(context, _device_type(gguf.tensors[name]), shape) for name, shape in shapes.items()}
    try:
        with gguf.path.open("rb") as file:
            mapped = set()
            if mapping_device is not None:
                mapped = _map(gguf, weights, mapping_device, file, stack)
            buffer = g.backend_alloc_ctx_tensors(context, backend)  # of what has no place yet
            if not buffer:
                raise EngineError(f"no memory on {device} for the vision tower of {gguf.path}")
            stack.callback(g.backend_buffer_free, buffer)
            g.backend_buffer_set_usage(buffer, ggml.WEIGHTS)
            for name in weights.keys() - mapped:
                data = _with_folded(gguf, config, file) if name == _POSITIONS else read_tensor(gguf, name, file)
                g.backend_tensor_set(weights[name], data.ctypes.data, 0, data.nbytes)
    except OSError as error:
        raise ModelFileError(f"{gguf.path}: cannot be read: {error.strerror or error}") from error
    return weights


def _map(gguf: GGUFFile, weights: dict[str, int], device: int, file: BinaryIO, stack: ExitStack) -> set[str]:
    """Give the tensors that are used as they are their place in the mapped file. Returns their names."""
    g = ggml.functions()
    content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    stack.callback(content.close)
    if hasattr(content, "madvise"):
        content.madvise(mmap.MADV_WILLNEED)
    address = np.frombuffer(content, np.uint8).ctypes.data
    buffer = g.backend_dev_buffer_from_host_ptr(device, address, len(content), len(content))
    if not buffer:
        return set()
    stack.callback(g.backend_buffer_free, buffer)
    g.backend_buffer_set_usage(buffer, ggml.WEIGHTS)
    mapped = set()
    for name, tensor in weights.items():
        info = gguf.tensors[name]
        if info.offset + info.nbytes > len(content):
            raise _shrank(gguf, name)
        if name != _POSITIONS and info.type == _device_type(info) and info.offset % _ALIGNMENT == 0:
            if g.backend_tensor_alloc(buffer, tensor, address + info.offset) != ggml.SUCCESS:
                raise EngineError(f"ggml cannot use tensor {name} of {gguf.path}")
            mapped.add(name)
    return mapped


def _with_folded(gguf: GGUFFile, config: TowerConfig, file: BinaryIO) -> NDArray[Any]:
    """Positions. Row 0 of CLIP's input is zero, so the class token enters with its position; SigLIP's bias is added to
    every position anyhow."""
    positions = read_tensor(gguf, _POSITIONS, file)
    with np.errstate(all="ignore"):  # numpy would print a warning of a damaged file's numbers
        if config.class_token:
            positions[0] += read_tensor(gguf, "v.class_embd", file)
        else:
            positions += read_tensor(gguf, "v.patch_embd.bias", file)
    return positions


def read_newline(gguf: GGUFFile) -> NDArray[np.float32] | None:
    """Of LLaVA-NeXT, the embedding that ends each row of a picture made of tiles: float32 [n_out]."""
    if NEWLINE not in gguf.tensors:
        return None
    with gguf.path.open("rb") as file:
        newline: NDArray[np.float32] = read_tensor(gguf, NEWLINE, file)
    return newline


def _device_type(info: TensorInfo) -> int:
    linear = len(info.shape) == 2 and info.name != _POSITIONS
    return info.type if linear else ggml.F32


def read_tensor(gguf: GGUFFile, name: str, file: BinaryIO) -> NDArray[Any]:
    """A tensor's bytes as they are, or as F32 in its shape where the device holds F32.

    Raises:
        ModelFileError: The file shrank since it was checked.
    """
    info = gguf.tensors[name]
    file.seek(info.offset)
    data = np.fromfile(file, np.uint8, info.nbytes)
    if data.size != info.nbytes:
        raise _shrank(gguf, name)
    return ggml_rows.dequantize(info.type, data).reshape(info.shape) if _device_type(info) == ggml.F32 else data


def _shrank(gguf: GGUFFile, name: str) -> ModelFileError:
    return ModelFileError(f"{gguf.path}: ends inside tensor {name}: it shrank while it was read")
