"""Reads PyTorch's files (`.bin`, `.pth`): where the numbers of each tensor are. No torch, and no pickle is run.

Knows torch's zip format: an entry `data.pkl` with the names, and the numbers of each storage in an entry of its own,
stored as they are. Does not know pickles (`pickle_machine`) or what a tensor means.

Format: https://github.com/pytorch/pytorch/blob/main/torch/serialization.py and caffe2/serialize/inline_container.h.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from local_llava.convert.pickle_machine import PickleError, Storage, StorageView, read_tensors
from local_llava.convert.source import StoredTensor, check_name
from local_llava.errors import CheckpointError

MAX_READ = 16 << 20
"""Bytes of a `data.pkl` or of a zip file's directory at most: a tensor takes some 100 bytes of each."""

_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
"""Of a value. Every other dtype has one."""

_NESTED = ("state_dict", "module")
"""Where XTuner's and Lightning's checkpoints, and DeepSpeed's, have their tensors."""

_SAVE_AGAIN = "load it where you trust it and save its state dict again with a newer torch, or as safetensors"
_NOT_TORCH = {
    # The pickle of a number that no other program begins a file with.
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.": f"is in PyTorch's format before 1.6; {_SAVE_AGAIN}",
    b"\x80": f"is a plain pickle, which may run anything when it is loaded; {_SAVE_AGAIN}",
    b"version https://git-lfs": "is a Git LFS pointer, not the weights; get them with `git lfs pull`",
}

_LOCAL_HEADER = struct.Struct("<4s2xHH16xHH")
"""Signature, flags, method, and the lengths of the name and of the extra field, which ends before the data."""


