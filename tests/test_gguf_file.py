"""gguf_file, llm_vocab and llm_file: every lie is caught, and what passes does not bring llama.cpp down."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import random
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from gguf_bytes import Tensor, TinyLLM, entry, gguf, header, text, tiny_sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from local_llava.corrections import corrected
from local_llava.default_chats import LLAMA3_CHAT
from local_llava.errors import ModelFileError
from local_llava.gguf_file import TYPES, GGUFFile, what_is
from local_llava.llm_file import check_llm, check_pair


def write(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    return path


def refusal(call: Callable[[], object], path: Path) -> str:
    """The message of the error that `call` raises, without the file's name, which it must begin with."""
    with pytest.raises(ModelFileError) as caught:
        call()
    message = str(caught.value)
    assert message.startswith(f"{path}: "), message
    assert message.isprintable() and len(message) < 500, message
    return message.removeprefix(f"{path}: ")


F32 = Tensor("w", [4], bytes(16))
N = struct.Struct("<Q").pack
I = struct.Struct("<I").pack  # noqa: E741


def test_reads_all_kinds_of_values(tmp_path: Path) -> None:
    entries: list[tuple[str, str, Any]] = [
        ("u8", "u8", 255),
        ("i64", "i64", -(2**63)),
        ("f32", "f32", 0.5),
        ("f64", "f64", 1e300),
        ("yes", "bool", True),
        ("text", "str", "naïve \U0001f600"),
        ("raw", "str", b"\xff\xfea"),
        ("words", "arr[str]", ["a", "", "é"]),
        ("numbers", "arr[u16]", [1, 65535]),
        ("floats", "arr[f32]", [1.0, -2.5]),
        ("flags", "arr[bool]", [True, False]),
        ("none", "arr[i32]", []),
    ]
    a, b = Tensor("a", [4, 3], bytes(range(48))), Tensor("b", [32, 2], bytes(68), 8)
    path = write(tmp_path, gguf(entries, [a, b]))
    file = GGUFFile.open(path)
    expected = {key: value for key, _, value in entries} | {"raw": "\udcff\udcfea"}
    assert dict(file.metadata) == expected
    assert {key: type(value) for key, value in file.metadata.items()} == {k: type(v) for k, v in expected.items()}
    assert file.types == {key: kind for key, kind, _ in entries}
    assert type(file.metadata["flags"][0]) is bool
    assert file.metadata["raw"].encode(errors="surrogateescape") == b"\xff\xfea"
    assert file.version == 3
    assert list(file.tensors) == ["a", "b"]
    first, second = file.tensors.values()
    assert (first.shape, first.type, first.nbytes) == ((3, 4), 0, 48)
    assert (second.shape, second.type, second.nbytes) == ((2, 32), 8, 68)
    assert path.read_bytes()[first.offset : first.offset + 48] == bytes(range(48))
    assert second.offset == first.offset + 64


def test_types_are_those_of_ggml() -> None:
    base = ctypes.CDLL(next(str(p) for p in (Path(llama_cpp.__file__).parent / "lib").glob("*ggml-base.*")))
    base.ggml_type_name.restype, base.ggml_type_size.restype = ctypes.c_char_p, ctypes.c_size_t
    base.ggml_blck_size.restype = ctypes.c_int64
    for number in range(43):  # GGML_TYPE_COUNT
        ours = TYPES.get(number)
        block, size = base.ggml_blck_size(number), base.ggml_type_size(number)
        assert (ours is None) == (block == 0), number
        if ours is not None:
            assert (ours.name.lower(), ours.block, ours.nbytes) == (
                base.ggml_type_name(number).decode().lower(),
                block,
                size,
            )
    assert max(TYPES) < 43


