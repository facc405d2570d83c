"""From a picture to the exact pixels that the tower was trained on.

Knows Pillow and the preprocessing of transformers' CLIPImageProcessor (its Pillow version) and of the official
LLaVA's padding. Knows no model file.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from local_llava.errors import ImageError
from local_llava.types import Preprocessing

ImageLike: TypeAlias = str | os.PathLike[str] | Image.Image

MAX_PIXELS = 200_000_000
"""Largest picture that is decoded, and largest that it is resized to on the way to the crop."""

FORMATS = ("PNG", "JPEG")


def load_image(source: ImageLike) -> Image.Image:
    """An upright RGB picture from a path or a PIL image.

    EXIF rotation is applied; transparent pixels are put on white.

    Raises:
        ImageError: Not a file, not a PNG or JPEG, truncated, or larger than MAX_PIXELS.
    """
    if isinstance(source, Image.Image):
        return _upright_rgb(source, "image")
    path = Path(source)
    try:
        # Pillow warns of what it calls decompression bombs below our own limit, which is an error.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                return _upright_rgb(image, str(path))
    except UnidentifiedImageError as e:
        empty = path.stat().st_size == 0
        raise ImageError(f"{path}: {'an empty file' if empty else 'not a picture'}; PNG and JPEG are accepted") from e
    except Image.DecompressionBombError as e:
        raise ImageError(f"{path}: more than {MAX_PIXELS} pixels") from e
    except OSError as e:
        if e.errno is not None:
            raise ImageError(f"{path}: cannot be read: {e.strerror}") from e
        raise ImageError(f"{path}: damaged or truncated picture: {e}") from e
    # Pillow's decoders raise these, and struct.error, on damaged files.
    except (ValueError, SyntaxError, IndexError, KeyError, EOFError, ArithmeticError) as e:
        raise ImageError(f"{path}: damaged picture: {e}") from e


def _upright_rgb(image: Image.Image, where: str) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"{where}: {image.width} x {image.height} is more than {MAX_PIXELS} pixels")
    if image.width == 0 or image.height == 0:
        raise ImageError(f"{where}: {image.width} x {image.height} has no pixels")
    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:
        layer = upright.convert("RGBA")
        upright = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        upright.alpha_composite(layer)
    return upright.convert("RGB")


def preprocess(images: Sequence[Image.Image], how: Preprocessing) -> NDArray[np.float32]:
    """Pixels of RGB pictures.

    Args:
        images: RGB pictures of any size.
        how: The preprocessing of the tower.

    Returns:
        float32 [n_images, 3, image_size, image_size], normalised. Equal to CLIPImageProcessor's to 1e-6 in mode
        "crop".

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
    """The 8-bit picture of image_size x image_size."""
    resample, size = Image.Resampling(how.resample), how.image_size
    if how.mode == "resize":
        return image.resize((size, size), resample)
    if how.mode == "pad":
        image = _pad(image, how)
    short, long = sorted(image.size)
    # transformers.image_transforms.get_resize_output_image_size: the long edge is rounded down
    new_long = int(how.shortest_edge * long / short)
    if how.shortest_edge * new_long > MAX_PIXELS:
        raise ImageError(f"image: {image.width} x {image.height} is too narrow to be resized")
    wide = image.width > image.height
    image = image.resize((new_long, how.shortest_edge) if wide else (how.shortest_edge, new_long), resample)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _pad(image: Image.Image, how: Preprocessing) -> Image.Image:
    """A square with the picture in its middle and the mean colour around it: expand2square of the official LLaVA."""
    side = max(image.size)
    if side * side > MAX_PIXELS:
        raise ImageError(f"image: {image.width} x {image.height} padded to a square is more than {MAX_PIXELS} pixels")
    red, green, blue = (int(m / how.rescale) for m in how.mean)
    square = Image.new("RGB", (side, side), (red, green, blue))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
