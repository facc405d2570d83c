"""The CLIP tower and the MLP projector: their tensors and metadata in an mmproj.

Names and keys are those that llama.cpp's tools/mtmd reads, so that the file works there too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gguf import GGUFValueType

from local_llava.convert.config import Config
from local_llava.convert.families import Parts, Row, Tower
from local_llava.convert.plan import Field
from local_llava.errors import CheckpointError
from local_llava.types import Preprocessing

MAX_GRID = 64
"""Patches in a row; the runtime takes no more."""


@dataclass(frozen=True)
class ClipConfig:
    """Hyperparameters, with transformers' CLIPVisionConfig defaults for what a configuration leaves out."""

    n_embd: int
    n_ff: int
    n_layer: int
    n_head: int
    image_size: int
    patch_size: int
    eps: float
    activation: str
    feature_layers: tuple[int, ...]
    """Numbers of the hidden states that are projected, side by side: 0 is the embeddings, k the output of block k."""

    @property
    def n_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


def tower(parts: Parts, n_embd: int) -> Tower:
    """What the mmproj holds; as `families.towers.read_tower`."""
    if parts.strategy != "default":
        raise CheckpointError(
            f"{parts.directory}: vision_feature_select_strategy is {parts.strategy}; default is supported with CLIP"
        )
    c = read_config(parts.vision, parts.feature_layers)
    projector = projector_rows(c, n_embd, parts.projector_bias)
    if parts.grid:
        projector.append(Row("model.image_newline", "image_newline", (n_embd,)))
    return Tower(c.image_size, tower_rows(c), projector, lambda preprocessing: fields(c, n_embd, preprocessing))


def read_config(config: Config, feature_layers: Sequence[int]) -> ClipConfig:
    """Read vision_config. Feature layers may be negative, counting from the last hidden state.

    Raises:
        CheckpointError: Not a CLIP tower, a value makes no sense, or a setting is not supported.
    """
    config.choice("model_type", "clip_vision_model", ("clip_vision_model",))
    config.integer("num_channels", 3, 3, 3)
    n_embd = config.integer("hidden_size", 768, 1, 1 << 14)
    n_head = config.integer("num_attention_heads", 12, 1, 1 << 12)
    if n_embd % n_head:
        raise CheckpointError(f"{config.name('num_attention_heads')}: {n_head} does not divide hidden_size {n_embd}")
    image_size = config.integer("image_size", 224, 1, 4096)
    patch_size = config.integer("patch_size", 32, 1, image_size)
    if image_size // patch_size > MAX_GRID:
        raise CheckpointError(
            f"{config.name('patch_size')}: {patch_size} makes more than {MAX_GRID} x {MAX_GRID} patches of a picture"
        )
    n_layer = config.integer("num_hidden_layers", 12, 1, 512)
    layers = tuple(layer + n_layer + 1 if layer < 0 else layer for layer in feature_layers)
    for layer, named in zip(layers, feature_layers, strict=True):
        if not 0 <= layer <= n_layer:
            raise CheckpointError(
                f"{config.path}: vision_feature_layer {named} is not one of the {n_layer + 1} hidden states"
            )
    return ClipConfig(
        n_embd=n_embd,
        n_ff=config.integer("intermediate_size", 3072, 1, 1 << 16),
        n_layer=n_layer,
        n_head=n_head,
        image_size=image_size,
        patch_size=patch_size,
        eps=config.number("layer_norm_eps", 1e-5, 1e-12, 0.1),
        activation=config.choice("hidden_act", "quick_gelu", ("quick_gelu", "gelu")),
        feature_layers=layers,
    )


