"""From a picture of any mode, or an array, to upright 8-bit RGB.

Knows Pillow's modes and numpy's dtypes. Knows no file and no tower. numpy is loaded where it is needed: a process that
decodes one picture mostly does without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from PIL import Image

from local_llava.errors import ImageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_PIXELS = 178_956_970
"""Most pixels of a picture, and most that it is resized to on the way to the crop: where Pillow, too, sees a bomb."""

# The EXIF orientations that a picture is not upright in, and what rights it.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112
# What a segment of a JPEG can hold. Pillow may copy all of it for each tag, a twelfth as many as it has bytes.
_MAX_EXIF = 1 << 16
_TIFF_BITS_PER_SAMPLE, _TIFF_PHOTOMETRIC = 258, 262


def check_size(width: int, height: int, where: str) -> None:
    """Check a size before memory is taken for it.

    Raises:
        ImageError: No pixels, or more than MAX_PIXELS.
    """
    if width < 1 or height < 1:
        raise ImageError(f"{where}: {width} x {height} has no pixels")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{where}: {width} x {height} is more than {MAX_PIXELS} pixels")


def upright_rgb(image: Image.Image, where: str) -> Image.Image:
    """A copy in mode RGB, turned as its EXIF data say, with transparent parts on white.

    Greys of 16 bits are scaled to 8. 32-bit integers are taken for 16 bits if they are 0 to 65535, floating point for
    shares of white if it is 0 to 1. Colours are not managed: ICC profiles are ignored, as transformers does.

    Args:
        image: Any mode of Pillow; loaded here if it is not yet.
        where: Names the picture in errors.

    Raises:
        ImageError: No pixels, more than MAX_PIXELS, or 32-bit values out of those ranges.
        Exception: Whatever Pillow raises on damaged files.
    """
    check_size(image.width, image.height, where)
    image.load()
    turn = _TURNS.get(_orientation(image))
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image, where)
    if turn is not None:
        image = image.transpose(turn)
    if image.has_transparency_data:
        image = _on_white(image)
    return image.convert("RGB")


def from_array(array: NDArray[Any], where: str = "array") -> Image.Image:
    """An array as a picture in mode RGB.

    Args:
        array: [height, width] or [height, width, 1, 3 or 4 (RGBA)]; uint8, uint16 (scaled to 8 bits), bool, or floating
            point from 0 to 1.
        where: Names the array in errors.

    Raises:
        ImageError: Another shape or dtype, values out of range, or a size that is refused.
    """
    import numpy as np

    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4):
        accepted = "[height, width] and [height, width, 1, 3 or 4]"
        raise ImageError(f"{where}: shape {list(array.shape)} is no picture; accepted are {accepted}")
    check_size(array.shape[1], array.shape[0], where)
    values = _to_uint8(array, where)
    if array.ndim == 3 and channels == 1:
        values = values[:, :, 0]
    return upright_rgb(Image.fromarray(np.ascontiguousarray(values)), where)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8. Damaged metadata, and too much of them, are no reason to refuse a picture: 1."""
    try:
        if any(len(image.info.get(name, "")) > _MAX_EXIF for name in ("exif", "Raw profile type exif")):
            return 1
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow's parser raises whatever the bytes lead it into
        return 1
    return value if isinstance(value, int) else 1


def _eight_bits(image: Image.Image, where: str) -> Image.Image:
    """A deep grey picture (modes I;16*, I and F) in mode L; what its transparent value marks is white."""
    import numpy as np

    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    if image.mode == "I":
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise ImageError(f"{where}: 32-bit values from {low} to {high}; accepted are 0 to 65535")
        values = values.astype(np.uint16)
    # TIFF's 12 bits come unscaled.
    bits = tags.get(_TIFF_BITS_PER_SAMPLE, (16,))[0] if image.mode.startswith("I;16") else 16
    grey = _to_uint8(values, where, bits if 8 < bits < 16 else 16)
    if image.mode.startswith("I;16") and tags.get(_TIFF_PHOTOMETRIC) == 0:
        grey = 255 - grey  # 0 is white, which Pillow heeds only in 8 bits
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def _to_uint8(values: NDArray[Any], where: str, bits: int = 16) -> NDArray[np.uint8]:
    """Values of any accepted dtype, scaled to 0..255 and rounded; of 16-bit integers only the low `bits` are in use."""
    import numpy as np

    scaled: NDArray[np.uint8]
    kind = values.dtype.str[1:]  # without the byte order
    if kind == "u1":
        scaled = values
    elif kind == "b1":
        scaled = values.astype(np.uint8) * np.uint8(255)
    elif kind == "u2":
        table = np.minimum(np.rint(np.arange(65536) * (255 / (2**bits - 1))), 255).astype(np.uint8)
        scaled = table[values]
    elif kind[0] == "f":
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 1):  # NaN is neither
            raise ImageError(f"{where}: floating point from {low:g} to {high:g}; accepted are 0 to 1")
        scaled = np.rint(values.astype(np.result_type(values, np.float32)) * 255).astype(np.uint8)
    else:
        accepted = "uint8, uint16, bool, and floating point from 0 to 1"
        raise ImageError(f"{where}: dtype {values.dtype}; accepted are {accepted}")
    return scaled


def _on_white(image: Image.Image) -> Image.Image:
    """A picture with transparent parts, in mode RGBA on a white ground."""
    key = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:
        # A PNG of 16 bits: Pillow keeps the high byte of each sample, and all of the transparent colour.
        image.info["transparency"] = tuple(v >> 8 for v in key)
    if image.mode == "La":  # premultiplied; Pillow has no direct way
        image = image.convert("LA")
    layer = image if image.mode == "RGBA" else image.convert("RGBA")
    white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
    white.alpha_composite(layer)
    return white
