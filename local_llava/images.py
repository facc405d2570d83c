"""From whatever names a picture to the exact pixels that the tower was trained on.

Knows the preprocessing of transformers' CLIPImageProcessor and LlavaNextImageProcessor (their Pillow versions) and of
the official LLaVA's padding. Knows no model file. Bytes come from `sources`, pictures out of them from `decode`, modes
and arrays are `pixels`'s; what LLaVA-NeXT cuts out of a picture is `anyres`'s.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from local_llava.errors import ImageError, UsageError
from local_llava.pictures import anyres, clipboard
from local_llava.pictures.decode import decode, rgb_of
from local_llava.pictures.pixels import MAX_PIXELS, from_array
from local_llava.pictures.sources import read_source
from local_llava.preprocessing import Preprocessing
from local_llava.types import PreprocessChoice

__all__ = ["ImageLike", "load_image", "preprocess", "preprocess_tiles", "with_mode"]

ImageLike: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image.Image | NDArray[Any]
"""What `load_image` takes."""

_STRIP_PIXELS = 1 << 22
"""Pixels of the square that are in memory at a time while a picture is padded."""


def load_image(source: ImageLike, *, remote: bool = True, local: bool = True) -> Image.Image:
    """An upright picture in mode RGB.

    Pictures are turned as their EXIF data say and put on white where they are transparent; deep greys are scaled to 8
    bits; of an animation comes the first frame. The content decides on the format, not a name.

    Args:
        source: A path (of a PDF, the end `#page=3` picks a page; otherwise the first), as `str` or PathLike. As `str`
            also an http or https URL, a data URL, "-" for standard input, or "clipboard:" for what was copied on a
            desktop. Bytes, or a binary file object, which is read from where it stands. A PIL image. A numpy array
            [height, width] or [height, width, 1, 3 or 4] of uint8, uint16, bool, or floating point from 0 to 1.
        remote: Whether a URL may be fetched. Pass False where the URL does not come from the user of this computer.
        local: Whether `source` may name what is on this computer: a file, standard input, the clipboard. Pass False for
            text that strangers send; data URLs are what is left with both off.

    Raises:
        ImageError: It cannot be read or fetched, is no picture or damaged, is larger than MAX_BYTES (`sources`) or
            MAX_PIXELS (`pixels`), needs an extra that is not installed, or is not allowed.
    """
    if isinstance(source, Image.Image):
        return rgb_of(source)
    if isinstance(source, np.ndarray):
        return from_array(source)
    if source == clipboard.NAME:
        if not local:
            raise ImageError("the clipboard is not accepted here; accepted are data URLs and URLs")
        found = clipboard.read_clipboard()
        if isinstance(found, Image.Image):
            return rgb_of(found, "clipboard")
        return decode(found, "clipboard") if isinstance(found, bytes) else load_image(found)
    encoded = read_source(source, remote=remote, local=local)
    return decode(encoded.data, encoded.where, encoded.page)


def with_mode(how: Preprocessing, choice: PreprocessChoice) -> Preprocessing:
    """The preprocessing that a user chose.

    Args:
        how: What the mmproj says.
        choice: "checkpoint" for that; "pad" for the whole picture, with bars of the mean colour that make it square;
            "crop" for its middle, as large as it can be. Either shows one tile, also to LLaVA-NeXT: less detail than
            its tiles, for a fifth to a third of the tokens and of the time.

    Raises:
        UsageError: Another choice.
    """
    if choice == "checkpoint" or (choice == how.mode and not how.grid):
        return how
    if choice not in ("pad", "crop"):
        raise UsageError(f"preprocess must be checkpoint, pad or crop, not {choice!r:.40}")
    # A shortest edge beyond the crop belongs to the checkpoint's own mode: it would cut off what the choice is to show.
    return replace(how, mode=choice, shortest_edge=how.image_size, grid=())


def preprocess_tiles(image: Image.Image, how: Preprocessing) -> NDArray[np.float32]:
    """Pixels of all that the tower sees of one picture.

    Args:
        image: An RGB picture of any size.
        how: The preprocessing of the tower.

    Returns:
        float32 [n_tiles, 3, image_size, image_size], normalised: without a grid, the one tile of `preprocess`. With
        one, the whole picture, whatever its aspect, and then its tiles by rows; equal to LlavaNextImageProcessor's to
        1e-6.

    Raises:
        ImageError: A picture is so narrow that it would grow beyond MAX_PIXELS.
    """
    if not how.grid:
        return preprocess([image], how)
    whole = _stretched(image, how.shortest_edge, Image.Resampling(how.resample))
    # As in transformers, every tile takes the steps of a picture, which change it only if the shortest edge is cropped.
    return preprocess([whole, *anyres.cut(image, how)], how)


def preprocess(images: Sequence[Image.Image], how: Preprocessing) -> NDArray[np.float32]:
    """Pixels of RGB pictures, one tile each.

    Args:
        images: RGB pictures of any size.
        how: The preprocessing of the tower; its grid is left aside.

    Returns:
        float32 [n_images, 3, image_size, image_size], normalised. Equal to CLIPImageProcessor's to 1e-6 in mode
        "crop", and in mode "pad" to what it makes of the picture padded to a square.

    Raises:
        ImageError: A picture is so narrow that it would grow beyond MAX_PIXELS.
    """
    size = how.image_size
    pixels = np.empty((len(images), 3, size, size), np.float32)
    mean, std = np.asarray(how.mean, np.float32), np.asarray(how.std, np.float32)
    for i, image in enumerate(images):
        values = np.asarray(_square(image, how), np.float64) * how.rescale
        pixels[i] = ((values.astype(np.float32) - mean) / std).transpose(2, 0, 1)
    return pixels


def _square(image: Image.Image, how: Preprocessing) -> Image.Image:
    """The 8-bit picture of image_size x image_size: what the tower sees."""
    resample, size, edge = Image.Resampling(how.resample), how.image_size, how.shortest_edge
    if how.mode == "resize":
        return _stretched(image, size, resample)
    if how.mode == "pad":
        image = _padded(image, how, resample)
    else:
        short, long = sorted(image.size)
        # transformers.image_transforms.get_resize_output_image_size: the long edge is rounded down
        new_long = int(edge * long / short)
        if edge * new_long > MAX_PIXELS:
            raise _too_narrow(image)
        image = image.resize((new_long, edge) if image.width > image.height else (edge, new_long), resample)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _stretched(image: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
    """The picture as a square of `size`, whatever its aspect."""
    if size * image.height > MAX_PIXELS:  # Pillow resizes all rows before the columns
        raise _too_narrow(image)
    return image.resize((size, size), resample)


def _padded(image: Image.Image, how: Preprocessing, resample: Image.Resampling) -> Image.Image:
    """expand2square of the official LLaVA, resized to shortest_edge: the picture amid the mean colour.

    Pillow resizes rows first, each by itself, and then columns. So the square is made and its rows are resized a strip
    at a time, with the same pixels in the end: a long screenshot needs no square of its length.
    """
    side, edge = max(image.size), how.shortest_edge
    if edge * side > MAX_PIXELS:
        raise _too_narrow(image)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    red, green, blue = (int(m / how.rescale) for m in how.mean)
    narrow = Image.new("RGB", (edge, side))
    rows = max(1, _STRIP_PIXELS // side)
    for y in range(0, side, rows):
        strip = Image.new("RGB", (side, min(rows, side - y)), (red, green, blue))
        strip.paste(image, (left, top - y))
        narrow.paste(strip.resize((edge, strip.height), resample), (0, y))
    return narrow.resize((edge, edge), resample)


def _too_narrow(image: Image.Image) -> ImageError:
    return ImageError(f"image: {image.width} x {image.height} is too narrow to be resized")
