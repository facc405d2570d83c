"""What an mmproj must hold: the hyperparameters and tensors of a CLIP tower with LLaVA's two-layer projector.

Knows the keys and names that llama.cpp reads (tools/mtmd/clip.cpp and clip-impl.h of the pinned version) and how files
of the legacy converter differ. Computes nothing and reads no tensor data: what passes `check_mmproj` can be handed to
ggml, which would abort the process on a shape that does not fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from local_llava.errors import ModelFileError
from local_llava.ggml_rows import QUANTIZABLE
from local_llava.gguf_file import TYPES, GGUFFile
from local_llava.types import Preprocessing

MAX_PATCHES = 4096
"""Patches of a picture; LLaVA's largest tower has 576."""
MAX_ACTIVATION_BYTES = 4 << 30
"""Intermediate results of a picture. A file of a few kilobytes may name sizes that no memory holds."""

NEWLINE = "model.image_newline"
"""Of LLaVA-NeXT: the embedding that ends each row of a picture made of tiles."""

_MATRIX_TYPES = tuple(QUANTIZABLE)
_LINEAR_TENSORS = ("attn_q", "attn_k", "attn_v", "attn_out", "ln1", "ln2", "ffn_up", "ffn_down")


@dataclass(frozen=True)
class TowerConfig:
    """Hyperparameters of tower and projector, checked against the tensors."""

    preprocessing: Preprocessing
    patch_size: int
    """Width and height of a patch, pixels. What is left over at the right and lower edge is not seen."""
    n_embd: int
    """Width of the tower."""
    n_ff: int
    """Width of its feed-forward layers."""
    n_head: int
    eps: float
    """Of the LayerNorms."""
    activation: Literal["gelu", "quick_gelu"]
    """Of the tower. The projector's is always the exact GELU."""
    feature_layers: tuple[int, ...]
    """Hidden states that go to the projector, side by side. k is the output of k blocks, as in transformers."""
    ffn_swapped: bool
    """The first layer of the feed-forward network is called `ffn_down`."""
    n_hidden: int
    """Width between the two layers of the projector."""
    n_out: int
    """Width of the image embeddings: that of the language model."""

    @property
    def n_patches(self) -> int:
        """Patches of a picture, and tokens that it takes in the prompt."""
        return (self.preprocessing.image_size // self.patch_size) ** 2

    @property
    def n_blocks(self) -> int:
        """Blocks that must run."""
        return max(self.feature_layers)

    @property
    def activation_bytes(self) -> int:
        """About what a picture's intermediate results take: the residual, and attention or feed-forward."""
        rows = self.n_patches + 1
        attention = 2 * self.n_head * rows * rows + 4 * rows * self.n_embd
        feed_forward = 2 * rows * max(self.n_ff, self.n_hidden)
        kept = (2 + len(self.feature_layers)) * rows * self.n_embd
        return 4 * (kept + max(attention, feed_forward))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor that is used, in numpy's order."""
        n, ff = self.n_embd, self.n_ff
        shapes: dict[str, tuple[int, ...]] = {
            "v.class_embd": (n,),
            "v.patch_embd.weight": (n, 3, self.patch_size, self.patch_size),
            "v.position_embd.weight": (self.n_patches + 1, n),
            "v.pre_ln.weight": (n,),
            "v.pre_ln.bias": (n,),
            "mm.0.weight": (self.n_hidden, n * len(self.feature_layers)),
            "mm.0.bias": (self.n_hidden,),
            "mm.2.weight": (self.n_out, self.n_hidden),
            "mm.2.bias": (self.n_out,),
        }
        if self.preprocessing.grid:
            shapes[NEWLINE] = (self.n_out,)
        fc1, fc2 = ("ffn_down", "ffn_up") if self.ffn_swapped else ("ffn_up", "ffn_down")
        for i in range(self.n_blocks):
            for name in _LINEAR_TENSORS:
                rows, columns = {fc1: (ff, n), fc2: (n, ff)}.get(name, (n, n))
                shapes[f"v.blk.{i}.{name}.weight"] = (n,) if name in ("ln1", "ln2") else (rows, columns)
                shapes[f"v.blk.{i}.{name}.bias"] = (rows,)
        return shapes


def check_mmproj(gguf: GGUFFile) -> TowerConfig:
    """Check that a GGUF is an mmproj that can be computed exactly, and read its hyperparameters.

    Two things are not written in files of llama.cpp's legacy converter (`convert_image_encoder_to_gguf.py`):

    - Which hidden state the projector takes, where `clip.vision.feature_layer` is missing. LLaVA takes that before the
      last block (-2). The legacy converter drops the last block from the file and from `block_count`; a tower written
      by other means has them all. Every published CLIP tower has an even number of blocks (12, 24, 32, 48), so an odd
      `block_count` (23) tells that the last one is gone and all run, and of an even one (24) the last does not run.
      See ggml-org/llama.cpp #25817.
    - That it calls the first feed-forward layer `ffn_down` and the second `ffn_up`. The shapes tell; where both widths
      are the same they do not, and the names are taken as llama.cpp takes them then: the first layer is `ffn_down`.

    Raises:
        ModelFileError: The file is something else, or a field or tensor is missing, out of bounds or unsupported.
    """
    fields = _Fields(gguf)
    fields.check_kind()
    preprocessing = Preprocessing.from_metadata(gguf.metadata, str(gguf.path))
    patch_size = fields.number("clip.vision.patch_size", 1, preprocessing.image_size)
    if (preprocessing.image_size // patch_size) ** 2 > MAX_PATCHES:
        raise fields.error(f"clip.vision.patch_size is {patch_size}: more than {MAX_PATCHES} patches are not supported")
    n_embd = fields.number("clip.vision.embedding_length", 1, 1 << 14)
    n_head = fields.number("clip.vision.attention.head_count", 1, n_embd)
    if n_embd % n_head:
        raise fields.error(f"clip.vision.attention.head_count is {n_head}, which does not divide {n_embd}")
    n_ff = fields.number("clip.vision.feed_forward_length", 1, 1 << 16)
    first = gguf.tensors.get("v.blk.0.ffn_down.weight")
    config = TowerConfig(
        preprocessing=preprocessing,
        patch_size=patch_size,
        n_embd=n_embd,
        n_ff=n_ff,
        n_head=n_head,
        eps=fields.epsilon("clip.vision.attention.layer_norm_epsilon"),
        activation=fields.activation(),
        feature_layers=fields.feature_layers(),
        ffn_swapped=first is not None and first.shape == (n_ff, n_embd),
        n_hidden=fields.rows("mm.0.weight"),
        n_out=fields.rows("mm.2.weight"),
    )
    fields.check_tensors(config)
    if config.activation_bytes > MAX_ACTIVATION_BYTES:
        raise fields.error(
            f"clip.vision.attention.head_count {n_head} with {config.n_patches} patches takes "
            f"{config.activation_bytes >> 30} GiB a picture; at most {MAX_ACTIVATION_BYTES >> 30} are supported"
        )
    return config


class _Fields:
    """Reads the fields of one file, with bounds, and names both in errors."""

    def __init__(self, gguf: GGUFFile) -> None:
        self.gguf = gguf

    def error(self, problem: str) -> ModelFileError:
        return ModelFileError(f"{self.gguf.path}: {problem}")

    def get(self, key: str) -> Any:
        if key not in self.gguf.metadata:
            raise self.error(f"{key} is missing")
        return self.gguf.metadata[key]

    def number(self, key: str, low: int, high: int) -> int:
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.error(f"{key} must be {low} to {high}, not {value!a:.80}")
        return value

    def flag(self, key: str) -> bool:
        value = self.gguf.metadata.get(key, False)
        if not isinstance(value, bool):
            raise self.error(f"{key} must be true or false, not {value!a:.80}")
        return value

    def epsilon(self, key: str) -> float:
        value = self.get(key)
        if not isinstance(value, float) or not 0 < value < 1:
            raise self.error(f"{key} must be between 0 and 1, not {value!a:.80}")
        return value

    def check_kind(self) -> None:
        architecture = self.gguf.metadata.get("general.architecture")
        if architecture != "clip":
            what = f"a model of architecture {architecture!a:.80}" if architecture else "not a model that names itself"
            raise self.error(f"general.architecture: this is {what}; give the mmproj, whose architecture is 'clip'")
        if not self.flag("clip.has_vision_encoder"):
            raise self.error("clip.has_vision_encoder is not true: the file has no vision tower; give LLaVA's mmproj")
        # The first files of 2023 have no projector_type; there was one kind.
        kind = self.gguf.metadata.get("clip.projector_type", self.gguf.metadata.get("clip.vision.projector_type"))
        if kind != "mlp" and not (kind is None and self.flag("clip.has_llava_projector")):
            raise self.error(f"clip.projector_type is {kind!a:.80}; only LLaVA's 'mlp' is supported")

    def activation(self) -> Literal["gelu", "quick_gelu"]:
        if self.flag("clip.use_silu"):
            raise self.error("clip.use_silu is true; towers with GELU or quick GELU are supported")
        return "gelu" if self.flag("clip.use_gelu") else "quick_gelu"

    def feature_layers(self) -> tuple[int, ...]:
        """See `check_mmproj` for files that do not say."""
        n_blocks = self.number("clip.vision.block_count", 1, 1024)
        key = "clip.vision.feature_layer"
        if key not in self.gguf.metadata:
            return (n_blocks if n_blocks % 2 else n_blocks - 1,)
        layers = self.get(key)
        fine = isinstance(layers, list) and 1 <= len(layers) <= 16
        if not fine or not all(type(layer) is int and 0 <= layer <= n_blocks for layer in layers):
            raise self.error(
                f"{key} must be a list of 1 to 16 numbers from 0 to block_count {n_blocks}, not {layers!a:.80}"
            )
        return tuple(layers)

    def rows(self, name: str) -> int:
        """Rows of a matrix whose width no field gives."""
        tensor = self.gguf.tensors.get(name)
        if tensor is None:
            raise self.error(f"tensor {name} is missing; a projector of two linear layers, mm.0 and mm.2, is supported")
        if len(tensor.shape) != 2 or tensor.shape[0] > 1 << 16:
            raise self.error(f"tensor {name} must be a matrix of at most {1 << 16} rows, not {list(tensor.shape)}")
        return tensor.shape[0]

    def check_tensors(self, config: TowerConfig) -> None:
        shapes = config.shapes()
        for name, shape in shapes.items():
            tensor = self.gguf.tensors.get(name)
            if tensor is None:
                raise self.error(
                    f"tensor {name} is missing; LLaVA 1.5's architecture, a CLIP tower with a class token, is supported"
                )
            if tensor.shape != shape:
                raise self.error(f"tensor {name} has shape {list(tensor.shape)}; the metadata asks for {list(shape)}")
            if tensor.type not in _MATRIX_TYPES:
                names = ", ".join(TYPES[t].name for t in _MATRIX_TYPES)
                raise self.error(f"tensor {name} is {TYPES[tensor.type].name}; {names} are supported")
        # A tensor that the graph would not use means an architecture that it is not: LLaVA-NeXT, Yi-VL, ...
        n_blocks = self.number("clip.vision.block_count", 1, 1024)
        unused = {
            f"v.blk.{i}.{name}.{kind}"
            for i in range(n_blocks)
            for name in _LINEAR_TENSORS
            for kind in ("weight", "bias")
        }
        unused |= {"v.post_ln.weight", "v.post_ln.bias"}
        for name in self.gguf.tensors:
            if name not in shapes and name not in unused and not name.startswith("t."):
                raise self.error(
                    f"tensor {name!a} belongs to a model of another kind; LLaVA 1.5's architecture is supported"
                )