def read_pickle(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file that `torch.save` wrote: a state dict, at the top or under `state_dict` or `module`.

    No weights are read, and nothing of the file is run. Entries that are no tensors are left out. Tensors may share
    their values, as tied weights do. Checksums are not compared: they are those of whole storages, and some are 0.

    Raises:
        CheckpointError: The file cannot be read, is damaged or of another format, asks for anything but tensors, or
            has a tensor whose values do not lie one after the other.
    """
    if not path.is_file():  # reading a pipe would wait for ever
        raise CheckpointError(f"{path}: is not a regular file")
    try:
        with _Bounded(io.FileIO(path)) as file:
            return _read(path, file)
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror or e}") from e
    except PickleError as e:
        raise CheckpointError(f"{path}: its pickle {e}") from e
    except (zipfile.BadZipFile, EOFError, NotImplementedError, OverflowError, ValueError, struct.error) as e:
        reason = ascii(str(e))[1:-1]  # it quotes names from the file
        raise CheckpointError(f"{path}: not a whole PyTorch file: {reason:.200}") from e


def _read(path: Path, file: BinaryIO) -> dict[str, StoredTensor]:
    start = file.read(32)
    for magic, reason in _NOT_TORCH.items():
        if start.startswith(magic):
            raise CheckpointError(f"{path}: {reason}")
    if not start.startswith(b"PK\3\4"):
        raise CheckpointError(f"{path}: not a PyTorch file: it does not begin as a zip file does")
    archive = _Archive(file)
    byteorder = archive.content("byteorder", 16) if archive.has("byteorder") else b"little"
    if byteorder != b"little":
        raise CheckpointError(f"{path}: its byte order is {byteorder!a}; little is supported")
    views = _state_dict(path, read_tensors(archive.content("data.pkl", MAX_READ)))
    for name in views:
        check_name(path, name)
    places = archive.places({view.storage.key for view in views.values()})
    return {name: _stored(path, name, view, places) for name, view in views.items()}


def _state_dict(path: Path, value: Any) -> dict[str, StorageView]:
    if not isinstance(value, dict):
        what = "one tensor" if isinstance(value, StorageView) else f"a {type(value).__name__}"
        raise CheckpointError(f"{path}: holds {what}; a dictionary of tensors by name is needed")
    for inner in (value, *(value.get(key) for key in _NESTED)):
        if isinstance(inner, dict):
            views = {name: view for name, view in inner.items() if isinstance(view, StorageView)}
            if views:
                return views
    raise CheckpointError(f"{path}: holds no tensors by name, neither at the top nor under {' or '.join(_NESTED)}")


def _stored(path: Path, name: str, view: StorageView, places: Mapping[str, tuple[int, int]]) -> StoredTensor:
    """The tensor of a view, after checking that it lies inside its storage, and that inside its entry."""
    if view.storage.key not in places:
        raise CheckpointError(f"{path}: {name} has its values in an entry {view.storage.key!a:.40}, which is missing")
    start, size = places[view.storage.key]
    if not 0 <= _storage_bytes(view.storage) <= size:
        raise CheckpointError(f"{path}: {name} is of a storage that is larger than its entry of {size} bytes")
    item = _BYTES.get(view.dtype, 1)
    count = math.prod(view.sizes)
    if any(n < 0 for n in view.sizes) or view.offset < 0 or math.prod(n or 1 for n in view.sizes) >= 1 << 62:
        raise CheckpointError(f"{path}: {name} has the sizes {view.sizes!a:.80}, which no tensor has")
    if (view.offset + count) * item > _storage_bytes(view.storage):
        raise CheckpointError(f"{path}: {name} ends outside its storage of {_storage_bytes(view.storage)} bytes")
    if count and not _contiguous(view):
        how = "is a view whose values do not lie one after the other"
        raise CheckpointError(f"{path}: {name} {how}; save the state dict again with .contiguous() tensors")
    return StoredTensor(name, view.dtype, view.sizes, path, start + view.offset * item, count * item)


def _storage_bytes(storage: Storage) -> int:
    return storage.count * (_BYTES.get(storage.dtype, 1) if storage.dtype else 1)


def _contiguous(view: StorageView) -> bool:
    wanted = 1
    for size, stride in zip(reversed(view.sizes), reversed(view.strides), strict=True):
        if size != 1:  # whose stride is never used
            if stride != wanted:
                return False
            wanted *= size
    return True


class _Archive:
    """The entries of a PyTorch file, which all lie in one folder."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = file.seek(0, io.SEEK_END)
        with zipfile.ZipFile(file) as archive:
            self._entries = {entry.filename: entry for entry in archive.infolist()}
            if len(self._entries) < len(archive.infolist()):
                raise zipfile.BadZipFile("two entries have the same name")
        folders = [name[: -len("data.pkl")] for name in self._entries if name.split("/")[1:] == ["data.pkl"]]
        if len(folders) != 1:
            raise zipfile.BadZipFile(f"{len(folders)} entries are called data.pkl, where one is needed")
        self._folder = folders[0]

    def has(self, name: str) -> bool:
        return self._folder + name in self._entries

    def content(self, name: str, limit: int) -> bytes:
        """A whole entry.

        Raises:
            zipfile.BadZipFile: It is larger than the limit.
        """
        start, size = self._place(name)
        if size > limit:
            raise zipfile.BadZipFile(f"{name} has {size} bytes, more than {limit}")
        self._file.seek(start)
        return self._file.read(size)

    def places(self, keys: set[str]) -> dict[str, tuple[int, int]]:
        """Where the values of each storage are, of those that there are: offset in the file and bytes.

        Raises:
            zipfile.BadZipFile: Two overlap.
        """
        places = {key: self._place(f"data/{key}") for key in keys if self.has(f"data/{key}")}
        end = 0
        for start, size in sorted(places.values()):
            if start < end:
                raise zipfile.BadZipFile("two entries overlap")
            end = start + size
        return places

    def _place(self, name: str) -> tuple[int, int]:
        """Offset and size of an entry's data. Only the header before the data tells where they begin: torch pads it."""
        entry = self._entries[self._folder + name]
        self._file.seek(entry.header_offset)
        header = self._file.read(_LOCAL_HEADER.size)
        signature, flags, method, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        if signature != b"PK\3\4":
            raise zipfile.BadZipFile(f"{entry.filename:.80} has no header")
        if method != zipfile.ZIP_STORED or entry.compress_type != zipfile.ZIP_STORED or flags & 1:
            raise zipfile.BadZipFile(f"{entry.filename:.80} is compressed or encrypted, which PyTorch does not do")
        start = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if entry.file_size != entry.compress_size or start + entry.file_size > self._size:
            raise zipfile.BadZipFile(f"{entry.filename:.80} ends behind the end of the file")
        return start, entry.file_size


class _Bounded(io.BufferedReader):
    """A file of which no more is read at once than `MAX_READ`: `zipfile` believes what a file says of its directory."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_READ:
            raise zipfile.BadZipFile(f"its directory has {size} bytes, more than {MAX_READ}")
        return super().read(size)
