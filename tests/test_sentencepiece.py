"""sentencepiece and detokenizer: text and tokens, as the tokenizers library has them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import llama_cpp as lib
import pytest
import sentencepiece_tokenizers as forms
from gguf import GGUFValueType, TokenType
from sentencepiece_tokenizers import Content
from tokenizers import Tokenizer as Reference
from tokenizers import models
from vocabularies import SENTENCES, Vocab, fuzz, write_fields

from local_llava.convert.plan import Field
from local_llava.convert.tokenizer import Tokenizer, read_tokenizer
from local_llava.corrections import corrected
from local_llava.default_chats import PHI3_CHAT, VICUNA_CHAT
from local_llava.detokenizer import ByteLevelDetokenizer, SentencePieceDetokenizer
from local_llava.gguf_file import GGUFFile
from local_llava.llm_vocab import check_vocab
from local_llava.sentencepiece import SentencePiece, merge

TYPED = ("<s>", "<unk>", "<0x0A>", "▁", "▁▁", "<image>", "<|end|>", "<|user|>", "[INST]", "    ", "\n\n", "[PAD32050]")


FORMS: dict[str, Callable[[], Content]] = {
    "Llama 2": forms.llama2,
    "Vicuna": forms.vicuna,
    "Phi 3": forms.phi3,
    "Mistral": forms.mistral,
    "Mistral, first": lambda: forms.metaspace(forms.mistral(), "first"),
    "Llama 2, always": lambda: forms.metaspace(forms.llama2(), "always"),
    "trained": forms.small,
    "trained, never": lambda: forms.metaspace(forms.small(), "never"),
}


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    callback = lib.llama_log_callback(lambda level, text, data: None)
    lib.llama_log_set(callback, None)
    yield
    lib.llama_log_set(lib.llama_log_callback(0), None)


@pytest.mark.parametrize("form", FORMS)
def test_text_is_split_as_in_tokenizers(form: str, tmp_path: Path) -> None:
    pair = forms.Pair(FORMS[form](), tmp_path)
    texts = fuzz(2000, 5, TYPED)
    assert len(set(texts)) > 1800
    assert pair.differences(texts) == []
    # Overlapping ways to the same token, which scores alone do not rank.
    rng = random.Random(6)
    assert pair.differences(["".join(rng.choices("ana nb", k=rng.randrange(1, 60))) for _ in range(500)]) == []
    assert pair.differences(["".join(rng.choices(" ▁=-", k=rng.randrange(1, 90))) for _ in range(500)]) == []


@pytest.mark.parametrize("form", ["Llama 2", "Phi 3", "Mistral", "trained", "trained, never"])
def test_llama_cpp_splits_text_the_same_by_the_scores(form: str, tmp_path: Path) -> None:
    """Our GGUF elsewhere. llama.cpp knows two of the four space prefixes."""
    pair = forms.Pair(FORMS[form](), tmp_path)
    vocab = Vocab(pair.tokenizer, tmp_path / "again.gguf")
    texts = fuzz(2000, 7, TYPED)
    assert [t for t in texts if vocab.encode(t, special=False) != pair.encode(t)] == []


def test_any_order_of_merges() -> None:
    """Random merges, in which a token may have several ways and ranks, against the library's BPE."""
    rng = random.Random(4)
    for _ in range(300):
        tokens = list("abc")
        merges: list[tuple[str, str]] = []
        for _ in range(rng.randrange(1, 25)):
            pair = (rng.choice(tokens), rng.choice(tokens))
            if pair not in merges and len("".join(pair)) < 8:
                merges.append(pair)
                tokens.append("".join(pair))
        rng.shuffle(merges)
        ids = {text: i for i, text in enumerate(dict.fromkeys(tokens))}
        reference = Reference(models.BPE(vocab=ids, merges=merges))
        ranks = {pair: i for i, pair in enumerate(merges)}
        for _ in range(20):
            text = "".join(rng.choices("abc", k=rng.randrange(1, 30)))
            ours = merge(text, lambda left, right, ranks=ranks: ranks.get((left, right)))
            assert ours == reference.encode(text).tokens, (text, merges)


