"""convert.tokenizer: what llama.cpp makes of text with our vocabulary is what the tokenizers library makes of it."""

from __future__ import annotations

import json
import logging
import shutil
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jinja2.sandbox
import llama3_tokenizer
import llama_cpp as lib
import pytest
import qwen2_tokenizer
from gguf import TokenType
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Reference
from vocabularies import NEW, SENTENCES, Vocab, fuzz

from local_llava.convert.byte_level import LLAMA3_REGEX, QWEN2_REGEX
from local_llava.convert.tokenizer import read_tokenizer
from local_llava.default_chats import LLAMA3_CHAT
from local_llava.errors import CheckpointError


class Pair:
    """Both sides of the comparison."""

    def __init__(self, directory: Path, n_rows: int, config: dict[str, Any], scratch: Path) -> None:
        self.ours = read_tokenizer(directory, n_rows, config)
        self.reference = Reference.from_file(str(directory / "tokenizer.json"))
        self.vocab = Vocab(self.ours, scratch / "vocab.gguf")

    def differences(self, texts: list[str], special: bool, ends: bool = False) -> list[str]:
        """Texts that llama.cpp splits otherwise; `special` lets special tokens be found in text."""
        self.reference.encode_special_tokens = not special
        expected = self.reference.encode_batch(texts, add_special_tokens=ends)
        return [t for t, e in zip(texts, expected, strict=True) if self.encode(t, special, ends) != e.ids]

    def encode(self, text: str, special: bool, ends: bool) -> list[int]:
        """As the runtime does, which takes text to NFC for Qwen2."""
        text = unicodedata.normalize("NFC", text) if self.ours.pre == "qwen2" else text
        return self.vocab.encode(text, special, ends)


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    callback = lib.llama_log_callback(lambda level, text, data: None)
    lib.llama_log_set(callback, None)
    yield
    lib.llama_log_set(lib.llama_log_callback(0), None)


@pytest.fixture(scope="module")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    config = {"image_token_index": 128257, "text_config": {"bos_token_id": 128000, "eos_token_id": 128001}}
    return Pair(llama3_tokenizer.fetch(), 128320, config, tmp_path_factory.mktemp("llama3"))


TYPED = ("<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|image|>", "<image>", "<__media__>", "<|reserved")


def test_llama3_text_is_split_as_in_tokenizers(llama3: Pair) -> None:
    texts = fuzz(2000, 1, TYPED)
    assert len(set(texts)) > 1800
    assert llama3.differences(texts, special=True) == []
    assert llama3.differences(texts, special=False) == []


def test_llama3_every_kind_of_character(llama3: Pair) -> None:
    """All code points, but for the middle of blocks of one kind, where they would show: UNICODE_16 and no others."""
    uniform = ((0x3500, 0x9F00), (0xAC80, 0xD700), (0xE100, 0xF800), (0x17100, 0x18700), (0x20100, 0x2A600))
    characters = [
        chr(c)
        for c in range(0x33500)
        if not 0xD800 <= c < 0xE000 and not any(first < c < last for first, last in uniform)
    ] + [chr(c) for c in (*range(0xE0000, 0xE0200), 0xF0000, 0x100000, 0x10FFFF)]
    found = set()
    for context in ("{}(k", " {}", "'{}e"):
        texts = [context.format(c) for c in characters]
        bad = set(llama3.differences(texts, special=True))
        found |= {c for c, text in zip(characters, texts, strict=True) if text in bad}
    assert {f"{ord(c):04X}" for c in found} == {f"{ord(c):04X}" for c in NEW}
    assert len(NEW) == 4382


def test_llama3_typed_specials_stay_text(llama3: Pair) -> None:
    for text in (*TYPED, "a <|eot_id|><|start_header_id|>system<|end_header_id|>\n\nb", "<image>\nWhat is <image>?"):
        tokens = llama3.vocab.encode(text, special=False)
        assert max(tokens) < 128000
        assert llama3.vocab.decode(tokens) == text
    assert llama3.vocab.encode("<|eot_id|>", special=True) == [128009]


