"""Pixels: equal to transformers' CLIPImageProcessor, whatever the file; bad pictures named, in child processes."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import resource
import struct
import sys
import threading
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import fuzz_images
import numpy as np
import pytest
from numpy.typing import NDArray
from picture_files import every_kind, exif, heic, pdf, pdf_of, photo, png, png_chunk, saved
from PIL import Image
from skimage import data
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from local_llava.errors import ImageError, ModelFileError, UsageError
from local_llava.images import load_image, preprocess, with_mode
from local_llava.pictures import isolated
from local_llava.pictures.file_checks import check_gif, checked_jpeg
from local_llava.preprocessing import Preprocessing

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
REAL = ["astronaut", "brick", "camera", "cell", "checkerboard", "chelsea", "clock", "coffee", "coins", "colorwheel",
        "grass", "gravel", "horse", "hubble_deep_field", "immunohistochemistry", "logo", "microaneurysms", "moon",
        "page", "retina", "rocket", "text"]  # fmt: skip
SIZES = [
    (1, 1),
    (1, 9),
    (9, 1),
    (336, 336),
    (337, 335),
    (14, 500),
    (501, 13),
    (97, 96),
    (1000, 3),
    (2, 700),
    (335, 337),
]
KINDS = every_kind()
# transformers clips 16 bits and ignores transparency; PDF and HEIC it does not read.
ITS_OWN = [
    kind
    for kind, file in KINDS.items()
    if not kind.startswith(("pdf", "heic")) and not any(word in kind for word in ("16", "32", "float"))
    if not Image.open(io.BytesIO(file)).has_transparency_data
]


def pictures() -> dict[str, Image.Image]:
    rng = np.random.default_rng(0)
    odd = {f"{w}x{h}": Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for w, h in SIZES}
    return {name: load_image(getattr(data, name)()) for name in REAL} | odd


PICTURES = pictures()


def processor(size: int) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def eight_bits(pixels: NDArray[Any]) -> NDArray[Any]:
    return np.rint((pixels[0].transpose(1, 2, 0) * STD + MEAN) * 255)


def agree(ours: NDArray[Any], expected: NDArray[Any]) -> bool:
    assert ours.dtype == np.float32 and np.array_equal(eight_bits(ours), eight_bits(expected))
    return bool(np.abs(ours - expected).max() <= 1e-6)


@pytest.mark.parametrize(("name", "size"), list(itertools.product(PICTURES, (336, 96))))
def test_crop_equals_transformers(name: str, size: int) -> None:
    expected = processor(size)(PICTURES[name], return_tensors="np")["pixel_values"]
    assert agree(preprocess([PICTURES[name]], Preprocessing(size, MEAN, STD)), expected)


@pytest.mark.parametrize("kind", ITS_OWN)
def test_files_equal_transformers(kind: str) -> None:
    """From the file on: its reader turns pictures, too, and its processor converts to RGB."""
    from transformers.image_utils import load_image as its_load_image

    its = its_load_image(Image.open(io.BytesIO(KINDS[kind])))
    expected = processor(56)(its, return_tensors="np")["pixel_values"]
    assert agree(preprocess([load_image(KINDS[kind])], Preprocessing(56, MEAN, STD)), expected)


def expand2square(image: Image.Image) -> Image.Image:
    """The official LLaVA's padding, in numpy."""
    values, side = np.asarray(image), max(image.size)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = [int(m * 255) for m in MEAN]
    top, left = (side - image.height) // 2, (side - image.width) // 2
    square[top : top + image.height, left : left + image.width] = values
    return Image.fromarray(square)


@pytest.mark.parametrize(("name", "size"), list(itertools.product(PICTURES, (336, 96))))
def test_pad_equals_a_padded_square_in_transformers(name: str, size: int) -> None:
    expected = processor(size)(expand2square(PICTURES[name]), return_tensors="np")["pixel_values"]
    assert agree(preprocess([PICTURES[name]], Preprocessing(size, MEAN, STD, mode="pad")), expected)


