"""Small files of every kind of picture that is accepted, for tests and for fuzz_images.py."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pillow_heif
from numpy.typing import NDArray
from PIL import Image
from skimage import data


def photo(width: int = 60, height: int = 44) -> Image.Image:
    """The cat's face of scikit-image."""
    return Image.fromarray(data.chelsea()).crop((60, 20, 380, 260)).resize((width, height))


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    # A copy, since Pillow leaves one format's settings on the image for the next.
    options["append_images"] = [frame.copy() for frame in options.get("append_images", [])]
    image.copy().save(buffer, format, **options)
    return buffer.getvalue()


def png(pixels: NDArray[Any], colour_type: int, bits: int, extra: bytes = b"") -> bytes:
    """A PNG as Pillow does not write it: any colour type at 16 bits, with chunks of one's own before the pixels."""

    height, width = pixels.shape[:2]
    rows = pixels.astype(">u2" if bits == 16 else np.uint8).reshape(height, -1)
    body = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    chunks = (png_chunk(b"IHDR", head), extra, png_chunk(b"IDAT", zlib.compress(body)), png_chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def pdf(pages: list[bytes], size: tuple[int, int] = (200, 100)) -> bytes:
    """A PDF of pages with these content streams (drawing operators, PDF 32000-1 Annex A)."""
    kids = " ".join(f"{3 + 2 * i} 0 R" for i in range(len(pages)))
    objects = [b"<</Type/Catalog/Pages 2 0 R>>", f"<</Type/Pages/Kids[{kids}]/Count {len(pages)}>>".encode()]
    for i, content in enumerate(pages):
        objects.append(
            f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 {size[0]} {size[1]}]/Contents {4 + 2 * i} 0 R>>".encode()
        )
        objects.append(f"<</Length {len(content)}>>stream\n".encode() + content + b"\nendstream")
    return pdf_of(objects)


def pdf_of(objects: list[bytes]) -> bytes:
    """A PDF of these objects, numbered from 1; the first is the catalog."""
    out, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += f"{number} 0 obj".encode() + body + b"endobj\n"
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    n = len(objects) + 1
    tail = f"xref\n0 {n}\n0000000000 65535 f \n{table}trailer<</Size {n}/Root 1 0 R>>\nstartxref\n{len(out)}\n%%EOF"
    return out + tail.encode()


def heic(image: Image.Image, orientation: int = 1) -> bytes:
    """A HEIC, which tells its orientation in boxes of its own, as phones write it."""
    buffer = io.BytesIO()
    if orientation == 1:
        made = pillow_heif.from_pillow(image)
    else:
        made = pillow_heif.from_bytes("RGB", image.size, image.tobytes())
        made.info["exif"] = exif(orientation).tobytes()
    made.save(buffer)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x0112] = orientation
    return made