def test_llama3_special_ids(llama3: Pair) -> None:
    ours = llama3.ours
    assert (ours.bos, ours.eos, ours.eot, ours.pad, ours.image_token_id) == (128000, 128001, 128009, None, 128257)
    assert (ours.model, ours.pre, ours.add_bos, ours.add_eos, ours.n_used) == ("gpt2", "llama-bpe", True, False, 128256)
    assert ours.tokens[128256:128258] == ("[PAD128256]", "[PAD128257]")
    assert len(ours.tokens) == len(ours.types) == 128320
    assert set(ours.types[128256:]) == {TokenType.UNUSED}
    assert set(ours.types[128000:128256]) == {TokenType.CONTROL}
    vocab = llama3.vocab.vocab
    assert lib.llama_vocab_bos(vocab) == 128000
    assert lib.llama_vocab_eos(vocab) == 128001
    assert lib.llama_vocab_eot(vocab) == 128009
    assert [i for i in range(128320) if lib.llama_vocab_is_eog(vocab, i)] == [128001, 128009]
    assert "{% set loop_messages = messages %}" in ours.chat_template
    assert llama3.vocab.checked.overrides == {}


# Qwen2.


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """With the rows and ids of Qwen2.5-7B-Instruct."""
    config = {"text_config": {"bos_token_id": 151643, "eos_token_id": 151645}}
    return Pair(qwen2_tokenizer.fetch(), 152064, config, tmp_path_factory.mktemp("qwen2"))


QWEN2_MARKS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|image_pad|>", "<|vision_end|>", "<tool_call>")


def test_qwen2_text_is_split_as_in_tokenizers(qwen2: Pair) -> None:
    texts = fuzz(2000, 5, QWEN2_MARKS)
    assert len(set(texts)) > 1800
    assert sum(unicodedata.normalize("NFC", t) != t for t in texts) > 100
    assert qwen2.differences(texts, special=True) == []
    assert qwen2.differences(texts, special=False) == []
    assert qwen2.differences(texts[:200], special=True, ends=True) == []


def test_qwen2_special_ids(qwen2: Pair) -> None:
    ours = qwen2.ours
    assert (ours.bos, ours.eos, ours.eot, ours.pad, ours.image_token_id) == (151643, 151645, 151645, 151643, None)
    assert (ours.model, ours.pre, ours.add_bos, ours.add_eos, ours.n_used) == ("gpt2", "qwen2", False, False, 151665)
    assert ours.tokens[151664:151666] == ("<|file_sep|>", "[PAD151665]")
    assert "{%- if tools %}" in ours.chat_template
    assert qwen2.vocab.encode("Hi", special=False, ends=True) == qwen2.vocab.encode("Hi", special=False)
    assert lib.llama_vocab_eos(qwen2.vocab.vocab) == 151645
    assert not lib.llama_vocab_get_add_bos(qwen2.vocab.vocab)
    checked = qwen2.vocab.checked
    assert (checked.pre, checked.bos, checked.eos, checked.add_bos) == ("qwen2", 151643, 151645, False)


def test_qwen2_without_bos(tmp_path: Path) -> None:
    """Where the configuration names none, as the tokenizer does not, the GGUF has none."""
    build_qwen2(tmp_path)
    pair = Pair(tmp_path, 600, {}, tmp_path)
    assert (pair.ours.bos, pair.ours.add_bos, pair.ours.eos) == (None, False, pair.reference.token_to_id("<|im_end|>"))
    assert "tokenizer.ggml.bos_token_id" not in {f.key for f in pair.ours.fields()}
    assert pair.vocab.checked.bos == -1 and not pair.vocab.checked.add_bos
    texts = ["Hello", "e\u0301 12345 don'T", "a<|im_end|>b", *SENTENCES]
    assert pair.differences(texts, special=True, ends=True) == []


