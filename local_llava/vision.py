"""A CLIP or SigLIP tower and LLaVA's projector as a ggml graph: pixels -> image embeddings, as in transformers.

Knows the arithmetic and the device. Knows nothing of picture files (`images`), of which files fit (`mmproj`), or of
the language model.

Why not libmtmd, and which of ggml's operations round to float16 and are avoided here: design.md, "Decisions". The
class token is row 0 of the sequence, as in CLIP (https://arxiv.org/abs/2103.00020) and transformers' `modeling_clip`;
SigLIP (https://arxiv.org/abs/2303.15343) has none.
"""

from __future__ import annotations

import ctypes
import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from local_llava import ggml, ggml_rows
from local_llava.corrections import open_model
from local_llava.errors import EngineError, ModelFileError
from local_llava.gguf_file import GGUFFile, TensorInfo
from local_llava.mmproj import NEWLINE, TowerConfig, check_mmproj, ffn_names
from local_llava.types import Preprocessing

__all__ = ["TowerConfig", "VisionTower", "check_mmproj"]

logger = logging.getLogger("local_llava")

MAX_ACTIVATIONS = 256 << 20
"""Bytes of intermediate results that one graph may take, estimated; it decides how many pictures go into one."""

_QUICK_GELU = 1.702
_TANH_GELU = 2 * (2 / math.pi) ** 0.5
_TANH_GELU_CUBE = 0.044715

_FOLDED = {NEWLINE, "v.class_embd", "v.patch_embd.bias"}
"""Tensors that the graph does not see."""


