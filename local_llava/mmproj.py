"""What an mmproj must hold: the hyperparameters and tensors of a CLIP or SigLIP tower with LLaVA's projector.

Knows the keys and names that llama.cpp reads (tools/mtmd/clip.cpp and clip-impl.h of the pinned version), how files of
the legacy converter differ, and our own keys for what llama.cpp has none for. Computes nothing and reads no tensor
data: what passes `check_mmproj` can be handed to ggml, which would abort the process on a shape that does not fit.

Our own keys, and what a file of another tool means that lacks them:

- `local_llava.vision.activation`: `gelu` (exact, by erf), `gelu_tanh` or `quick_gelu`. llama.cpp's `clip.use_gelu` is
  true for the first two. Without our key, a tower with a class token (CLIP) has `gelu` or `quick_gelu`, as that says;
  one without (SigLIP) has `gelu_tanh` as all published ones do, also where the legacy converter wrote false, since it
  knows no function but `gelu` by name.
- `local_llava.vision.feature_select`: transformers' `vision_feature_select_strategy`. `default` drops the first row of
  the hidden states, `full` none. Without it the class token is dropped, where there is one.
- `local_llava.projector.layer_norm_epsilon`, of the norm `mm.input_norm` before the projector: that of the tower.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

from local_llava.errors import ModelFileError
from local_llava.ggml_rows import QUANTIZABLE
from local_llava.gguf_file import TYPES, GGUFFile
from local_llava.preprocessing import Preprocessing

MAX_PATCHES = 4096
"""Patches of a picture; LLaVA's largest tower has 576."""
MAX_ACTIVATION_BYTES = 4 << 30
"""Intermediate results of a picture. A file of a few kilobytes may name sizes that no memory holds."""

NEWLINE = "model.image_newline"
"""Of LLaVA-NeXT: the embedding that ends each row of a picture made of tiles."""

ACTIVATION_KEY = "local_llava.vision.activation"
STRATEGY_KEY = "local_llava.vision.feature_select"
NORM_EPS_KEY = "local_llava.projector.layer_norm_epsilon"

Activation: TypeAlias = Literal["gelu", "gelu_tanh", "quick_gelu"]
Strategy: TypeAlias = Literal["default", "full"]

