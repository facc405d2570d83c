"""Faults of published files: found, put right in memory, and nothing else touched."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import faulty_ggufs as faults
import llama3_tokenizer
import llama_cpp.llama_cpp as c
import mmproj_files
import numpy as np
import pytest
from faulty_ggufs import FAULTS, TEMPLATE, faulty, good
from gguf import GGUFValueType, TokenType
from gguf_bytes import TinyLLM, gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llava_checkpoints import TINY, random_model, save
from numpy.typing import NDArray
from sentencepiece_tokenizers import small, with_image, write
from vocabularies import write_fields

from local_llava.convert import convert
from local_llava.convert.plan import Field
from local_llava.convert.tokenizer import read_tokenizer
from local_llava.corrections import Corrected, architecture, corrected, open_model
from local_llava.default_chats import LLAMA3_CHAT, PHI3_CHAT, QWEN2_CHAT, VICUNA_CHAT
from local_llava.errors import ModelFileError
from local_llava.gguf_file import GGUFFile
from local_llava.llm import LLM
from local_llava.llm.rows import Rows
from local_llava.llm_file import check_llm
from local_llava.mmproj import check_mmproj
from local_llava.sentencepiece import TextRun
from local_llava.types import PAIR_KEY


def read(path: Path, data: bytes) -> GGUFFile:
    path.write_bytes(data)
    return GGUFFile.open(path)


def keys(result: Corrected) -> dict[str, str]:
    return {c.key: str(c) for c in result.corrections}


def test_a_right_file_is_left_alone(tmp_path: Path) -> None:
    gguf_file = read(tmp_path / "m.gguf", good().bytes)
    result = corrected(gguf_file)
    assert (result.corrections, result.notes) == ((), ())
    assert dict(result.gguf.metadata) == dict(gguf_file.metadata)
    assert result.gguf.overrides == {}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault(name: str, tmp_path: Path) -> None:
    """What comes out is the good file, and each line names what was wrong."""
    right = read(tmp_path / "good.gguf", good().bytes)
    result = corrected(read(tmp_path / "m.gguf", faulty(name).bytes))
    lines = keys(result)
    assert lines.keys() == FAULTS[name][1].keys()
    for key, part in FAULTS[name][1].items():
        assert part in lines[key]
        assert lines[key].startswith(key) and lines[key].isprintable()
    assert dict(result.gguf.metadata) == dict(right.metadata)
    assert dict(result.gguf.types) == dict(right.types)
    assert check_llm(result.gguf).vocab.eot == 263
    assert corrected(result.gguf).corrections == ()
    assert architecture(read(tmp_path / "m.gguf", faulty(name).bytes)) == "llama"


QUESTION = TextRun(("hello <|eot_id|> 123", "! hell"))


def evaluate(path: Path) -> tuple[list[int], NDArray[np.float32], list[bool], list[bytes]]:
    llm = LLM.load(path, n_cells=256, n_threads=1, kv_type="F32")
    try:
        tokens = llm.tokenize(QUESTION)
        rows = Rows()
        rows.add(0, 0, [llm.config.vocab.bos, *tokens], "last")
        llm.decode(rows)
        logits = llm.logits().copy()
        ends = [llm.ends_turn(i) for i in range(llm.config.n_vocab)]
        return tokens, logits, ends, [llm.piece(i) for i in range(llm.config.n_vocab)]
    finally:
        llm.close()


ON_DISK = ("keys of llava", "keys of mistral")
"""llama.cpp looks for some keys in the file first, and only then for an override."""


@pytest.mark.parametrize("name", [name for name in FAULTS if name not in ON_DISK])
def test_llama_cpp_sees_the_right_file(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Tokens, logits, ends and texts are those of the good file; the log has a line for each correction."""
    paths = [tmp_path / "good.gguf", tmp_path / "m.gguf"]
    paths[0].write_bytes(good().bytes)
    paths[1].write_bytes(faulty(name).bytes)
    expected = evaluate(paths[0])
    with caplog.at_level(logging.INFO, "local_llava"):
        caplog.clear()
        found = evaluate(paths[1])
    assert found[0] == expected[0]
    assert np.array_equal(found[1], expected[1])
    assert found[2] == expected[2]
    assert found[3] == expected[3]
    told = [r.message for r in caplog.records if r.message.startswith("m.gguf: ")]
    assert len(told) == len(FAULTS[name][1])