class VisionTower:
    """A tower with its projector, on one device. One thread at a time may use it.

    Attributes:
        config: Hyperparameters, as checked.
        preprocessing: How a picture becomes `encode`'s pixels.
        n_tokens: Embeddings per picture; see `TowerConfig.n_tokens` for where they are not one a patch.
        n_embd: Width of an embedding: that of the language model.
        newline: Of LLaVA-NeXT, the embedding that ends each row of a picture made of tiles: float32 [n_embd].
        device: Name of the device that computes.
        images_per_graph: Pictures that are computed at once; more are computed in several steps.
    """

    def __init__(
        self,
        config: TowerConfig,
        backends: list[_Backend],
        weights: dict[str, int],
        newline: NDArray[np.float32] | None,
        flash_attention: bool,
        stack: ExitStack,
    ) -> None:
        """Use `load`. `stack` frees what was made, in the right order."""
        self.newline = newline
        self.config = config
        self.preprocessing: Preprocessing = config.preprocessing
        self.n_tokens = config.n_tokens
        self.n_embd = config.n_out
        self.device = backends[0].name
        self.images_per_graph = max(1, min(64, MAX_ACTIVATIONS // config.activation_bytes))
        self._weights = weights
        # GPUs have kernels for float16 keys and values; the CPU's for float16 also sum in it, and lose by it.
        self._kv_type = (ggml.F16 if len(backends) > 1 else ggml.F32) if flash_attention else None
        self._max_nodes = 256 + 64 * config.n_blocks
        g = ggml.functions()
        handles = (ctypes.c_void_p * len(backends))(*(backend.handle for backend in backends))
        self._scheduler = g.backend_sched_new(handles, None, len(backends), self._max_nodes, False, False)
        stack.callback(g.backend_sched_free, self._scheduler)
        self._stack = stack

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        n_threads: int | None = None,
        use_gpu: bool = True,
        flash_attention: bool = False,
    ) -> VisionTower:
        """Load an mmproj, tensor by tensor.

        Args:
            path: An mmproj that `check_mmproj` accepts.
            n_threads: CPU threads; None for as many as the process may run on.
            use_gpu: Take the first GPU that ggml knows, if there is one.
            flash_attention: Keep no matrix of attention weights, for less memory, and less time on a GPU, where keys
                and values are rounded to float16 for it. On a CPU it rounds nothing and is no faster.

        Raises:
            ModelFileError: The file cannot be read or used; the message names the field or tensor.
            EngineError: The device has no memory for it, or ggml failed.
        """
        gguf = open_model(path)
        config = check_mmproj(gguf)
        with ExitStack() as stack:
            backends = _open_backends(use_gpu, n_threads, stack)
            weights = _load_weights(gguf, config, backends[0], stack)
            tower = cls(config, backends, weights, _read_newline(gguf), flash_attention, stack.pop_all())
        logger.debug("vision tower on %s, %d pictures in a graph", tower.device, tower.images_per_graph)
        return tower

    def encode(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Compute the embeddings of pictures.

        Args:
            pixels: float32 [n_images, 3, image_size, image_size], preprocessed.

        Returns:
            float32 [n_images, n_tokens, n_embd].

        Raises:
            ValueError: Another shape or dtype, or the tower is closed.
            EngineError: ggml failed, or memory ran out.
        """
        size = self.preprocessing.image_size
        if pixels.dtype != np.float32 or pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
            raise ValueError(f"pixels must be float32 [n, 3, {size}, {size}], not {pixels.dtype} {pixels.shape}")
        if not self._scheduler:
            raise ValueError("the vision tower is closed")
        out = np.empty((len(pixels), self.n_tokens, self.n_embd), np.float32)
        for start in range(0, len(pixels), self.images_per_graph):
            part = slice(start, start + self.images_per_graph)
            self._compute(_patches(pixels[part], self.config), out[part])
        return out

    def close(self) -> None:
        """Free the memory; the tower cannot be used after."""
        self._scheduler = None
        self._stack.close()

    def __enter__(self) -> VisionTower:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _compute(self, patches: NDArray[np.float32], out: NDArray[np.float32]) -> None:
        """One graph: patches [n, n_rows, values] -> out [n, n_tokens, n_embd]."""
        g = ggml.functions()
        size = self._max_nodes * g.tensor_overhead() + g.graph_overhead_custom(self._max_nodes, False)
        with _context(size) as context:
            graph = _Graph(context, self.config, self._weights, len(patches), self._kv_type)
            plan = g.new_graph_custom(context, self._max_nodes, False)
            g.build_forward_expand(plan, graph.output)
            g.backend_sched_reset(self._scheduler)
            if not g.backend_sched_alloc_graph(self._scheduler, plan):
                raise EngineError(f"no memory on {self.device} to encode {len(patches)} pictures")
            g.backend_tensor_set(graph.input, patches.ctypes.data, 0, patches.nbytes)
            status = g.backend_sched_graph_compute(self._scheduler, plan)
            if status != ggml.SUCCESS:
                raise EngineError(f"ggml failed to encode pictures on {self.device} (status {status})")
            g.backend_tensor_get(graph.output, out.ctypes.data, 0, out.nbytes)


class _Backend:
    """An initialised device."""

    def __init__(self, device: int, stack: ExitStack) -> None:
        g = ggml.functions()
        self.device = device
        self.name: str = g.backend_dev_description(device).decode("utf-8", "replace")
        self.handle: int | None = g.backend_dev_init(device, None)
        if not self.handle:
            raise EngineError(f"ggml cannot start the device {self.name}")
        stack.callback(g.backend_free, self.handle)


def _open_backends(use_gpu: bool, n_threads: int | None, stack: ExitStack) -> list[_Backend]:
    """The GPU, if wanted and there, then the CPU, which computes what the GPU's backend lacks."""
    g = ggml.functions()
    kinds = (ggml.GPU, ggml.IGPU) if use_gpu else ()
    gpu = next((device for kind in kinds if (device := g.backend_dev_by_type(kind))), None)
    backends = [_Backend(gpu, stack)] if gpu else []
    cpu = _Backend(g.backend_dev_by_type(ggml.CPU), stack)
    # 512 is GGML_MAX_N_THREADS.
    ggml.set_n_threads(cpu.device, cpu.handle or 0, min(512, max(1, n_threads or ggml.available_cpus())))
    return [*backends, cpu]


@contextmanager
def _context(size: int) -> Iterator[int]:
    """A ggml context for the descriptions of tensors; their data lies in backend buffers."""
    g = ggml.functions()
    context = g.init(ggml.InitParams(size, None, True))
    if not context:
        raise EngineError("ggml has no memory for a graph")
    try:
        yield context
    finally:
        g.free(context)


def _new_tensor(context: int, type: int, shape: tuple[int, ...]) -> int:
    ne = shape[::-1]  # ggml counts dimensions from the innermost one
    tensor: int = ggml.functions().new_tensor(context, type, len(ne), (ctypes.c_int64 * len(ne))(*ne))
    return tensor


def _load_weights(gguf: GGUFFile, config: TowerConfig, backend: _Backend, stack: ExitStack) -> dict[str, int]:
    """Read the tensors that are used into a buffer of the device. Returns name -> tensor.

    Matrices of the linear layers keep their type; what is only added, and the small patch embedding, becomes F32.
    """
    g = ggml.functions()
    shapes = config.shapes()
    context = stack.enter_context(_context((len(shapes) + 1) * g.tensor_overhead()))
    weights = {}
    for name, shape in shapes.items():
        if name in _FOLDED:
            continue
        if name == "v.patch_embd.weight":
            shape = (shape[0], 3 * config.patch_size**2)
        weights[name] = _new_tensor(context, _device_type(gguf.tensors[name]), shape)
    buffer = g.backend_alloc_ctx_tensors(context, backend.handle)
    if not buffer:
        raise EngineError(f"no memory on {backend.name} for the vision tower of {gguf.path}")
    stack.callback(g.backend_buffer_free, buffer)
    g.backend_buffer_set_usage(buffer, ggml.WEIGHTS)
    try:
        with gguf.path.open("rb") as file:
            for name, tensor in weights.items():
                data = _read_tensor(gguf, name, file)
                if name == "v.position_embd.weight":
                    # Row 0 of CLIP's input is zero, so the class token enters with its position; SigLIP's bias is
                    # added to every position anyhow.
                    with np.errstate(all="ignore"):  # numpy would print a warning of a damaged file's numbers
                        if config.class_token:
                            data[0] += _read_tensor(gguf, "v.class_embd", file)
                        else:
                            data += _read_tensor(gguf, "v.patch_embd.bias", file)
                g.backend_tensor_set(tensor, data.ctypes.data, 0, data.nbytes)
    except OSError as error:
        raise ModelFileError(f"{gguf.path}: cannot be read: {error.strerror or error}") from error
    return weights


def _read_newline(gguf: GGUFFile) -> NDArray[np.float32] | None:
    if NEWLINE not in gguf.tensors:
        return None
    with gguf.path.open("rb") as file:
        newline: NDArray[np.float32] = _read_tensor(gguf, NEWLINE, file)
    return newline


def _device_type(info: TensorInfo) -> int:
    linear = len(info.shape) == 2 and info.name != "v.position_embd.weight"
    return info.type if linear else ggml.F32


def _read_tensor(gguf: GGUFFile, name: str, file: BinaryIO) -> NDArray[Any]:
    """A tensor's bytes as they are, or as F32 in its shape where the device holds F32."""
    info = gguf.tensors[name]
    file.seek(info.offset)
    data = np.fromfile(file, np.uint8, info.nbytes)
    if data.size != info.nbytes:
        raise ModelFileError(f"{gguf.path}: ends inside tensor {name}: it shrank while it was read")
    return ggml_rows.dequantize(info.type, data).reshape(info.shape) if _device_type(info) == ggml.F32 else data


def _patches(pixels: NDArray[np.float32], config: TowerConfig) -> NDArray[np.float32]:
    """[n, 3, size, size] -> [n, n_rows, 3 * patch_size**2], where row 0 is zero for a class token.

    A convolution whose stride is its width is a matrix product of the patches, and this order of values is the
    kernel's. `ggml_im2col` gives the same on fewer backends; `ggml_conv_2d` would round to float16.
    """
    n, channels, size, _ = pixels.shape
    width = config.patch_size
    grid = size // width
    used = pixels[:, :, : grid * width, : grid * width]
    parts = used.reshape(n, channels, grid, width, grid, width).transpose(0, 2, 4, 1, 3, 5)
    out = np.zeros((n, config.n_rows, channels * width**2), np.float32)
    out[:, config.n_rows - grid * grid :] = parts.reshape(n, grid * grid, -1)
    return out


class _Graph:
    """The computation for a number of pictures. Shapes in comments are numpy's; ggml's are reversed."""

    def __init__(self, context: int, config: TowerConfig, weights: dict[str, int], n: int, kv_type: int | None) -> None:
        self.g = ggml.functions()
        self.context, self.config, self.weights, self.n, self.kv_type = context, config, weights, n, kv_type
        self.n_rows = config.n_rows
        self.input = _new_tensor(context, ggml.F32, (n, self.n_rows, 3 * config.patch_size**2))
        self.g.set_input(self.input)
        self.output = self.projector(self.tower(self.input))
        self.g.set_output(self.output)

    def matmul(self, a: int, b: int) -> int:
        """b @ a.T, summed in float32 also where a backend would sum float16 weights in float16."""
        out: int = self.g.mul_mat(self.context, a, b)
        self.g.prec_set_acc(out, ggml.PREC_F32)
        return out

    def linear(self, name: str, x: int) -> int:
        y = self.matmul(self.weights[f"{name}.weight"], x)
        return int(self.g.add(self.context, y, self.weights[f"{name}.bias"]))

    def layer_norm(self, name: str, x: int, eps: float) -> int:
        y = self.g.norm(self.context, x, eps)
        y = self.g.mul(self.context, y, self.weights[f"{name}.weight"])
        return int(self.g.add(self.context, y, self.weights[f"{name}.bias"]))

    def activation(self, x: int) -> int:
        """Without ggml's own `gelu` and `gelu_quick`, which are looked up in float16."""
        if self.config.activation == "gelu":
            return int(self.g.gelu_erf(self.context, x))
        if self.config.activation == "gelu_tanh":
            # x / 2 * (1 + tanh(y / 2)) = x * sigmoid(y), and y = x * (a + a * 0.044715 * x * x).
            y = self.g.mul(self.context, x, x)
            y = self.g.scale_bias(self.context, y, _TANH_GELU * _TANH_GELU_CUBE, _TANH_GELU)
            y = self.g.sigmoid(self.context, self.g.mul(self.context, y, x))
            return int(self.g.mul(self.context, y, x))
        # x * sigmoid(1.702 x), by way of silu(y) = y * sigmoid(y).
        y = self.g.silu(self.context, self.g.scale(self.context, x, _QUICK_GELU))
        return int(self.g.scale(self.context, y, 1 / _QUICK_GELU))

    def tower(self, patches: int) -> int:
        """[n, rows, values] -> hidden states of the feature layers, [n, rows, n_embd * n_layers]."""
        x = self.matmul(self.weights["v.patch_embd.weight"], patches)
        x = self.g.add(self.context, x, self.weights["v.position_embd.weight"])
        if self.config.class_token:
            x = self.layer_norm("v.pre_ln", x, self.config.eps)
        hidden = [x]
        for i in range(self.config.n_blocks):
            hidden.append(self.block(f"v.blk.{i}", hidden[-1]))
        features = [hidden[layer] for layer in self.config.feature_layers]
        out = features[0]
        for feature in features[1:]:
            out = self.g.concat(self.context, out, feature, 0)
        return out

    def block(self, name: str, x: int) -> int:
        """A pre-norm transformer block, [n, rows, n_embd] -> the same."""
        h = self.layer_norm(f"{name}.ln1", x, self.config.eps)
        h = self.attention(*(self.linear(f"{name}.attn_{part}", h) for part in "qkv"))
        x = self.g.add(self.context, x, self.linear(f"{name}.attn_out", h))
        fc1, fc2 = ffn_names(self.config.ffn_swapped)
        h = self.linear(f"{name}.{fc1}", self.layer_norm(f"{name}.ln2", x, self.config.eps))
        h = self.linear(f"{name}.{fc2}", self.activation(h))
        return int(self.g.add(self.context, x, h))

    def heads(self, x: int) -> int:
        """[n, rows, n_embd] -> a view [n, n_head, rows, d_head]."""
        d_head = self.config.n_embd // self.config.n_head
        x = self.g.reshape_4d(self.context, x, d_head, self.config.n_head, self.n_rows, self.n)
        return int(self.g.permute(self.context, x, 0, 2, 1, 3))

    def attention(self, q: int, k: int, v: int) -> int:
        """[n, rows, n_embd] each -> [n, rows, n_embd]."""
        scale = float((self.config.n_embd // self.config.n_head) ** -0.5)
        q, k, v = (self.heads(part) for part in (q, k, v))
        if self.kv_type is None:
            weights = self.g.soft_max_ext(self.context, self.matmul(k, q), None, scale, 0.0)
            v = self.g.cont(self.context, self.g.permute(self.context, v, 1, 0, 2, 3))
            x = self.g.cont(self.context, self.g.permute(self.context, self.matmul(v, weights), 0, 2, 1, 3))
        else:
            k, v = (self.g.cast(self.context, part, self.kv_type) for part in (k, v))
            x = self.g.flash_attn_ext(self.context, q, k, v, None, scale, 0.0, 0.0)
            self.g.prec_set_acc(x, ggml.PREC_F32)
        return int(self.g.reshape_3d(self.context, x, self.config.n_embd, self.n_rows, self.n))

    def projector(self, x: int) -> int:
        """[n, rows, features] -> [n, n_tokens, n_out]. Strategy "default" drops row 0: the class token."""
        if dropped := self.n_rows - self.config.n_tokens:
            width = self.config.n_embd * len(self.config.feature_layers)
            row = 4 * width
            x = self.g.view_3d(
                self.context, x, width, self.config.n_tokens, self.n, row, row * self.n_rows, row * dropped
            )
            x = self.g.cont(self.context, x)
        if self.config.norm_eps is not None:
            x = self.layer_norm("mm.input_norm", x, self.config.norm_eps)
        h = self.linear("mm.0", x)
        return self.linear("mm.2", self.g.gelu_erf(self.context, h))
