"""A GGUF with its faults put right: `local-llava repair`.

Knows how a header is written anew before tensor data that stay as they are, byte for byte and whatever their types.
What is wrong in a file is for `corrections` to know.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from local_llava.convert import write
from local_llava.convert.write import Progress
from local_llava.corrections import Corrected, corrected
from local_llava.errors import ModelFileError, OutputError, UsageError
from local_llava.gguf_file import ARRAY, SCALARS, STRING, GGUFFile
from local_llava.llm_file import check_llm
from local_llava.mmproj import check_mmproj

_CHUNK = 4 << 20
"""Bytes that are copied at a time, and all that is held of the tensors."""

_NUMBERS = {name: (number, struct.Struct(f"<{code}")) for number, (name, code) in SCALARS.items()}


@dataclass(frozen=True)
class Repair:
    """A file to be put right, checked: what comes out can be loaded."""

    source: Path
    target: Path
    result: Corrected
    """Where it has no corrections the file is fine."""
    overwrite: bool

    @property
    def size(self) -> int:
        """Bytes of the new file."""
        gguf = self.result.gguf
        return len(_header(gguf)) + _padded(_data_size(gguf), gguf)

    def write(self, progress: Progress | None = None) -> Path:
        """Write the file: it appears, or takes the other's place, when it is complete. On any error nothing changes.

        Args:
            progress: Called with the bytes written since the last call; they add up to `size`.

        Raises:
            OutputError: The target exists, its directory cannot be written, or the disk is full.
            ModelFileError: The source cannot be read.
        """
        write.check_writable([(self.target, self.size)], self.overwrite)
        partial = self.target.with_name(f".{self.target.name[:50]}.{secrets.token_hex(4)}.partial")
        try:
            with write.Pending(overwrite=self.overwrite) as pending:
                self._write(partial, progress or (lambda _: None))
                pending.adopt(partial, self.target)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
        return self.target

    def _write(self, partial: Path, progress: Progress) -> None:
        with write.naming(self.target):
            out = partial.open("xb")
        with out:
            for chunk in self._chunks():
                with write.naming(self.target):
                    out.write(chunk)
                progress(len(chunk))
            with write.naming(self.target):
                out.flush()
                os.fsync(out.fileno())
                shutil.copymode(self.source, partial)

    def _chunks(self) -> Iterator[bytes]:
        gguf = self.result.gguf
        yield _header(gguf)
        left = size = _data_size(gguf)
        try:
            with self.source.open("rb") as file:
                file.seek(min((t.offset for t in gguf.tensors.values()), default=0))
                while left and (chunk := file.read(min(left, _CHUNK))):
                    left -= len(chunk)
                    yield chunk
        except OSError as e:
            raise ModelFileError(f"{self.source}: cannot be read: {e.strerror or e}") from e
        if left:
            raise ModelFileError(f"{self.source}: ends inside its tensors: it shrank while it was read")
        yield bytes(_padded(size, gguf) - size)


def prepare_repair(
    source: str | Path,
    target: str | Path | None = None,
    *,
    chat_template: str | None = None,
    overwrite: bool = False,
) -> Repair:
    """Find out what is wrong with a language model or mmproj, without writing.

    Args:
        source: A GGUF.
        target: The new file; None to put it in the place of `source`.
        chat_template: Jinja source to be stored in a language model, whatever it has.
        overwrite: Replace an existing target.

    Raises:
        ModelFileError: The source cannot be read, or is wrong in a way that cannot be put right.
        PromptError: A question cannot be put with the chat template.
        OutputError: The target is the source.
        UsageError: A chat template for an mmproj.
    """
    source = Path(source)
    gguf = GGUFFile.open(source)
    in_place = target is None
    target = source if target is None else Path(target)
    if not in_place and target.exists() and target.samefile(source):
        raise OutputError(f"{target} is the file to be repaired; name another one for the result, or --in-place")
    result = corrected(gguf, chat_template)
    if result.gguf.metadata.get("general.architecture") == "clip":
        if chat_template is not None:
            raise UsageError(f"{source} is an mmproj: a chat template belongs to the language model")
        check_mmproj(result.gguf)
    else:
        check_llm(result.gguf)
    return Repair(source, target, result, overwrite or in_place)


def repair_gguf(
    source: str | Path,
    target: str | Path | None = None,
    *,
    chat_template: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Corrected:
    """Put a language model or mmproj right; arguments and errors as of `prepare_repair` and `Repair.write`.

    Returns:
        What was wrong. If nothing was, nothing is written.
    """
    prepared = prepare_repair(source, target, chat_template=chat_template, overwrite=overwrite)
    if prepared.result.corrections:
        prepared.write(progress)
    return prepared.result


def _data_size(gguf: GGUFFile) -> int:
    """Bytes from the first tensor to the end of the last."""
    tensors = gguf.tensors.values()
    return max((t.offset + t.nbytes for t in tensors), default=0) - min((t.offset for t in tensors), default=0)


def _alignment(gguf: GGUFFile) -> int:
    alignment: int = gguf.metadata.get("general.alignment", 32)
    return alignment


def _padded(size: int, gguf: GGUFFile) -> int:
    return -(-size // _alignment(gguf)) * _alignment(gguf)


def _header(gguf: GGUFFile) -> bytes:
    """All before the tensor data, padded. GGUF's description: ggml/docs/gguf.md; version 3, as 2, little-endian."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(gguf.tensors), len(gguf.metadata))]
    for key, value in gguf.metadata.items():
        parts += (_string(key), *_value(value, gguf.types[key]))
    start = min((t.offset for t in gguf.tensors.values()), default=0)
    for tensor in gguf.tensors.values():
        dims = tensor.shape[::-1]
        parts += (
            _string(tensor.name),
            struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.type, tensor.offset - start),
        )
    header = b"".join(parts)
    return header + bytes(_padded(len(header), gguf) - len(header))


def _value(value: Any, kind: str) -> Iterator[bytes]:
    item = kind.removeprefix("arr[").removesuffix("]")
    number, form = (STRING, None) if item == "str" else _NUMBERS[item]
    if item != kind:
        yield struct.pack("<IIQ", ARRAY, number, len(value))
    else:
        yield struct.pack("<I", number)
        value = [value]
    for each in value:
        yield _string(each) if form is None else form.pack(each)


def _string(text: str) -> bytes:
    data = text.encode(errors="surrogateescape")
    return struct.pack("<Q", len(data)) + data
