"""Damages the files of a checkpoint with knowledge of their structure: JSON values and safetensors headers.

Knows both formats and which values are odd. Does not know which of them local-llava takes.
"""

from __future__ import annotations

import copy
import json
import os
import random
import struct
from pathlib import Path
from typing import Any

from fuzz_values import TEXTS, odd_template, odd_text

RAW = (
    "[" * 100_000,
    "[" * 100_000 + "]" * 100_000,
    '{"a":' * 5000 + "1" + "}" * 5000,
    "1e999",
    "-1e999",
    "1e-999",
    "NaN",
    "Infinity",
    "-Infinity",
    "9" * 5000,
    "1" + "0" * 400,
    "0x10",
    "01",
    "'x'",
    "tru",
    '"\\ud800"',
    '"\\u0000"',
    '"\\x"',
    '"a\nb"',
    "",
    "[1,]",
    "{1:2}",
    '{"a":1,"a":[]}',
    "// x",
)
"""JSON and what is none, put where a value was."""

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 8, 64, 255, 256, 479, 480, 511, 512, 639, 640, 4096, 65536,
    2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, -(2**31), -(2**63),
    0.0, -0.0, 0.5, 1.0, 1.5, 1e-30, 1e-5, 1e30, 1e300, 64.0, [], {}, [[]], [None], {"a": None},
    [0], [1, 2, 3], [1, 2, 3, 4, 5], [0.5, 0.5], [0.5, 0.5, 0.5], [0, 0, 0], ["x"], {"type": "x"}, {"": ""},
)  # fmt: skip

DTYPES = ("F32", "F16", "BF16", "F64", "I64", "I32", "U32", "I16", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "C64", "X")