_ACTIVATIONS: tuple[Activation, ...] = ("gelu", "gelu_tanh", "quick_gelu")
_STRATEGIES: tuple[Strategy, ...] = ("default", "full")
_MATRIX_TYPES = tuple(QUANTIZABLE)
_ONLY_CLIP = ("v.class_embd", "v.pre_ln.weight", "v.pre_ln.bias")
_INPUT_NORM = ("mm.input_norm.weight", "mm.input_norm.bias")
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
    activation: Activation
    """Of the tower. The projector's is always the exact GELU."""
    feature_layers: tuple[int, ...]
    """Hidden states that go to the projector, side by side. k is the output of k blocks, as in transformers."""
    ffn_swapped: bool
    """The first layer of the feed-forward network is called `ffn_down`."""
    n_hidden: int
    """Width between the two layers of the projector."""
    n_out: int
    """Width of the image embeddings: that of the language model."""
    class_token: bool = True
    """CLIP's tower has one, before the patches, and a LayerNorm before the first block. SigLIP's has neither, but a
    bias of the patch embedding."""
    strategy: Strategy = "default"
    """Whether the first row of the hidden states is dropped before the projector, or none."""
    norm_eps: float | None = None
    """Of the LayerNorm before the projector (VipLlava); None where there is none."""

    @property
    def n_patches(self) -> int:
        """Patches of a picture."""
        return (self.preprocessing.image_size // self.patch_size) ** 2

    @property
    def n_rows(self) -> int:
        """Rows of the hidden states of a picture: the class token, if there is one, and the patches."""
        return self.n_patches + self.class_token

    @property
    def n_tokens(self) -> int:
        """Embeddings of a picture or tile. Where they are not `n_patches`, "full" leads with the class token, or
        "default" lacks the first patch of a tower without one, as in transformers."""
        return self.n_rows - (self.strategy == "default")

    @property
    def n_blocks(self) -> int:
        """Blocks that must run."""
        return max(self.feature_layers)

    @property
    def activation_bytes(self) -> int:
        """About what a picture's intermediate results take: the residual, and attention or feed-forward."""
        rows = self.n_rows
        attention = 2 * self.n_head * rows * rows + 4 * rows * self.n_embd
        feed_forward = 2 * rows * max(self.n_ff, self.n_hidden)
        kept = (2 + len(self.feature_layers)) * rows * self.n_embd
        gathered = 2 * len(self.feature_layers) * rows * self.n_embd
        return 4 * (kept + max(attention, feed_forward, gathered))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor that is used, in numpy's order."""
        n, ff = self.n_embd, self.n_ff
        width = n * len(self.feature_layers)
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
            _ONLY_CLIP if self.class_token else ("v.patch_embd.bias",), (n,)
        )
        shapes |= {
            "v.patch_embd.weight": (n, 3, self.patch_size, self.patch_size),
            "v.position_embd.weight": (self.n_rows, n),
            "mm.0.weight": (self.n_hidden, width),
            "mm.0.bias": (self.n_hidden,),
            "mm.2.weight": (self.n_out, self.n_hidden),
            "mm.2.bias": (self.n_out,),
        }
        if self.norm_eps is not None:
            shapes |= dict.fromkeys(_INPUT_NORM, (width,))
        if self.preprocessing.grid:
            shapes[NEWLINE] = (self.n_out,)
        fc1, fc2 = ffn_names(self.ffn_swapped)
        for i in range(self.n_blocks):
            for name in _LINEAR_TENSORS:
                rows, columns = {fc1: (ff, n), fc2: (n, ff)}.get(name, (n, n))
                shapes[f"v.blk.{i}.{name}.weight"] = (n,) if name in ("ln1", "ln2") else (rows, columns)
                shapes[f"v.blk.{i}.{name}.bias"] = (rows,)
        return shapes


def has_class_token(tensors: Collection[str]) -> bool:
    """Whether a file with these tensors is of a tower with a class token: CLIP's, not SigLIP's.

    Any tensor that only CLIP has tells; a file that lacks another of them is damaged.
    """
    return any(name in tensors for name in _ONLY_CLIP)


def assumed_feature_layer(n_blocks: int, class_token: bool = True) -> int:
    """The hidden state that goes to the projector, where a file does not say.

    LLaVA takes that before the last block (-2). llama.cpp's legacy converter drops the last block from the file and
    from `block_count`; a tower written by other means has them all. Every published CLIP tower has an even number of
    blocks (12, 24, 32, 48), so an odd `block_count` (23) tells that the last one is gone and all run, and of an even
    one (24) the last does not run. So it is with SigLIP's (12, 24), but for that of 400M parameters, which has 27:
    26 is without the last. See ggml-org/llama.cpp #25817.

    Args:
        n_blocks: `clip.vision.block_count`, at least 1.
        class_token: As `has_class_token` tells.
    """
    complete = n_blocks % 2 == 0 if class_token or n_blocks not in (26, 27) else n_blocks == 27
    return n_blocks - 1 if complete else n_blocks


def ffn_names(swapped: bool) -> tuple[str, str]:
    """How the first and the second layer of a feed-forward network are called; swapped as `ffn_is_swapped` tells."""
    return ("ffn_down", "ffn_up") if swapped else ("ffn_up", "ffn_down")


def ffn_is_swapped(gguf: GGUFFile, n_embd: int, n_ff: int) -> bool:
    """Whether the first feed-forward layer is called `ffn_down`, as in files of llama.cpp's legacy converter.

    The shapes tell; where both widths are the same they do not, and the names are taken as llama.cpp takes them then:
    the first layer is `ffn_down`.
    """
    first = gguf.tensors.get("v.blk.0.ffn_down.weight")
    return first is not None and first.shape == (n_ff, n_embd)


