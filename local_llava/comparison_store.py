"""What a comparison keeps on disk while it runs: rows of float32, in files without a name that end with it."""

from __future__ import annotations

import shutil
import tempfile
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from local_llava.errors import OutputError


class StoredRows:
    """Rows in a temporary file, which only this process sees and which is gone when it is closed, however that comes.

    Attributes:
        n: Rows that are there.
    """

    def __init__(self, width: int) -> None:
        """
        Args:
            width: Numbers in a row.

        Raises:
            OutputError: No temporary file can be made.
        """
        self.width, self.n = width, 0
        try:
            # No buffer of Python's: rows are large.
            self._file = tempfile.TemporaryFile(prefix="local-llava-", buffering=0)  # noqa: SIM115 - closed by `close`
        except OSError as e:
            raise _error(e) from e

    def __enter__(self) -> StoredRows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the file."""
        self._file.close()

    def append(self, rows: NDArray[np.float32]) -> int:
        """Keep rows, float32 [n, width]; returns the number of the first one.

        Raises:
            OutputError: There is no room on the disk.
        """
        first = self.n
        left = np.ascontiguousarray(rows, "<f4").reshape(-1).view(np.uint8).data
        try:
            self._file.seek(first * self.width * 4)
            while left:
                left = left[self._file.write(left) :]
        except OSError as e:
            raise _error(e) from e
        self.n += len(rows)
        return first

    def read(self, first: int, n: int) -> NDArray[np.float32]:
        """Rows again: float32 [n, width]."""
        rows = np.empty((n, self.width), "<f4")
        left = rows.reshape(-1).view(np.uint8).data
        try:
            self._file.seek(first * self.width * 4)
            while left:
                n_read = self._file.readinto(left)
                if not n_read:
                    raise OutputError("a temporary file is shorter than what was written to it")
                left = left[n_read:]
        except OSError as e:
            raise _error(e) from e
        return rows.astype(np.float32, copy=False)


def check_room(n_bytes: int, advice: str) -> None:
    """See whether the disk of temporary files has room.

    Raises:
        OutputError: It has not; the message ends with the advice.
    """
    try:
        directory = tempfile.gettempdir()
        free = shutil.disk_usage(directory).free
    except OSError as e:
        raise _error(e) from e
    if n_bytes > free:
        raise OutputError(
            f"{directory} has {free / 1e9:.1f} GB free, and {n_bytes / 1e9:.1f} GB are needed for the reference's "
            f"logits: {advice}, or name another directory (TMPDIR)"
        )


def _error(error: OSError) -> OutputError:
    return OutputError(f"a temporary file cannot be used: {error.strerror}; TMPDIR names another directory for it")