def test_npms_llama2_is_mistrals_vocabulary() -> None:
    assert forms.mistral()["model"]["vocab"]["▁the"] == 272
    assert forms.llama2()["model"]["vocab"]["▁the"] == 278
    assert [len(c["model"]["merges"]) for c in (forms.mistral(), forms.llama2())] == [58980, 61249]


def test_merges_as_pairs(tmp_path: Path) -> None:
    content = forms.small()
    forms.write(content, tmp_path)
    expected = read_tokenizer(tmp_path, 800, {})
    merges = content["model"]["merges"]
    other = [m.split(" ") if isinstance(m, str) else " ".join(m) for m in merges]
    forms.write({**content, "model": {**content["model"], "merges": other}}, tmp_path)
    assert read_tokenizer(tmp_path, 800, {}) == expected


@pytest.mark.parametrize("scheme", ["prepend", "first", "always", "never"])
def test_added_tokens_are_matched_in_text(scheme: str, tmp_path: Path) -> None:
    """Those that are no marks of a template: raw ones first, then those that are normalized as the text is."""
    content = forms.small() if scheme == "prepend" else forms.metaspace(forms.small(), scheme)
    n = max(content["model"]["vocab"].values()) + 1
    words = [("raw", False), ("rawer", False), ("nor mal", True), ("normaler", True), ("ü\n", False), ("▁x", True)]
    plain = [forms.added(n + i, t, special=False, normalized=late) for i, (t, late) in enumerate(words)]
    mark = forms.added(n + len(plain), "<point>", special=False)
    pair = forms.Pair(forms.with_added(content, [*plain, mark]), tmp_path, 800)
    # A mark that is not special would be matched by the library; typed, it is text here.
    pair.reference = Reference.from_str(json.dumps(forms.with_added(content, plain)))
    pair.reference.encode_special_tokens = True
    typed = tuple(t for t, _ in words)
    spaced = tuple(f"{a}{t}{b}" for t in typed for a in (" ", "a", "  ") for b in (" ", "b"))
    assert pair.differences(fuzz(2000, 8, (*typed, *spaced, "rawerraw"))) == []
    assert n + len(plain) not in pair.encode("a <point> b")
    assert pair.tokenizer.types[n] == TokenType.USER_DEFINED


def test_white_space_around_tokens_that_swallow_it(tmp_path: Path) -> None:
    content = forms.small()
    n = max(content["model"]["vocab"].values()) + 1
    marks = [
        forms.added(n, "<|l|>", lstrip=True),
        forms.added(n + 1, "<|r|>", rstrip=True),
        forms.added(n + 2, "<|n|>"),
    ]
    pair = forms.Pair(forms.with_added(content, marks), tmp_path, 800)
    pair.reference.encode_special_tokens = False
    spaces = [chr(c) for c in range(0x3001) if chr(c).isspace() or c in (0x1C, 0x200B, 0x180E)] + ["", " \t \n", "a "]
    for space in spaces:
        for i, mark in enumerate(("<|l|>", "<|r|>", "<|n|>")):
            for text in (f"a{space}{mark}{space}b", f"{space}{mark}", f"{mark}{space}"):
                before, after = text.split(mark)
                ours = [*pair.encode(before, before=n + i), n + i, *pair.encode(after, first=False, after=n + i)]
                assert ours == pair.reference.encode(text, add_special_tokens=False).ids, (text, mark)


def published(tokenizer: Tokenizer, path: Path, name: str = "llama-2") -> GGUFFile:
    """A file as llama.cpp's converter makes it of a tokenizer.model, corrected: its scores, no merges, no template.

    Runs of spaces have all the same score there.
    """
    scores = tuple(
        0.0 if i < 259 else -1e9 if set(text) == {"▁"} else float(259 - i) for i, text in enumerate(tokenizer.tokens)
    )
    plain = replace(tokenizer, scores=scores, merges=(), space_prefix=None)
    fields = [f for f in plain.fields() if f.key != "tokenizer.chat_template"]
    return corrected(write_fields([Field("general.name", name, GGUFValueType.STRING), *fields], path)).gguf


