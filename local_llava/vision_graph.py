"""The arithmetic of a CLIP or SigLIP tower and LLaVA's projector as ggml graphs, whole or in pieces.

Knows what is computed, as in transformers, and from where to where. Knows nothing of devices, buffers and files, or of
when which piece is computed (`vision`).

Why not libmtmd, and which of ggml's operations round to float16 and are avoided here: design.md, "Decisions". The
class token is row 0 of the sequence, as in CLIP (https://arxiv.org/abs/2103.00020) and transformers' `modeling_clip`;
SigLIP (https://arxiv.org/abs/2303.15343) has none.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from local_llava import ggml
from local_llava.errors import EngineError
from local_llava.mmproj import TowerConfig, ffn_names

PATCHES = -1
"""The place where a computation begins. Place k >= 0 is the hidden state that k blocks give; `Places.end`, behind the
last of those that are needed, has the embeddings."""

_QUICK_GELU = 1.702
_TANH_GELU = 2 * (2 / math.pi) ** 0.5
_TANH_GELU_CUBE = 0.044715


class Places:
    """What lies between the pixels and the embeddings of a tower, and what the way there costs."""

    def __init__(self, config: TowerConfig) -> None:
        self.config = config
        self.end = config.n_blocks + 1

    def shape(self, place: int, n: int) -> tuple[int, int, int]:
        """Of what is there for n pictures, float32."""
        config = self.config
        if place == self.end:
            return n, config.n_tokens, config.n_out
        return n, config.n_rows, 3 * config.patch_size**2 if place == PATCHES else config.n_embd

    def cost(self, start: int, stop: int) -> float:
        """Multiplications from one place to another, for a picture. Almost all of the time goes there."""
        config = self.config
        rows, n_embd = config.n_rows, config.n_embd
        n_blocks = min(stop, config.n_blocks) - max(start, 0)
        total = n_blocks * rows * (4 * n_embd + 2 * config.n_ff + 2 * rows) * n_embd
        if start == PATCHES:
            total += rows * 3 * config.patch_size**2 * n_embd
        if stop == self.end:
            width = n_embd * len(config.feature_layers)
            total += config.n_tokens * (width + config.n_out) * config.n_hidden
        return float(total)

    def inputs(self, start: int, stop: int) -> set[int]:
        """Places whose values a piece reads."""
        early = {layer for layer in self.config.feature_layers if layer <= start} if stop == self.end else set()
        return early | {start}

    def outputs(self, start: int, stop: int) -> set[int]:
        """Places whose values a piece gives: where it ends, and what only the projector will read."""
        if stop == self.end:
            return {stop}
        return {layer for layer in self.config.feature_layers if start < layer < stop} | {stop}


@contextmanager
def new_context(size: int) -> Iterator[int]:
    """A ggml context for the descriptions of tensors; their data lies in backend buffers.

    Raises:
        EngineError: There is no memory for it.
    """
    g = ggml.functions()
    context = g.init(ggml.InitParams(size, None, True))
    if not context:
        raise EngineError("ggml has no memory for a graph")
    try:
        yield context
    finally:
        g.free(context)


def new_tensor(context: int, type: int, shape: tuple[int, ...]) -> int:
    """A tensor without data, of a shape in numpy's order."""
    ne = shape[::-1]  # ggml counts dimensions from the innermost one
    tensor: int = ggml.functions().new_tensor(context, type, len(ne), (ctypes.c_int64 * len(ne))(*ne))
    return tensor


def patches(pixels: NDArray[np.float32], config: TowerConfig) -> NDArray[np.float32]:
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


class Graph:
    """The computation for a number of pictures. Shapes in comments are numpy's; ggml's are reversed.

    Attributes:
        inputs: Tensors to fill, by place.
        outputs: Tensors that are computed, by place.
    """

    def __init__(
        self,
        context: int,
        places: Places,
        weights: dict[str, int],
        n: int,
        kv_type: int | None,
        start: int,
        stop: int,
    ) -> None:
        """Describe what leads n pictures from one place to a later one.

        Args:
            context: Where the tensors are described.
            weights: By the names of `TowerConfig.shapes`.
            kv_type: Type of keys and values in flash attention; None for attention without it.
        """
        self.g = ggml.functions()
        self.context, self.config, self.weights, self.n, self.kv_type = context, places.config, weights, n, kv_type
        self.n_rows = self.config.n_rows
        self.inputs = {
            place: new_tensor(context, ggml.F32, places.shape(place, n)) for place in places.inputs(start, stop)
        }
        for tensor in self.inputs.values():
            self.g.set_input(tensor)
        known = dict(self.inputs)
        if start == PATCHES:
            known[0] = self.embedding(known[PATCHES])
        for layer in range(max(start, 0), min(stop, self.config.n_blocks)):
            known[layer + 1] = self.block(f"v.blk.{layer}", known[layer])
        if stop == places.end:
            known[stop] = self.projector([known[layer] for layer in self.config.feature_layers])
        self.outputs = {place: known[place] for place in places.outputs(start, stop)}
        for tensor in self.outputs.values():
            self.g.set_output(tensor)

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

    def embedding(self, patches: int) -> int:
        """[n, rows, values] -> [n, rows, n_embd]."""
        x = self.matmul(self.weights["v.patch_embd.weight"], patches)
        x = self.g.add(self.context, x, self.weights["v.position_embd.weight"])
        return self.layer_norm("v.pre_ln", x, self.config.eps) if self.config.class_token else int(x)

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

    def projector(self, features: list[int]) -> int:
        """[n, rows, n_embd] of each feature layer -> [n, n_tokens, n_out]. Strategy "default" drops row 0: the class
        token."""
        x = features[0]
        for feature in features[1:]:
            x = self.g.concat(self.context, x, feature, 0)
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
