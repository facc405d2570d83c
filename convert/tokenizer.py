"""From a checkpoint's tokenizer files to the vocabulary of a GGUF.

Knows `tokenizer.json` (the format of Hugging Face's tokenizers library) as far as its two kinds have it in common; what
is special to them is `byte_level`'s and `sentencepiece`'s, and the older tokenizer.model is `spm_model`'s. What the
runtime cannot do as the tokenizers library does is refused by name, since it would change what the model reads without
a word. Does not know the tensors.

The metadata that comes out passes `llm_vocab.check_vocab`, so both share what a vocabulary is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, TokenType

from local_llava.convert.added_tokens import (
    AddedToken,
    check_matching,
    check_stripping,
    read_added_tokens,
    with_configuration,
)
from local_llava.convert.bpe import Vocabulary
from local_llava.convert.byte_level import read_byte_level
from local_llava.convert.chat_template import read_chat_template
from local_llava.convert.config import Config, read_json
from local_llava.convert.plan import Field
from local_llava.convert.sentencepiece import read_sentencepiece
from local_llava.convert.special_ids import SpecialIds, configured_ends, end_of_turn, sequence_ends
from local_llava.convert.spm_model import read_spm_model
from local_llava.errors import CheckpointError
from local_llava.llm_vocab import (
    LSTRIP_KEY,
    NORMALIZED_KEY,
    QWEN2_PRE,
    RSTRIP_KEY,
    SPACE_PREFIX_KEY,
    STRIP_SPACE_KEY,
    adds_space,
)

_NO_TOKEN = -1

_ADDED_SCORE, _UNUSED_SCORE = -1000.0, -10000.0
"""Of tokens that no merge makes; the values are those of llama.cpp's converter."""


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary as GGUF holds it."""

    model: str
    """"gpt2": byte-level BPE; "llama": SentencePiece."""
    pre: str
    tokens: tuple[str, ...]
    """One for each row of the embedding: the vocabulary's as they are written there, added ones as they are."""
    types: tuple[TokenType, ...]
    merges: tuple[str, ...]
    """llama.cpp reads them of byte-level BPE only, the runtime of both kinds."""
    bos: int | None
    """Qwen2 has none."""
    eos: int
    """As the configuration says; the base model's in Llama-3 LLaVA, which never comes in a chat."""
    eot: int | None
    """End of turn in the chat's format."""
    pad: int | None
    add_bos: bool
    add_eos: bool
    chat_template: str
    image_token_id: int | None
    """The token that stands for pictures, where the checkpoint has one."""
    n_used: int
    """Entries of the tokenizer itself; the rows after them are padding."""
    scores: tuple[float, ...] = ()
    """Of SentencePiece: one for each token, by which llama.cpp merges."""
    unk: int | None = None
    space_prefix: str | None = None
    """Of SentencePiece: one of `llm_vocab.SPACE_PREFIXES`."""
    strip_space: bool = False
    """Whether an answer loses the space that it begins with."""
    lstrip: tuple[int, ...] = ()
    rstrip: tuple[int, ...] = ()
    """Tokens that swallow the white space before or after them."""
    normalized: tuple[int, ...] = ()
    """Of SentencePiece: user-defined tokens that are looked for in text with its prefix."""

    def fields(self) -> tuple[Field, ...]:
        """The `tokenizer.*` metadata of the language model's GGUF, and ours of SentencePiece."""
        array, text, u32 = GGUFValueType.ARRAY, GGUFValueType.STRING, GGUFValueType.UINT32
        ids = {"bos": self.bos, "eos": self.eos, "eot": self.eot, "unknown": self.unk, "padding": self.pad}
        return (
            Field("tokenizer.ggml.model", self.model, text),
            Field("tokenizer.ggml.pre", self.pre, text),
            Field("tokenizer.ggml.tokens", list(self.tokens), array, text),
            *([Field("tokenizer.ggml.scores", list(self.scores), array, GGUFValueType.FLOAT32)] if self.scores else ()),
            Field("tokenizer.ggml.token_type", [int(t) for t in self.types], array, GGUFValueType.INT32),
            *([Field("tokenizer.ggml.merges", list(self.merges), array, text)] if self.merges else ()),
            *(Field(f"tokenizer.ggml.{k}_token_id", v, u32) for k, v in ids.items() if v is not None),
            Field("tokenizer.ggml.add_bos_token", self.add_bos, GGUFValueType.BOOL),
            Field("tokenizer.ggml.add_eos_token", self.add_eos, GGUFValueType.BOOL),
            *self._spaces(),
            Field("tokenizer.chat_template", self.chat_template, text),
        )

    def _spaces(self) -> list[Field]:
        if self.space_prefix is None:
            return []
        lists = {LSTRIP_KEY: self.lstrip, RSTRIP_KEY: self.rstrip, NORMALIZED_KEY: self.normalized}
        return [
            Field("tokenizer.ggml.add_space_prefix", adds_space(self.space_prefix), GGUFValueType.BOOL),
            Field(SPACE_PREFIX_KEY, self.space_prefix, GGUFValueType.STRING),
            Field(STRIP_SPACE_KEY, self.strip_space, GGUFValueType.BOOL),
            *(Field(k, list(v), GGUFValueType.ARRAY, GGUFValueType.UINT32) for k, v in lists.items() if v),
        ]


