"""From the bytes of a picture file to upright RGB.

Knows the formats, by their content and never by a name, and where each is decoded. Knows not where the bytes come from
(`sources`), nor what becomes of the picture (`images`).
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, UnidentifiedImageError

from local_llava.errors import ImageError
from local_llava.pictures.file_checks import check_gif, checked_jpeg
from local_llava.pictures.isolated import decode_apart
from local_llava.pictures.pixels import MAX_PIXELS, check_size, upright_rgb

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM")
"""Pillow's names of what it decodes in this process. The others are decoded by `isolated`."""

ACCEPTED = "PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF, PPM, and with their extras HEIC and PDF"

MAX_SCANNED_PIXELS = 4_000_000_000
"""Most pixels times scans of a progressive JPEG. Files have about ten scans; each costs a pass over all pixels, however
few bytes it has."""

# Byte order and version, BigTIFF last.
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PILLOW_STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM", b"P4", b"P5", b"P6")
_AVIF_BRANDS = {b"avif", b"avis"}
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}


def decode(data: bytes, where: str, page: int | None = None) -> Image.Image:
    """An upright RGB picture from a file's bytes: the first frame of an animation, one page of a PDF.

    Args:
        data: The whole file.
        where: Names it in errors.
        page: Page of a PDF, from 1; None for the first.

    Raises:
        ImageError: Not a picture, damaged or truncated, too large, a page was named of what is no PDF, or the extra
            that its format needs is missing.
    """
    kind = _kind(data)
    if page is not None and kind != "PDF":
        raise ImageError(f"{where}: #page= picks a page of a PDF, and this is none")
    if kind != "Pillow":
        return decode_apart(kind, data, where, 1 if page is None else page)
    try:
        with _quiet_pillow():
            return _by_pillow(data, where)
    except ImageError:
        raise
    except UnidentifiedImageError as e:
        raise ImageError(f"{where}: {_what_it_is(data)}; accepted are {ACCEPTED}") from e
    except Image.DecompressionBombError as e:
        raise ImageError(f"{where}: more than {MAX_PIXELS} pixels") from e
    except MemoryError as e:
        raise ImageError(f"{where}: not enough memory to decode it") from e
    except Exception as e:  # on damaged files Pillow's plugins raise whatever the bytes lead them into
        raise ImageError(f"{where}: damaged or truncated picture: {_one_line(e)}") from e


def rgb_of(image: Image.Image, where: str = "image") -> Image.Image:
    """An upright RGB copy of a picture that Pillow has open.

    Raises:
        ImageError: It cannot be loaded, or its size or values are refused.
    """
    try:
        with _quiet_pillow():
            return upright_rgb(image, where)
    except ImageError:
        raise
    except MemoryError as e:
        raise ImageError(f"{where}: not enough memory to decode it") from e
    except Exception as e:  # of any plugin that the caller has open
        raise ImageError(f"{where}: damaged or truncated picture: {_one_line(e)}") from e


def _by_pillow(data: bytes, where: str) -> Image.Image:
    scans = 1
    if data.startswith(b"\xff\xd8"):
        data, scans = checked_jpeg(data, where)
    elif data.startswith(b"GIF8"):
        check_gif(data, where)
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        check_size(image.width, image.height, where)
        if image.width * image.height * scans > MAX_SCANNED_PIXELS:
            raise ImageError(f"{where}: {scans} scans of {image.width} x {image.height} pixels are too many to decode")
        if image.format == "PPM" and image.tile[0][0] != "raw":
            # Pillow decodes these in Python, a minute for 200 MB, or hours for comments amid numbers.
            raise ImageError(f"{where}: a PPM in text, or of an odd depth; accepted are binary ones of 8 bits")
        return upright_rgb(image, where)


def _kind(data: bytes) -> str:
    """PDF, HEIC, AVIF, TIFF, or Pillow for what it decodes in this process."""
    if data[:4] in _TIFF_STARTS:
        return "TIFF"
    if data[4:8] == b"ftyp":
        box = data[: min(int.from_bytes(data[:4], "big"), 256)]
        brands = {box[i : i + 4] for i in (8, *range(16, len(box) - 3, 4))}
        if brands & _AVIF_BRANDS:
            return "AVIF"
        if brands & _HEIC_BRANDS:
            return "HEIC"
    # Readers of PDF look for its mark in the first kilobyte, where the metadata of a picture may mention it.
    if data.startswith(b"%PDF-") or (b"%PDF-" in data[:1024] and not data.startswith(_PILLOW_STARTS)):
        return "PDF"
    return "Pillow"


def _what_it_is(data: bytes) -> str:
    """Why Pillow did not recognise a file."""
    if not data:
        return "an empty file"
    start = data[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "a web page, not a picture"
    if start.startswith((b"<svg", b"<?xml")):
        return "an SVG or another XML file, not a picture of pixels"
    return "not a picture"


def _one_line(error: Exception) -> str:
    text = "".join(c if c.isprintable() else " " for c in str(error)) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


_quiet_lock = threading.Lock()
_quiet_depth = 0
_quiet_filters = warnings.catch_warnings()


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Keep Pillow's warnings from users: what matters of them is an error of ours.

    `warnings.catch_warnings` restores what it found, so that threads that overlap would restore each other's filters:
    the first that enters sets them, and the last that leaves restores them.
    """
    global _quiet_depth, _quiet_filters
    with _quiet_lock:
        if _quiet_depth == 0:
            _quiet_filters = warnings.catch_warnings()
            _quiet_filters.__enter__()
            warnings.filterwarnings("ignore", module=r"PIL\b")
        _quiet_depth += 1
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_depth -= 1
            if _quiet_depth == 0:
                _quiet_filters.__exit__(None, None, None)