def check_mmproj(gguf: GGUFFile) -> TowerConfig:
    """Check that a GGUF is an mmproj that can be computed exactly, and read its hyperparameters.

    What files of llama.cpp's legacy converter (`convert_image_encoder_to_gguf.py`) leave open is settled by
    `assumed_feature_layer` and `ffn_is_swapped`.

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
    class_token = has_class_token(gguf.tensors)
    eps = fields.epsilon("clip.vision.attention.layer_norm_epsilon")
    config = TowerConfig(
        preprocessing=preprocessing,
        patch_size=patch_size,
        n_embd=n_embd,
        n_ff=n_ff,
        n_head=n_head,
        eps=eps,
        activation=fields.activation(class_token),
        feature_layers=fields.feature_layers(class_token),
        ffn_swapped=ffn_is_swapped(gguf, n_embd, n_ff),
        n_hidden=fields.rows("mm.0.weight"),
        n_out=fields.rows("mm.2.weight"),
        class_token=class_token,
        strategy=fields.strategy(class_token),
        norm_eps=fields.norm_epsilon(eps),
    )
    fields.check_tensors(config)
    if config.n_tokens < 1 or (preprocessing.grid and config.n_tokens != config.n_patches):
        raise fields.error(
            f"{STRATEGY_KEY} {config.strategy!r} does not fit this tower: {config.n_tokens} embeddings "
            f"of {config.n_patches} patches"
        )
    if config.activation_bytes > MAX_ACTIVATION_BYTES:
        raise fields.error(
            f"clip.vision.attention.head_count {n_head} with {config.n_patches} patches takes "
            f"{config.activation_bytes >> 30} GiB a picture; at most {MAX_ACTIVATION_BYTES >> 30} are supported"
        )
    return config


_Choice = TypeVar("_Choice", bound=str)


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

    def choice(self, key: str, choices: tuple[_Choice, ...], default: _Choice) -> _Choice:
        """One of our own keys, which files of other tools lack."""
        value = self.gguf.metadata.get(key, default)
        if value not in choices:
            raise self.error(f"{key} must be {' or '.join(choices)}, not {value!a:.80}")
        return choices[choices.index(value)]

    def activation(self, class_token: bool) -> Activation:
        if self.flag("clip.use_silu"):
            raise self.error("clip.use_silu is true; towers with GELU or quick GELU are supported")
        of_clip: Activation = "gelu" if self.flag("clip.use_gelu") else "quick_gelu"
        return self.choice(ACTIVATION_KEY, _ACTIVATIONS, of_clip if class_token else "gelu_tanh")

    def strategy(self, class_token: bool) -> Strategy:
        return self.choice(STRATEGY_KEY, _STRATEGIES, "default" if class_token else "full")

    def norm_epsilon(self, eps: float) -> float | None:
        """Of the norm before the projector, if there is one; by default that of the tower."""
        if not any(name in self.gguf.tensors for name in _INPUT_NORM):
            return None
        return self.epsilon(NORM_EPS_KEY) if NORM_EPS_KEY in self.gguf.metadata else eps

    def feature_layers(self, class_token: bool) -> tuple[int, ...]:
        n_blocks = self.number("clip.vision.block_count", 1, 1024)
        key = "clip.vision.feature_layer"
        if key not in self.gguf.metadata:
            return (assumed_feature_layer(n_blocks, class_token),)
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
                raise self.error(f"tensor {name} is missing; LLaVA with a CLIP or SigLIP tower is supported")
            if tensor.shape != shape:
                raise self.error(f"tensor {name} has shape {list(tensor.shape)}; the metadata asks for {list(shape)}")
            if tensor.type not in _MATRIX_TYPES:
                names = ", ".join(TYPES[t].name for t in _MATRIX_TYPES)
                raise self.error(f"tensor {name} is {TYPES[tensor.type].name}; {names} are supported")
        # A tensor that the graph would not use means an architecture that it is not: Yi-VL, MobileVLM, ...
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
                    f"tensor {name!a} belongs to a model of another kind; LLaVA with CLIP or SigLIP is supported"
                )