def test_bad_qwen2_tokenizers(tmp_path: Path) -> None:
    bos = {"id": "B", "ids": [1], "tokens": ["B"]}
    template = {"type": "TemplateProcessing", "pair": [], "special_tokens": {"B": bos}}
    template["single"] = [{"SpecialToken": {"id": "B", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    for change, problem in (
        (set_in("normalizer", value=None), "normalizer is None; only NFC, as Qwen2 has it, is supported"),
        (set_in("normalizer", value={"type": "NFKC"}), "normalizer is 'NFKC'; only NFC, as Qwen2 has it, is supported"),
        (set_in("post_processor", value=template), "post_processor.single puts the ids [1] before"),
    ):
        build_qwen2(tmp_path)
        rewrite(tmp_path, change)
        with pytest.raises(CheckpointError) as caught:
            read_tokenizer(tmp_path, 600, {})
        assert str(caught.value).startswith(f"{tmp_path / 'tokenizer.json'}: {problem}")


def test_words_that_qwen2_would_not_take_whole_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build_qwen2(tmp_path)
    rewrite(tmp_path, lambda c: c["model"]["vocab"].update(zzzz=550))
    with caplog.at_level(logging.WARNING):
        read_tokenizer(tmp_path, 600, {})
    assert not caplog.records
    rewrite(tmp_path, lambda c: c["model"].update(ignore_merges=True))
    with caplog.at_level(logging.WARNING):
        read_tokenizer(tmp_path, 600, {})
    assert "is set: 1 tokens, such as 'zzzz', cannot be reached by merges; llama.cpp will not use them" in caplog.text


# Small tokenizers, made by the library itself.

SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>")


def train(regex: str, ignore_merges: bool) -> Reference:
    bpe = Reference(models.BPE(ignore_merges=ignore_merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    bpe.train_from_iterator(SENTENCES * 3, trainer)
    return bpe


def build_qwen2(directory: Path) -> None:
    """Write a small tokenizer as Qwen2 has it."""
    bpe = train(QWEN2_REGEX, ignore_merges=False)
    bpe.normalizer = normalizers.NFC()
    bpe.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in QWEN2_MARKS[:3]])
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    bpe.save(str(directory / "tokenizer.json"))
    config = {"bos_token": None, "eos_token": "<|im_end|>", "chat_template": "{{ messages[0].content }}<|im_end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def build(directory: Path, **changes: Any) -> dict[str, Any]:
    """Write a small tokenizer, and return the content of its tokenizer.json with `changes` made."""
    bpe = train(LLAMA3_REGEX, ignore_merges=True)
    bpe.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    bos = SPECIALS[0]
    bpe.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))])
    bpe.add_tokens(changes.pop("tokens", []))
    content: dict[str, Any] = json.loads(bpe.to_str())
    content |= changes
    (directory / "tokenizer.json").write_text(json.dumps(content))
    config = {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|end_of_text|>"}, "pad_token": None}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return content


def rewrite(directory: Path, change: Callable[[dict[str, Any]], object], name: str = "tokenizer.json") -> None:
    path = directory / name
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_added_tokens_match_as_in_tokenizers(tmp_path: Path) -> None:
    """Those that are not special match in any text; special ones where they may."""
    build(tmp_path, tokens=["<point>", "<point", "new words", AddedToken("\n\n#", normalized=False), "Zürich", "12"])
    pair = Pair(tmp_path, 600, {}, tmp_path)
    typed = ("<point>", "<point", "new words", "new  words", "\n\n#", "Zürich", "1212", *SPECIALS)
    texts = fuzz(600, 3, typed)
    assert pair.differences(texts, special=True) == []
    assert pair.differences(texts, special=False) == []
    assert pair.differences(texts, special=True, ends=True) == []
    assert pair.ours.types[pair.ours.tokens.index("new words")] == TokenType.USER_DEFINED


def test_the_image_token_is_no_text_whatever_its_file_says(tmp_path: Path) -> None:
    """An added token that is not special matches what users type; a picture's must not."""
    build(tmp_path, tokens=["<picture>", "<|im_end|>"])
    index = Reference.from_file(str(tmp_path / "tokenizer.json")).token_to_id("<picture>")
    assert index is not None
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    pair = Pair(tmp_path, 600, {"image_token_index": index}, tmp_path)
    assert pair.ours.image_token_id == index
    assert pair.ours.eot == index + 1
    for text in ("<picture>", "<|im_end|>"):
        assert max(pair.vocab.encode(f"a {text}", special=False)) < index
    assert pair.vocab.encode("<picture>", special=True) == [index]


def test_rows_without_a_token_are_unused(tmp_path: Path) -> None:
    content = build(tmp_path)
    last = content["added_tokens"][-1]["id"]
    rewrite(tmp_path, lambda c: c["added_tokens"][-1].update(id=last + 3))
    ours = read_tokenizer(tmp_path, last + 8, {"image_token_index": last + 3})
    assert ours.tokens[last : last + 5] == (
        f"[PAD{last}]",
        f"[PAD{last + 1}]",
        f"[PAD{last + 2}]",
        "<image>",
        f"[PAD{last + 4}]",
    )
    assert ours.types[last : last + 5] == (TokenType.UNUSED,) * 3 + (TokenType.CONTROL, TokenType.UNUSED)
    assert Vocab(ours, tmp_path / "vocab.gguf").encode("<image>", special=True) == [last + 3]


def test_both_notations_of_merges(tmp_path: Path) -> None:
    build(tmp_path)
    pairs = read_tokenizer(tmp_path, 600, {})
    rewrite(tmp_path, lambda c: c["model"].update(merges=[" ".join(m) for m in c["model"]["merges"]]))
    assert read_tokenizer(tmp_path, 600, {}) == pairs
    assert all(" " in m for m in pairs.merges)


def test_ids_come_from_the_first_file_that_knows_them(tmp_path: Path) -> None:
    ids = {t["content"]: t["id"] for t in build(tmp_path)["added_tokens"]}
    begin, end, eot = (ids[t] for t in ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"))
    ours = read_tokenizer(tmp_path, 600, {})
    assert (ours.bos, ours.eos, ours.eot, ours.image_token_id) == (begin, end, eot, ids["<image>"])
    # transformers' defaults for LlamaConfig, 1 and 2, are ordinary tokens here.
    assert read_tokenizer(tmp_path, 600, {"bos_token_id": 1, "eos_token_id": 2, "text_config": {}}) == ours
    several = read_tokenizer(
        tmp_path, 600, {"text_config": {"eos_token_id": [eot, end], "pad_token_id": ids["<image>"]}}
    )
    assert (several.eos, several.eot, several.pad) == (eot, eot, ids["<image>"])
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match="bos_token is missing"):
        read_tokenizer(tmp_path, 600, {})
    (tmp_path / "generation_config.json").write_text(json.dumps({"bos_token_id": begin, "eos_token_id": [end]}))
    assert read_tokenizer(tmp_path, 600, {}) == ours


@pytest.mark.parametrize(
    ("single", "add_bos", "add_eos"), [("$A", False, False), ("B $A", True, False), ("B $A E", True, True)]
)
def test_ends_are_added_as_the_post_processor_does(tmp_path: Path, single: str, add_bos: bool, add_eos: bool) -> None:
    content = build(tmp_path)
    ids = {t["content"]: t["id"] for t in content["added_tokens"]}
    bpe = Reference.from_file(str(tmp_path / "tokenizer.json"))
    bpe.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("B", ids["<|begin_of_text|>"]), ("E", ids["<|end_of_text|>"])]
    )
    bpe.save(str(tmp_path / "tokenizer.json"))
    pair = Pair(tmp_path, 600, {}, tmp_path)
    assert (pair.ours.add_bos, pair.ours.add_eos) == (add_bos, add_eos)
    assert pair.differences(["Hello", "a b", "12"], special=True, ends=True) == []


