"""Checkpoints whose files fuzz.py found to hang or crash the reader, or to spoil its message: one clear line each."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from local_llava.convert.checkpoint import Checkpoint
from local_llava.convert.config import MAX_JSON_BYTES, Config, read_json
from local_llava.convert.families import clip, llama, llava
from local_llava.convert.preprocessing import read_preprocessing
from local_llava.convert.source import StoredTensor
from local_llava.errors import CheckpointError

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"


def safetensors(*names: str) -> bytes:
    """A whole file with tensors of one value."""
    entries = {name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate(names)}
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + bytes(4 * len(names))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / WEIGHTS).write_bytes(safetensors("a"))
    return tmp_path


def index(directory: Path, **weight_map: Any) -> None:
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def pipe(path: Path) -> None:
    """Opening it would wait for a writer for ever."""
    path.unlink()
    os.mkfifo(path)


def large_header(path: Path) -> None:
    header = b"{}".ljust(MAX_JSON_BYTES + 1)
    path.write_bytes(struct.pack("<Q", len(header)) + header)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (lambda d: pipe(d / WEIGHTS), "model.safetensors: is not a regular file"),
    "line break in a tensor's name": (
        lambda d: (d / WEIGHTS).write_bytes(safetensors("a\nb")),
        "model.safetensors: names a tensor 'a\\nb'; names of 1 to 200 bytes of printable text are accepted",
    ),
    "long name of a tensor": (lambda d: (d / WEIGHTS).write_bytes(safetensors("a" * 201)), "names a tensor 'aaa"),
    "escape in a damaged header": (
        lambda d: (d / WEIGHTS).write_bytes(safetensors("\x1b[31m").replace(b"[1]", b"[9]")),
        "not a whole safetensors file: ",
    ),
    "large header": (lambda d: large_header(d / WEIGHTS), "a header of 67108865 bytes; at most 67108864 are accepted"),
    "shard of a long name": (lambda d: index(d, a="\u00e9" * 150), "index.json: weight_map['a'] must be a file name"),
    "shard with a line break": (lambda d: index(d, a="x\ny"), "weight_map['a'] must be a file name, not 'x\\ny'"),
    "shard of half a character": (lambda d: index(d, a="\ud800"), "index.json: not valid JSON: \\ud800 is half of"),
    "shard that is an object": (lambda d: index(d, a={"b" * 5000: 1}), "must be a file name, not {'bbbb"),
    "name with a line break in the index": (lambda d: index(d, **{"a\nb": WEIGHTS}), "names a tensor 'a\\nb'"),
    "config of half a character": (
        lambda d: (d / "config.json").write_text('{"a": [{"\\udfff": 1}]}'),
        "config.json: not valid JSON: \\udfff is half of a character",
    ),
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
@pytest.mark.parametrize(("damage", "problem"), BAD.values(), ids=BAD)
def test_bad_files(directory: Path, damage: Callable[[Path], object], problem: str) -> None:
    damage(directory)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(directory)
    message = str(caught.value)
    assert problem in message
    assert message.startswith(str(directory)) and message.isprintable() and len(message) < 500


def test_shards_of_unusual_digits(directory: Path) -> None:
    """Superscripts are digits to Python, but no number."""
    (directory / WEIGHTS).rename(directory / "model-1-of-\u00b2.safetensors")
    assert list(Checkpoint.open(directory).tensors) == ["a"]


def test_whole_characters_outside_the_first_plane_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(r'{"\ud83d\ude00": "\ud83d\ude00 \\ud800"}')
    assert read_json(path) == {"\U0001f600": "\U0001f600 \\ud800"}


@pytest.mark.parametrize(
    ("entry", "value"),
    [("image_mean", 1e30), ("image_mean", float("nan")), ("image_std", 0), ("image_std", float("nan"))],
)
def test_pixels_that_are_no_numbers(tmp_path: Path, entry: str, value: float) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({entry: [0.5, 0.5, value]}))
    with pytest.raises(CheckpointError, match=rf"preprocessor_config.json: {entry} must be from "):
        read_preprocessing(tmp_path, 28)


def test_a_number_that_no_float_can_hold(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.5, 10**400]}))
    with pytest.raises(CheckpointError, match=r"image_mean must be a list of 3 numbers, not \[0.5, 0.5, 1000"):
        read_preprocessing(tmp_path, 28)


def test_long_values_are_shortened_in_messages(tmp_path: Path) -> None:
    for values in ({"size": {"height": "x" * 5000, "width": 1}}, {"size": "x" * 5000}, {"crop_size": "x" * 5000}):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
        with pytest.raises(CheckpointError) as caught:
            read_preprocessing(tmp_path, 28)
        assert len(str(caught.value)) < 500
    names = ("vision_tower.x", "multi_modal_projector.x", "language_model.model.x")
    tensors = {name: StoredTensor(name, "F32", (1,), tmp_path, 0, 4) for name in names}
    with pytest.raises(CheckpointError, match=r"vision_feature_layer must be 1 to 16 layers, not \[1, 1") as caught:
        llava.take_apart(Checkpoint(tmp_path, {"vision_feature_layer": [1] * 5000}, tensors))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("entry", "value"),
    [("rms_norm_eps", 0), ("hidden_size", 1 << 18), ("num_attention_heads", 1 << 11), ("vocab_size", 1 << 23)],
)
def test_a_decoder_that_the_runtime_would_refuse(tmp_path: Path, entry: str, value: float) -> None:
    with pytest.raises(CheckpointError, match=rf"config.json: text_config.{entry}"):
        llama.decoder(Config(tmp_path / "config.json", {entry: value}, "text_config"), tied=False)


@pytest.mark.parametrize(
    ("entry", "value"),
    [("layer_norm_eps", 0), ("hidden_size", 1 << 15), ("intermediate_size", 1 << 17), ("patch_size", 3)],
)
def test_a_tower_that_the_runtime_would_refuse(tmp_path: Path, entry: str, value: float) -> None:
    """What is converted must load."""
    with pytest.raises(CheckpointError, match=rf"config.json: vision_config.{entry}"):
        clip.read_config(Config(tmp_path / "config.json", {entry: value}, "vision_config"), (-2,))
