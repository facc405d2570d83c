"""Pictures of a directory, and questions about them: what a model is measured with.

Knows file names, and the two forms that questions are written in. Opens no picture.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from local_llava.errors import ImageError, UsageError
from local_llava.text_file import read_text

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm", ".pgm", ".heic", ".heif"),
)
"""Ends of the names that are taken for pictures, in lower case."""


@dataclass(frozen=True)
class Question:
    """A question about a picture."""

    image: Path
    text: str


def pictures_in(directory: Path) -> list[Path]:
    """The pictures of a directory, by name; not those of directories in it.

    Raises:
        ImageError: It cannot be read, or there are none.
    """
    try:
        paths = sorted(p for p in directory.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    except OSError as e:
        raise ImageError(f"{directory}: cannot be read: {e.strerror}; a directory with pictures is wanted") from e
    if not paths:
        raise ImageError(f"{directory}: there are no pictures; names that end with {', '.join(SUFFIXES)} are taken")
    return paths


def questions_about(directory: Path, file: Path | None, otherwise: Sequence[str]) -> list[Question]:
    """Questions about the pictures of a directory, those about the same picture together.

    Args:
        directory: The pictures.
        file: UTF-8 text with a question a line, which are all asked about each picture. One whose name ends with .jsonl
            has a JSON object a line, with `image`, a file of the directory, and `question`.
        otherwise: What is asked about each picture if there is no file.

    Raises:
        ImageError: There are no pictures, or one that is named is not there.
        UsageError: The file cannot be used.
    """
    if file is None:
        return [Question(path, text) for path in pictures_in(directory) for text in otherwise]
    lines = _lines(file)
    if file.suffix.lower() != ".jsonl":
        return [Question(path, text) for path in pictures_in(directory) for _, text in lines]
    by_image: dict[Path, list[Question]] = {}
    for number, line in lines:
        question = _parse(line, f"{file}, line {number}", directory)
        by_image.setdefault(question.image, []).append(question)
    return [question for questions in by_image.values() for question in questions]


def _lines(file: Path) -> list[tuple[int, str]]:
    """The lines that are not empty, with their numbers."""
    text = read_text(file, "a file with a question a line")
    lines = [(i, line.strip()) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UsageError(f"{file}: there are no questions in it; one a line is wanted")
    return lines


def _parse(line: str, where: str, directory: Path) -> Question:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    wanted = [value.get(key) for key in ("image", "question")] if isinstance(value, dict) else []
    if not wanted or not all(isinstance(text, str) and text for text in wanted):
        raise UsageError(f'{where}: must be a JSON object such as {{"image": "cat.jpg", "question": "What is it?"}}')
    image, text = wanted
    path = directory / str(image)
    if "\0" in str(image) or not path.is_file():
        raise ImageError(f"{where}: {path!s:.200} is not there")
    return Question(path, str(text))
