"""What CLIP and SigLIP towers share, and LLaVA's MLP projector: their tensors and metadata in an mmproj.

Names and keys are those that llama.cpp's tools/mtmd reads, so that the file works there too; what it has no key for is
described in `mmproj`. A tower of its own kind is a row, `Kind`: `clip`, `siglip`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gguf import GGUFValueType

from local_llava.convert.config import Config
from local_llava.convert.families import Parts, Row, Strategy, Tower
from local_llava.convert.plan import Field
from local_llava.errors import CheckpointError
from local_llava.mmproj import ACTIVATION_KEY, NEWLINE, NORM_EPS_KEY, STRATEGY_KEY, Activation, ffn_names
from local_llava.preprocessing import Preprocessing

MAX_GRID = 64
"""Patches in a row; the runtime takes no more."""

ACTIVATIONS: dict[str, Activation] = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
"""What transformers calls them -> what the mmproj does."""


@dataclass(frozen=True)
class Kind:
    """A kind of tower: how it is built, and transformers' defaults for what a configuration leaves out."""

    model_type: str
    class_token: bool
    """CLIP's has a class token, and a LayerNorm before the first block; SigLIP's a bias of the patch embedding."""
    patch_size: int
    eps: float
    activation: str


@dataclass(frozen=True)
class TowerShape:
    """Hyperparameters."""

    n_embd: int
    n_ff: int
    n_layer: int
    n_head: int
    image_size: int
    patch_size: int
    eps: float
    activation: Activation
    class_token: bool
    feature_layers: tuple[int, ...]
    """Numbers of the hidden states that are projected, side by side: 0 is the embeddings, k the output of block k."""

    @property
    def n_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


def tower(parts: Parts, n_embd: int, kind: Kind) -> Tower:
    """What the mmproj holds; as `families.towers.read_tower`."""
    c = read_config(parts.vision, parts.feature_layers, kind)
    _check_strategy(c, parts)
    norm_eps = _norm_eps(parts)
    projector = projector_rows(c, n_embd, parts.projector_bias, norm_eps is not None)
    if parts.grid:
        projector.append(Row(NEWLINE, "image_newline", (n_embd,)))

    def metadata(preprocessing: Preprocessing) -> Sequence[Field]:
        return fields(c, n_embd, parts.strategy, norm_eps, preprocessing)

    return Tower(c.image_size, tower_rows(c), projector, metadata)


def read_config(config: Config, feature_layers: Sequence[int], kind: Kind) -> TowerShape:
    """Read vision_config. Feature layers may be negative, counting from the last hidden state.

    Raises:
        CheckpointError: Not such a tower, a value makes no sense, or a setting is not supported.
    """
    config.choice("model_type", kind.model_type, (kind.model_type,))
    config.integer("num_channels", 3, 3, 3)
    n_embd = config.integer("hidden_size", 768, 1, 1 << 14)
    n_head = config.integer("num_attention_heads", 12, 1, 1 << 12)
    if n_embd % n_head:
        raise CheckpointError(f"{config.name('num_attention_heads')}: {n_head} does not divide hidden_size {n_embd}")
    image_size = config.integer("image_size", 224, 1, 4096)
    patch_size = config.integer("patch_size", kind.patch_size, 1, image_size)
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
    return TowerShape(
        n_embd=n_embd,
        n_ff=config.integer("intermediate_size", 3072, 1, 1 << 16),
        n_layer=n_layer,
        n_head=n_head,
        image_size=image_size,
        patch_size=patch_size,
        eps=config.number("layer_norm_eps", kind.eps, 1e-12, 0.1),
        activation=ACTIVATIONS[config.choice("hidden_act", kind.activation, tuple(ACTIVATIONS))],
        class_token=kind.class_token,
        feature_layers=layers,
    )