BAD_CONTAINERS = {
    "empty": (b"", "is not a GGUF but empty"),
    "short magic": (b"GGU", "is not a GGUF but of another kind"),
    "magic only": (b"GGUF", "ends inside the version"),
    "cut in counts": (b"GGUF" + I(3) + N(0)[:5], "ends inside the number of tensors"),
    "version 1": (header(version=1), "is a GGUF of version 1; versions 2 and 3 are supported"),
    "version 4": (header(version=4), "is a GGUF of version 4; versions 2 and 3"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is a big-endian GGUF"),
    "many tensors": (header(n_tensors=2**63), "the number of tensors is 9223372036854775808; at most 65536"),
    "many entries": (header(n_entries=65537), "the number of metadata entries is 65537; at most 65536"),
    "no entries": (header(n_entries=1), "ends inside the key of metadata entry 0"),
    "empty key": (gguf([entry("", "u8", 1)]), "the key of metadata entry 0 is ''"),
    "zero in key": (gguf([entry("a\0b", "u8", 1)]), "the key of metadata entry 0 is 'a\\x00b'"),
    "long key": (gguf([entry("k" * 2000, "u8", 1)]), "the key of metadata entry 0 is 'kkk"),
    "key of 2**60": (header(n_entries=1) + N(2**60), "the key of metadata entry 0 has a text of 1152921504606846976"),
    "twice": (gguf([("k", "u8", 1), ("k", "u8", 2)]), "metadata key 'k' appears twice"),
    "odd value type": (gguf([text("k") + I(13)]), "metadata 'k' is of the unknown type 13"),
    "nested array": (gguf([text("k") + I(9) + I(9) + N(1)]), "metadata 'k' is an array of arrays"),
    "long array": (gguf([text("k") + I(9) + I(0) + N(2**40)]), "metadata 'k' is an array of 1099511627776 items"),
    "array past the end": (gguf([text("k") + I(9) + I(0) + N(1000)]), "ends inside 'k'"),
    "texts past the end": (gguf([text("k") + I(9) + I(8) + N(1000)]), "ends inside 'k'"),
    "text past the end": (gguf([text("k") + I(8) + N(2**63)]), "'k' has a text of 9223372036854775808 bytes"),
    "text past the end, shorter": (gguf([text("k") + I(8) + N(2**20)]), "ends inside 'k'"),
    "line break in key": (
        gguf([entry("a\nb", "u8", 1)]),
        "the key of metadata entry 0 is 'a\\nb'; 1 to 1024 bytes of pr",
    ),
    "key that is no text": (gguf([entry(b"a\xff", "u8", 1)]), "the key of metadata entry 0 is 'a\\udcff'"),
    "escape in name": (gguf([], [Tensor("\x1b[31m", [4], bytes(16))]), "the name of tensor 0 is '\\x1b[31m'"),
    "alignment type": (gguf([("general.alignment", "u64", 32)]), "general.alignment must be a u32, not u64"),
    "alignment 0": (gguf([("general.alignment", "u32", 0)]), "general.alignment must be a power of two from 32"),
    "alignment 48": (gguf([("general.alignment", "u32", 48)]), "general.alignment must be a power of two from 32"),
    # Loads in ggml, which then aborts on tensors that are not aligned to 32 bytes.
    "alignment 8": (gguf([("general.alignment", "u32", 8)]), "general.alignment must be a power of two from 32"),
    "no dimensions": (gguf([], [Tensor("w", [], bytes(4))]), "tensor 'w' has 0 dimensions; 1 to 4 are accepted"),
    "5 dimensions": (gguf([], [Tensor("w", [1] * 5, bytes(4))]), "tensor 'w' has 5 dimensions"),
    "no rows": (gguf([], [Tensor("w", [4, 0])]), "tensor 'w' has the impossible shape [0, 4]"),
    "overflow": (
        gguf([], [Tensor("w", [2**32, 2**31])]),
        "tensor 'w' has the impossible shape [2147483648, 4294967296]",
    ),
    "negative": (gguf([], [Tensor("w", [2**64 - 1])]), "tensor 'w' has the impossible shape"),
    "odd tensor type": (
        gguf([], [Tensor("w", [4], bytes(16), 43)]),
        "tensor 'w' is of type 43, which ggml does not know",
    ),
    "removed tensor type": (gguf([], [Tensor("w", [32], bytes(18), 31)]), "tensor 'w' is of type 31, which ggml does"),
    "half a block": (
        gguf([], [Tensor("w", [48], bytes(54), 2)]),
        "tensor 'w' is Q4_0 with rows of 48; their length must",
    ),
    "name twice": (gguf([], [F32, F32]), "tensor 'w' appears twice"),
    "long name": (gguf([], [Tensor("w" * 64, [4], bytes(16))]), "the name of tensor 0 is 'www"),
    "no name": (gguf([], [Tensor("", [4], bytes(16))]), "the name of tensor 0 is ''"),
    "no data": (gguf([], [F32])[:-17], "tensor 'w' ends at byte"),
    "offset": (gguf([], [dataclasses.replace(F32, offset=32)]), "tensor 'w' has offset 32; it must be 0"),
    "odd offset": (gguf([], [F32, Tensor("v", [4], bytes(16), offset=16)]), "tensor 'v' has offset 16; it must be 32"),
    "overlap": (gguf([], [F32, Tensor("v", [4], bytes(16), offset=0)]), "tensor 'v' has offset 0; it must be 32"),
    "huge offset": (
        gguf([], [dataclasses.replace(F32, offset=2**64 - 1)]),
        "tensor 'w' has offset 18446744073709551615",
    ),
}


@pytest.mark.parametrize(("data", "problem"), BAD_CONTAINERS.values(), ids=BAD_CONTAINERS)
def test_bad_containers(tmp_path: Path, data: bytes, problem: str) -> None:
    # An array of 2**40 items must cost no more than the bytes that are there.
    path = write(tmp_path, data)
    tracemalloc.start()
    message = refusal(lambda: GGUFFile.open(path), path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message.startswith(problem)
    assert peak < 4 << 20


def test_header_is_bounded(tmp_path: Path) -> None:
    """Files as large as they say (sparse), whose metadata has no end."""
    path = tmp_path / "model.gguf"
    many = gguf([entry("a", "arr[u8]", [0] * 100), text("k") + I(9) + I(0) + N(4 << 20)]) + bytes(4 << 20)
    for data, problem in (
        (gguf([text("k") + I(8) + N(1 << 29)]), "'k' has a text of 536870912 bytes; at most 67108864 are accepted"),
        (many, "metadata 'k' is an array of 4194304 items; at most 4194304 in all arrays are accepted"),
    ):
        path.write_bytes(data)
        os.truncate(path, 1 << 30)
        assert refusal(lambda: GGUFFile.open(path), path).startswith(problem)
    with path.open("wb") as file:
        file.write(header(n_entries=100))
        for i in range(100):
            file.write(text(f"k{i}") + I(8) + N(8 << 20))
            file.seek(8 << 20, os.SEEK_CUR)
        file.truncate()
    assert refusal(lambda: GGUFFile.open(path), path).startswith("has a header of more than 64 MiB, at 'k7'")


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(20), "a PNG picture"),
        (b"\xff\xd8\xff\xe0" + bytes(20), "a JPEG picture"),
        (b"PK\x03\x04" + bytes(20), "a ZIP archive or PyTorch checkpoint"),
        (b"\x80\x02}q\x00.", "a pickle"),
        (N(2) + b"{}", "a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>", "an HTML page"),
        (b'{"a": 1}', "JSON"),
        (b"tjgg" + bytes(20), "a model in a format older than GGUF"),
        (bytes(600), "filled with zeros"),
        (b"FUGG" + bytes(20), "a GGUF with its bytes in the wrong order"),
    ],
)
def test_other_files_are_named(tmp_path: Path, head: bytes, name: str) -> None:
    assert what_is(head, len(head)).startswith(name)
    path = write(tmp_path, head)
    assert refusal(lambda: GGUFFile.open(path), path).startswith(f"is not a GGUF but {name}")


