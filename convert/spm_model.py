"""SentencePiece's own file, tokenizer.model, where a checkpoint has no tokenizer.json beside it.

Knows the few fields of its protocol buffer that say how text is split:
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto, and what transformers' Llama
tokenizer adds to them from tokenizer_config.json and added_tokens.json.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from gguf import TokenType

from local_llava.convert.added_tokens import AddedToken
from local_llava.convert.bpe import Vocabulary
from local_llava.convert.config import Config, read_json
from local_llava.errors import CheckpointError
from local_llava.llm_vocab import BYTE_TOKENS, is_mark

MAX_BYTES = 64 << 20
"""Largest file that is read; a real one has half a megabyte."""

_BPE = 2
"""Of `TrainerSpec.ModelType`."""

_Fields: TypeAlias = "dict[int, list[int | bytes]]"
"""Values by field number: of varints the number, of others the bytes."""


@dataclass(frozen=True)
class _Piece:
    text: str
    score: float
    kind: TokenType


def read_spm_model(path: Path) -> tuple[Vocabulary, list[AddedToken]]:
    """Read a tokenizer.model and what lies beside it.

    Returns:
        The vocabulary, without merges: every pair that makes a token merges, by the token's score. And the tokens that
        are matched as text: control and user-defined pieces, and those of added_tokens.json.

    Raises:
        CheckpointError: The file is damaged, or asks for what the runtime does not do.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"{path}: larger than the {MAX_BYTES} bytes that such a file may have")
        data = path.read_bytes()
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror}") from e
    try:
        model = _fields(data)
        trainer, normalizer = (_fields(b"".join(_bytes(model, number))) for number in (2, 3))
        pieces = [_piece(raw) for raw in _bytes(model, 1)]
        settings = {
            "trainer_spec.model_type": (_number(trainer, 3, 1), _BPE, "2 (BPE)"),
            "trainer_spec.byte_fallback": (_number(trainer, 35, 0), 1, "true"),
            "trainer_spec.treat_whitespace_as_suffix": (_number(trainer, 24, 0), 0, "false"),
            "normalizer_spec.remove_extra_whitespaces": (_number(normalizer, 4, 1), 0, "false"),
            "normalizer_spec.escape_whitespaces": (_number(normalizer, 5, 1), 1, "true"),
        }
        rules, name = any(_bytes(normalizer, 2)), b"".join(_bytes(normalizer, 1)[-1:])
        dummy_prefix = bool(_number(normalizer, 3, 1))
    except (ValueError, struct.error) as e:
        raise CheckpointError(f"{path}: not a SentencePiece model: {str(e)[:100]}") from e
    for key, (value, accepted, text) in settings.items():
        if value != accepted:
            raise CheckpointError(f"{path}: {key} is {value}; only {text} is supported")
    if rules:
        shown = name.decode("utf-8", "replace")
        raise CheckpointError(f"{path}: normalizer_spec has rules ({shown!a:.40}); only identity is supported")
    _check_pieces(path, pieces)
    return _vocabulary(path, pieces, dummy_prefix), _added(path.parent, pieces)


def _vocabulary(path: Path, pieces: list[_Piece], dummy_prefix: bool) -> Vocabulary:
    config = path.parent / "tokenizer_config.json"
    # transformers' first Llama tokenizer put the space before every text between special tokens; `legacy` keeps it so.
    legacy = Config(config, read_json(config) if config.is_file() else {}).flag("legacy", True)
    return Vocabulary(
        model="llama",
        pre="default",
        ids={piece.text: i for i, piece in enumerate(pieces)},
        merges=(),
        types={piece.text: piece.kind for piece in pieces if piece.kind in (TokenType.BYTE, TokenType.UNKNOWN)},
        scores={piece.text: piece.score for piece in pieces},
        unk=next((i for i, piece in enumerate(pieces) if piece.kind == TokenType.UNKNOWN), None),
        space_prefix="never" if not dummy_prefix else "prepend" if legacy else "first",
        strip_space=dummy_prefix,
    )


def _check_pieces(path: Path, pieces: list[_Piece]) -> None:
    texts: dict[str, int] = {}
    for i, piece in enumerate(pieces):
        if not piece.text or "\0" in piece.text:
            raise CheckpointError(f"{path}: piece {i} is {piece.text!a:.40}; a text without a zero character is needed")
        if texts.setdefault(piece.text, i) != i:
            raise CheckpointError(f"{path}: pieces {texts[piece.text]} and {i} are both {piece.text!a:.40}")
        if piece.kind == TokenType.UNUSED:
            raise CheckpointError(f"{path}: piece {i}, {piece.text!a:.40}, is of type UNUSED, which is not supported")
        if piece.kind == TokenType.USER_DEFINED and not is_mark(piece.text):
            # sentencepiece matches it after the space is put before the text, others before.
            raise CheckpointError(
                f"{path}: piece {i}, {piece.text!a:.40}, is user-defined; only marks such as <name> are supported"
            )
    missing = sorted(BYTE_TOKENS - {piece.text for piece in pieces if piece.kind == TokenType.BYTE})
    if missing:
        raise CheckpointError(f"{path}: lacks {len(missing)} of the 256 byte pieces, such as {missing[0]}")


def _added(directory: Path, pieces: list[_Piece]) -> list[AddedToken]:
    matched = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
    found = {
        piece.text: AddedToken(i, piece.text, piece.kind != TokenType.USER_DEFINED, normalized=False)
        for i, piece in enumerate(pieces)
        if piece.kind in matched
    }
    path = directory / "added_tokens.json"
    for text, i in read_json(path).items() if path.is_file() else ():
        if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < 1 << 31 or not text or "\0" in text:
            raise CheckpointError(f"{path}: {text!a:.40} must be a text with a token id, not {i!a:.40}")
        found.setdefault(text, AddedToken(i, text, special=False, normalized=False))
    return list(found.values())


def _piece(raw: bytes) -> _Piece:
    fields = _fields(raw)
    text = b"".join(_bytes(fields, 1)[-1:]).decode()
    score = struct.unpack("<f", b"".join(_bytes(fields, 2)[-1:]) or bytes(4))[0]
    if not -1e30 < score < 1e30:
        raise ValueError(f"a piece has the score {score}")
    return _Piece(text, score, TokenType(_number(fields, 3, 1)))


def _number(fields: _Fields, field: int, default: int) -> int:
    """The last value of a field, which counts."""
    value = fields.get(field, [default])[-1]
    if not isinstance(value, int):
        raise ValueError(f"field {field} is no number")
    return value


def _bytes(fields: _Fields, field: int) -> list[bytes]:
    values = fields.get(field, [])
    found = [value for value in values if isinstance(value, bytes)]
    if len(found) < len(values):
        raise ValueError(f"field {field} is a number")
    return found


def _fields(data: bytes) -> _Fields:
    """The fields of a message: https://protobuf.dev/programming-guides/encoding/.

    Raises:
        ValueError: It is not one.
    """
    fields: _Fields = {}
    for number, value in _wire(data):
        fields.setdefault(number, []).append(value)
    return fields


def _wire(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if size > len(data) - at:
            raise ValueError("it ends inside a field")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for i in range(10):
        if at + i >= len(data):
            raise ValueError("it ends inside a number")
        value |= (data[at + i] & 0x7F) << (7 * i)
        if data[at + i] < 0x80:
            return value, at + i + 1
    raise ValueError("a number of more than ten bytes")
