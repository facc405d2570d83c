"""A text file that a user named, such as questions, a template or a schema. Knows nothing of what is in it."""

from __future__ import annotations

from pathlib import Path

from local_llava.errors import UsageError

MAX_BYTES = 64 << 20


def read_text(path: Path, wanted: str) -> str:
    """Read UTF-8 text, with or without the mark that some editors begin it with.

    Args:
        path: The file, of `MAX_BYTES` at most.
        wanted: What it should be, for error messages: "a file with a JSON schema".

    Raises:
        UsageError: It cannot be read, is too large or is no UTF-8 text.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path}: {MAX_BYTES >> 20} MB of text are the most that is read; {wanted} is wanted")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is not UTF-8 text"
        raise UsageError(f"{path}: cannot be read: {reason}; {wanted} is wanted") from e