def tower_rows(c: ClipConfig) -> list[Row]:
    """Every tensor of the tower, in the order of the file."""
    e = c.n_embd
    table = [
        Row("v.class_embd", "embeddings.class_embedding", (e,)),
        Row("v.patch_embd.weight", "embeddings.patch_embedding.weight", (e, 3, c.patch_size, c.patch_size)),
        Row("v.position_embd.weight", "embeddings.position_embedding.weight", (c.n_patches + 1, e)),
    ]
    # llama.cpp takes a first layer called ffn_down for a legacy file's, told by its shape; where both layers have the
    # same shape it always does, so there the names must be swapped.
    up, down = ("ffn_down", "ffn_up") if c.n_ff == e else ("ffn_up", "ffn_down")
    # "pre_layrnorm" is how transformers spells it.
    modules: list[tuple[str, str, tuple[int, ...]]] = [("v.pre_ln", "pre_layrnorm", (e,))]
    for i in range(c.n_layer):
        source = f"encoder.layers.{i}"
        modules += [
            (f"v.blk.{i}.{target}", f"{source}.{name}", shape)
            for target, name, shape in (
                ("ln1", "layer_norm1", (e,)),
                ("attn_q", "self_attn.q_proj", (e, e)),
                ("attn_k", "self_attn.k_proj", (e, e)),
                ("attn_v", "self_attn.v_proj", (e, e)),
                ("attn_out", "self_attn.out_proj", (e, e)),
                ("ln2", "layer_norm2", (e,)),
                (up, "mlp.fc1", (c.n_ff, e)),
                (down, "mlp.fc2", (e, c.n_ff)),
            )
        ]
    return table + _with_bias(modules)


def projector_rows(c: ClipConfig, n_embd_text: int, has_bias: bool) -> list[Row]:
    """The two linear layers from the tower's width to the decoder's. A missing bias is written as zeros."""
    modules: list[tuple[str, str, tuple[int, ...]]] = [
        ("mm.0", "linear_1", (n_embd_text, c.n_embd * len(c.feature_layers))),
        ("mm.2", "linear_2", (n_embd_text, n_embd_text)),
    ]
    table = _with_bias(modules)
    return table if has_bias else [r if r.target.endswith(".weight") else replace(r, source=None) for r in table]


def _with_bias(modules: list[tuple[str, str, tuple[int, ...]]]) -> list[Row]:
    return [
        row
        for target, source, shape in modules
        for row in (
            Row(f"{target}.weight", f"{source}.weight", shape),
            Row(f"{target}.bias", f"{source}.bias", shape[:1]),
        )
    ]


def fields(c: ClipConfig, n_embd_text: int, preprocessing: Preprocessing) -> list[Field]:
    """The architecture's metadata, and our own keys for exact preprocessing."""
    u32, f32, i32 = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.INT32
    flag, text, array = GGUFValueType.BOOL, GGUFValueType.STRING, GGUFValueType.ARRAY
    keys = Preprocessing.KEYS
    return [
        Field("clip.has_vision_encoder", True, flag),
        Field("clip.has_llava_projector", True, flag),
        Field("clip.projector_type", "mlp", text),
        Field("clip.use_gelu", c.activation == "gelu", flag),
        Field("clip.vision.image_size", c.image_size, u32),
        Field("clip.vision.patch_size", c.patch_size, u32),
        Field("clip.vision.embedding_length", c.n_embd, u32),
        Field("clip.vision.feed_forward_length", c.n_ff, u32),
        Field("clip.vision.projection_dim", n_embd_text, u32),
        Field("clip.vision.block_count", c.n_layer, u32),
        Field("clip.vision.feature_layer", list(c.feature_layers), array, i32),
        Field("clip.vision.image_mean", list(preprocessing.mean), array, f32),
        Field("clip.vision.image_std", list(preprocessing.std), array, f32),
        Field("clip.vision.attention.head_count", c.n_head, u32),
        Field("clip.vision.attention.layer_norm_epsilon", c.eps, f32),
        *_grid_fields(preprocessing),
        Field(keys["mode"], preprocessing.mode, text),
        Field(keys["shortest_edge"], preprocessing.shortest_edge, u32),
        Field(keys["resample"], preprocessing.resample, u32),
        Field(keys["rescale"], preprocessing.rescale, GGUFValueType.FLOAT64),
    ]


def _grid_fields(preprocessing: Preprocessing) -> list[Field]:
    """LLaVA-NeXT's, as llama.cpp's legacy converter writes them."""
    if not preprocessing.grid:
        return []
    flat = [v for size in preprocessing.grid for v in size]
    return [
        Field("clip.vision.image_grid_pinpoints", flat, GGUFValueType.ARRAY, GGUFValueType.INT32),
        Field("clip.vision.mm_patch_merge_type", "spatial_unpad", GGUFValueType.STRING),
    ]