def test_what_is_no_file(tmp_path: Path) -> None:
    missing = tmp_path / "none.gguf"
    assert "cannot be read: No such file" in refusal(lambda: GGUFFile.open(missing), missing)
    assert "is a directory" in refusal(lambda: GGUFFile.open(tmp_path), tmp_path)
    with pytest.raises(ModelFileError, match="is not a path"):
        GGUFFile.open(Path("a\0b"))
    if hasattr(os, "mkfifo"):
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        assert "is not a regular file" in refusal(lambda: GGUFFile.open(pipe), pipe)


TINY = TinyLLM(n_layer=1).bytes
HEADER_END = len(TINY) - sum(len(t.data) for t in TinyLLM(n_layer=1).tensors.values())


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(
        st.tuples(
            st.integers(0, HEADER_END),
            st.one_of(
                st.binary(min_size=1, max_size=9),
                st.integers(0, 2**64 - 1).map(N),
                st.sampled_from([N(2**63), N(2**64 - 1), I(0), I(9), I(8), I(2**32 - 1)]),
            ),
        ),
        max_size=4,
    ),
    end=st.one_of(st.none(), st.integers(0, HEADER_END + 64)),
)
def test_any_damage_gives_one_error(tmp_path: Path, edits: list[tuple[int, bytes]], end: int | None) -> None:
    data = bytearray(TINY)
    for at, new in edits:
        data[at : at + len(new)] = new
    path = write(tmp_path, bytes(data[:end]))
    try:
        check_llm(GGUFFile.open(path))
    except ModelFileError as e:
        assert str(e).isprintable()
        assert str(e).startswith(str(path))