def test_a_pre_tokenizer_that_is_only_guessed_splits_otherwise(tmp_path: Path) -> None:
    """The reason for one of the corrections: numbers are cut in threes in a Llama 3."""
    model = good()
    model.entries["tokenizer.ggml.merges"] = ("arr[str]", ["1 2", "12 3", "123 4"])
    texts = model.entries["tokenizer.ggml.tokens"][1]
    texts[256:259] = ["12", "123", "1234"]
    del model.entries["tokenizer.ggml.pre"]
    path = tmp_path / "m.gguf"
    path.write_bytes(model.bytes)
    llm = LLM.load(path, n_cells=256, n_threads=1)
    assert [texts[i] for i in llm.tokenize(TextRun(("1234",)))] == ["123", "4"]
    llm.close()


# --- other vocabularies ---


def with_phi3() -> TinyLLM:
    model = faults.with_tokens("llama", faults.PHI3_TOKENS, PHI3_CHAT)
    texts = model.entries["tokenizer.ggml.tokens"][1]
    model.entries |= {
        "general.file_type": ("u32", 0),
        "general.name": ("str", "LLaVA Phi-3 mini"),
        "tokenizer.ggml.eos_token_id": ("u32", texts.index("<|endoftext|>")),
    }
    return model


def test_phi3(tmp_path: Path) -> None:
    """EOS 32000, where turns end with <|end|>; and marks that swallow the white space after them."""
    model = with_phi3()
    texts = model.entries["tokenizer.ggml.tokens"][1]
    for template in (PHI3_CHAT, None, faults.CHATML, faults.VICUNA):
        model.entries.pop(TEMPLATE, None)
        if template is not None:
            model.entries[TEMPLATE] = ("str", template)
        result = corrected(read(tmp_path / "m.gguf", model.bytes))
        expected = {"tokenizer.ggml.eot_token_id", "local_llava.tokenizer.rstrip_tokens"}
        assert keys(result).keys() == expected | ({TEMPLATE} if template != PHI3_CHAT else set())
        vocab = check_llm(result.gguf).vocab
        assert (vocab.eot, vocab.chat_template) == (texts.index("<|end|>"), PHI3_CHAT)
        marks = ("</s>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
        assert vocab.rstrip == {texts.index(text) for text in marks}


def test_vicuna(tmp_path: Path) -> None:
    """Its vocabulary has no marks, so that any template may be its own."""
    model = faults.with_tokens("llama", (), None)
    model.entries["general.file_type"] = ("u32", 0)
    result = corrected(read(tmp_path / "m.gguf", model.bytes))
    assert keys(result).keys() == {TEMPLATE}
    assert result.gguf.metadata[TEMPLATE] == VICUNA_CHAT
    for template, noted in ((faults.LLAMA2, False), (faults.VICUNA, False), (faults.CHATML, True)):
        model.entries[TEMPLATE] = ("str", template)
        result = corrected(read(tmp_path / "m.gguf", model.bytes))
        assert result.corrections == ()
        assert bool(result.notes) == noted, "marks that are no tokens are told, not changed"
    model.entries[TEMPLATE] = ("str", faults.VICUNA)
    for eos in (1, None):  # <s>, or none
        model.entries["tokenizer.ggml.eos_token_id"] = ("u32", eos)
        if eos is None:
            del model.entries["tokenizer.ggml.eos_token_id"]
        result = corrected(read(tmp_path / "m.gguf", model.bytes))
        assert keys(result).keys() == {"tokenizer.ggml.eos_token_id"}
        assert result.gguf.metadata["tokenizer.ggml.eos_token_id"] == 2


def test_mistrals_own_marks_are_not_known(tmp_path: Path) -> None:
    model = faults.with_tokens("llama", ("[INST]", "[/INST]"), None)
    result = corrected(read(tmp_path / "m.gguf", model.bytes))
    assert result.notes == ("tokenizer.chat_template: there is none",)
    assert TEMPLATE not in keys(result)


def test_what_a_template_says_is_safe_to_print(tmp_path: Path) -> None:
    model = faults.with_tokens("llama", ("[INST]",), "{{ raise_exception('\x1b[31m\u202e no') }}")
    (note,) = corrected(read(tmp_path / "m.gguf", model.bytes)).notes
    assert note.endswith("refuses this conversation: ?[31m? no")


def test_a_vocabulary_with_marks_of_two_formats(tmp_path: Path) -> None:
    """Llama 3's with ChatML's tokens, as some fine-tunes have: the template writes tokens, and is right."""
    model = good()
    texts, types = (model.entries[f"tokenizer.ggml.{name}"][1] for name in ("tokens", "token_type"))
    texts[256:258], types[256:258] = ["<|im_start|>", "<|im_end|>"], [3, 3]
    model.entries["tokenizer.ggml.merges"] = ("arr[str]", ["h e"])
    model.entries[TEMPLATE] = ("str", faults.CHATML)
    result = corrected(read(tmp_path / "m.gguf", model.bytes))
    assert keys(result).keys() == {"tokenizer.ggml.eot_token_id"}
    assert "is 263, taken as 257: turns end with '<|im_end|>'" in keys(result)["tokenizer.ggml.eot_token_id"]


def test_qwen2(tmp_path: Path) -> None:
    """No BOS, text in NFC, ChatML; and a file of before the pre-tokenizer was named."""
    model = faults.with_tokens("gpt2", faults.CHATML_TOKENS, None)
    # Three tokens at the end took the place of Llama 3's marks, the others are none of Qwen2's.
    texts, types = (model.entries[f"tokenizer.ggml.{name}"][1] for name in ("tokens", "token_type"))
    texts[259], types[259] = "é".encode().decode("latin-1"), 1
    model.entries["tokenizer.ggml.merges"] = ("arr[str]", ["h e", "l l", "he ll", "\u00c3 \u00a9"])
    texts[259] = "\u00c3\u00a9"
    model.entries["general.file_type"] = ("u32", 0)
    del model.entries["tokenizer.ggml.bos_token_id"]
    path = tmp_path / "m.gguf"
    result = corrected(read(path, model.bytes))
    assert keys(result).keys() == {TEMPLATE, "tokenizer.ggml.eot_token_id"}
    assert result.gguf.metadata[TEMPLATE] == QWEN2_CHAT
    vocab = check_llm(result.gguf).vocab
    assert (vocab.bos, vocab.add_bos, vocab.pre, vocab.eot) == (-1, False, "qwen2", texts.index("<|im_end|>"))
    del model.entries["tokenizer.ggml.add_bos_token"]
    assert check_llm(corrected(read(path, model.bytes)).gguf).vocab.add_bos is False
    llm = LLM.load(path, n_cells=256, n_threads=1)
    assert llm.tokenize(TextRun(("e\u0301",))) == llm.tokenize(TextRun(("é",))) == [259]
    llm.close()
    model.entries["tokenizer.ggml.add_bos_token"] = ("bool", True)
    with pytest.raises(ModelFileError, match="bos_token_id is missing"):
        check_llm(corrected(read(path, model.bytes)).gguf)
    del model.entries["tokenizer.ggml.pre"]
    with pytest.raises(ModelFileError, match="pre is 'default'"):  # a llama's could be anybody's
        check_llm(corrected(read(path, model.bytes)).gguf)


def test_llama3s_real_vocabulary(tmp_path: Path) -> None:
    """As files of April 2024 have it, with XTuner's EOS: what is corrected, and how long that takes."""
    config = {"text_config": {"bos_token_id": 128000, "eos_token_id": 128001}}
    tokenizer = read_tokenizer(llama3_tokenizer.fetch(), 128320, config)
    gone = ("tokenizer.ggml.pre", "tokenizer.ggml.eot_token_id", TEMPLATE)
    fields = [f for f in tokenizer.fields() if f.key not in gone]
    gguf_file = write_fields(fields, tmp_path / "m.gguf")
    started = time.process_time()
    result = corrected(gguf_file)
    assert time.process_time() - started < 2
    assert set(gone) == keys(result).keys()
    assert [result.gguf.metadata[key] for key in gone] == ["llama-bpe", 128009, LLAMA3_CHAT]
    whole = write_fields(tokenizer.fields(), tmp_path / "m.gguf")
    assert corrected(whole).corrections == (), "with the stock template, which takes strings only"


# --- what must stay an error, and what must stay as it is ---


def test_what_llama_cpp_reads_for_itself(tmp_path: Path) -> None:
    """Arrays cannot be overridden: the file must be repaired."""
    model = good()
    model.entries[faults.TYPES] = ("arr[u32]", model.entries[faults.TYPES][1])
    path = tmp_path / "m.gguf"
    path.write_bytes(model.bytes)
    assert keys(corrected(GGUFFile.open(path))).keys() == {faults.TYPES}
    with pytest.raises(
        ModelFileError, match=r"token_type is stored as arr\[u32\]; .*`local-llava repair` makes a file"
    ):
        LLM.load(path, n_cells=256, n_threads=1)


@pytest.mark.parametrize(
    ("key", "kind", "value"),
    [
        ("llama.block_count", "i32", -1),
        ("llama.block_count", "f32", 2.0),
        ("llama.embedding_length", "u64", 1 << 40),
        ("llama.rope.freq_base", "f64", float("nan")),
        ("llama.rope.freq_base", "f64", 1e300),
        ("tokenizer.ggml.add_bos_token", "u32", 2),
        ("tokenizer.ggml.add_bos_token", "str", "true"),
        ("tokenizer.ggml.tokens", "arr[u32]", [1, 2]),
        ("tokenizer.ggml.pre", "str", "tekken"),
        ("tokenizer.ggml.eos_token_id", "str", "</s>"),
        ("tokenizer.ggml.eos_token_id", "u32", 128001),
        ("general.architecture", "str", "mamba"),
        ("general.architecture", "u32", 3),
        (TEMPLATE, "u32", 3),
    ],
)
def test_what_proves_nothing_is_not_changed(tmp_path: Path, key: str, kind: str, value: Any) -> None:
    model = good()
    if key == "general.architecture":
        faults.prefixed("llama.", f"{value}.", "llama")(model.entries)
    model.entries[key] = (kind, value)
    result = corrected(read(tmp_path / "m.gguf", model.bytes))
    assert key not in keys(result)
    with pytest.raises(ModelFileError):
        check_llm(result.gguf)


def test_our_own_conversions_are_right(tmp_path: Path) -> None:
    files = [convert(TINY, tmp_path / "tiny", quant="Q4_K_M", mmproj_quant="Q8_0")]
    square = random_model(vision={"intermediate_size": 48})
    files.append(convert(save(square, tmp_path / "checkpoint"), tmp_path / "square", quant="F16"))
    for pair in files:
        for path in (pair.model, pair.mmproj):
            result = corrected(GGUFFile.open(path))
            assert (result.corrections, result.notes) == ((), ())


def test_a_checkpoints_own_template_is_its_word(tmp_path: Path) -> None:
    """In a conversion of ours another model's marks are what the checkpoint says."""
    model = good()
    model.entries |= {PAIR_KEY: ("str", "x"), TEMPLATE: ("str", faults.VICUNA)}
    model.entries[faults.TYPES][1][261:263] = [4, 4]
    assert corrected(read(tmp_path / "m.gguf", model.bytes)).corrections == ()
    model.entries[TEMPLATE] = ("str", "{{")
    result = corrected(read(tmp_path / "m.gguf", model.bytes))
    assert result.corrections == ()
    assert "tokenizer.chat_template: the model's chat template cannot be rendered" in result.notes[0]


def test_a_published_sentencepiece_model(tmp_path: Path) -> None:
    """Types of numbers and a template, for a vocabulary that our own tokenizer reads."""
    write(with_image(small()), tmp_path / "tokenizer")
    fields = [f for f in read_tokenizer(tmp_path / "tokenizer", 800, {}).fields() if f.key != TEMPLATE]
    signed = [
        Field(f.key, f.value, GGUFValueType.INT32) if f.key.endswith("_token_id") else f
        for f in fields
        if not f.key.startswith("local_llava.")
    ]
    result = corrected(write_fields(signed, tmp_path / "m.gguf"))
    ids = {f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "unknown")}
    assert keys(result).keys() == ids | {TEMPLATE}
    assert TokenType.CONTROL in result.gguf.metadata[faults.TYPES]