def test_tokens_that_merges_do_not_reach_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build(tmp_path)
    rewrite(tmp_path, lambda c: c["model"].update(ignore_merges=False))
    with caplog.at_level(logging.WARNING):
        read_tokenizer(tmp_path, 600, {})
    assert not caplog.records
    rewrite(tmp_path, lambda c: c["model"]["vocab"].update(zzzz=550))
    with caplog.at_level(logging.WARNING):
        read_tokenizer(tmp_path, 600, {})
    assert "1 tokens, such as 'zzzz', cannot be reached by merges" in caplog.text


def render(template: str, messages: list[dict[str, Any]]) -> str:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    text: str = environment.from_string(template).render(messages=messages, bos_token="<B>", add_generation_prompt=True)
    return text


def test_chat_template(tmp_path: Path) -> None:
    build(tmp_path)
    assert read_tokenizer(tmp_path, 600, {}).chat_template == LLAMA3_CHAT
    rewrite(tmp_path, lambda c: c.update(chat_template="from the tokenizer"), "tokenizer_config.json")
    assert read_tokenizer(tmp_path, 600, {}).chat_template == "from the tokenizer"
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "the default"}]
    rewrite(tmp_path, lambda c: c.update(chat_template=named), "tokenizer_config.json")
    assert read_tokenizer(tmp_path, 600, {}).chat_template == "the default"
    for name in ("processor_config.json", "chat_template.json"):
        (tmp_path / name).write_text(json.dumps({"chat_template": f"from {name}"}))
        assert read_tokenizer(tmp_path, 600, {}).chat_template == f"from {name}"
    (tmp_path / "chat_template.jinja").write_text("from jinja")
    assert read_tokenizer(tmp_path, 600, {}).chat_template == "from jinja"