def check(path: Path) -> object:
    return check_llm(GGUFFile.open(path))


def test_a_good_model(tmp_path: Path) -> None:
    config = check_llm(GGUFFile.open(write(tmp_path, TinyLLM().bytes)))
    assert (config.n_embd, config.n_layer, config.n_head, config.n_head_kv, config.n_embd_head) == (64, 2, 4, 2, 16)
    assert (config.n_ff, config.n_ctx_train, config.n_vocab, config.tied) == (96, 256, 265, False)
    assert (config.vocab.bos, config.vocab.eos, config.vocab.eot, config.vocab.add_bos) == (259, 260, 263, True)
    assert config.overrides == {}
    assert check_llm(GGUFFile.open(write(tmp_path, TinyLLM(tied=True, weight_type=1).bytes))).tied
    check_pair(config, Path("p.gguf"), 64)
    with pytest.raises(ModelFileError, match=r"p.gguf: gives image embeddings of width 32, but .*model.gguf takes 64"):
        check_pair(config, Path("p.gguf"), 32)


def test_published_files_of_before_may_2024_are_put_right(tmp_path: Path) -> None:
    """They name no pre-tokenizer and no end of turn; llama.cpp takes both from `kv_overrides`."""
    model = TinyLLM()
    for key in ("tokenizer.ggml.pre", "tokenizer.ggml.eot_token_id"):
        del model.entries[key]
    path = write(tmp_path, model.bytes)
    assert refusal(lambda: check(path), path).startswith("tokenizer.ggml.pre is 'default'")
    config = check_llm(corrected(GGUFFile.open(path)).gguf)
    added = {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.eot_token_id": 263}
    assert added.items() <= config.overrides.items()
    assert (config.vocab.eot, config.vocab.pre, config.vocab.chat_template) == (263, "llama-bpe", LLAMA3_CHAT)


TOKENS = TinyLLM().entries["tokenizer.ggml.tokens"][1]

BAD_ENTRIES: list[tuple[str, str, Any, str]] = [
    ("general.architecture", "", None, "is missing"),
    ("general.architecture", "u32", 1, "is stored as u32; it must be str"),
    ("general.architecture", "str", "clip", "is clip: this is the mmproj; give the language model's GGUF"),
    ("general.architecture", "str", "mamba", "is 'mamba'; supported: llama"),
    ("general.type", "str", "adapter", "is 'adapter': it is no model"),
    ("general.type", "str", "x" * 5000, "is 'xxx"),
    ("general.name", "str", "Phi-3-mini", "is 'Phi-3-mini', but the vocabulary has no </s>"),
    ("split.count", "u16", 3, "is 3: it is one part of a split model"),
    ("llama.context_length", "", None, "is missing; a language model has it, as u32"),
    ("llama.context_length", "u32", 0, "is 0; it must be 1 to"),
    ("llama.embedding_length", "i32", 64, "is stored as i32; it must be u32"),
    ("llama.embedding_length", "u32", 62, "'s"),
    ("llama.block_count", "u32", 0, "is 0; it must be 1 to 512"),
    ("llama.block_count", "u32", 513, "is 513; it must be 1 to 512"),
    ("llama.attention.head_count", "u32", 0, "is 0"),
    ("llama.attention.head_count", "u32", 6, "is 6; it must divide embedding_length, 64"),
    ("llama.attention.head_count", "arr[u32]", [4, 4], "is stored as arr[u32]"),
    ("llama.attention.head_count_kv", "u32", 3, "is 3; it must divide head_count, 4"),
    ("llama.attention.value_length", "u32", 8, "is 8; a head's width, 16, is needed"),
    ("llama.attention.layer_norm_rms_epsilon", "f32", float("nan"), "is nan; it must be"),
    ("llama.attention.layer_norm_rms_epsilon", "f32", -1.0, "is -1; it must be"),
    ("llama.attention.causal", "bool", False, "is False: it reads text in both directions"),
    ("llama.rope.dimension_count", "u32", 8, "is 8; a head's width, 16, is needed"),
    ("llama.rope.freq_base", "f32", float("inf"), "is inf"),
    ("llama.rope.scaling.type", "str", "longest", "is 'longest'; supported: none, linear, yarn"),
    ("llama.expert_count", "u32", 8, "is 8: mixtures of experts are not supported"),
    ("llama.expert_used_count", "u32", 2, "is 2: mixtures of experts are not supported"),
    ("llama.nextn_predict_layers", "u32", 9, "is 9: multi-token prediction is not supported"),
    ("llama.pooling_type", "u32", 1, "is 1: it is an embedding model"),
    ("llama.embedding_length_out", "u32", 32, "must equal embedding_length, 64"),
    ("tokenizer.ggml.model", "", None, "is missing"),
    ("tokenizer.ggml.model", "str", "rwkv", "is 'rwkv'; supported are gpt2"),
    ("tokenizer.ggml.model", "str", "x" * 5000, "is 'xxxx"),
    ("tokenizer.ggml.model", "str", "no_vocab", "is 'no_vocab'; supported are gpt2"),
    ("tokenizer.ggml.pre", "str", "tekken", "is 'tekken'; supported are llama-bpe (Llama 3) and qwen2"),
    ("tokenizer.ggml.tokens", "", None, "is missing"),
    ("tokenizer.ggml.tokens", "arr[u32]", [1], "is stored as arr[u32]"),
    ("tokenizer.ggml.tokens", "arr[str]", [], "has 0 tokens"),
    ("tokenizer.ggml.tokens", "arr[str]", [*TOKENS[:-1], "he"], "has the token 'he' twice, at 256 and 264"),
    ("tokenizer.ggml.tokens", "arr[str]", [*TOKENS[:-1], "he\0x"], "has a zero byte in token 264"),
    ("tokenizer.ggml.tokens", "arr[str]", ["", *TOKENS[1:-1], "[EMPTY_0]"], "has the token '[EMPTY_0]' twice"),
    ("tokenizer.ggml.tokens", "arr[str]", ["x0", *TOKENS[1:]], "has no token for the byte 0x00, of 1"),
    ("tokenizer.ggml.token_type", "arr[i32]", [1] * 264, "has 264 items for 265 tokens"),
    ("tokenizer.ggml.token_type", "arr[i32]", [7] * 265, "has the value 7; 0 to 6 are known"),
    ("tokenizer.ggml.token_type", "arr[i32]", [6] * 265, "calls token 0, '\\u0100', a byte"),
    ("tokenizer.ggml.merges", "", None, "is missing"),
    ("tokenizer.ggml.merges", "arr[str]", ["he"], "has the item 'he' at 0"),
    ("tokenizer.ggml.scores", "arr[f32]", [0.0], "has 1 items for 265 tokens"),
    ("tokenizer.ggml.bos_token_id", "", None, "is missing"),
    ("tokenizer.ggml.eos_token_id", "u32", 265, "is 265, but the vocabulary has 265 tokens"),
    ("tokenizer.ggml.eot_token_id", "i32", 1, "is stored as i32"),
    ("tokenizer.chat_template", "u32", 1, "is stored as u32"),
]


@pytest.mark.parametrize(("key", "kind", "value", "problem"), BAD_ENTRIES)
def test_bad_entries(tmp_path: Path, key: str, kind: str, value: Any, problem: str) -> None:
    model = TinyLLM()
    if kind:
        model.entries[key] = (kind, value)
    else:
        del model.entries[key]
    message = refusal(lambda: check(path), path := write(tmp_path, model.bytes))
    # A width of 62 is caught where the heads do not divide it.
    assert message.startswith(f"{key} {problem}") or (value == 62 and "62" in message)


def changed(name: str, **changes: Any) -> TinyLLM:
    model = TinyLLM()
    model.tensors[name] = dataclasses.replace(model.tensors[name], **changes)
    return model


def test_bad_tensors(tmp_path: Path) -> None:
    def message(model: TinyLLM) -> str:
        path = write(tmp_path, model.bytes)
        return refusal(lambda: check(path), path)

    for name in TinyLLM().tensors:
        model = TinyLLM()
        del model.tensors[name]
        if name != "output.weight":
            assert message(model).startswith(f"tensor {name} is missing; its shape is [")
        t = TinyLLM().tensors[name]
        wide = changed(name, ne=[t.ne[0] + 1, *t.ne[1:]], data=bytes(len(t.data) + len(t.data) // t.ne[0]))
        assert message(wide).startswith(f"tensor {name} has the shape [")
    n = 265 * 64
    for name, kind, size in (
        ("token_embd.weight", 26, n * 4),
        ("output.weight", 24, n),
        ("output.weight", 9, n // 32 * 36),
    ):
        assert message(changed(name, type=kind, data=bytes(size))).startswith(f"tensor {name} is {TYPES[kind].name}")
    for kind in (1, 30):
        assert "accepted: F32" in message(changed("blk.0.attn_norm.weight", type=kind, data=bytes(128)))
    model = TinyLLM()
    model.add("blk.2.attn_q.weight", 64, 64)
    assert message(model) == "tensor 'blk.2.attn_q.weight' is not part of a llama model of 2 layers"
    model = TinyLLM()
    model.add("rope_freqs.weight", 7)
    assert message(model).startswith("tensor rope_freqs.weight has the shape [7]; it must be [8]")


def test_sentencepiece(tmp_path: Path) -> None:
    assert check_llm(GGUFFile.open(write(tmp_path, tiny_sentencepiece().bytes))).vocab.model == "llama"
    for key, old, new, problem in (
        ("tokens", "<0x0A>", "<0xA>", "tokens lacks the byte token <0x0A>"),
        ("scores", None, None, "scores is missing"),
    ):
        model = tiny_sentencepiece()
        kind, values = model.entries.pop(f"tokenizer.ggml.{key}")
        if old:
            model.entries[f"tokenizer.ggml.{key}"] = (kind, [new if v == old else v for v in values])
            model.entries["tokenizer.ggml.token_type"] = ("arr[i32]", [1] * 265)
        path = write(tmp_path, model.bytes)
        assert refusal(partial(check, path), path).startswith(f"tokenizer.ggml.{problem}")


def variants() -> Iterator[TinyLLM]:
    """Odd models that may pass: one value at random in each."""
    rng = random.Random(2)
    odd: dict[str, list[Any]] = {
        "u32": [0, 1, 2, 3, 4, 5, 8, 16, 32, 64, 96, 128, 255, 259, 264, 2**16, 2**27, 2**31, 2**32 - 1],
        "f32": [0.0, -1.0, 1e-12, 1e-5, 0.1, 1.0, 1e4, 1e12, 1e30],
        "str": ["", "x", "llama", "llama-bpe", "default", "none", "yarn", "linear", "%s%n", "\u00e9\n" * 99],
        "bool": [True, False],
    }
    optional = {
        "llama.rope.scaling.type": "str",
        "llama.rope.scaling.factor": "f32",
        "llama.rope.scaling.original_context_length": "u32",
        "llama.rope.scaling.attn_factor": "f32",
        "llama.attention.key_length": "u32",
        "llama.attention.value_length": "u32",
        "llama.vocab_size": "u32",
        "llama.expert_group_count": "u32",
        "llama.attention.sliding_window": "u32",
        "llama.logit_scale": "f32",
        "tokenizer.ggml.add_eos_token": "bool",
        "tokenizer.ggml.add_sep_token": "bool",
        "tokenizer.ggml.add_space_prefix": "bool",
        "tokenizer.ggml.unknown_token_id": "u32",
        "tokenizer.ggml.mask_token_id": "u32",
        "tokenizer.chat_template": "str",
        "general.file_type": "u32",
        "general.quantization_version": "u32",
    }
    for _ in range(600):
        model = rng.choice([TinyLLM, TinyLLM, tiny_sentencepiece])()
        for _ in range(rng.choice([1, 1, 2])):
            kinds = {key: kind for key, (kind, _) in model.entries.items() if kind in odd} | optional
            key = rng.choice(sorted(kinds))
            model.entries[key] = (kinds[key], rng.choice(odd[kinds[key]]))
        if rng.random() < 0.4:
            key = rng.choice(["tokens", "token_type", "merges"])
            kind, values = model.entries.get(f"tokenizer.ggml.{key}", ("arr[str]", []))
            values = list(values)
            if values:
                at = rng.randrange(len(values))
                values[at] = (
                    rng.choice([0, 1, 2, 3, 4, 5])
                    if key == "token_type"
                    else rng.choice(["x y", "\u4e2d", " ", "a b c"])
                )
                model.entries[f"tokenizer.ggml.{key}"] = (kind, values)
        yield model


def load_all(paths: list[Path]) -> dict[str, str]:
    """How llama.cpp takes each file, by name."""
    script = Path(__file__).parent / "load_ggufs.py"
    # ggml runs gdb for a backtrace when it aborts, which takes seconds.
    env = os.environ | {"GGML_NO_BACKTRACE": "1"}
    done = subprocess.run([sys.executable, script, *paths], capture_output=True, text=True, env=env, check=True)
    results = {Path(line.split(" ", 1)[0]).name: line.split(" ", 1)[1] for line in done.stdout.splitlines()}
    assert list(results) == [path.name for path in paths]
    return results


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each file is loaded in a forked process")
def test_what_passes_does_not_bring_llama_cpp_down(tmp_path: Path) -> None:
    paths: list[Path] = []
    for model in [TinyLLM(), tiny_sentencepiece(), *variants()]:
        path = tmp_path / f"{len(paths)}.gguf"
        path.write_bytes(model.bytes)
        try:
            check_llm(GGUFFile.open(path))
        except ModelFileError:
            continue
        paths.append(path)
        if len(paths) == 100:
            break
    assert len(paths) == 100
    results = load_all(paths)
    assert set(results.values()) == {"loaded"}, results


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each file is loaded in a forked process")
def test_what_is_refused_would_bring_it_down(tmp_path: Path) -> None:
    """The reason for the checks: these abort llama.cpp. When one no longer does, its check may be relaxed."""
    cases: dict[str, tuple[str, str, Any]] = {
        "layers": ("llama.block_count", "u32", 0),
        "epsilon": ("llama.attention.layer_norm_rms_epsilon", "f32", -1.0),
        "experts": ("llama.expert_count", "u32", 8),
        "scaling": ("llama.rope.scaling.type", "str", "longest"),
        "repeated": ("tokenizer.ggml.tokens", "arr[str]", ["a"] * 265),
        "zero": ("tokenizer.ggml.tokens", "arr[str]", [f"a\0{i}" for i in range(265)]),
    }
    paths: list[Path] = []
    for name, (key, kind, value) in cases.items():
        model = TinyLLM()
        model.entries[key] = (kind, value)
        paths.append(tmp_path / f"{name}.gguf")
        paths[-1].write_bytes(model.bytes)
    for name, number, size in (("blk.0.attn_norm.weight", 1, 128), ("token_embd.weight", 26, 265 * 256)):
        paths.append(tmp_path / f"{name}.gguf")
        paths[-1].write_bytes(changed(name, type=number, data=bytes(size)).bytes)
    for path in paths:
        refusal(partial(check, path), path)
    results = load_all(paths)
    assert all(result.startswith("died -") for result in results.values()), results
