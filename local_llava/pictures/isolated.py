"""Decodes what had better be decoded in a process of its own: PDF, HEIC, AVIF and TIFF.

A page can ask pdfium for hours of work, metadata of AVIF and TIFF can make Pillow take any amount of memory, libtiff
writes to standard error, and damaged files have ended processes in all four libraries. So a child gets the bytes, a
time limit, and a limit of its memory. Knows how to start it and what it answers; the decoders are `isolated_child`'s.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import Any

from PIL import Image

from local_llava.errors import ImageError
from local_llava.pictures.pixels import check_size

MAX_SECONDS = 60.0
"""Most seconds that the child may take."""

# What is an extra, and the module that it installs.
_EXTRAS = {"PDF": ("pdf", "pypdfium2"), "HEIC": ("heic", "pillow_heif")}


def decode_apart(kind: str, data: bytes, where: str, page: int = 1) -> Image.Image:
    """An upright RGB picture, decoded in a child process.

    Args:
        kind: "PDF", "HEIC", "AVIF" or "TIFF".
        data: The whole file.
        where: Names it in errors.
        page: Page of a PDF, from 1.

    Raises:
        ImageError: The extra is missing, or the file is damaged, or takes too long or too much memory.
    """
    if kind in _EXTRAS and importlib.util.find_spec(_EXTRAS[kind][1]) is None:
        raise ImageError(f"{where}: {kind} needs an extra: pip install 'local-llava[{_EXTRAS[kind][0]}]'")
    program = f"import sys; sys.path[:] = {sys.path!r}; from local_llava.pictures.isolated_child import main; main()"
    try:
        done = subprocess.run(
            [sys.executable or "python3", "-c", program, kind, str(page)],
            input=data,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=MAX_SECONDS,
        )
    except subprocess.TimeoutExpired as e:
        raise ImageError(f"{where}: decoding this {kind} takes longer than {MAX_SECONDS:g} seconds") from e
    except OSError as e:
        raise ImageError(f"{where}: no process can be started to decode this {kind}: {e.strerror}") from e
    end = done.stdout.find(b"\n")
    if done.returncode != 0 or end < 0:
        raise ImageError(f"{where}: damaged {kind}: its decoder failed on it")
    answer: dict[str, Any] = json.loads(done.stdout[:end])
    if "error" in answer:
        raise ImageError(f"{where}: {answer['error']}")
    check_size(answer["width"], answer["height"], where)
    return Image.frombytes("RGB", (answer["width"], answer["height"]), memoryview(done.stdout)[end + 1 :])