# --- mmproj ---


@pytest.fixture(scope="module")
def tower() -> mmproj_files.Reference:
    return mmproj_files.Reference(n_blocks=4)


def legacy(tower: mmproj_files.Reference, drop_last: bool, swap: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """As the old script wrote them: no feature layer, perhaps no last block, fc1 called ffn_down."""
    metadata, tensors = tower.metadata(), tower.tensors()
    del metadata["clip.vision.feature_layer"]
    if drop_last:
        metadata["clip.vision.block_count"] -= 1
        tensors = {k: v for k, v in tensors.items() if not k.startswith(f"v.blk.{tower.n_blocks - 1}.")}
    if swap:
        other = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
        tensors = {".".join(other.get(p, p) for p in k.split(".")): v for k, v in tensors.items()}
    return metadata, tensors


@pytest.mark.parametrize(("drop_last", "swap"), [(True, True), (True, False), (False, True), (False, False)])
def test_a_legacy_mmproj(drop_last: bool, swap: bool, tower: mmproj_files.Reference, tmp_path: Path) -> None:
    metadata, tensors = legacy(tower, drop_last, swap)
    metadata["general.file_type"] = 0
    path = mmproj_files.write_gguf(tmp_path / "p.gguf", metadata, tensors)
    result = corrected(GGUFFile.open(path))
    expected = {"clip.vision.feature_layer"} | ({"v.blk.*.ffn_down"} if swap else set())
    assert keys(result).keys() == expected
    assert result.gguf.metadata["clip.vision.feature_layer"] == [3]
    config, before = check_mmproj(result.gguf), check_mmproj(GGUFFile.open(path))
    assert (config.n_blocks, config.ffn_swapped, before.ffn_swapped) == (3, False, swap)
    right = {k: tuple(v.shape) for k, v in tower.tensors().items() if not k.startswith("v.blk.3") or not drop_last}
    assert {t.name: t.shape for t in result.gguf.tensors.values()} == right
    assert corrected(result.gguf).corrections == ()


def test_equal_widths_keep_their_names(tmp_path: Path) -> None:
    """There llama.cpp itself takes the first layer for one called ffn_down."""
    square = mmproj_files.Reference(n_ff=64)
    metadata, tensors = legacy(square, True, True)
    path = mmproj_files.write_gguf(tmp_path / "p.gguf", metadata | {"general.file_type": 0}, tensors)
    assert keys(corrected(GGUFFile.open(path))).keys() == {"clip.vision.feature_layer"}


MMPROJ_FAULTS: dict[str, tuple[Any, set[str]]] = {
    "of 2023": (lambda m: m.pop("clip.projector_type"), {"clip.projector_type"}),
    "called llama": (lambda m: m.update({"general.architecture": "llama"}), {"general.architecture"}),
    "called llava": (lambda m: m.update({"general.architecture": "llava"}), {"general.architecture"}),
    "keys of llava": (
        lambda m: [m.update({k.replace("clip.", "llava.", 1): m.pop(k)}) for k in list(m) if k.startswith("clip.")],
        {"llava.*"},
    ),
    "keys without a name": (
        lambda m: [m.update({k.removeprefix("clip."): m.pop(k)}) for k in list(m) if k.startswith("clip.")],
        {"*"},
    ),
    "no file type": (lambda m: m.pop("general.file_type"), {"general.file_type"}),
}


@pytest.mark.parametrize("name", MMPROJ_FAULTS)
def test_other_mmproj_files(name: str, tower: mmproj_files.Reference, tmp_path: Path) -> None:
    metadata = tower.metadata() | {"general.file_type": 0}
    right = mmproj_files.write_gguf(tmp_path / "right.gguf", dict(metadata), tower.tensors())
    change, expected = MMPROJ_FAULTS[name]
    change(metadata)
    path = mmproj_files.write_gguf(tmp_path / "p.gguf", metadata, tower.tensors())
    result = corrected(GGUFFile.open(path))
    assert keys(result).keys() == expected
    assert dict(result.gguf.metadata) == dict(GGUFFile.open(right).metadata)
    assert check_mmproj(result.gguf) == check_mmproj(GGUFFile.open(right))
    assert architecture(GGUFFile.open(path)) == "clip"


def test_types_of_an_mmproj(tower: mmproj_files.Reference, tmp_path: Path) -> None:
    metadata = tower.metadata() | {"general.file_type": 0}
    right = mmproj_files.write_gguf(tmp_path / "right.gguf", metadata, tower.tensors())
    types = {"clip.vision.block_count": "i32", "clip.vision.image_size": "u64", "clip.use_gelu": "u8"}
    types |= {"clip.vision.image_mean": "arr[f64]", "clip.vision.attention.layer_norm_epsilon": "f64"}
    path = faults.spoil(right, tmp_path / "p.gguf", faults.retyped(types))
    assert GGUFFile.open(path).types["clip.vision.image_mean"] == "arr[f64]"
    assert open_model(path).types == GGUFFile.open(right).types
    assert keys(corrected(GGUFFile.open(path))).keys() == types.keys()


# --- files that nobody has checked ---


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_nothing_in_a_header_brings_it_down(tmp_path: Path, data: st.DataObject) -> None:
    """Any entry may be of any type and value: corrections come back, and what is wrong still is an error."""
    entries = {k: v for k, v in good().entries.items() if k != "tokenizer.ggml.merges"}
    entries["clip.vision.block_count"] = ("u32", 3)
    odd: list[tuple[str, Any]] = [
        ("str", ""), ("str", "clip"), ("str", "llama"), ("str", "{% for m in messages %}{{ m }}{% endfor %}"),
        ("str", "{{ 9 ** 99999 }}"), ("u32", 0), ("u32", 2**32 - 1), ("i32", -1), ("i64", -(2**63)), ("u64", 2**64 - 1),
        ("f32", float("nan")), ("f64", 1e308), ("bool", True), ("arr[i32]", []), ("arr[str]", []), ("arr[f32]", [0.5]),
        ("arr[str]", ["<|eot_id|>"] * 3), ("arr[u64]", [2**64 - 1]), ("arr[i32]", [3] * 265), ("arr[bool]", [True]),
    ]  # fmt: skip
    for _ in range(data.draw(st.integers(1, 4))):
        key = data.draw(st.sampled_from(sorted(entries)))
        if data.draw(st.booleans()):
            entries[key] = data.draw(st.sampled_from(odd))
        else:
            entries.pop(key)
    tensors = data.draw(st.sampled_from([list(good().tensors.values()), []]))
    names = data.draw(st.sampled_from([{}, {"token_embd.weight": "v.patch_embd.weight"}]))
    tensors = [type(t)(names.get(t.name, t.name), t.ne, t.data, t.type) for t in tensors]
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf([(key, *value) for key, value in entries.items()], tensors))
    result = corrected(GGUFFile.open(path))
    for line in (*map(str, result.corrections), *result.notes):
        assert line.isprintable() and len(line) < 600
    assert corrected(result.gguf).corrections == (), "what is right needs no more"
    for check in (check_llm, check_mmproj):
        try:
            check(result.gguf)
        except ModelFileError as e:
            assert str(e).isprintable()


def test_what_passes_loads(tmp_path: Path) -> None:
    """Files with several faults at once load in llama.cpp, and without the corrections the checks refuse them."""
    for name in ("called llava", "wrong types", "no BOS and no EOS", "no pre-tokenizer"):
        model = faulty(name)
        FAULTS["no end of turn"][0](model.entries)
        path = tmp_path / "m.gguf"
        path.write_bytes(model.bytes)
        with pytest.raises(ModelFileError):
            check_llm(GGUFFile.open(path))
        llm = LLM.load(path, n_cells=256, n_threads=1)
        assert c.llama_vocab_eot(llm._vocab) == 263
        assert c.llama_vocab_bos(llm._vocab) == 259
        assert llm.ends_turn(263)
        llm.close()