def every_kind() -> dict[str, bytes]:
    """Files by kind, `format-variant`. All show the same cat, more or less."""
    rgb = photo()
    grey, cmyk, palette = rgb.convert("L"), rgb.convert("CMYK"), rgb.quantize(16)
    alpha = rgb.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(rgb.size))
    frames = [rgb.rotate(90 * i) for i in range(3)]
    wide = np.asarray(grey, np.uint16) * 257 + 3
    deep = np.asarray(rgb, np.uint16) * 257
    i16 = Image.fromarray(wide)
    rle = b"".join(b"".join(bytes([1, v]) for v in row) + b"\0\0" for row in np.asarray(grey)[::-1].tolist()) + b"\0\1"
    ramp = b"".join(bytes([i, i, i, 0]) for i in range(256))
    bmp_head = struct.pack("<IiiHHIIiiII", 40, *grey.size, 1, 8, 1, len(rle), 0, 0, 256, 0)
    bmp_rle = b"BM" + struct.pack("<IHHI", 1078 + len(rle), 0, 0, 1078) + bmp_head + ramp + rle
    return {
        "png-rgb": saved(rgb, "PNG"),
        "png-rgba": saved(alpha, "PNG"),
        "png-grey": saved(grey, "PNG"),
        "png-grey-alpha": saved(alpha.convert("LA"), "PNG"),
        "png-1bit": saved(grey.convert("1"), "PNG"),
        "png-palette": saved(palette, "PNG"),
        "png-palette-trns": saved(palette, "PNG", transparency=bytes(range(0, 256, 16))),
        "png-rgb-trns": saved(rgb, "PNG", transparency=rgb.getpixel((0, 0))),
        "png-grey-16": saved(i16, "PNG"),
        "png-rgb-16": png(deep, 2, 16),
        "png-exif-icc-text": saved(rgb, "PNG", exif=exif(6), icc_profile=b"no profile" * 20, pnginfo=None),
        "png-animated": saved(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "jpeg": saved(rgb, "JPEG"),
        "jpeg-progressive": saved(rgb, "JPEG", progressive=True),
        "jpeg-grey": saved(grey, "JPEG"),
        "jpeg-cmyk": saved(cmyk, "JPEG"),
        "jpeg-exif": saved(rgb, "JPEG", exif=exif(6)),
        "jpeg-mpo": saved(frames[0], "MPO", save_all=True, append_images=frames[1:]),
        "webp": saved(rgb, "WEBP"),
        "webp-lossless-alpha": saved(alpha, "WEBP", lossless=True),
        "webp-exif": saved(rgb, "WEBP", exif=exif(8)),
        "webp-animated": saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "gif": saved(palette, "GIF"),
        "gif-transparent": saved(palette, "GIF", transparency=3),
        "gif-animated": saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "bmp": saved(rgb, "BMP"),
        "bmp-palette": saved(palette, "BMP"),
        "bmp-1bit": saved(grey.convert("1"), "BMP"),
        "bmp-alpha": saved(alpha, "BMP"),
        "bmp-rle": bmp_rle,
        "tiff": saved(rgb, "TIFF"),
        "tiff-lzw": saved(rgb, "TIFF", compression="tiff_lzw"),
        "tiff-deflate-alpha": saved(alpha, "TIFF", compression="tiff_adobe_deflate"),
        "tiff-jpeg": saved(rgb, "TIFF", compression="jpeg"),
        "tiff-group4": saved(grey.convert("1"), "TIFF", compression="group4"),
        "tiff-packbits-palette": saved(palette, "TIFF", compression="packbits"),
        "tiff-cmyk": saved(cmyk, "TIFF", compression="tiff_lzw"),
        "tiff-lab": saved(rgb.convert("LAB"), "TIFF"),
        "tiff-grey-16": saved(i16, "TIFF"),
        "tiff-grey-16-big": saved(Image.fromarray(wide.astype(">u2")), "TIFF"),
        "tiff-grey-32": saved(Image.fromarray(wide.astype(np.int32)), "TIFF"),
        "tiff-float": saved(Image.fromarray(np.asarray(grey, np.float32) / 255), "TIFF", compression="tiff_deflate"),
        "tiff-exif": saved(rgb, "TIFF", exif=exif(3)),
        "tiff-pages": saved(frames[0], "TIFF", save_all=True, append_images=frames[1:]),
        "avif": saved(rgb, "AVIF"),
        "avif-alpha": saved(alpha, "AVIF"),
        "avif-exif": saved(rgb, "AVIF", exif=exif(6)),
        "avif-animated": saved(frames[0], "AVIF", save_all=True, append_images=frames[1:]),
        "ppm": saved(rgb, "PPM"),
        "ppm-grey": saved(grey, "PPM"),
        "ppm-1bit": saved(grey.convert("1"), "PPM"),
        "ppm-grey-16": b"P5 %d %d 65535\n" % grey.size + wide.astype(">u2").tobytes(),
        "heic": heic(rgb),
        "heic-rotated": heic(rgb, 6),
        "heic-alpha": heic(alpha),
        "heic-grey-10bit": heic(i16),
        "pdf-drawn": pdf([b"1 0 0 rg 0 0 100 100 re f", b"0 0 1 rg 0 0 100 100 re f"]),
        "pdf-photo": saved(rgb, "PDF"),
    }
