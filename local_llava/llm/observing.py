"""What goes into a model's matrices while it computes: llama.cpp's eval callback, for whoever wants to look.

Knows which nodes of a graph multiply a weight with activations. Knows nothing of what is done with those.
"""

from __future__ import annotations

import ctypes
from typing import Protocol

import llama_cpp.llama_cpp as c
import numpy as np
from numpy.typing import NDArray

from local_llava import ggml


class Observer(Protocol):
    """Who looks. What it raises ends the batch, and is raised where that was asked for."""

    def wants(self, name: str) -> bool:
        """Whether the inputs of a tensor are of interest."""
        ...

    def take(self, name: str, inputs: NDArray[np.float32]) -> None:
        """What a matrix is multiplied with in a batch: float32 [n_rows, n_columns], valid during the call."""
        ...


class Observation:
    """The callback of a context, which must live as long as that."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._error: BaseException | None = None
        # ggml's scheduler calls it in the thread that evaluates, before and after each node.
        self.callback = c.ggml_backend_sched_eval_callback(self._on_node)

    def check(self) -> None:
        """Raise what the observer raised in the last batch, which then ended early; llama.cpp says nothing of that."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _on_node(self, address: int, ask: bool, _: object) -> bool:
        """Asked first, whether the node is of interest; then told that it is computed, and asked whether to go on."""
        try:
            if self._error is not None:
                return ask  # so that what is left ends at its first node
            node = ggml.Tensor.from_address(address)
            if node.op != ggml.MUL_MAT:
                return False
            weight, inputs = (ggml.Tensor.from_address(source) for source in node.src[:2])
            name = _weight_name(weight)
            # Experts are in three dimensions, and multiplied by another operation; check_llm refuses their models.
            if weight.ne[2] * weight.ne[3] != 1 or inputs.type != ggml.F32 or not self._observer.wants(name):
                return False
            if not ask:
                self._observer.take(name, _rows(node.src[1], inputs))
            return True
        except BaseException as e:  # ctypes would print it, and go on
            self._error = e
            return False


def _weight_name(tensor: ggml.Tensor) -> str:
    """The name in the file: ggml's scheduler calls its copies CUDA0#blk.0.attn_k.weight#0."""
    name: str = tensor.name.decode("utf-8", "replace")
    return name.split("#")[1] if "#" in name else name


def _rows(address: int, tensor: ggml.Tensor) -> NDArray[np.float32]:
    """The values, wherever they lie: float32 [n_rows, n_columns]."""
    shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
    nbytes = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + ctypes.sizeof(ctypes.c_float)
    data = np.empty(nbytes, np.uint8)
    ggml.functions().backend_tensor_get(address, data.ctypes.data, 0, nbytes)
    values: NDArray[np.float32] = np.ndarray(shape, np.float32, data, 0, strides)
    return values.reshape(-1, shape[-1])