@pytest.mark.parametrize("resample", range(6))
def test_padding_in_strips_changes_no_pixel(resample: int) -> None:
    rng = np.random.default_rng(resample)
    for width, height, edge in ((5000, 300, 96), (300, 5003, 96), (2001, 2100, 336), (7, 6, 96)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        how = Preprocessing(edge - 10, (0.48, 0.46, 0.41), (1, 1, 1), mode="pad", shortest_edge=edge, resample=resample)
        square = Image.new("RGB", (max(image.size),) * 2, tuple(int(m / how.rescale) for m in how.mean))
        square.paste(image, ((square.width - width) // 2, (square.width - height) // 2))
        expected = square.resize((edge, edge), Image.Resampling(resample)).crop((5, 5, edge - 5, edge - 5))
        ours = np.rint((preprocess([image], how)[0].transpose(1, 2, 0) + how.mean) * 255)
        assert np.array_equal(ours, np.asarray(expected)), (width, height)


def test_pad_keeps_the_borders_in_the_mean_colour() -> None:
    image = Image.new("RGB", (200, 100), (255, 0, 0))
    values = eight_bits(preprocess([image], Preprocessing(96, MEAN, STD, mode="pad", resample=0)))
    assert values[0, 0].tolist() == [122, 116, 104]  # int(255 * mean), as the official LLaVA pads
    assert values[48, 0].tolist() == [255, 0, 0] and values[48, 95].tolist() == [255, 0, 0]


def test_resize_ignores_the_aspect() -> None:
    image = Image.fromarray(data.coffee())
    ours = preprocess([image], Preprocessing(96, (0, 0, 0), (1, 1, 1), mode="resize"))[0]
    assert np.array_equal(np.rint(ours.transpose(1, 2, 0) * 255), np.asarray(image.resize((96, 96), Image.BICUBIC)))


def test_the_mode_is_the_users_choice() -> None:
    for mode in ("crop", "pad", "resize"):
        own = Preprocessing(96, MEAN, STD, mode=mode, shortest_edge=120, resample=2)
        assert with_mode(own, "checkpoint") is own
        assert with_mode(own, "pad").mode == "pad" and with_mode(own, "crop").mode == "crop"
        assert all(with_mode(own, choice).resample == 2 for choice in ("pad", "crop"))
    # "pad" shows all: a checkpoint's crop within the resized picture is its own.
    assert with_mode(Preprocessing(96, MEAN, STD, shortest_edge=120), "pad").shortest_edge == 96
    with pytest.raises(UsageError, match="checkpoint, pad or crop"):
        with_mode(Preprocessing(96, MEAN, STD), "squash")  # type: ignore[arg-type]


def test_every_kind_shows_the_cat() -> None:
    cat = np.asarray(photo(), np.float64)
    grey_cat = np.asarray(photo().convert("L"))
    for kind in ("png-rgb", "png-rgb-16", "png-animated", "bmp", "bmp-alpha", "tiff", "tiff-lzw", "tiff-cmyk",
                 "tiff-pages", "ppm"):  # fmt: skip
        assert np.array_equal(np.asarray(load_image(KINDS[kind])), cat), kind
    for kind in ("png-grey", "png-grey-16", "bmp-rle", "tiff-grey-16", "tiff-grey-16-big", "tiff-grey-32", "tiff-float",
                 "ppm-grey", "ppm-grey-16"):  # fmt: skip
        assert np.array_equal(grey(KINDS[kind]), grey_cat), kind
    # Codecs, palettes and other colour spaces change it; a picture that is inverted or turned differs by 30 and more.
    for kind in ("jpeg", "jpeg-progressive", "jpeg-cmyk", "jpeg-mpo", "webp", "webp-animated", "gif", "gif-animated",
                 "png-palette", "bmp-palette", "tiff-jpeg", "tiff-packbits-palette", "tiff-lab", "avif",
                 "avif-animated", "heic"):  # fmt: skip
        assert np.abs(np.asarray(load_image(KINDS[kind])) - cat).mean() < 7, kind
    for mode in ("RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "P"):
        given = photo().convert("RGBA" if mode == "RGBX" else "RGB").convert(mode)
        assert np.abs(np.asarray(load_image(given)) - cat).mean() < (20 if mode == "P" else 3), mode


def grey(file: Any) -> NDArray[np.uint8]:
    values = np.asarray(load_image(file))
    assert (values == values[:, :, :1]).all()
    return values[:, :, 0]


def test_sixteen_bits_are_scaled() -> None:
    deep = np.linspace(0, 65535, 60 * 44).round().astype(np.uint16).reshape(44, 60)
    expected = np.rint(deep / 257)
    big, little = Image.fromarray(deep.astype(">u2")), Image.fromarray(deep)
    assert (big.mode, little.mode) == ("I;16B", "I;16")
    wide = Image.fromarray(deep.astype(np.int32))
    files = [saved(little, "PNG"), *(saved(image, "TIFF", compression="tiff_lzw") for image in (little, wide))]
    files += [
        *(saved(image, "TIFF") for image in (little, big, wide)),
        b"P5 60 44 65535 " + deep.astype(">u2").tobytes(),
    ]
    for given in (*files, little, big, wide, deep, deep.astype(">u2"), deep[:, :, None]):
        assert np.array_equal(grey(given), expected)
    assert np.abs(grey(heic(little)) - expected).mean() < 2  # 10 bits, and lossy
    # Pillow keeps the high byte of coloured samples.
    rgb = np.stack([deep, deep[::-1], 65535 - deep], -1)
    assert np.abs(np.asarray(load_image(png(rgb, 2, 16))) - rgb / 257).max() < 1
    assert np.abs(np.asarray(load_image(rgb)) - rgb / 257).max() <= 0.5
    assert np.array_equal(grey(Image.fromarray((deep / 65535).astype(np.float32))), expected)
    for values in (np.array([[-1, 5]], np.int32), np.array([[70000, 5]], np.int32)):
        with pytest.raises(ImageError, match="32-bit values from"):
            load_image(Image.fromarray(values))


def tiff(pixels: bytes, width: int, height: int, *tags: tuple[int, int]) -> bytes:
    """A TIFF of one strip with these tags beside the obvious ones."""
    entries = sorted(
        {256: width, 257: height, 259: 1, 277: 1, 278: height, 279: len(pixels), 273: 0, **dict(tags)}.items()
    )
    start = 8 + 2 + 12 * len(entries) + 4
    body = b"".join(struct.pack("<HHII", t, 4, 1, start if t == 273 else v) for t, v in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4) + pixels


def test_deep_greys_of_tiff() -> None:
    deep = np.array([[0, 1000, 40000, 65535]], "<u2")
    # 0 is white
    assert grey(tiff(deep.tobytes(), 4, 1, (258, 16), (262, 0))).tolist() == [[255, 251, 99, 0]]
    # 12 bits: 0, 0x800, 0xFFF, 0x100
    assert grey(tiff(bytes.fromhex("000800 FFF100"), 4, 1, (258, 12), (262, 1))).tolist() == [[0, 128, 255, 16]]


def test_transparency_is_white() -> None:
    rng = np.random.default_rng(0)
    colour, alpha = rng.integers(0, 256, (44, 60, 3), np.uint8), rng.integers(0, 256, (44, 60, 1), np.uint8)
    expected = colour * (alpha / 255) + 255 * (1 - alpha / 255)
    rgba = np.concatenate([colour, alpha], 2)
    image = Image.fromarray(rgba)
    premultiplied = image.convert("RGBa")
    assert premultiplied.mode == "RGBa"
    wide = png(rgba.astype(np.uint16) * 257, 6, 16)
    files = [saved(image, "PNG"), saved(image, "WEBP", lossless=True, exact=True), saved(image, "TIFF"), wide]
    for given in (*files, image, rgba):
        assert np.abs(np.asarray(load_image(given)) - expected).max() <= 0.5
    assert np.abs(np.asarray(load_image(premultiplied)) - expected).max() <= 2
    grey_alpha = image.convert("LA")
    shade = np.asarray(grey_alpha.getchannel("L"))[:, :, None]
    expected = (shade * (alpha / 255) + 255 * (1 - alpha / 255)) * np.ones(3)
    for given in (saved(grey_alpha, "PNG"), grey_alpha, grey_alpha.convert("La")):
        assert np.abs(np.asarray(load_image(given)) - expected).max() <= 2


def test_transparent_colours_are_white() -> None:
    palette = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("P")
    palette.putpalette([v for i in range(256) for v in (i, 255 - i, 7)])
    for key in (5, bytes([255] * 5 + [0])):
        values = np.asarray(load_image(saved(palette, "PNG", transparency=key))).reshape(256, 3)
        assert values[5].tolist() == [255, 255, 255] and values[6].tolist() == [6, 249, 7]
    half = np.asarray(load_image(saved(palette, "PNG", transparency=bytes([255, 128])))).reshape(256, 3)
    assert np.abs(half[1] - (np.array([1, 254, 7]) * 128 + 255 * 127) / 255).max() <= 1
    assert load_image(saved(palette, "GIF", transparency=9)).getpixel((9, 0)) == (255, 255, 255)
    with_alpha = palette.convert("PA")
    assert with_alpha.mode == "PA" and load_image(with_alpha).getpixel((5, 0)) == (5, 250, 7)

    deep = np.arange(16, dtype=np.uint16).reshape(4, 4) * 4000
    values = np.asarray(load_image(png(deep, 0, 16, png_chunk(b"tRNS", struct.pack(">H", 8000)))))[:, :, 0].ravel()
    assert values[2] == 255 and values[1] == round(4000 / 257) and values[3] == round(12000 / 257)
    colours = np.stack([deep, deep, deep], -1)
    values = np.asarray(load_image(png(colours, 2, 16, png_chunk(b"tRNS", struct.pack(">HHH", 8000, 8000, 8000)))))
    assert (values.reshape(16, 3)[2] == 255).all() and (values.reshape(16, 3)[3] < 60).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotation(orientation: int) -> None:
    image = photo()
    values = np.asarray(image)
    expected = {
        1: values,
        2: values[:, ::-1],
        3: values[::-1, ::-1],
        4: values[::-1],
        5: values.transpose(1, 0, 2),
        6: values.transpose(1, 0, 2)[:, ::-1],
        7: values[::-1, ::-1].transpose(1, 0, 2),
        8: values.transpose(1, 0, 2)[::-1],
    }[orientation]
    for format, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})):
        ours = np.asarray(load_image(saved(image, format, exif=exif(orientation), **options)))
        assert np.array_equal(ours, expected), format
    lossy = [saved(image, format, exif=exif(orientation)) for format in ("JPEG", "AVIF")]
    for file in (*lossy, heic(image, orientation)):
        ours = np.asarray(load_image(file), np.float64)
        assert ours.shape == expected.shape and np.abs(ours - expected).mean() < 8
    deep = np.asarray(image.convert("L"), np.uint16) * 257
    turned = np.asarray(load_image(saved(Image.fromarray(deep), "PNG", exif=exif(orientation))))
    assert turned.shape == expected.shape


def test_damaged_metadata_are_no_reason_to_refuse_a_picture() -> None:
    for junk in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40):
        assert load_image(saved(photo(), "JPEG", exif=junk)).size == photo().size
    assert load_image(saved(photo(), "PNG", icc_profile=b"junk")).size == photo().size


