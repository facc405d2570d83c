"""convert.sentencepiece and spm_model: what a GGUF says of such a vocabulary, and the files that cannot be used."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import sentencepiece_tokenizers as forms
from gguf import GGUFValueType, TokenType
from vocabularies import SENTENCES, fuzz, write_fields, write_vocab

from local_llava.convert.plan import Field
from local_llava.convert.tokenizer import read_tokenizer
from local_llava.errors import CheckpointError, ModelFileError
from local_llava.llm_vocab import NORMALIZED_KEY, RSTRIP_KEY, SPACE_PREFIX_KEY, STRIP_SPACE_KEY, check_vocab
from local_llava.sentencepiece import SentencePiece, TextRun


def test_metadata(tmp_path: Path) -> None:
    """As llama.cpp's converter has it, but for the values of scores, which order the same."""
    pair = forms.Pair(forms.phi3(), tmp_path, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    ours, metadata, types = pair.tokenizer, pair.gguf.metadata, pair.gguf.types
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.pre"] == "default"
    ids = {name: metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "eot", "unknown", "padding")}
    assert ids == {"bos": 1, "eos": 32000, "eot": 32007, "unknown": 0, "padding": 32000}
    assert (metadata["tokenizer.ggml.add_bos_token"], metadata["tokenizer.ggml.add_eos_token"]) == (True, False)
    assert metadata["tokenizer.ggml.add_space_prefix"] is True
    assert metadata[SPACE_PREFIX_KEY] == "prepend"
    assert metadata[RSTRIP_KEY] == [2, *range(32001, 32011)]
    assert types["tokenizer.ggml.scores"] == "arr[f32]"
    assert ours.types[:4] == (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.BYTE)
    assert set(ours.types[3:259]) == {TokenType.BYTE}
    assert set(ours.types[259:32000]) == {TokenType.NORMAL}
    assert set(ours.types[32000:32012]) == {TokenType.CONTROL}
    assert ours.image_token_id == 32011
    assert set(ours.types[32013:]) == {TokenType.UNUSED}
    merged = {a + b for a, b in (m.split(" ") for m in ours.merges)}
    # But for runs of spaces, sentencepiece's own scores fall by one from id to id.
    scores = [s for s, t in zip(ours.scores[259:32000], ours.tokens[259:32000], strict=True) if set(t) != {"▁"}]
    assert scores == sorted(scores, reverse=True)
    assert max(ours.scores[i] for i in range(259, 32000) if ours.tokens[i] not in merged) < -len(ours.merges)


def test_normalized_tokens_are_listed(tmp_path: Path) -> None:
    words = [forms.added(700, "word", special=False, normalized=True), forms.added(701, "<mark>", normalized=True)]
    pair = forms.Pair(forms.with_added(forms.small(), words), tmp_path, 800)
    assert pair.gguf.metadata[NORMALIZED_KEY] == [700]


def test_the_configuration_overrides_a_tokens_flags(tmp_path: Path) -> None:
    """As in transformers, which adds the tokenizer_config.json's again."""
    decoder = {"2": {**forms.added(2, "</s>", rstrip=True)}, "700": forms.added(700, "<new>", lstrip=True)}
    pair = forms.Pair(forms.small(), tmp_path, 800, added_tokens_decoder=decoder)
    assert (pair.tokenizer.rstrip, pair.tokenizer.lstrip) == ((2,), (700,))


def test_sentencepieces_own_file(tmp_path: Path) -> None:
    """tokenizer.model, against the library that made it."""
    text = tmp_path / "text"
    text.write_text("\n".join(SENTENCES * 20))
    settings = {"model_type": "bpe", "byte_fallback": True, "vocab_size": 900, "character_coverage": 0.98}
    settings |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "split_digits": True}
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "tokenizer"), user_defined_symbols=["<mark>"], **settings
    )
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}')
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 900}')
    tokenizer = read_tokenizer(tmp_path, 1000, {})
    gguf = write_vocab(tokenizer, tmp_path / "vocab.gguf")
    vocab = check_vocab(gguf)
    ours = SentencePiece.from_gguf(gguf, vocab)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    texts = [t for t in fuzz(2000, 10, ("<s>", "</s>", "<0x41>", "▁")) if "<mark>" not in t]
    assert [t for t in texts if ours.encode(TextRun((t,))) != reference.encode(t)] == []
    assert tokenizer.scores[:900] == tuple(reference.get_score(i) for i in range(900))
    assert (tokenizer.bos, tokenizer.eos, tokenizer.unk, tokenizer.pad) == (1, 2, 0, 900)
    assert (tokenizer.space_prefix, tokenizer.strip_space, tokenizer.add_bos) == ("prepend", True, True)
    assert ours.encode(TextRun(("<mark>",))) != [reference.piece_to_id("<mark>")]
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "legacy": False, "add_bos_token": False}))
    newer = read_tokenizer(tmp_path, 1000, {})
    assert (newer.space_prefix, newer.add_bos) == ("first", False)


