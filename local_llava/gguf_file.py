"""Reads the header of a GGUF: metadata and where the tensors lie, with every count and length bounded.

Knows the container format and nothing of what is inside: which keys and tensors a language model or an mmproj needs is
for `llm_file` and the tower to say. Never reads tensor data.

gguf's own `GGUFReader` maps the whole file, takes seconds for a vocabulary of 128 thousand tokens, and trusts the
counts that it finds; ggml's reader accepts files on whose values llama.cpp later aborts. The rules here are those of
ggml/src/gguf.cpp (llama.cpp of llama-cpp-python 0.3.36) or stricter.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from local_llava.errors import ModelFileError

MAX_HEADER = 64 << 20
"""Bytes that a header may take. A vocabulary of 256 thousand tokens with its merges takes 15 MB."""
MAX_ITEMS = 4 << 20
"""Items of all arrays together; Llama 3's vocabulary has 540 thousand, of which 280 thousand merges."""
MAX_ENTRIES = 1 << 16
"""Metadata entries, and tensors, of a file."""
MAX_KEY = 1 << 10
MIN_ALIGNMENT, MAX_ALIGNMENT = 32, 1 << 16
"""ggml computes only on data aligned to 32 bytes (TENSOR_ALIGNMENT), and aborts on a mapped file with less."""
MAX_DIMS = 4
"""GGML_MAX_DIMS."""
MAX_NAME = 63
"""GGML_MAX_NAME without the terminating zero."""

_CHUNK = 1 << 20

SCALARS = {
    0: ("u8", "B"),
    1: ("i8", "b"),
    2: ("u16", "H"),
    3: ("i16", "h"),
    4: ("u32", "I"),
    5: ("i32", "i"),
    6: ("f32", "f"),
    7: ("bool", "?"),
    10: ("u64", "Q"),
    11: ("i64", "q"),
    12: ("f64", "d"),
}
"""GGUF value type -> name and `struct` code. 8 is a string, 9 an array."""
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class TypeTraits:
    """How a tensor type packs its values."""

    name: str
    block: int
    """Values in a block; a row is a whole number of blocks."""
    nbytes: int
    """Bytes of a block."""


TYPES: Mapping[int, TypeTraits] = MappingProxyType(
    {
        number: TypeTraits(*traits)
        for number, traits in {
            0: ("F32", 1, 4),
            1: ("F16", 1, 2),
            2: ("Q4_0", 32, 18),
            3: ("Q4_1", 32, 20),
            6: ("Q5_0", 32, 22),
            7: ("Q5_1", 32, 24),
            8: ("Q8_0", 32, 34),
            9: ("Q8_1", 32, 36),
            10: ("Q2_K", 256, 84),
            11: ("Q3_K", 256, 110),
            12: ("Q4_K", 256, 144),
            13: ("Q5_K", 256, 176),
            14: ("Q6_K", 256, 210),
            15: ("Q8_K", 256, 292),
            16: ("IQ2_XXS", 256, 66),
            17: ("IQ2_XS", 256, 74),
            18: ("IQ3_XXS", 256, 98),
            19: ("IQ1_S", 256, 50),
            20: ("IQ4_NL", 32, 18),
            21: ("IQ3_S", 256, 110),
            22: ("IQ2_S", 256, 82),
            23: ("IQ4_XS", 256, 136),
            24: ("I8", 1, 1),
            25: ("I16", 1, 2),
            26: ("I32", 1, 4),
            27: ("I64", 1, 8),
            28: ("F64", 1, 8),
            29: ("IQ1_M", 256, 56),
            30: ("BF16", 1, 2),
            34: ("TQ1_0", 256, 54),
            35: ("TQ2_0", 256, 66),
            39: ("MXFP4", 32, 17),
            40: ("NVFP4", 64, 36),
            41: ("Q1_0", 128, 18),
            42: ("Q2_0", 64, 18),
        }.items()
    }
)
"""ggml's tensor types by number, as in ggml.c's `type_traits`; removed types (Q4_0_4_4 and others) are left out."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies, and how."""

    name: str
    shape: tuple[int, ...]
    """numpy's order: the last is the row length (ggml's ne[0])."""
    type: int
    """ggml's type number, a key of `TYPES`."""
    offset: int
    """Of the first byte, from the start of the file."""
    nbytes: int