@pytest.mark.parametrize("form", ["Llama 2", "Mistral"])
def test_published_files(form: str, tmp_path: Path) -> None:
    pair = forms.Pair(FORMS[form](), tmp_path)
    gguf = published(pair.tokenizer, tmp_path / "published.gguf")
    vocab = check_vocab(gguf)
    assert (vocab.space_prefix, vocab.strip_space, vocab.eot) == ("prepend", True, None)
    assert vocab.chat_template == VICUNA_CHAT
    pair.ours = SentencePiece.from_gguf(gguf, vocab)
    assert pair.differences(fuzz(2000, 9, TYPED)) == []


def test_published_phi3(tmp_path: Path) -> None:
    """llama.cpp goes by the model's name, where GGUF has no key."""
    pair = forms.Pair(forms.phi3(), tmp_path)
    vocab = check_vocab(published(pair.tokenizer, tmp_path / "phi.gguf", "LLaVA Phi-3 mini"))
    assert vocab.rstrip - {32011, 32012} == pair.vocab.rstrip == {2, *range(32001, 32011)}
    assert vocab.chat_template == PHI3_CHAT
    assert vocab.eot == 32007
    assert check_vocab(published(pair.tokenizer, tmp_path / "other.gguf", "other")).rstrip == frozenset()


# --- tokens to text ---


@pytest.mark.parametrize("form", ["Llama 2", "trained", "trained, never"])
def test_tokens_become_the_librarys_text(form: str, tmp_path: Path) -> None:
    pair = forms.Pair(FORMS[form](), tmp_path, 32064 if "Llama" in form else 800)
    metadata = pair.gguf.metadata
    rng = random.Random(3)
    n = pair.tokenizer.n_used
    byte_tokens = [[*rng.choice(SENTENCES).encode()[:8]] for _ in range(50)]
    for _ in range(2000):
        ids: list[int] = []
        for _ in range(rng.randrange(1, 12)):
            kind = rng.random()
            if kind < 0.4:
                ids.append(rng.randrange(n))
            elif kind < 0.6:
                ids += [3 + b for b in rng.choice(byte_tokens)]
            else:
                ids += pair.encode(rng.choice(SENTENCES)[: rng.randrange(1, 9)])
        text = SentencePieceDetokenizer(
            metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], pair.vocab.strip_space
        )
        ours = "".join([*(text.push(i) for i in ids), text.finish()])
        assert forms.is_same_text(ours, pair.reference.decode(ids)), ids


def test_bytes_that_are_no_text() -> None:
    tokens = ["▁a", "b", *(f"<0x{b:02X}>" for b in range(256)), "<s>", "[PAD]"]
    types = [1, 1, *[6] * 256, 3, 5]

    def pushed(*pieces: int | str) -> list[str]:
        text = SentencePieceDetokenizer(tokens, types, strip_space=True)
        ids = [tokens.index(p) if isinstance(p, str) else 2 + p for p in pieces]
        return [*map(text.push, ids), text.finish()]

    assert pushed("▁a", "▁a") == ["a", " a", ""]
    assert pushed(0x20, "▁a") == ["", " a", ""], "one space only, however it came"
    assert pushed(*"é🦙".encode()) == ["", "é", "", "", "", "🦙", ""]
    assert pushed(0xF0, 0x9F, "b") == ["", "", "\ufffd\ufffdb", ""], "one for each byte, as the library does"
    assert pushed(0xE2, 0x41, 0x42, "b") == ["", "\ufffd\ufffd", "\ufffd", "b", ""], "to the end of the run"
    assert pushed(0x0A, 0xE2) == ["\n", "", "\ufffd"], "what was shown stays"
    assert pushed(0xC3, "<s>", 0xA9, "[PAD]", "b") == ["", "", "é", "", "b", ""], "skipped tokens end no run"


def test_characters_of_byte_level_tokens() -> None:
    text = ByteLevelDetokenizer(lambda token: bytes([token]))
    assert [text.push(b) for b in "é🦙".encode()] == ["", "é", "", "", "", "🦙"]
    assert [text.push(b) for b in b"\xf0\x9f"] == ["", ""]
    assert text.finish() == "\ufffd"