LIES: list[tuple[str, Any, GGUFValueType, GGUFValueType | None, str]] = [
    ("tokenizer.ggml.scores", [0.0] * 799, GGUFValueType.ARRAY, GGUFValueType.FLOAT32, "has 799 items for 800 tokens"),
    (
        "tokenizer.ggml.scores",
        [float("nan")] * 800,
        GGUFValueType.ARRAY,
        GGUFValueType.FLOAT32,
        "has a value that is no",
    ),
    (
        "tokenizer.ggml.scores",
        ["a"],
        GGUFValueType.ARRAY,
        GGUFValueType.STRING,
        "is stored as arr[str]; it must be arr[",
    ),
    ("tokenizer.ggml.merges", ["ab"], GGUFValueType.ARRAY, GGUFValueType.STRING, "has the item 'ab' at 0; two tokens"),
    ("tokenizer.ggml.merges", "ab", GGUFValueType.STRING, None, "is stored as str; it must be arr[str]"),
    ("tokenizer.ggml.add_space_prefix", 1, GGUFValueType.UINT32, None, "is stored as u32; it must be bool"),
    ("tokenizer.ggml.unknown_token_id", 800, GGUFValueType.UINT32, None, "is 800, but the vocabulary has 800 tokens"),
    (
        SPACE_PREFIX_KEY,
        "last",
        GGUFValueType.STRING,
        None,
        "is 'last'; accepted: prepend, replace, always, first, never",
    ),
    (SPACE_PREFIX_KEY, True, GGUFValueType.BOOL, None, "is stored as bool; it must be str"),
    (STRIP_SPACE_KEY, "x", GGUFValueType.STRING, None, "is stored as str; it must be bool"),
    (RSTRIP_KEY, [1, 800], GGUFValueType.ARRAY, GGUFValueType.UINT32, "has the token 800, but the vocabulary has 800"),
    (NORMALIZED_KEY, [1], GGUFValueType.ARRAY, GGUFValueType.INT32, "is stored as arr[i32]; it must be arr[u32]"),
]


@pytest.mark.parametrize(("key", "value", "kind", "item", "problem"), LIES)
def test_files_that_lie(
    tmp_path: Path, key: str, value: Any, kind: GGUFValueType, item: GGUFValueType | None, problem: str
) -> None:
    forms.write(forms.small(), tmp_path)
    fields = [f for f in read_tokenizer(tmp_path, 800, {}).fields() if f.key != key]
    path = tmp_path / "vocab.gguf"
    with pytest.raises(ModelFileError) as caught:
        check_vocab(write_fields([*fields, Field(key, value, kind, item)], path))
    assert str(caught.value).startswith(f"{path}: {key} {problem}")


# --- files that cannot be used ---


def set_in(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}
ONLY = "with byte_fallback supported are the normalizers Prepend and Replace, or Metaspace without split"

BAD: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no pipeline": (set_in("normalizer", value=None), f"normalizer and pre_tokenizer do []; {ONLY}"),
    "NFKC": (set_in("normalizer", value={"type": "NFKC"}), "normalizer and pre_tokenizer do ['NFKC']; with byte_fallb"),
    "other prefix": (
        set_in("normalizer", "normalizers", 0, "prepend", value="_"),
        "normalizer and pre_tokenizer do ['Prepend', 'Replace']; with",
    ),
    "both": (set_in("pre_tokenizer", value=METASPACE), "normalizer and pre_tokenizer do ['Prepend', 'Replace', 'Meta"),
    "list of steps": (set_in("normalizer", "normalizers", value=[1]), "normalizer.normalizers must be a list of obj"),
    "ignore_merges": (set_in("model", "ignore_merges", value=True), "model.ignore_merges is set; with byte_fallback"),
    "dropout": (set_in("model", "dropout", value=0.1), "model.dropout is set"),
    "decoder": (set_in("decoder", value={"type": "ByteLevel"}), "decoder does ['ByteLevel']; with byte_fallback"),
    "no decoder": (set_in("decoder", value=None), "decoder does []; with byte_fallback supported are Replace"),
    "strips more": (set_in("decoder", "decoders", 3, "start", value=2), "decoder does ['Replace', 'ByteFallback'"),
    "a space": (set_in("model", "vocab", "a b", value=790), "model.vocab['a b'] must be a text without a space"),
    "a zero": (set_in("model", "vocab", "a\0", value=790), "model.vocab['a\\x00'] must be a text without a space"),
    "no byte": (
        lambda c: set_in("model", "vocab", "<0x5>", value=c["model"]["vocab"].pop("<0x0A>"))(c),
        "model.vocab lacks 1 of the 256 byte tokens, such as <0x0A>",
    ),
    "merge": (
        set_in("model", "merges", 3, value=["q", "▁▁▁q"]),
        "model.merges[3] joins ['q', '\\u2581\\u2581\\u2581q']",
    ),
    "no merges": (set_in("model", "merges", value=[]), "model.merges is empty; with byte_fallback a model that merges"),
    "strips in text": (
        lambda c: c["added_tokens"].append(forms.added(700, "word", special=False, rstrip=True)),
        "added_tokens: rstrip is set for 'word'; only special tokens may have it",
    ),
    "whole words": (
        set_in("added_tokens", 0, "single_word", value=True),
        "added_tokens[0].single_word is set for '<unk>'",
    ),
    "flag": (set_in("added_tokens", 0, "rstrip", value=1), "added_tokens[0].rstrip must be true or false, not 1"),
}