def _check_strategy(c: TowerShape, parts: Parts) -> None:
    """Strategy "default" drops the first row, whatever it is: so does transformers, and with it what was trained."""
    where = f"{parts.directory}: vision_feature_select_strategy is {parts.strategy}"
    if parts.grid and c.class_token is (parts.strategy == "full"):
        raise CheckpointError(
            f"{where}; LLaVA-NeXT's tiles need {'default' if c.class_token else 'full'} with this tower, "
            "one embedding a patch"
        )
    if not c.class_token and parts.strategy == "default" and c.n_patches == 1:
        raise CheckpointError(f"{where}, which leaves nothing of a picture that is a single patch")


def _norm_eps(parts: Parts) -> float | None:
    """Epsilon of the LayerNorm before VipLlava's projector; None where there is no such norm."""
    if parts.top.get("projector_layernorm_eps") is None:
        return None
    return Config(parts.directory / "config.json", parts.top).number("projector_layernorm_eps", None, 1e-12, 0.1)


def tower_rows(c: TowerShape) -> list[Row]:
    """Every tensor of the tower, in the order of the file."""
    e = c.n_embd
    patch = Row("v.patch_embd.weight", "embeddings.patch_embedding.weight", (e, 3, c.patch_size, c.patch_size))
    position = Row("v.position_embd.weight", "embeddings.position_embedding.weight", (c.n_patches + c.class_token, e))
    modules: list[tuple[str, str, tuple[int, ...]]] = []
    if c.class_token:
        table = [Row("v.class_embd", "embeddings.class_embedding", (e,)), patch, position]
        modules.append(("v.pre_ln", "pre_layrnorm", (e,)))  # how transformers spells it
    else:
        table = [patch, Row("v.patch_embd.bias", "embeddings.patch_embedding.bias", (e,)), position]
    # llama.cpp takes a first layer called ffn_down for a legacy file's, told by its shape; where both layers have the
    # same shape it always does, so there the names must be swapped.
    fc1, fc2 = ffn_names(swapped=c.n_ff == e)
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
                (fc1, "mlp.fc1", (c.n_ff, e)),
                (fc2, "mlp.fc2", (e, c.n_ff)),
            )
        ]
    return table + _with_bias(modules)


def projector_rows(c: TowerShape, n_embd_text: int, has_bias: bool, has_norm: bool) -> list[Row]:
    """The two linear layers from the tower's width to the decoder's. A missing bias is written as zeros."""
    width = c.n_embd * len(c.feature_layers)
    norm = _with_bias([("mm.input_norm", "layernorm", (width,))]) if has_norm else []
    table = _with_bias([("mm.0", "linear_1", (n_embd_text, width)), ("mm.2", "linear_2", (n_embd_text, n_embd_text))])
    return norm + (
        table if has_bias else [r if r.target.endswith(".weight") else replace(r, source=None) for r in table]
    )


def _with_bias(modules: Sequence[tuple[str, str, tuple[int, ...]]]) -> list[Row]:
    return [
        row
        for target, source, shape in modules
        for row in (
            Row(f"{target}.weight", f"{source}.weight", shape),
            Row(f"{target}.bias", f"{source}.bias", shape[:1]),
        )
    ]


def fields(
    c: TowerShape, n_embd_text: int, strategy: Strategy, norm_eps: float | None, preprocessing: Preprocessing
) -> list[Field]:
    """The architecture's metadata, and our own keys for what it has none for."""
    u32, f32, i32 = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.INT32
    flag, text, array = GGUFValueType.BOOL, GGUFValueType.STRING, GGUFValueType.ARRAY
    keys = Preprocessing.KEYS
    return [
        Field("clip.has_vision_encoder", True, flag),
        Field("clip.has_llava_projector", True, flag),
        Field("clip.projector_type", "mlp", text),
        Field("clip.use_gelu", c.activation != "quick_gelu", flag),
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
        Field(ACTIVATION_KEY, c.activation, text),
        Field(STRATEGY_KEY, strategy, text),
        *([] if norm_eps is None else [Field(NORM_EPS_KEY, norm_eps, f32)]),
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
