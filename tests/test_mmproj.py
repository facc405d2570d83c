"""Files that are no mmproj that can be computed are refused by name, in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_bytes import Entry, gguf
from mmproj_files import Reference, write_gguf

from local_llava.errors import ModelFileError
from local_llava.gguf_file import GGUFFile
from local_llava.mmproj import check_mmproj
from local_llava.vision import VisionTower

LONG = "x" * 5000
TOWER: list[Entry] = [
    ("general.architecture", "str", "clip"),
    ("clip.has_vision_encoder", "bool", True),
    ("clip.projector_type", "str", "mlp"),
    ("clip.vision.image_size", "u32", 28),
    ("clip.vision.image_mean", "arr[f32]", [0.5] * 3),
    ("clip.vision.image_std", "arr[f32]", [0.5] * 3),
    ("clip.vision.patch_size", "u32", 14),
    ("clip.vision.embedding_length", "u32", 32),
    ("clip.vision.attention.head_count", "u32", 4),
    ("clip.vision.feed_forward_length", "u32", 64),
    ("clip.vision.attention.layer_norm_epsilon", "f32", 1e-5),
    ("clip.vision.block_count", "u32", 2),
]


@pytest.mark.parametrize(
    "key",
    [
        "general.architecture",
        "clip.has_vision_encoder",
        "clip.projector_type",
        "clip.vision.patch_size",
        "clip.vision.attention.layer_norm_epsilon",
        "clip.use_gelu",
        "clip.vision.feature_layer",
    ],
)
def test_long_values_are_shortened_in_messages(key: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf([*(entry for entry in TOWER if entry[0] != key), (key, "str", LONG)]))
    with pytest.raises(ModelFileError) as caught:
        check_mmproj(GGUFFile.open(path))
    assert key in str(caught.value) and "'xxx" in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("key", "kind", "value"),
    [
        ("clip.vision.image_mean", "arr[f32]", [0.5, float("nan"), 0.5]),
        ("clip.vision.image_mean", "arr[f32]", [0.5, float("-inf"), 0.5]),
        ("clip.vision.image_std", "arr[f32]", [0.5, 1e-40, 0.5]),
        ("local_llava.preprocess.rescale_factor", "f64", 1e-300),
        ("local_llava.preprocess.rescale_factor", "str", LONG),
        ("local_llava.preprocess.mode", "str", LONG),
    ],
)
def test_pixels_that_are_no_numbers(key: str, kind: str, value: Any, tmp_path: Path) -> None:
    """They would end in an integer of infinity (the bars of mode "pad"), or warnings of numpy."""
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf([*(entry for entry in TOWER if entry[0] != key), (key, kind, value)]))
    with pytest.raises(ModelFileError) as caught:
        check_mmproj(GGUFFile.open(path))
    assert f"{key} must be " in str(caught.value)
    assert len(str(caught.value)) < 500


Metadata = dict[str, Any]
SIGLIP = {"siglip": True, "act": "gelu_pytorch_tanh", "strategy": "full"}


def set_key(key: str, value: Any) -> Callable[[Metadata, Metadata], None]:
    return lambda metadata, tensors: metadata.update({key: value})


def drop_key(key: str) -> Callable[[Metadata, Metadata], None]:
    return lambda metadata, tensors: metadata.pop(key) and None


def set_tensor(name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> Callable[[Metadata, Metadata], None]:
    return lambda metadata, tensors: tensors.update({name: np.zeros(shape, dtype)})


def drop_tensor(name: str) -> Callable[[Metadata, Metadata], None]:
    return lambda metadata, tensors: tensors.pop(name) is None or None


def many_heads(metadata: Metadata, tensors: Metadata) -> None:
    metadata.update({"clip.vision.image_size": 896, "clip.vision.attention.head_count": 64})
    tensors["v.position_embd.weight"] = np.zeros((4097, 64), np.float32)


V = "clip.vision."
L = "local_llava."
REFUSED: list[tuple[Callable[[Metadata, Metadata], None], str]] = [
    (
        set_key("general.architecture", "llama"),
        "general.architecture: this is a model of architecture 'llama'; give the",
    ),
    (set_key("clip.has_vision_encoder", False), "clip.has_vision_encoder is not true"),
    (drop_key("clip.has_vision_encoder"), "clip.has_vision_encoder is not true"),
    (set_key("clip.has_vision_encoder", 1), "clip.has_vision_encoder must be true or false, not 1"),
    (set_key("clip.projector_type", "ldp"), "clip.projector_type is 'ldp'"),
    (set_key("clip.use_silu", True), "clip.use_silu is true"),
    (set_key("clip.use_gelu", "yes"), "clip.use_gelu must be true or false, not 'yes'"),
    (drop_key(f"{V}image_size"), "clip.vision.image_size must be 1 to 4096, not None"),
    (drop_key(f"{V}image_mean"), "clip.vision.image_mean must be three numbers"),
    (drop_key(f"{V}patch_size"), "clip.vision.patch_size is missing"),
    (set_key(f"{V}patch_size", 0), "clip.vision.patch_size must be 1 to 28, not 0"),
    (set_key(f"{V}patch_size", 29), "clip.vision.patch_size must be 1 to 28, not 29"),
    (set_key(f"{V}patch_size", 14.0), "clip.vision.patch_size must be 1 to 28, not 14.0"),
    (set_key(f"{V}patch_size", 7), "tensor v.patch_embd.weight has shape [64, 3, 14, 14]"),
    (set_key(f"{V}image_size", 4096), "clip.vision.patch_size is 14: more than 4096 patches"),
    (set_key(f"{V}image_size", 56), "tensor v.position_embd.weight has shape [5, 64]; the metadata asks for [17, 64]"),
    (drop_key(f"{V}embedding_length"), "clip.vision.embedding_length is missing"),
    (set_key(f"{V}embedding_length", 1 << 31), "clip.vision.embedding_length must be 1 to 16384"),
    (set_key(f"{V}embedding_length", 68), "tensor v.class_embd has shape [64]; the metadata asks for [68]"),
    (set_key(f"{V}feed_forward_length", 0), "clip.vision.feed_forward_length must be 1 to 65536"),
    (set_key(f"{V}feed_forward_length", 100), "tensor v.blk.0.ffn_up.weight has shape [128, 64]"),
    (set_key(f"{V}attention.head_count", 0), "clip.vision.attention.head_count must be 1 to 64, not 0"),
    (set_key(f"{V}attention.head_count", 5), "clip.vision.attention.head_count is 5, which does not divide 64"),
    (many_heads, "clip.vision.attention.head_count 64 with 4096 patches takes 8 GiB"),
    (drop_key(f"{V}attention.layer_norm_epsilon"), "clip.vision.attention.layer_norm_epsilon is missing"),
    (set_key(f"{V}attention.layer_norm_epsilon", 0.0), "layer_norm_epsilon must be between 0 and 1, not 0.0"),
    (set_key(f"{V}attention.layer_norm_epsilon", float("nan")), "layer_norm_epsilon must be between 0 and 1, not nan"),
    (drop_key(f"{V}block_count"), "clip.vision.block_count is missing"),
    (set_key(f"{V}block_count", 0), "clip.vision.block_count must be 1 to 1024, not 0"),
    (set_key(f"{V}block_count", 3), "tensor 'v.blk.3.attn_k.weight' belongs to a model of another kind"),
    (
        set_key(f"{V}feature_layer", [5]),
        "clip.vision.feature_layer must be a list of 1 to 16 numbers from 0 to block_count 4",
    ),
    (set_key(f"{V}feature_layer", [-2]), "clip.vision.feature_layer must be a list"),
    (set_key(f"{V}feature_layer", 3), "clip.vision.feature_layer must be a list"),
    (set_key(f"{V}feature_layer", [True]), "clip.vision.feature_layer must be a list"),
    (set_key(f"{V}feature_layer", [1, 3]), "tensor mm.0.weight has shape [96, 64]; the metadata asks for [96, 128]"),
    (drop_tensor("v.class_embd"), "tensor v.class_embd is missing"),
    (drop_tensor("v.blk.2.attn_k.bias"), "tensor v.blk.2.attn_k.bias is missing"),
    (drop_tensor("mm.2.weight"), "tensor mm.2.weight is missing"),
    (set_tensor("mm.0.weight", (96,)), "tensor mm.0.weight must be a matrix"),
    (set_tensor("mm.2.weight", (96, 100)), "tensor mm.2.weight has shape [96, 100]; the metadata asks for [96, 96]"),
    (set_tensor("v.blk.1.ln2.weight", (63,)), "tensor v.blk.1.ln2.weight has shape [63]"),
    (set_tensor("v.blk.1.attn_q.weight", (64, 32)), "tensor v.blk.1.attn_q.weight has shape [64, 32]"),
    (
        set_tensor("v.blk.1.attn_q.weight", (64, 64), np.int32),
        "tensor v.blk.1.attn_q.weight is I32; F32, F16, Q4_0",
    ),
    (set_tensor("model.image_newline", (96,)), "tensor 'model.image_newline' belongs to a model of another kind"),
    (set_tensor("v.blk.0.attn_q_norm.weight", (16,)), "tensor 'v.blk.0.attn_q_norm.weight' belongs to"),
    (drop_tensor("v.pre_ln.weight"), "tensor v.pre_ln.weight is missing"),
    (set_tensor("v.patch_embd.bias", (64,)), "tensor 'v.patch_embd.bias' belongs to a model of another kind"),
    (set_tensor("mm.input_norm.weight", (64,)), "tensor mm.input_norm.bias is missing"),
    (set_key(f"{L}vision.activation", "relu"), "activation must be gelu or gelu_tanh or quick_gelu, not 'relu'"),
    (set_key(f"{L}vision.activation", ["gelu"]), "activation must be gelu or gelu_tanh or quick_gelu, not ['gelu']"),
    (set_key(f"{L}vision.feature_select", 1), "local_llava.vision.feature_select must be default or full, not 1"),
]
REFUSED_SIGLIP: list[tuple[Callable[[Metadata, Metadata], None], str]] = [
    (drop_tensor("v.patch_embd.bias"), "tensor v.patch_embd.bias is missing"),
    (set_tensor("v.patch_embd.bias", (63,)), "tensor v.patch_embd.bias has shape [63]; the metadata asks for [64]"),
    (set_tensor("v.patch_embd.bias", (64,), np.int32), "tensor v.patch_embd.bias is I32; F32, F16"),
    (set_tensor("v.position_embd.weight", (5, 64)), "tensor v.position_embd.weight has shape [5, 64]; the metadata"),
    (set_tensor("v.class_embd", (64,)), "tensor v.pre_ln.weight is missing"),
    (set_tensor("v.pre_ln.bias", (64,)), "tensor v.class_embd is missing"),
    (set_tensor("mm.input_norm.bias", (64,)), "tensor mm.input_norm.weight is missing"),
    (set_tensor("v.head.probe", (1, 1, 64)), "tensor 'v.head.probe' belongs to a model of another kind"),
]
REFUSED_VIP: list[tuple[Callable[[Metadata, Metadata], None], str]] = [
    (drop_tensor("mm.input_norm.weight"), "tensor mm.input_norm.weight is missing"),
    (set_tensor("mm.input_norm.bias", (64,)), "tensor mm.input_norm.bias has shape [64]; the metadata asks for [128]"),
    (set_key(f"{L}projector.layer_norm_epsilon", 0.0), "projector.layer_norm_epsilon must be between 0 and 1, not 0.0"),
    (set_key(f"{L}projector.layer_norm_epsilon", "x"), "projector.layer_norm_epsilon must be between 0 and 1, not 'x'"),
    (
        set_key(f"{V}feature_layer", [1, 2, 3]),
        "tensor mm.0.weight has shape [96, 128]; the metadata asks for [96, 192]",
    ),
]
ALL_REFUSED = (
    [({}, *case) for case in REFUSED]
    + [(SIGLIP, *case) for case in REFUSED_SIGLIP]
    + [({"feature_layer": [-2, 1], "norm_eps": 0.01, "own_keys": True}, *case) for case in REFUSED_VIP]
)


@pytest.mark.parametrize(("kind", "change", "message"), ALL_REFUSED, ids=[message for *_, message in ALL_REFUSED])
def test_refused(
    kind: dict[str, Any], change: Callable[[Metadata, Metadata], None], message: str, tmp_path: Path
) -> None:
    reference = Reference(**kind)
    metadata, tensors = reference.metadata(), reference.tensors()
    change(metadata, tensors)
    path = write_gguf(tmp_path / "m.gguf", metadata, tensors)
    with pytest.raises(ModelFileError) as caught:
        check_mmproj(GGUFFile.open(path))  # as it is; what can be put right is, before it is loaded: test_corrections
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and message in text and "\n" not in text


def test_nothing_left_of_a_picture(tmp_path: Path) -> None:
    reference = Reference(image_size=32, patch_size=32, n_blocks=2, siglip=True, own_keys=True)
    path = write_gguf(tmp_path / "m.gguf", reference.metadata(), reference.tensors())
    with pytest.raises(
        ModelFileError, match=r"feature_select 'default' does not fit this tower: 0 embeddings of 1 pat"
    ):
        VisionTower.load(path)


@pytest.mark.parametrize(
    ("siglip", "strategy", "fits"), [(a, b, a is (b == "full")) for a in (False, True) for b in ("default", "full")]
)
def test_tiles_need_an_embedding_a_patch(siglip: bool, strategy: str, fits: bool, tmp_path: Path) -> None:
    reference = Reference(siglip=siglip, strategy=strategy, own_keys=True)
    metadata = {**reference.metadata(), "clip.vision.image_grid_pinpoints": [28, 56, 56, 56]}
    tensors = {**reference.tensors(), "model.image_newline": np.ones(96, np.float32)}
    path = write_gguf(tmp_path / "m.gguf", metadata, tensors)
    if fits:
        with VisionTower.load(path, n_threads=1) as tower:
            assert tower.n_tokens == 4 and tower.newline is not None
    else:
        with pytest.raises(ModelFileError, match=f"feature_select '{strategy}' does not fit this tower: [35] emb"):
            VisionTower.load(path)