@pytest.mark.parametrize(("change", "problem"), BAD.values(), ids=BAD)
def test_bad_tokenizers(tmp_path: Path, change: Callable[[dict[str, Any]], None], problem: str) -> None:
    content = json.loads(json.dumps(forms.small()))
    change(content)
    forms.write(content, tmp_path)
    with pytest.raises(CheckpointError) as caught:
        read_tokenizer(tmp_path, 800, {})
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'tokenizer.json'}: {problem}")
    assert message.isprintable() and len(message) < len(str(tmp_path)) + 300


def test_metaspace_that_splits(tmp_path: Path) -> None:
    content = forms.metaspace(forms.small(), "first")
    for more in ({"split": True}, {"replacement": "_"}, {"prepend_scheme": "last"}):
        forms.write({**content, "pre_tokenizer": {**content["pre_tokenizer"], **more}}, tmp_path)
        with pytest.raises(CheckpointError, match=r"normalizer and pre_tokenizer do \['Metaspace'\]"):
            read_tokenizer(tmp_path, 800, {})
    content = forms.metaspace(forms.small(), "never")
    del content["pre_tokenizer"]["prepend_scheme"]
    forms.write({**content, "pre_tokenizer": {**content["pre_tokenizer"], "add_prefix_space": False}}, tmp_path)
    assert read_tokenizer(tmp_path, 800, {}).space_prefix == "never"


def test_merges_that_would_make_a_special_token_are_left_out(tmp_path: Path) -> None:
    """The library would make </s> of typed text."""
    content = json.loads(json.dumps(forms.small()))
    for text in ("<", "/", "s", ">", "</", "s>"):
        content["model"]["vocab"].setdefault(text, 700 + len(text) + ord(text[0]) % 40)
    content["model"]["merges"] = [["<", "/"], ["s", ">"], ["</", "s>"], *content["model"]["merges"]]
    pair = forms.Pair(content, tmp_path, 800)
    assert pair.reference.encode("a</s>", add_special_tokens=False).ids[-1] == 2
    assert pair.encode("a</s>")[-2:] == [content["model"]["vocab"][text] for text in ("</", "s>")]


def test_damaged_spm_models(tmp_path: Path) -> None:
    """A file cut anywhere, and one with other settings."""
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    text = tmp_path / "text"
    text.write_text("\n".join(SENTENCES * 20))
    settings: dict[str, Any] = {"input": str(text), "vocab_size": 900, "model_prefix": str(tmp_path / "tokenizer")}
    plain = {"model_type": "bpe", "byte_fallback": True, "remove_extra_whitespaces": False, "character_coverage": 0.98}
    identity = {"normalization_rule_name": "identity"}
    for change, problem in (
        ({"model_type": "unigram"}, "trainer_spec.model_type is 1; only 2 (BPE) is supported"),
        ({"byte_fallback": False}, "trainer_spec.byte_fallback is 0; only true is supported"),
        ({"remove_extra_whitespaces": True}, "normalizer_spec.remove_extra_whitespaces is 1; only false is supported"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizer_spec has rules ('nmt_nfkc'); only identity is supported"),
        (
            {"user_defined_symbols": ["word"]},
            "piece 3, 'word', is user-defined; only marks such as <name> are supported",
        ),
    ):
        sentencepiece.SentencePieceTrainer.train(**settings, **{**plain, **identity, **change})
        with pytest.raises(CheckpointError) as caught:
            read_tokenizer(tmp_path, 1000, {})
        assert str(caught.value) == f"{tmp_path / 'tokenizer.model'}: {problem}"
    sentencepiece.SentencePieceTrainer.train(**settings, **plain, **identity)
    path = tmp_path / "tokenizer.model"
    whole = path.read_bytes()
    rng = random.Random(1)
    n_refused = 0
    for i in range(300):
        data = bytearray(whole)
        if i % 2:
            del data[rng.randrange(len(whole)) :]
        else:
            for _ in range(rng.randrange(1, 4)):
                data[rng.randrange(len(whole))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            read_tokenizer(tmp_path, 1000, {})
        except CheckpointError as e:
            n_refused += 1
            assert str(e).startswith(str(tmp_path)) and str(e).isprintable() and len(str(e)) < 400
    assert n_refused > 100


def test_mutated_files_end_in_one_line(tmp_path: Path) -> None:
    """2,000 damaged tokenizer.json files, in a child process: each is read or refused."""
    forms.write(forms.small(), tmp_path)
    for i, content in enumerate((forms.small(), forms.metaspace(forms.small(), "first"))):
        (tmp_path / f"{i}.json").write_text(json.dumps(content))
    run = [sys.executable, Path(__file__).with_name("fuzz_tokenizer.py"), tmp_path, "2000", "1"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = json.loads(done.stdout)
    assert sum(outcomes.values()) == 2000 and min(outcomes.values()) > 100, outcomes