def test_arrays() -> None:
    rgb = np.asarray(photo())
    for array in (
        rgb,
        rgb.astype(np.float64) / 255,
        rgb.astype(np.float32) / 255,
        rgb.astype(np.uint16) * 257,
        rgb[:, ::-1][:, ::-1],
    ):
        assert np.array_equal(np.asarray(load_image(array)), rgb)
    mask = rgb[:, :, 0] > 100
    for array in (mask, mask[:, :, None], mask.astype(np.float16)):
        assert np.array_equal(grey(array), mask * 255)
    for array, what in (
        (rgb.astype(np.int64), "dtype int64; accepted are uint8"),
        (rgb.astype(np.complex64), "dtype complex64"),
        (rgb.astype(object), "dtype object"),
        (rgb.astype(np.float32), "floating point from"),
        (np.full((4, 4), np.nan), "floating point from nan"),
        (np.full((4, 4), -0.1), "floating point from -0.1"),
        (rgb[None], r"shape \[1, 44, 60, 3\]"),
        (rgb[:, :, :2], r"shape \[44, 60, 2\]"),
        (rgb[0, 0], r"shape \[3\]"),
        (rgb[:0], "60 x 0 has no pixels"),
        (np.broadcast_to(np.uint8(0), (20000, 20000)), "20000 x 20000 is more than"),
    ):
        with pytest.raises(ImageError, match=what):
            load_image(array)