@dataclass(frozen=True)
class GGUFFile:
    """The header of a GGUF."""

    path: Path
    version: int
    metadata: Mapping[str, Any]
    """bool, int, float, str, or a list of one of them. Bytes of a string that are not UTF-8 become lone surrogates
    (`surrogateescape`), since tokens may be any bytes: `value.encode(errors="surrogateescape")` restores them."""
    types: Mapping[str, str]
    """Type of each metadata value as stored, "u32", "str", "arr[i32]", ...: llama.cpp takes only the exact one."""
    tensors: Mapping[str, TensorInfo]
    """In the order of the file."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Entries that differ from the file on the disk (`corrections`): llama.cpp, which reads that, is told them."""

    @classmethod
    def open(cls, path: Path) -> GGUFFile:
        """Read and check the header of a GGUF.

        Everything that the container format promises is checked: tensors lie in the file, aligned, one behind the
        other, with whole blocks in a row. At most `MAX_HEADER` bytes are read.

        Args:
            path: A GGUF of version 2 or 3, little endian.

        Raises:
            ModelFileError: The file cannot be read, is something else, is cut short, or contradicts itself.
        """
        path = Path(path)
        try:
            if "\0" in str(path):
                raise ModelFileError(f"{str(path)!a}: is not a path")
            # Checked before opening, which would wait for ever on a pipe.
            mode = path.stat().st_mode
            if stat.S_ISDIR(mode):
                raise ModelFileError(f"{path}: is a directory; give a GGUF file in it")
            if not stat.S_ISREG(mode):
                raise ModelFileError(f"{path}: is not a regular file; give a GGUF file")
            with path.open("rb") as file:
                return _Reader(path, file).read()
        except OSError as e:
            raise ModelFileError(f"{path}: cannot be read: {e.strerror or e}") from e


def what_is(head: bytes, size: int) -> str:
    """Name what a file is by its first bytes, for messages about files that are not GGUF.

    Args:
        head: The first bytes, 512 or so.
        size: Bytes of the whole file.

    Returns:
        A phrase that fits after "is", such as "a PNG picture".
    """
    if not size:
        return "empty"
    text = head.lstrip().lower()
    if size >= 8 and head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= size - 8:
        return "a safetensors file"
    for start, name in (
        (b"\x89PNG", "a PNG picture"),
        (b"\xff\xd8\xff", "a JPEG picture"),
        (b"PK\x03\x04", "a ZIP archive or PyTorch checkpoint (.bin, .pth)"),
        (b"\x80\x02", "a pickle, perhaps an old PyTorch checkpoint"),
        (b"\x1f\x8b", "gzip-compressed"),
        (b"version https://git-lfs", "a Git LFS pointer: the file itself was not downloaded"),
        (b"FUGG", "a GGUF with its bytes in the wrong order"),
    ):
        if head.startswith(start):
            return name
    for start in (b"ggml", b"ggjt", b"ggla", b"ggmf"):
        if head[:4] in (start, start[::-1]):
            return "a model in a format older than GGUF"
    if text.startswith((b"<!doctype", b"<html")):
        return "an HTML page, perhaps of a login or an error"
    if text.startswith(b"{"):
        return "JSON"
    if not any(head):
        return "filled with zeros: the download or copy did not finish"
    return "of another kind"


def _quote(text: str) -> str:
    """A name from a file, safe to show on one line."""
    return ascii(text if len(text) <= 80 else text[:77] + "...")


