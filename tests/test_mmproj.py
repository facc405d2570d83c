"""Metadata of an mmproj that fuzz.py found to spoil a message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf_bytes import Entry, gguf

from local_llava.errors import ModelFileError
from local_llava.gguf_file import GGUFFile
from local_llava.mmproj import check_mmproj

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