def test_what_is_no_picture(tmp_path: Path) -> None:
    for content, what in (
        (b"hello", "not a picture; accepted are PNG, JPEG"),
        (b"", "an empty file"),
        (b"<html>", "a web page, not a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG"),
        (b"P3 1 1 255 1 2 3", "a PPM in text"),
        (b"P6 1 1 7 \1\2\3", "a PPM in text, or of an odd depth"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not a picture"),
        (b"8BPS\0\1" + bytes(40), "not a picture"),
    ):
        path = tmp_path / "a.png"
        path.write_bytes(content)
        with pytest.raises(ImageError, match=what) as caught:
            load_image(path)
        assert str(caught.value).startswith(f"{path}: ")


def test_a_picture_that_mentions_pdf_is_a_picture() -> None:
    assert load_image(saved(photo(), "JPEG", comment=b"made of %PDF-1.7")).size == photo().size
    assert load_image(b"\n\n" + KINDS["pdf-drawn"]).size == (1536, 768)


def test_bombs() -> None:
    def header(width: int, height: int) -> bytes:
        head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + head + png_chunk(b"IDAT", b"")

    def gif(metadata: bytes) -> bytes:
        return b"GIF89a\1\0\1\0\0\0\0" + metadata + b",\0\0\0\0\1\0\1\0\0\2\2D\1\0;"

    text = png_chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(200 << 20), 9))
    many = saved(Image.new("RGB", (4000, 4000)), "JPEG", progressive=True)
    scan = many[many.rindex(b"\xff\xda") : -2]
    for what, file in (
        ("pixels", header(2**31 - 1, 2**31 - 1)),
        ("pixels", header(20000, 20000)),
        ("pixels", b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\1\0\1\0\0\2\2D\1\0;"),
        ("pixels", b"P6 100000 100000 255\n"),
        ("pixels", tiff(b"", 100000, 100000, (258, 8), (262, 1))),
        ("damaged", tiff(b"", 1, 1, (258, 8), (262, 1), (259, 5), (322, 65536), (323, 65536), (324, 8), (325, 9))),
        ("too large", png(np.zeros((1, 1)), 0, 8, text)),
        ("scans of 4000 x 4000", many[:-2] + scan * 300 + b"\xff\xd9"),
        ("segments", b"\xff\xd8" + b"\xff\xfe\0\2" * 100_000),
        ("5000 blocks", gif(b"!\xfe" + (b"\xff" + b"a" * 255) * 100_000 + b"\0")),
        ("5000 blocks", gif(b"!\xfe\1a\0" * 1_000_000)),
    ):
        began = time.monotonic()
        with pytest.raises(ImageError, match=what):
            load_image(file)
        assert time.monotonic() - began < 10
    for image in (Image.new("RGB", (1_000_000, 1)), Image.new("RGB", (1, 1_000_000))):
        for mode in ("crop", "pad"):
            with pytest.raises(ImageError, match="too narrow"):
                preprocess([image], Preprocessing(336, MEAN, STD, mode=mode))
    assert load_image(pdf([b"1 0 0 rg 0 0 9 9 re f"], (2_000_000_000, 1))).size == (1536, 1)


def test_metadata_without_end() -> None:
    """Tags that all have the same bytes for their value, which some releases of Pillow copy for each."""
    size = 600_000
    tags = b"".join(struct.pack("<HHII", 1000 + i, 1, size, 0) for i in range(size // 12 - 10))
    ifd = b"II*\0" + struct.pack("<IH", 8, len(tags) // 12) + tags + bytes(200)
    parts = [b"Exif\0\0" + ifd[i : i + 65000] for i in range(0, len(ifd), 65000)]
    plain = saved(photo(), "JPEG")
    segments = b"".join(b"\xff\xe1" + struct.pack(">H", len(part) + 2) + part for part in parts)
    safe, scans = checked_jpeg(plain[:2] + segments + plain[2:], "here")
    assert scans == 1 and safe.count(b"Exif\0\0") == 1 and len(safe) == len(plain) + len(segments)
    assert checked_jpeg(KINDS["jpeg-exif"], "here")[0] is KINDS["jpeg-exif"]
    assert checked_jpeg(KINDS["jpeg-progressive"], "here")[1] == 10
    check_gif(KINDS["gif-animated"], "here")

    webp = saved(photo(), "WEBP", exif=b"Exif\0\0" + ifd)
    files = [plain[:2] + segments + plain[2:], png(np.zeros((1, 1)), 0, 8, png_chunk(b"eXIf", ifd)), webp]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for file in files:
        began = time.monotonic()
        load_image(file)
        assert time.monotonic() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000  # KiB
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of writing such
        avif = saved(photo(), "AVIF", exif=ifd)
    for file in (avif, ifd):
        with contextlib.suppress(ImageError):
            load_image(file)


def test_a_child_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forms that draw the next form ten times each, twelve deep: a million million of them."""
    form = (
        b"<</Type/XObject/Subtype/Form/BBox[0 0 9 9]/Resources<</XObject<</F %d 0 R>>>>/Length 60>>stream\n%sendstream"
    )
    page = b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]/Resources<</XObject<</F 5 0 R>>>>/Contents 4 0 R>>"
    pages = [b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[3 0 R]/Count 1>>", page]
    forms = [form % (6 + i, b"/F Do " * 10 + b"\n") for i in range(12)]
    monkeypatch.setattr(isolated, "MAX_SECONDS", 1.5)
    with pytest.raises(ImageError, match=r"PDF takes longer than 1\.5 seconds"):
        load_image(pdf_of([*pages, b"<</Length 5>>stream\n/F Do\nendstream", *forms]))
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(ImageError, match="no process can be started"):
        load_image(KINDS["tiff"])


def test_pdfs_that_are_none() -> None:
    for file, what in (
        (b"%PDF-1.7\nnothing", "damaged or truncated PDF"),
        (locked_pdf(), "locked with a password"),
    ):
        with pytest.raises(ImageError, match=what):
            load_image(file)


def locked_pdf() -> bytes:
    """Encrypted by the standard handler (PDF 32000-1, 7.6.3) with keys that the empty password does not give."""
    lock = b"<</Filter/Standard/V 1/R 2/P -4/O<" + b"11" * 32 + b">/U<" + b"22" * 32 + b">>>"
    plain = pdf([b""])
    body, table = plain.split(b"xref\n", 1)
    return body + b"xref\n" + table.replace(b"/Root 1 0 R", b"/Root 1 0 R/ID[<aa><aa>]/Encrypt " + lock)


def test_damaged_pictures_in_child_processes() -> None:
    """Every kind cut at ten places, then changed in many ways. By hand: python tests/fuzz_images.py --count 5000."""
    # Those that start a process for each picture are the slow ones.
    isolated_kinds = "tiff-lzw,tiff-jpeg,tiff-group4,tiff-grey-16,avif,heic,heic-alpha,pdf"
    for kinds, count in (("png,jpeg,webp,gif,bmp,ppm", 1200), (isolated_kinds, 9 * 14)):
        outcomes, wrong, slowest, memory, noise = fuzz_images.run(seed=0, count=count, kinds=kinds)
        assert not wrong and not noise
        assert slowest < 30 and memory < 1500 and sum(outcomes.values()) == count
        assert all(outcomes[f"{kind.split('-')[0]} error"] for kind in kinds.split(","))
        assert any(outcome.endswith("picture") for outcome in outcomes)


def test_pillow_warns_no_user(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    loud = [
        saved(Image.new("1", (12000, 9000)), "PNG"),  # what Pillow calls a bomb, and is none yet
        saved(photo(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x09\0\0\0\x50"),
        tiff(bytes(16), 4, 4, (258, 8), (262, 1), (305, 99999), (339, 9)),
    ]
    before = list(warnings.filters)

    def load(file: bytes) -> None:
        with contextlib.suppress(ImageError):
            load_image(file)

    with warnings.catch_warnings(record=True) as seen, caplog.at_level(logging.INFO):
        warnings.simplefilter("always")
        outer = list(warnings.filters)
        threads = [threading.Thread(target=load, args=(file,)) for file in loud * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert warnings.filters == outer
        warnings.warn("one's own", stacklevel=1)
    assert [str(w.message) for w in seen] == ["one's own"]
    assert warnings.filters == before and capfd.readouterr().err == "" and caplog.text == ""


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