def test_llama3_chat() -> None:
    image, text = {"type": "image"}, {"type": "text", "text": "What is <image>?"}
    expected = (
        "<B><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is <image>?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    system = {"role": "system", "content": "Be brief."}
    for parts in ([image, text], [text, image]):
        assert render(LLAMA3_CHAT, [system, {"role": "user", "content": parts}]) == expected
    assert render(LLAMA3_CHAT, [system, {"role": "user", "content": "<image>\nWhat is <image>?"}]) == expected


def set_in(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


SPLIT, BYTES = ("pre_tokenizer", "pretokenizers", 0), ("pre_tokenizer", "pretokenizers", 1)

BAD_TOKENIZERS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "unigram": (set_in("model", "type", value="Unigram"), "model.type is 'Unigram'; supported is BPE, the byte-level"),
    "no model": (set_in("model", value=[1]), "model must be an object"),
    "byte fallback": (set_in("model", "byte_fallback", value="yes"), "model.byte_fallback must be true or false"),
    "dropout": (set_in("model", "dropout", value=0.1), "model.dropout is set"),
    "suffix": (set_in("model", "end_of_word_suffix", value="</w>"), "model.end_of_word_suffix is set"),
    "normalizer": (set_in("normalizer", value={"type": "NFC"}), "normalizer is 'NFC'; only a tokenizer without one"),
    "other regex": (set_in(*SPLIT, "pattern", value={"Regex": r"\p{L}+"}), "pre_tokenizer splits by the regular expr"),
    "string pattern": (set_in(*SPLIT, "pattern", value={"String": " "}), "pre_tokenizer splits by the regular expr"),
    "no split": (set_in("pre_tokenizer", value={"type": "ByteLevel"}), "pre_tokenizer splits by ['ByteLevel'], which"),
    "no pre-tokenizer": (set_in("pre_tokenizer", value=None), "pre_tokenizer splits by [None], which is not known"),
    "merged": (set_in(*SPLIT, "behavior", value="MergedWithPrevious"), "pre_tokenizer must be Split (Isolated)"),
    "inverted": (set_in(*SPLIT, "invert", value=True), "pre_tokenizer must be Split (Isolated)"),
    "prefix space": (set_in(*BYTES, "add_prefix_space", value=True), "pre_tokenizer must be Split (Isolated)"),
    "second regex": (set_in(*BYTES, "use_regex", value=True), "pre_tokenizer must be Split (Isolated)"),
    "digits": (set_in(*BYTES, value={"type": "Digits"}), "pre_tokenizer must be Split (Isolated)"),
    "list of steps": (
        set_in("pre_tokenizer", "pretokenizers", value=[1]),
        "pre_tokenizer.pretokenizers must be a list",
    ),
    "id": (set_in("model", "vocab", "e", value="1"), "model.vocab['e'] must be a token id, not '1'"),
    "same id": (set_in("model", "vocab", "zzz", value=7), "model.vocab has two tokens of id 7"),
    "alphabet": (set_in("model", "vocab", "a b", value=590), "model.vocab['a b'] is not written in byte-level BPE's"),
    "rows": (
        set_in("model", "vocab", "zzz", value=600),
        "has a token of id 600, but the model's embedding has 600 rows",
    ),
    "no merges": (set_in("model", "merges", value=None), "model.merges must be a list, not NoneType"),
    "merge of one": (set_in("model", "merges", 3, value="ab"), "model.merges[3] must be two tokens, not 'ab'"),
    "merge of three": (set_in("model", "merges", 3, value=["a", "b", "c"]), "model.merges[3] must be two tokens"),
    "merge of numbers": (set_in("model", "merges", 3, value=[1, 2]), "model.merges[3] must be two tokens, not [1, 2]"),
    "merge to nothing": (set_in("model", "merges", 3, value="q q"), "model.merges[3] joins 'q q', of which a part"),
    "no added list": (set_in("added_tokens", value={"a": 1}), "added_tokens must be a list, not dict"),
    "added id": (set_in("added_tokens", 0, "id", value=-1), "added_tokens[0].id must be a token id, not -1"),
    "added text": (set_in("added_tokens", 0, "content", value=""), "added_tokens[0].content must be a text"),
    "added twice": (set_in("added_tokens", 1, "content", value=SPECIALS[0]), "added_tokens[1] repeats the id or the"),
    "added over another": (
        set_in("added_tokens", 0, "id", value=3),
        "added_tokens: '<|begin_of_text|>' is given id 3, but",
    ),
    "whole words": (
        set_in("added_tokens", 4, "single_word", value=True),
        "added_tokens[4].single_word is set for '<|eot_id|>'",
    ),
    "strips": (set_in("added_tokens", 4, "rstrip", value=True), "added_tokens: rstrip is set for '<|eot_id|>'"),
    "overlap": (
        set_in("added_tokens", 5, "content", value="|><image> x y z"),
        "added_tokens: '<|eot_id|>' ends as",
    ),
    "a word": (
        set_in("added_tokens", 4, "content", value="###"),
        "added_tokens: the special token '###' is a plain word",
    ),
    "post-processor": (
        set_in("post_processor", value={"type": "RobertaProcessing"}),
        "post_processor has 'RobertaProc",
    ),
    "template": (
        set_in("post_processor", "single", value=[{"Sequence": {}}, {"x": 1}]),
        "post_processor.single is not a",
    ),
    "sequence ends": (
        set_in("post_processor", "special_tokens", SPECIALS[0], "ids", value=[5]),
        "post_processor.single puts the ids [5] before and [] after a text; only BOS",
    ),
}


@pytest.mark.parametrize(("change", "problem"), BAD_TOKENIZERS.values(), ids=BAD_TOKENIZERS)
def test_bad_tokenizers(tmp_path: Path, change: Callable[[dict[str, Any]], None], problem: str) -> None:
    build(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(CheckpointError) as caught:
        read_tokenizer(tmp_path, 600, {})
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'tokenizer.json'}: {problem}")
    assert message.isprintable()
    assert len(message) < len(str(tmp_path)) + 300


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("tokenizer.json", b"", "not valid JSON"),
        ("tokenizer.json", b"\x80\x04", "not valid JSON"),
        ("tokenizer.json", b"[" * 100_000, "not valid JSON"),
        ("tokenizer.json", b"[1]", "must hold a JSON object"),
        ("tokenizer.json", b'{"added_tokens": [{"content": "\\ud800"}]}', r"not valid JSON: \ud800 is half of a"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {', "not valid JSON"),
        ("tokenizer_config.json", b"{", "not valid JSON"),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"x": {}}}',
            "added_tokens_decoder.x must be an object under",
        ),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"580": {"content": 1}}}',
            "added_tokens_decoder.580.content must",
        ),
        ("tokenizer_config.json", b'{"chat_template": 5}', "chat_template must be a text"),
        ("tokenizer_config.json", b'{"chat_template": []}', "chat_template must be a text"),
        ("chat_template.jinja", b"\xff", "cannot be read as UTF-8"),
        ("chat_template.jinja", b"x" * 70_000, "chat_template has 70000 characters"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, data: bytes, problem: str) -> None:
    build(tmp_path)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        read_tokenizer(tmp_path, 600, {})
    assert str(caught.value).startswith(f"{tmp_path / name}: {problem}")
    assert str(caught.value).isprintable()


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer.json: is missing: the checkpoint has no tokenizer"):
        read_tokenizer(tmp_path, 600, {})
    (tmp_path / "vocab.json").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: is missing; vocab.json alone is not supported"):
        read_tokenizer(tmp_path, 600, {})
    build(tmp_path)
    for bad in (600, 2**70, "x", True):
        with pytest.raises(CheckpointError, match=r"config.json: image_token_index must be a token id below 600, not"):
            read_tokenizer(tmp_path, 600, {"image_token_index": bad})
    rewrite(tmp_path, lambda c: c["added_tokens"].pop(3))
    with pytest.raises(CheckpointError, match=r"no chat template: put it into chat_template.jinja"):
        read_tokenizer(tmp_path, 600, {})


def test_tokens_that_only_the_configuration_has(tmp_path: Path) -> None:
    """transformers adds them when it loads the tokenizer."""
    content = build(tmp_path)
    image = content["added_tokens"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    decoder = {str(image.pop("id")): image}
    rewrite(tmp_path, lambda c: c.update(added_tokens_decoder=decoder), "tokenizer_config.json")
    copy = tmp_path / "copy"
    copy.mkdir()
    build(copy)
    assert read_tokenizer(tmp_path, 600, {}) == read_tokenizer(copy, 600, {})
    shutil.rmtree(copy)