def read_tokenizer(directory: Path, n_rows: int, config: Mapping[str, Any]) -> Tokenizer:
    """Read a checkpoint's tokenizer.

    Tokens typed as text stay text in llama.cpp (`parse_special=False`) where their type is CONTROL; so the image token
    and the special ids are that whatever the file calls them, and only other added tokens are USER_DEFINED, which
    match everywhere, as they do in the tokenizers library.

    Args:
        directory: Holds tokenizer.json or tokenizer.model and, some of them, tokenizer_config.json, added_tokens.json,
            generation_config.json, chat_template.jinja, chat_template.json, processor_config.json.
        n_rows: Rows of the embedding; rows past the tokenizer become unused tokens.
        config: Content of config.json: `text_config` or the top level may hold bos_token_id, eos_token_id and
            pad_token_id, the top level image_token_index or image_token_id.

    Raises:
        CheckpointError: One line with file and field: a file is missing or malformed, or the tokenizer does something
            that llama.cpp's does not.
    """
    path = directory / "tokenizer.json"
    root = None
    if path.is_file():
        root = Config(path, read_json(path))
        added = read_added_tokens(root)
        vocabulary = _read_vocabulary(root)
    elif (directory / "tokenizer.model").is_file():
        path = directory / "tokenizer.model"
        vocabulary, added = read_spm_model(path)
    else:
        hint = "; vocab.json alone is not supported" if (directory / "vocab.json").is_file() else ""
        raise CheckpointError(f"{path}: is missing{hint}: the checkpoint has no tokenizer that can be converted")
    added = with_configuration(added, directory)
    if vocabulary.model == "llama":
        check_stripping(path, added)
    else:
        check_matching(path, added, vocabulary.ids)
    tokens, types = _rows(path, vocabulary, added, n_rows)
    special = SpecialIds(directory, config, added)
    template = read_chat_template(directory, vocabulary.model, [t.content for t in added])
    bos = special.find("bos") if vocabulary.pre == QWEN2_PRE else special.need("bos")
    eos, pad = special.need("eos"), special.find("pad")
    eot = end_of_turn(template, added)
    image = special.image(n_rows)
    by_id = {t.id for t in added}
    for i in (bos, eos, eot, pad, image):
        if i is not None and i in by_id and i != vocabulary.unk:
            types[i] = TokenType.CONTROL
    add_bos, add_eos = configured_ends(directory) if root is None else _ends(root, vocabulary, bos, eos)
    is_spm = vocabulary.model == "llama"
    return Tokenizer(
        model=vocabulary.model,
        pre=vocabulary.pre,
        tokens=tuple(tokens),
        types=tuple(types),
        merges=vocabulary.merges,
        bos=bos,
        eos=eos,
        eot=eot,
        pad=pad,
        add_bos=add_bos,
        add_eos=add_eos,
        chat_template=template,
        image_token_id=image,
        n_used=len(vocabulary.ids.keys() | {t.content for t in added}),
        scores=_scores(tokens, types, vocabulary) if is_spm else (),
        unk=vocabulary.unk,
        space_prefix=vocabulary.space_prefix,
        strip_space=vocabulary.strip_space,
        lstrip=tuple(t.id for t in added if t.lstrip),
        rstrip=tuple(t.id for t in added if t.rstrip),
        normalized=tuple(t.id for t in added if is_spm and t.normalized and types[t.id] == TokenType.USER_DEFINED),
    )


def _read_vocabulary(root: Config) -> Vocabulary:
    model = root.sub("model")
    if model.values.get("type") != "BPE":
        raise CheckpointError(
            f"{model.name('type')} is {model.values.get('type')!a:.40}; supported is BPE, the byte-level one of Llama "
            "3 and Qwen2 or a SentencePiece type's with byte_fallback"
        )
    return read_sentencepiece(root) if model.flag("byte_fallback", False) else read_byte_level(root)


def _ends(root: Config, vocabulary: Vocabulary, bos: int | None, eos: int) -> tuple[bool, bool]:
    """Whether BOS and EOS are put around a text. Qwen2 was trained without BOS, and its post-processor puts none."""
    if bos is not None and vocabulary.pre != QWEN2_PRE:
        return sequence_ends(root, bos, eos)
    return False, sequence_ends(root, _NO_TOKEN, eos)[1]


def _rows(
    path: Path, vocabulary: Vocabulary, added: Sequence[AddedToken], n_rows: int
) -> tuple[list[str], list[TokenType]]:
    """Tokens and their types by id; rows that no token has become unused ones, as in llama.cpp's converter."""
    vocab = vocabulary.ids
    texts = {i: text for text, i in vocab.items()}
    kinds = {i: vocabulary.types.get(text, TokenType.NORMAL) for text, i in vocab.items()}
    for token in added:
        if texts.setdefault(token.id, token.content) != token.content or vocab.get(token.content, token.id) != token.id:
            other = (
                f"{texts[token.id]!a:.40} has that id" if texts[token.id] != token.content else "vocab has another id"
            )
            raise CheckpointError(f"{path}: added_tokens: {token.content!a:.40} is given id {token.id}, but {other}")
        if token.content not in vocabulary.types:
            kinds[token.id] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    highest = max(texts)
    if highest >= n_rows:
        raise CheckpointError(f"{path}: has a token of id {highest}, but the model's embedding has {n_rows} rows")
    taken = set(texts.values())
    tokens, types = [], []
    for i in range(n_rows):
        name = texts.get(i, f"[PAD{i}]")
        if i not in texts and name in taken:
            raise CheckpointError(f"{path}: row {i} has no token, and its usual stand-in {name} is a token itself")
        tokens.append(name)
        types.append(kinds.get(i, TokenType.UNUSED))
    return tokens, types


def _scores(tokens: Sequence[str], types: Sequence[TokenType], vocabulary: Vocabulary) -> tuple[float, ...]:
    others = {TokenType.BYTE: 0.0, TokenType.UNUSED: _UNUSED_SCORE}
    return tuple(
        vocabulary.scores.get(text, others.get(kind, _ADDED_SCORE)) for text, kind in zip(tokens, types, strict=True)
    )
