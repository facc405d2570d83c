"""What the child process of `isolated` runs: the decoders of PDF (pdfium), HEIC (libheif), AVIF
(libavif, in Pillow) and TIFF (libtiff, in Pillow).

Gets the bytes on its standard input and answers with a line of JSON (an error, or the size) and RGB pixels. Loads no
more than it needs, since it is started for each picture.
"""

from __future__ import annotations

import importlib
import io
import json
import math
import os
import sys
from typing import Any

from PIL import Image, UnidentifiedImageError, features

from local_llava.errors import ImageError
from local_llava.pictures.pixels import MAX_PIXELS, check_size, upright_rgb

PDF_LONG_EDGE = 1536
"""Pixels of the longer edge of a rendered page: more than towers take, and the text of a printed page stays legible."""

MAX_MEMORY = {"PDF": 2 << 30, "HEIC": 4 << 30, "AVIF": 4 << 30, "TIFF": 4 << 30}
"""Most bytes of address space that the process may take, where the system can limit it (Linux). A picture of the most
pixels that are accepted needs about 3 GiB."""


def main() -> None:
    """Decode standard input. Arguments: "PDF", "HEIC", "AVIF" or "TIFF"; the page of a PDF, from 1."""
    # Whatever the libraries print must not come between the pixels.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    kind, page = sys.argv[1], int(sys.argv[2])
    _limit_memory(MAX_MEMORY[kind])
    pixels = b""
    try:
        image = upright_rgb(_open(kind, sys.stdin.buffer.read(), page), kind)
        pixels = image.tobytes()
        answer: dict[str, Any] = {"width": image.width, "height": image.height}
    except ImageError as e:
        answer = {"error": str(e)}
    except MemoryError:
        answer = {"error": f"not enough memory to decode this {kind}"}
    except Image.DecompressionBombError:
        answer = {"error": f"more than {MAX_PIXELS} pixels"}
    except UnidentifiedImageError:  # its text names an object of Python
        answer = {"error": f"damaged or truncated {kind}"}
    except Exception as e:  # whatever the bytes lead the libraries into
        answer = {"error": f"damaged or truncated {kind}: {' '.join(str(e).split())[:200] or type(e).__name__}"}
    out.write(json.dumps(answer).encode() + b"\n")
    out.write(pixels)
    out.flush()
    # The libraries' own clean-up may fail on what a damaged file left behind.
    os._exit(0)


def _limit_memory(most: int) -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    try:
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    except (OSError, ValueError):  # macOS has the name but not the limit
        return


def _open(kind: str, data: bytes, page: int) -> Image.Image:
    """The picture, of a size that is accepted; all but a PDF is decoded when it is loaded."""
    if kind == "PDF":
        return _pdf_page(data, page)
    if kind == "HEIC":
        pillow_heif: Any = importlib.import_module("pillow_heif")  # Any: it need not be there to check types
        # libheif turns the picture upright, and gives 8 bits of whatever depth there is.
        image: Image.Image = pillow_heif.HeifImageFile(io.BytesIO(data))
    elif kind == "AVIF" and not features.check("avif"):
        raise ImageError("an AVIF, and this Pillow was built without AVIF: pip install --force-reinstall pillow")
    else:
        image = Image.open(io.BytesIO(data), formats=[kind])
    check_size(image.width, image.height, kind)
    return image


def _pdf_page(data: bytes, number: int) -> Image.Image:
    pypdfium2: Any = importlib.import_module("pypdfium2")
    try:
        pdf = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as e:
        if "password" in str(e).lower():
            raise ImageError("the PDF is locked with a password; accepted are PDFs without one") from e
        raise
    pdf.init_forms()  # or fields that were filled in stay empty
    if not 1 <= number <= len(pdf):
        raise ImageError(f"the PDF has {len(pdf)} page(s), counted from 1; there is no page {number}")
    page = pdf[number - 1]
    width, height = page.get_size()
    if not (math.isfinite(width) and math.isfinite(height) and width > 0 and height > 0):
        raise ImageError(f"page {number} of the PDF has no size")
    image: Image.Image = page.render(scale=PDF_LONG_EDGE / max(width, height)).to_pil()
    return image
