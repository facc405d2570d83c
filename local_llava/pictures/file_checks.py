"""What small files can do to Pillow's decoders, found before they are decoded: scans, segments, metadata without end.

Knows the outer structure of JPEG and GIF. Newer releases of Pillow guard against some of this themselves; those for
older Pythons do not.
"""

from __future__ import annotations

import re

from local_llava.errors import ImageError

MAX_JPEG_SEGMENTS = 20_000
"""Most segments of a JPEG. Files have a few dozen, or some hundred with large metadata."""

MAX_GIF_BLOCKS = 5_000
"""Most blocks of text and metadata before the first picture of a GIF. Each holds 255 bytes at most, and Pillow copies
all of a comment for each one that it adds."""

# A marker with a segment: neither a stuffed zero or filler, nor TEM, nor RSTn, nor SOI.
_JPEG_MARKER = re.compile(rb"\xff+([^\x00\x01\xd0-\xd8\xff])", re.DOTALL)
_JPEG_APP1, _JPEG_SOS, _JPEG_EOI = 0xE1, 0xDA, 0xD9
_EXIF = b"Exif\0\0"


def checked_jpeg(data: bytes, where: str) -> tuple[bytes, int]:
    """A JPEG that is safe to open, and the number of its scans.

    Pillow joins all segments of EXIF data, and copies them for each of their tags; the orientation is in the first, so
    the others are made void.

    Raises:
        ImageError: More than MAX_JPEG_SEGMENTS segments.
    """
    scans, exif, position = 0, [], 2
    for _ in range(MAX_JPEG_SEGMENTS):
        found = _JPEG_MARKER.search(data, position)
        if found is None or found[1][0] == _JPEG_EOI:
            break
        start = found.end()
        scans += found[1][0] == _JPEG_SOS
        if found[1][0] == _JPEG_APP1 and data.startswith(_EXIF, start + 2):
            exif.append(start + 2)
        # Entropy-coded data follow the segment of a scan: they hold no marker, so the search passes over them.
        position = start + max(2, int.from_bytes(data[start : start + 2], "big"))
    else:
        raise ImageError(f"{where}: a JPEG of more than {MAX_JPEG_SEGMENTS} segments")
    if len(exif) > 1:
        changed = bytearray(data)
        for start in exif[1:]:
            changed[start : start + len(_EXIF)] = bytes(len(_EXIF))
        data = bytes(changed)
    return data, scans


def check_gif(data: bytes, where: str) -> None:
    """Check what comes before the first picture of a GIF.

    Raises:
        ImageError: More than MAX_GIF_BLOCKS blocks.
    """
    flags = data[10] if len(data) > 10 else 0
    at, blocks = 13 + (6 << (flags & 7) if flags & 0x80 else 0), 0  # behind the header and its palette
    while at < len(data) and data[at : at + 1] not in (b",", b";"):
        if data[at : at + 1] != b"!":
            at += 1  # as Pillow passes over what it does not know
            continue
        at += 2
        while at < len(data) and data[at]:
            at += 1 + data[at]
            blocks += 1
            if blocks > MAX_GIF_BLOCKS:
                raise ImageError(f"{where}: a GIF with more than {MAX_GIF_BLOCKS} blocks before its picture")
        at += 1
