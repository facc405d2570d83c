"""Damages protocol buffers, of which SentencePiece's tokenizer.model is one, field by field.

Knows as much of the wire format as such files use (https://protobuf.dev/programming-guides/encoding), not what the
fields mean.
"""

from __future__ import annotations

import random

from fuzz_images import damaged


def odd_protobuf(data: bytes, rng: random.Random, others: list[bytes]) -> tuple[bytes, str]:
    """A protocol buffer: its first fields, or those of one field that is a message, dropped, repeated or changed."""
    fields = protobuf_fields(data)
    i, j = rng.randrange(len(fields)), rng.randrange(len(fields))
    number, value = fields[i]
    how = rng.choice(("drop", "twice", "swap", "number", "inside", "inside", "inside", "damage", "cut"))
    match how:
        case "drop":
            del fields[i]
        case "twice":
            fields.insert(j, fields[i])
        case "swap":
            fields[i], fields[j] = fields[j], fields[i]
        case "number":
            fields[i] = (rng.choice((0, 1, 2, 3, 15, 1000)), value)
        case "inside" if isinstance(value, bytes) and protobuf_fields(value):
            fields[i] = (number, odd_protobuf(value, rng, others)[0])
        case "cut":
            del fields[i:]
        case _:
            odd = (
                b"",
                b"\xff\xff",
                "\u2581x".encode(),
                damaged(value, others, rng) if isinstance(value, bytes) else b"x",
            )
            number_odd = rng.choice((0, 1, 2, 3, 6, 7, 2**31, 2**63, 2**64 - 1))
            fields[i] = (number, rng.choice(odd) if isinstance(value, bytes) else number_odd)
    return b"".join(protobuf_field(*field) for field in fields), f"protobuf {how}"


def protobuf_fields(data: bytes) -> list[tuple[int, int | bytes]]:
    """Numbers and values of a message's fields; none where it is no message. Floats are taken as four bytes."""
    fields: list[tuple[int, int | bytes]] = []
    at = 0
    try:
        while at < len(data):
            tag, at = varint(data, at)
            if tag & 7 == 0:
                value, at = varint(data, at)
                fields.append((tag >> 3, value))
            elif tag & 7 in (2, 5):
                size, at = varint(data, at) if tag & 7 == 2 else (4, at)
                if at + size > len(data):
                    return []
                fields.append((-(tag >> 3) if tag & 7 == 5 else tag >> 3, data[at : at + size]))
                at += size
            else:
                return []
    except IndexError:
        return []
    return fields


def protobuf_field(number: int, value: int | bytes) -> bytes:
    """The bytes of a field; a negative number is that of a float."""
    if isinstance(value, int):
        return as_varint(abs(number) << 3) + as_varint(value)
    if number < 0 and len(value) == 4:
        return as_varint(-number << 3 | 5) + value
    return as_varint(abs(number) << 3 | 2) + as_varint(len(value)) + value


def varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
        if byte < 0x80:
            return value, at


def as_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
