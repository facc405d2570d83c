"""Pixels: equal to transformers' CLIPImageProcessor, and bad pictures named."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from local_llava.errors import ImageError, ModelFileError
from local_llava.images import load_image, preprocess
from local_llava.types import Preprocessing

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
REAL = ("astronaut", "coffee", "chelsea", "rocket")


def pictures() -> dict[str, Image.Image]:
    real = {name: Image.fromarray(getattr(data, name)()) for name in REAL}
    rng = np.random.default_rng(0)
    sizes = [(1, 1), (1, 9), (336, 336), (337, 335), (14, 500), (501, 13), (97, 96), (1000, 3)]
    odd = {f"{w}x{h}": Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for w, h in sizes}
    return real | odd


@pytest.mark.parametrize(("name", "size"), list(itertools.product(pictures(), (336, 96))))
def test_crop_equals_transformers(name: str, size: int) -> None:
    image = pictures()[name]
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    expected = processor(image, return_tensors="np")["pixel_values"]
    ours = preprocess([image], Preprocessing(size, MEAN, STD))
    assert ours.dtype == np.float32
    assert np.abs(ours - expected).max() <= 1e-6
    # the 8-bit pixels behind them, exactly
    back = [np.rint((a[0].transpose(1, 2, 0) * STD + MEAN) * 255) for a in (ours, expected)]
    assert np.array_equal(*back)


def test_pad_keeps_the_borders_in_the_mean_colour() -> None:
    image = Image.new("RGB", (200, 100), (255, 0, 0))
    ours = preprocess([image], Preprocessing(96, MEAN, STD, mode="pad", resample=0))[0]
    values = np.rint((ours.transpose(1, 2, 0) * STD + MEAN) * 255)
    assert values[0, 0].tolist() == [122, 116, 104]  # int(255 * mean), as the official LLaVA pads
    assert values[48, 0].tolist() == [255, 0, 0] and values[48, 95].tolist() == [255, 0, 0]


def test_resize_ignores_the_aspect() -> None:
    image = Image.fromarray(data.coffee())
    ours = preprocess([image], Preprocessing(96, (0, 0, 0), (1, 1, 1), mode="resize"))[0]
    assert np.array_equal(np.rint(ours.transpose(1, 2, 0) * 255), np.asarray(image.resize((96, 96), Image.BICUBIC)))


def test_modes_and_rotation(tmp_path: Path) -> None:
    grey = Image.fromarray(data.camera())
    assert load_image(grey).mode == "RGB"
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert load_image(clear).getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").size == (20, 40)


def encoded(format: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(data.chelsea()).save(buffer, format)
    return buffer.getvalue()


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_truncated_and_flipped(format: str, tmp_path: Path) -> None:
    whole, path = encoded(format), tmp_path / "picture"
    for cut in range(0, len(whole) - 2, len(whole) // 10):
        path.write_bytes(whole[:cut])
        with pytest.raises(ImageError, match="picture"):
            load_image(path)
    rng = np.random.default_rng(0)
    for _ in range(100):
        flipped = bytearray(whole)
        for position in rng.integers(0, len(whole), 5):
            flipped[position] ^= int(rng.integers(1, 256))
        path.write_bytes(flipped)
        try:
            load_image(path)
        except ImageError as e:
            assert str(path) in str(e) and "\n" not in str(e)


def test_what_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("hello")
    (tmp_path / "b.png").write_bytes(b"")
    for path, what in (("a.png", "not a picture"), ("b.png", "empty"), ("c.png", "No such file"), (".", "directory")):
        with pytest.raises(ImageError, match=what):
            load_image(tmp_path / path)


def test_bombs(tmp_path: Path) -> None:
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    with pytest.raises(ImageError, match="pixels"):
        load_image(tmp_path / "bomb.png")
    with pytest.raises(ImageError, match="narrow"):
        preprocess([Image.new("RGB", (1_000_000, 1))], Preprocessing(336, MEAN, STD))
    with pytest.raises(ImageError, match="pixels"):
        preprocess([Image.new("RGB", (50_000, 1))], Preprocessing(336, MEAN, STD, mode="pad"))


def test_metadata_that_makes_no_sense() -> None:
    good = {"clip.vision.image_size": 336, "clip.vision.image_mean": list(MEAN), "clip.vision.image_std": list(STD)}
    assert Preprocessing.from_metadata(good, "f").mode == "crop"
    keys = Preprocessing.KEYS
    for change in (
        {"clip.vision.image_size": 0},
        {"clip.vision.image_mean": [1.0]},
        {"clip.vision.image_std": [0.0, 1.0, 1.0]},
        {keys["mode"]: "squash"},
        {keys["resample"]: 17},
        {keys["shortest_edge"]: 10},
        {keys["rescale"]: -1.0},
    ):
        with pytest.raises(ModelFileError, match="f: "):
            Preprocessing.from_metadata({**good, **change}, "f")