class _Reader:
    """One pass over a header."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.size = os.fstat(file.fileno()).st_size
        self.buffer = bytearray()
        self.at = 0
        self.items_left = MAX_ITEMS

    def read(self) -> GGUFFile:
        head = self.peek(512)
        if head[:4] != b"GGUF":
            raise self.error(f"is not a GGUF but {what_is(head, self.size)}; give a .gguf file")
        self.at = 4
        version = self.number("I", "the version")
        if version & 0xFFFF == 0 and version:
            raise self.error("is a big-endian GGUF; only little-endian ones are supported")
        if version not in (2, 3):
            raise self.error(f"is a GGUF of version {version}; versions 2 and 3 are supported")
        n_tensors = self.count("the number of tensors")
        n_metadata = self.count("the number of metadata entries")
        metadata, types = self.read_metadata(n_metadata)
        alignment = metadata.get("general.alignment", 32)
        if types.get("general.alignment", "u32") != "u32":
            raise self.error(f"general.alignment must be a u32, not {types['general.alignment']}")
        if not MIN_ALIGNMENT <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            accepted = f"a power of two from {MIN_ALIGNMENT} to {MAX_ALIGNMENT}"
            raise self.error(f"general.alignment must be {accepted}, not {alignment}")
        tensors = self.read_tensors(n_tensors, alignment)
        return GGUFFile(
            self.path, version, MappingProxyType(metadata), MappingProxyType(types), MappingProxyType(tensors)
        )

    def error(self, problem: str) -> ModelFileError:
        return ModelFileError(f"{self.path}: {problem}")

    def peek(self, n: int) -> bytes:
        self.fill(min(n, self.size - self.at), "its first bytes")
        return bytes(self.buffer[self.at : self.at + n])

    def fill(self, n: int, what: str) -> None:
        """Have `n` bytes from the current place in the buffer."""
        missing = self.at + n - len(self.buffer)
        if missing <= 0:
            return
        if self.at + n > self.size:
            raise self.error(f"ends inside {what}: cut short, or damaged")
        if self.at + n > MAX_HEADER:
            raise self.error(f"has a header of more than {MAX_HEADER >> 20} MiB, at {what}; damaged")
        self.buffer += self.file.read(max(missing, _CHUNK))
        if len(self.buffer) < self.at + n:
            raise self.error(f"ends inside {what}: it shrank while it was read")

    def number(self, code: str, what: str) -> Any:
        form = struct.Struct("<" + code)
        self.fill(form.size, what)
        (value,) = form.unpack_from(self.buffer, self.at)
        self.at += form.size
        return value

    def count(self, what: str) -> int:
        value: int = self.number("Q", what)
        if value > MAX_ENTRIES:
            raise self.error(f"{what} is {value}; at most {MAX_ENTRIES} are accepted")
        return value

    def string(self, what: str, limit: int = MAX_HEADER) -> str:
        (text,) = self.strings(1, what, limit)
        return text

    def strings(self, n: int, what: str, limit: int = MAX_HEADER) -> list[str]:
        length_of, result = struct.Struct("<Q").unpack_from, []
        # The hot loop of a vocabulary: locals, and one comparison per item in place of a call.
        at, buffer, have = self.at, self.buffer, len(self.buffer)
        for _ in range(n):
            if at + 8 > have:
                self.at = at
                self.fill(8, what)
                have = len(buffer)
            (length,) = length_of(buffer, at)
            at += 8
            if at + length > have:
                if length > limit:
                    raise self.error(f"{what} has a text of {length} bytes; at most {limit} are accepted")
                self.at = at
                self.fill(length, what)
                have = len(buffer)
            result.append(buffer[at : at + length].decode("utf-8", "surrogateescape"))
            at += length
        self.at = at
        return result

    def name(self, what: str, limit: int) -> str:
        """A key or a tensor name: C strings in ggml, so no zero inside; and UTF-8 that a line can show."""
        text = self.string(what, limit)
        if not 1 <= len(text.encode(errors="surrogateescape")) <= limit or not text.isprintable():
            raise self.error(f"{what} is {_quote(text)}; 1 to {limit} bytes of printable text are accepted")
        return text

    def read_metadata(self, n: int) -> tuple[dict[str, Any], dict[str, str]]:
        metadata: dict[str, Any] = {}
        types: dict[str, str] = {}
        for i in range(n):
            key = self.name(f"the key of metadata entry {i}", MAX_KEY)
            if key in metadata:
                raise self.error(f"metadata key {_quote(key)} appears twice")
            metadata[key], types[key] = self.value(_quote(key))
        return metadata, types

    def value(self, key: str) -> tuple[Any, str]:
        kind: int = self.number("I", key)
        if kind == STRING:
            return self.string(key), "str"
        if kind != ARRAY:
            name, code = self.scalar(kind, key)
            return self.number(code, key), name
        item: int = self.number("I", key)
        n: int = self.number("Q", key)
        if n > self.items_left:
            raise self.error(f"metadata {key} is an array of {n} items; at most {MAX_ITEMS} in all arrays are accepted")
        self.items_left -= n
        if item == STRING:
            return self.strings(n, key), "arr[str]"
        name, code = self.scalar(item, key)
        form = struct.Struct(f"<{n}{code}")
        self.fill(form.size, key)
        values = list(form.unpack_from(self.buffer, self.at))
        self.at += form.size
        return values, f"arr[{name}]"

    def scalar(self, kind: int, key: str) -> tuple[str, str]:
        if kind not in SCALARS:
            what = "an array of arrays" if kind == ARRAY else f"of the unknown type {kind}"
            raise self.error(f"metadata {key} is {what}; numbers, booleans, texts and arrays of them are accepted")
        return SCALARS[kind]

    def read_tensors(self, n: int, alignment: int) -> dict[str, TensorInfo]:
        entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for i in range(n):
            name = self.name(f"the name of tensor {i}", MAX_NAME)
            if name in entries:
                raise self.error(f"tensor {_quote(name)} appears twice")
            entries[name] = self.tensor(_quote(name))
        start = -(-self.at // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        expected = 0
        for name, (shape, kind, offset) in entries.items():
            if offset != expected:
                # ggml's rule: no gaps, no overlap, in the order of the header.
                raise self.error(f"tensor {_quote(name)} has offset {offset}; it must be {expected}")
            nbytes = prod(shape) // TYPES[kind].block * TYPES[kind].nbytes
            if start + offset + nbytes > self.size:
                raise self.error(
                    f"tensor {_quote(name)} ends at byte {start + offset + nbytes}, but the file has {self.size}: "
                    "cut short, or damaged"
                )
            tensors[name] = TensorInfo(name, shape, kind, start + offset, nbytes)
            expected += -(-nbytes // alignment) * alignment
        return tensors

    def tensor(self, name: str) -> tuple[tuple[int, ...], int, int]:
        """Shape, type and offset from the start of the data."""
        what = f"the entry of tensor {name}"
        n_dims: int = self.number("I", what)
        if not 1 <= n_dims <= MAX_DIMS:
            raise self.error(f"tensor {name} has {n_dims} dimensions; 1 to {MAX_DIMS} are accepted")
        shape = tuple(reversed([self.number("Q", what) for _ in range(n_dims)]))
        kind: int = self.number("I", what)
        offset: int = self.number("Q", what)
        if kind not in TYPES:
            raise self.error(f"tensor {name} is of type {kind}, which ggml does not know or no longer supports")
        if min(shape) < 1 or prod(shape) >= 2**63:
            raise self.error(f"tensor {name} has the impossible shape {list(shape)}")
        if shape[-1] % TYPES[kind].block:
            raise self.error(
                f"tensor {name} is {TYPES[kind].name} with rows of {shape[-1]}; "
                f"their length must be a multiple of {TYPES[kind].block}"
            )
        return shape, kind, offset