def odd_json(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A JSON file with one to three things changed, or its text damaged."""
    if rng.random() < 0.1:
        return odd_encoding(data, rng)
    tree = json.loads(data)
    raw: dict[str, str] = {}
    done = [edit_json(tree, rng, raw) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.8)
    for mark, new in raw.items():
        text = text.replace(f'"{mark}"', new)
    return text.encode(errors="surrogatepass"), ", ".join(done)


def odd_jinja(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A chat template's file."""
    new = odd_template(rng, data.decode())
    return new if isinstance(new, bytes) else new.encode(errors="surrogatepass"), "template"


def odd_encoding(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    text = data.decode()
    at = rng.randrange(len(text))
    how = rng.choice(("bom", "utf-16", "latin-1", "cut", "tail", "zeros", "empty", "list", "raw"))
    new = {
        "bom": b"\xef\xbb\xbf" + data,
        "utf-16": text.encode("utf-16"),
        "latin-1": text.replace("e", "\xe9").encode("latin-1", "replace"),
        "cut": data[:at],
        "tail": data + rng.choice((b"\0", b"}", b" x", b"\n" * 5000)),
        "zeros": bytes(len(data)),
        "empty": b"",
        "list": b"[" + data + b"]",
        "raw": text[:at].encode() + rng.choice(RAW).encode() + text[at:].encode(),
    }[how]
    return new, f"text {how}"


def find(tree: Any, rng: random.Random) -> tuple[Any, Any, str]:
    """A container in the tree, a key of it, and the path. Shallow places are likelier than in a long list."""
    path, here = "", tree
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        if not keys:
            return here, None, path
        key = rng.choice(keys)
        path += f".{key}" if isinstance(key, str) else f"[{key}]"
        if not isinstance(here[key], (dict, list)) or rng.random() < 0.3:
            return here, key, path[:80]
        here = here[key]


def edit_json(tree: Any, rng: random.Random, raw: dict[str, str]) -> str:
    here, key, path = find(tree, rng)
    if key is None:
        return f"{path} is empty"
    old = here[key]
    how = rng.choice(
        ("value", "value", "near", "near", "near", "raw", "drop", "move", "rename", "twice", "add", "swap")
    )
    other, other_key, _ = find(tree, rng)
    match how:
        case "value":
            here[key] = copy.deepcopy(rng.choice((*VALUES, *map(as_text, TEXTS))))
        case "near":
            here[key] = near(old, rng)
        case "raw":
            mark = f"raw-{len(raw)}-"
            raw[mark], here[key] = rng.choice(RAW), mark
        case "drop":
            del here[key]
        case "move" if other_key is not None:
            here[key] = copy.deepcopy(other[other_key])
        case "swap" if other_key is not None:
            here[key], other[other_key] = copy.deepcopy(other[other_key]), copy.deepcopy(old)
        case "rename" if isinstance(here, dict):
            here[as_text(odd_text(rng, key))] = here.pop(key)
        case "twice" if isinstance(here, list):
            here.insert(rng.randrange(len(here) + 1), copy.deepcopy(old))
        case "twice":
            # A key that comes twice can only be written, not held.
            mark, second = f"raw-{len(raw)}-", near(old, rng)
            raw[mark], here[key] = f"{json.dumps(old)}, {json.dumps(key)}: {json.dumps(second)}", mark
        case "add" if isinstance(here, dict):
            here[as_text(odd_text(rng, key))] = copy.deepcopy(rng.choice(VALUES))
        case _:
            here[key] = rng.choice(VALUES)
    return f"{path} {how}"


def as_text(text: str | bytes) -> str:
    """JSON can hold half of a surrogate pair."""
    return text if isinstance(text, str) else text.decode(errors="surrogateescape")


def near(old: Any, rng: random.Random) -> Any:
    """A value of the same type, or one that means nearly the same."""
    if isinstance(old, bool):
        return rng.choice((not old, not old, int(old), str(old)))
    if isinstance(old, int):
        return rng.choice((old + 1, old - 1, old * 2, old // 2, -old, float(min(old, 2**60)), str(old), [old]))
    if isinstance(old, float):
        return rng.choice((old * 2, old / 2, -old, old + 1, str(old), 0.0))
    if isinstance(old, str):
        return odd_template(rng, old) if "{%" in old else as_text(odd_text(rng, old))
    if isinstance(old, list):
        return rng.choice((old[1:], old[:-1], old * 2, old[::-1], dict.fromkeys(map(str, old[:5])), [old], []))
    if isinstance(old, dict):
        fewer = dict(rng.sample(sorted(old.items()), len(old) // 2))
        return rng.choice((fewer, list(old), {}, dict.fromkeys(list(old)[:1], old), dict.fromkeys(old)))
    return rng.choice(VALUES)


def odd_safetensors(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A safetensors file with a whole but wrong header, a damaged one, or odd weights."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    how = rng.choice(("entries", "entries", "entries", "entries", "json", "weights", "weights", "length", "cut", "pad"))
    match how:
        case "entries":
            done = [edit_tensor(header, rng) for _ in range(rng.choice((1, 1, 2)))]
            if rng.random() < 0.7:
                body = laid_out(header, body)
            return packed(json.dumps(header).encode(), body), ", ".join(done)
        case "json":
            text, what = odd_json(data[8 : 8 + length], rng)
            return packed(text, body), f"header: {what}"
        case "weights":
            return data[: 8 + length] + odd_weights(body, rng), "weights"
        case "length":
            new = rng.choice((0, 1, 2, length - 1, length + 1, len(data), 100_000_000, 2**31, 2**32, 2**63, 2**64 - 1))
            return struct.pack("<Q", new) + data[8:], f"header of {new} bytes"
        case "cut":
            ends = [8 + length + e["data_offsets"][1] for k, e in header.items() if k != "__metadata__"]
            end = rng.choice((0, 7, 8, 9, 8 + length - 1, 8 + length, rng.choice(ends), rng.randrange(len(data))))
            more = rng.choice((-1, 0, 1))
            return (data[: max(0, end + more)], f"cut at {end + more}") if more < 1 else (data + b"\0", "a byte more")
        case _:
            spaces = b" " * rng.choice((1, 8, 4096, 1_000_000))
            return packed(spaces + data[8 : 8 + length] + spaces, body), "padded"


def packed(header: bytes, body: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + body


def laid_out(header: dict[str, Any], body: bytes) -> bytes:
    """Put the tensors one behind the other with the bytes that dtype and shape ask for, where they make sense."""
    sizes = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "I32": 4, "U32": 4, "I16": 2, "U8": 1, "BOOL": 1}
    out = bytearray()
    for name, entry in header.items():
        if name == "__metadata__" or not isinstance(entry, dict):
            continue
        size = sizes.get(entry.get("dtype", ""), 1)
        for n in entry.get("shape", []):
            size *= n
        if not 0 <= size <= 1 << 21:
            continue
        start = max(0, entry["data_offsets"][0])
        old = body[start : start + size]
        entry["data_offsets"] = [len(out), len(out) + size]
        out += old + bytes(size - len(old))
    return bytes(out)


def edit_tensor(header: dict[str, Any], rng: random.Random) -> str:
    name, other = rng.choice(list(header)), rng.choice(list(header))
    if name == "__metadata__":
        header[name] = rng.choice((None, 1, [], {"format": 1}, {"a": {}}, {"x" * 9999: "y"}, {"format": "tf"}))
        return "__metadata__"
    entry = header[name]
    shape = entry["shape"]
    how = rng.choice(("dtype", "dtype", "shape", "shape", "shape", "offset", "drop", "copy", "rename", "swap", "twice"))
    match how:
        case "dtype":
            entry["dtype"] = rng.choice(DTYPES)
        case "shape":
            at = rng.randrange(len(shape)) if shape else 0
            entry["shape"] = rng.choice(
                (
                    shape[::-1],
                    [*shape, 1],
                    [1, *shape],
                    shape[1:],
                    [],
                    [*shape[:at], rng.choice((0, 1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1)), *shape[at + 1 :]],
                    [*shape[:at], shape[at] + rng.choice((-1, 1, shape[at])) if shape else 1, *shape[at + 1 :]],
                )
            )
        case "offset":
            start, stop = entry["data_offsets"]
            moved = ([stop, start], [start, start], [start + 4, stop + 4], [start, stop - 2], [0, stop], [0, 2**64 - 1])
            entry["data_offsets"] = rng.choice(moved)
        case "drop":
            del header[name]
        case "copy":
            header[rng.choice((name + "2", "model." + name, "extra\nline", "", as_text(odd_text(rng, name))))] = entry
        case "rename":
            header[as_text(odd_text(rng, name))] = header.pop(name)
        case "swap" if other != "__metadata__":
            header[name], header[other] = header[other], header[name]
        case _:
            header[f"{name.removesuffix('.weight')}.bias"] = {**entry, "shape": shape[:1]}
    return f"{name} {how}"


def odd_weights(body: bytes, rng: random.Random) -> bytes:
    """Numbers that are none, or none that a type can hold, at the beginning, somewhere, or everywhere."""
    pattern = rng.choice(
        (b"\0", b"\xff", b"\x00\x00\xc0\x7f", b"\x00\x7e", b"\x80\x7f", b"\x00\xfc", b"\xff\xff\x7f\x7f", b"\x01\0\0\0")
    )
    start = rng.choice((0, rng.randrange(len(body)) & ~3))
    stop = min(len(body), start + rng.choice((4, 64, 4096, len(body))))
    return body[:start] + (pattern * (stop - start))[: stop - start] + body[stop:]


def odd_file(path: Path, rng: random.Random) -> str:
    """Something else in place of a file, or nothing."""
    how = rng.choice(("missing", "directory", "empty", "loop", "pipe", "broken link"))
    path.unlink()
    match how:
        case "directory":
            path.mkdir()
        case "empty":
            path.touch()
        case "loop":
            path.symlink_to(path.name)
        case "pipe" if hasattr(os, "mkfifo"):
            os.mkfifo(path)
        case "broken link":
            path.symlink_to("nowhere")
    return how
