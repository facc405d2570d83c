"""The tower computes what transformers computes, and files that are not such a tower are refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from mmproj_files import Reference, relative_error, write_gguf

from local_llava import ggml, vision
from local_llava.errors import ModelFileError
from local_llava.gguf_file import GGUFFile
from local_llava.types import Preprocessing
from local_llava.vision import VisionTower, check_mmproj

F32_BAR, F16_BAR, Q8_BAR = 1e-5, 1e-3, 5e-2

SHAPES: dict[str, dict[str, Any]] = {
    "default": {},
    "gelu": {"act": "gelu"},
    "large epsilon": {"eps": 0.01},
    "last": {"feature_layer": -1},
    "third last": {"feature_layer": -3},
    "embeddings": {"feature_layer": 0},
    "two, in this order": {"feature_layer": [3, -4]},
    "one head, seven blocks": {"n_head": 1, "n_blocks": 7, "seed": 3},
    "larger": {"image_size": 112, "n_embd": 96, "n_ff": 224, "n_head": 6, "n_blocks": 6, "n_out": 64},
    "16 px": {"image_size": 96, "patch_size": 16, "n_head": 8, "act": "gelu"},
    "edge left over": {"image_size": 45, "patch_size": 14},
    "one patch": {"image_size": 32, "patch_size": 32, "n_blocks": 2},
}


def load(path: Path, **options: Any) -> VisionTower:
    """On one CPU thread: threads that wait for each other are slow where the tests share their cores."""
    return VisionTower.load(path, **{"n_threads": 1, **options})


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.fixture
def tower(reference: Reference, tmp_path: Path) -> Iterator[VisionTower]:
    with load(write_gguf(tmp_path / "m.gguf", reference.metadata(), reference.tensors())) as tower:
        yield tower


def error_of(reference: Reference, path: Path, kind: Q = Q.F32, **options: Any) -> float:
    write_gguf(path, reference.metadata(), reference.tensors(), kind)
    pixels = reference.pixels()
    with load(path, **options) as tower:
        assert tower.n_tokens == (reference.image_size // reference.patch_size) ** 2
        assert tower.n_embd == reference.n_out
        assert tower.preprocessing.mean == (0.5, 0.5, 0.5) and tower.preprocessing.std == (0.25, 0.25, 0.25)
        return relative_error(tower.encode(pixels), reference.features(pixels))


@pytest.mark.parametrize("name", SHAPES)
def test_f32_equals_transformers(name: str, tmp_path: Path) -> None:
    assert error_of(Reference(**SHAPES[name]), tmp_path / "m.gguf") <= F32_BAR


@pytest.mark.parametrize("flash_attention", [False, True])
@pytest.mark.parametrize(("kind", "dtype"), [(Q.F16, torch.float16), (Q.BF16, torch.bfloat16)])
@pytest.mark.parametrize("name", ["default", "larger"])
def test_half_precision_equals_transformers_on_the_same_weights(
    name: str, kind: Q, dtype: torch.dtype, flash_attention: bool, tmp_path: Path
) -> None:
    reference = Reference(**SHAPES[name])
    reference.round_weights(dtype)
    bar = F16_BAR if kind == Q.F16 else 1e-2  # ggml rounds activations to the type of the weights
    assert error_of(reference, tmp_path / "m.gguf", kind, flash_attention=flash_attention) <= bar


@pytest.mark.parametrize("name", ["default", "larger"])
def test_q8_0_is_near(name: str, tmp_path: Path) -> None:
    error = error_of(Reference(**SHAPES[name]), tmp_path / "m.gguf", Q.Q8_0)
    assert F32_BAR < error <= Q8_BAR, "not quantized, or wrong"


def test_flash_attention_is_exact_on_a_cpu(reference: Reference, tmp_path: Path) -> None:
    assert error_of(reference, tmp_path / "m.gguf", flash_attention=True, use_gpu=False) <= F32_BAR


def test_flash_attention_with_the_keys_and_values_of_a_gpu(
    tower: VisionTower, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tower, "_kv_type", ggml.F16)
    pixels = reference.pixels()
    assert F32_BAR < relative_error(tower.encode(pixels), reference.features(pixels)) <= F16_BAR


def test_pictures_of_a_batch_do_not_touch_each_other(tower: VisionTower, reference: Reference) -> None:
    pixels = reference.pixels(7)
    together = tower.encode(pixels)
    alone = np.concatenate([tower.encode(pixels[i : i + 1]) for i in range(7)])
    tower.images_per_graph = 3
    in_steps = tower.encode(pixels)
    for out in (together, alone, in_steps):
        assert out.shape == (7, 4, 96) and out.dtype == np.float32
        assert max(relative_error(a, b) for a, b in zip(out, reference.features(pixels), strict=True)) <= F32_BAR


def test_memory_bounds_the_pictures_of_a_graph(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "m.gguf", reference.metadata(), reference.tensors())
    one = check_mmproj(GGUFFile.open(path)).activation_bytes
    for limit, expected in ((0, 1), (3 * one, 3), (1 << 40, 64)):
        monkeypatch.setattr(vision, "MAX_ACTIVATIONS", limit)
        with load(path) as tower:
            assert tower.images_per_graph == expected


def test_a_real_towers_pictures_fit_a_graph_of_bounded_size() -> None:
    large = vision.TowerConfig(
        preprocessing=Preprocessing(336, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        patch_size=14,
        n_embd=1024,
        n_ff=4096,
        n_head=16,
        eps=1e-5,
        activation="quick_gelu",
        feature_layers=(23,),
        ffn_swapped=False,
        n_hidden=4096,
        n_out=4096,
    )
    assert 40e6 < large.activation_bytes < 80e6


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_threads_do_not_change_the_result(n_threads: int, reference: Reference, tmp_path: Path) -> None:
    assert error_of(reference, tmp_path / "m.gguf", n_threads=n_threads, use_gpu=False) <= F32_BAR


def test_no_pictures(tower: VisionTower) -> None:
    assert tower.encode(np.empty((0, 3, 28, 28), np.float32)).shape == (0, 4, 96)


def test_pixels_may_lie_anyhow_in_memory(tower: VisionTower, reference: Reference) -> None:
    pixels = reference.pixels()
    turned = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    assert np.array_equal(tower.encode(turned), tower.encode(pixels))


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((1, 3, 28, 28)), np.zeros((3, 28, 28), np.float32), np.zeros((1, 3, 28, 27), np.float32)],
)
def test_other_pixels_are_refused(tower: VisionTower, pixels: Any) -> None:
    with pytest.raises(ValueError, match=r"pixels must be float32 \[n, 3, 28, 28\]"):
        tower.encode(pixels)


def test_a_closed_tower_says_so_and_closes_twice(tower: VisionTower, reference: Reference) -> None:
    tower.close()
    tower.close()
    with pytest.raises(ValueError, match="closed"):
        tower.encode(reference.pixels())


# Legacy files


def legacy(reference: Reference, keep: int, swap: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """What convert_image_encoder_to_gguf.py writes: blocks cut, no feature layer, ffn names the other way round."""
    metadata = {key: value for key, value in reference.metadata().items() if key != "clip.vision.feature_layer"}
    metadata["clip.vision.block_count"] = keep
    tensors = {}
    for name, data in reference.tensors().items():
        if name.startswith("v.post_ln") or (name.startswith("v.blk.") and int(name.split(".")[2]) >= keep):
            continue
        if swap:
            name = name.replace("ffn_up", "ffn_X").replace("ffn_down", "ffn_up").replace("ffn_X", "ffn_down")
        tensors[name] = data
    return metadata, tensors


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(("n_blocks", "keep", "run"), [(4, 3, 3), (4, 4, 3), (8, 7, 7), (2, 1, 1)])
def test_files_without_a_feature_layer(n_blocks: int, keep: int, run: int, swap: bool, tmp_path: Path) -> None:
    reference = Reference(n_blocks=n_blocks)  # transformers' -2
    path = write_gguf(tmp_path / "m.gguf", *legacy(reference, keep, swap))
    config = check_mmproj(GGUFFile.open(path))
    assert (config.n_blocks, config.ffn_swapped) == (run, swap)
    pixels = reference.pixels()
    with load(path) as tower:
        assert relative_error(tower.encode(pixels), reference.features(pixels)) <= F32_BAR


def test_legacy_files_of_24_layers() -> None:
    metadata = Reference().metadata()
    del metadata["clip.vision.feature_layer"]
    for stored, run in ((23, 23), (24, 23), (11, 11), (12, 11)):
        fields = vision_fields({**metadata, "clip.vision.block_count": stored})
        assert fields.feature_layers() == (run,)


def vision_fields(metadata: dict[str, Any]) -> Any:
    from local_llava.mmproj import _Fields

    return _Fields(GGUFFile(Path("m.gguf"), 3, metadata, {}, {}))


def test_equal_widths_are_named_as_llama_cpp_takes_them(tmp_path: Path) -> None:
    reference = Reference(n_ff=64)
    pixels = reference.pixels()
    write_gguf(tmp_path / "m.gguf", *legacy(reference, 3, swap=True))
    with load(tmp_path / "m.gguf") as tower:
        assert relative_error(tower.encode(pixels), reference.features(pixels)) <= F32_BAR


def test_a_file_of_2023_has_no_projector_type(reference: Reference, tmp_path: Path) -> None:
    metadata, tensors = legacy(reference, 3, swap=True)
    del metadata["clip.projector_type"]
    assert check_mmproj(GGUFFile.open(write_gguf(tmp_path / "m.gguf", metadata, tensors))).n_blocks == 3


# Files that are refused

Metadata = dict[str, Any]


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
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refused(
    change: Callable[[Metadata, Metadata], None], message: str, reference: Reference, tmp_path: Path
) -> None:
    metadata, tensors = reference.metadata(), reference.tensors()
    change(metadata, tensors)
    path = write_gguf(tmp_path / "m.gguf", metadata, tensors)
    with pytest.raises(ModelFileError) as caught:
        VisionTower.load(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and message in text and "\n" not in text


def test_a_file_that_shrinks_after_the_check_is_refused(reference: Reference, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", reference.metadata(), reference.tensors())
    gguf = GGUFFile.open(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 500)
    last = max(gguf.tensors.values(), key=lambda info: info.offset)
    with path.open("rb") as file, pytest.raises(ModelFileError, match=rf"ends inside tensor {last.name}"):
        vision._read_tensor(gguf, last.name, file)
