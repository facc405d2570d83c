"""From a checkpoint's tokenizer files to the vocabulary of a GGUF.

Knows `tokenizer.json` (the format of Hugging Face's tokenizers library) for byte-level BPE with Llama-3's
pre-tokenizer, and where checkpoints keep special ids and chat templates. What llama.cpp cannot do as the tokenizers
library does is refused by name, since it would change what the model reads without a word. Does not know the tensors.

The metadata that comes out passes `llm_vocab.check_vocab`, so both share what a vocabulary is there.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, TokenType

from local_llava.convert.added_tokens import AddedToken, check_matching, read_added_tokens
from local_llava.convert.chat_template import read_chat_template
from local_llava.convert.checkpoint import read_json
from local_llava.convert.config import Config
from local_llava.convert.plan import Field
from local_llava.errors import CheckpointError
from local_llava.llm_vocab import END_OF_TURN, byte_alphabet

LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PRE_TOKENIZERS = {
    LLAMA3_REGEX: "llama-bpe",
    # The same without the inline flag, for libraries that lack it.
    LLAMA3_REGEX.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"): (
        "llama-bpe"
    ),
}
"""Regular expression -> llama.cpp's name of the pre-tokenizer that splits so."""

_SUPPORTED = "supported is Llama 3's byte-level BPE"

logger = logging.getLogger("local_llava")


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary as GGUF holds it."""

    model: str
    """"gpt2": byte-level BPE."""
    pre: str
    tokens: tuple[str, ...]
    """One for each row of the embedding: the vocabulary's in GPT-2's byte alphabet, added ones as they are."""
    types: tuple[TokenType, ...]
    merges: tuple[str, ...]
    bos: int
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

    def fields(self) -> tuple[Field, ...]:
        """The `tokenizer.*` metadata of the language model's GGUF."""
        array, text, u32 = GGUFValueType.ARRAY, GGUFValueType.STRING, GGUFValueType.UINT32
        ids = {"bos": self.bos, "eos": self.eos, "eot": self.eot, "padding": self.pad}
        return (
            Field("tokenizer.ggml.model", self.model, text),
            Field("tokenizer.ggml.pre", self.pre, text),
            Field("tokenizer.ggml.tokens", list(self.tokens), array, text),
            Field("tokenizer.ggml.token_type", [int(t) for t in self.types], array, GGUFValueType.INT32),
            Field("tokenizer.ggml.merges", list(self.merges), array, text),
            *(Field(f"tokenizer.ggml.{k}_token_id", v, u32) for k, v in ids.items() if v is not None),
            Field("tokenizer.ggml.add_bos_token", self.add_bos, GGUFValueType.BOOL),
            Field("tokenizer.ggml.add_eos_token", self.add_eos, GGUFValueType.BOOL),
            Field("tokenizer.chat_template", self.chat_template, text),
        )


def read_tokenizer(directory: Path, n_rows: int, config: Mapping[str, Any]) -> Tokenizer:
    """Read a checkpoint's tokenizer.

    Tokens typed as text stay text in llama.cpp (`parse_special=False`) where their type is CONTROL; so the image token
    and the special ids are that whatever the file calls them, and only other added tokens are USER_DEFINED, which
    match everywhere, as they do in the tokenizers library.

    Args:
        directory: Holds tokenizer.json and, some of them, tokenizer_config.json, generation_config.json,
            chat_template.jinja, chat_template.json, processor_config.json.
        n_rows: Rows of the embedding; rows past the tokenizer become unused tokens.
        config: Content of config.json: `text_config` or the top level may hold bos_token_id, eos_token_id and
            pad_token_id, the top level image_token_index or image_token_id.

    Raises:
        CheckpointError: One line with file and field: a file is missing or malformed, or the tokenizer does something
            that llama.cpp's does not.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        kinds = [name for name in ("tokenizer.model", "vocab.json") if (directory / name).is_file()]
        hint = f"; {kinds[0]} alone is not supported" if kinds else ""
        raise CheckpointError(f"{path}: is missing{hint}: the checkpoint has no tokenizer that can be converted")
    root = Config(path, read_json(path))
    added = read_added_tokens(root, directory)
    pre = _check_pipeline(root)
    vocab = _read_vocab(root.sub("model"))
    merges = _read_merges(root.sub("model"), vocab)
    check_matching(path, added, vocab)
    tokens, types = _rows(path, vocab, added, n_rows)
    special = _SpecialIds(directory, config, added)
    template = read_chat_template(directory, [t.content for t in added])
    bos, eos, pad = special.need("bos"), special.need("eos"), special.find("pad")
    eot = _end_of_turn(template, added)
    image = special.image(n_rows)
    by_id = {t.id for t in added}
    for i in (bos, eos, eot, pad, image):
        if i is not None and i in by_id:
            types[i] = TokenType.CONTROL
    add_bos, add_eos = _sequence_ends(root, bos, eos)
    n_used = len(vocab.keys() | {t.content for t in added})
    return Tokenizer(
        model="gpt2",
        pre=pre,
        tokens=tuple(tokens),
        types=tuple(types),
        merges=tuple(merges),
        bos=bos,
        eos=eos,
        eot=eot,
        pad=pad,
        add_bos=add_bos,
        add_eos=add_eos,
        chat_template=template,
        image_token_id=image,
        n_used=n_used,
    )


def _check_pipeline(root: Config) -> str:
    """llama.cpp's name of the pre-tokenizer, when everything around the model can be done there."""
    model = root.sub("model")
    if model.values.get("type") != "BPE":
        raise CheckpointError(f"{model.name('type')} is {model.values.get('type')!a:.40}; {_SUPPORTED}")
    if model.values.get("byte_fallback"):
        raise CheckpointError(f"{model.name('byte_fallback')} is set: a SentencePiece vocabulary; {_SUPPORTED}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.values.get(key):
            raise CheckpointError(f"{model.name(key)} is set; only a model without it is supported")
    normalizer = root.values.get("normalizer")
    if normalizer is not None and normalizer != {"type": "Sequence", "normalizers": []}:
        kind = normalizer.get("type") if isinstance(normalizer, dict) else normalizer
        raise CheckpointError(f"{root.name('normalizer')} is {kind!a:.40}; only a tokenizer without one is supported")
    return _pre_tokenizer(root)


def _pre_tokenizer(root: Config) -> str:
    steps = root.sub("pre_tokenizer").values
    parts = steps.get("pretokenizers") if steps.get("type") == "Sequence" else [steps]
    if not isinstance(parts, list) or not all(isinstance(p, dict) for p in parts):
        raise CheckpointError(f"{root.name('pre_tokenizer')}.pretokenizers must be a list of objects")
    splits = [p for p in parts if p.get("type") == "Split"]
    regexes = [p["pattern"].get("Regex") for p in splits if isinstance(p.get("pattern"), dict)]
    name = next((PRE_TOKENIZERS[r] for r in regexes if isinstance(r, str) and r in PRE_TOKENIZERS), None)
    if name is None:
        found = f"the regular expression {regexes[0]!a:.60}" if regexes else f"{[p.get('type') for p in parts]!a:.60}"
        raise CheckpointError(f"{root.name('pre_tokenizer')} splits by {found}, which is not known; {_SUPPORTED}")
    # Isolated keeps every match as a word; so does removing all that does not match, since the expression matches all.
    whole = len(splits) == 1 and (splits[0].get("behavior"), bool(splits[0].get("invert"))) in (
        ("Isolated", False),
        ("Removed", True),
    )
    rest = [p for p in parts if p.get("type") != "Split"]
    bytewise = len(rest) == 1 and rest[0].get("type") == "ByteLevel" and parts[-1] is rest[0]
    if not whole or not bytewise or rest[0].get("add_prefix_space", True) or rest[0].get("use_regex", True):
        raise CheckpointError(
            f"{root.name('pre_tokenizer')} must be Split (Isolated) by that expression, then ByteLevel without "
            f"a prefix space and its own regular expression; found {[p.get('type') for p in parts]!a:.80}"
        )
    return name


def _read_vocab(model: Config) -> dict[str, int]:
    vocab = model.sub("vocab").values
    alphabet = set(byte_alphabet())
    seen: dict[int, str] = {}
    for text, i in vocab.items():
        if not isinstance(i, int) or isinstance(i, bool) or i < 0:
            raise CheckpointError(f"{model.name('vocab')}[{text!a:.40}] must be a token id, not {i!a:.40}")
        if not text or not alphabet.issuperset(text):
            raise CheckpointError(f"{model.name('vocab')}[{text!a:.40}] is not written in byte-level BPE's alphabet")
        if seen.setdefault(i, text) != text:
            raise CheckpointError(f"{model.name('vocab')} has two tokens of id {i}: {seen[i]!a:.40} and {text!a:.40}")
    missing = sorted(alphabet - vocab.keys())
    if missing:
        # Text with such bytes would lose them.
        raise CheckpointError(f"{model.name('vocab')} lacks {len(missing)} of the 256 bytes, such as {missing[0]!a}")
    return dict(vocab)


def _read_merges(model: Config, vocab: Mapping[str, int]) -> list[str]:
    """As "left right"; files since tokenizers 0.20 hold pairs."""
    items = model.values.get("merges")
    if not isinstance(items, list):
        raise CheckpointError(f"{model.name('merges')} must be a list, not {type(items).__name__}")
    merges = []
    for i, item in enumerate(items):
        pair = item.split(" ") if isinstance(item, str) else item
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(p, str) for p in pair):
            raise CheckpointError(f"{model.name('merges')}[{i}] must be two tokens, not {item!a:.60}")
        left, right = pair
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise CheckpointError(
                f"{model.name('merges')}[{i}] joins {item!a:.60}, of which a part is not in the vocab"
            )
        merges.append(f"{left} {right}")
    if len(set(merges)) < len(merges):
        raise CheckpointError(f"{model.name('merges')} has {len(merges) - len(set(merges))} repeated items")
    if not model.flag("ignore_merges", False):
        _warn_of_unreachable(model, vocab, merges)
    return merges


def _warn_of_unreachable(model: Config, vocab: Mapping[str, int], merges: Sequence[str]) -> None:
    """Warn where llama.cpp, which always takes a word that is a token whole, differs from a file that says not to.

    Llama 3 itself does as llama.cpp (its reference tokenizer is tiktoken); its first tokenizer.json did not say so.
    """
    rank = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
    unreachable = [text for text in vocab if len(_bpe(text, rank)) > 1]
    if unreachable:
        logger.warning(
            "%s is not set: %d tokens, such as %a, cannot be reached by merges; llama.cpp will use them all the same",
            model.name("ignore_merges"),
            len(unreachable),
            unreachable[0],
        )


def _bpe(word: str, rank: Mapping[tuple[str, ...], int]) -> list[str]:
    parts = list(word)
    while len(parts) > 1:
        best = min(range(len(parts) - 1), key=lambda i: rank.get((parts[i], parts[i + 1]), len(rank)))
        if (parts[best], parts[best + 1]) not in rank:
            break
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts


def _rows(
    path: Path, vocab: Mapping[str, int], added: Sequence[AddedToken], n_rows: int
) -> tuple[list[str], list[TokenType]]:
    """Tokens and their types by id; rows that no token has become unused ones, as in llama.cpp's converter."""
    texts = {i: text for text, i in vocab.items()}
    kinds = dict.fromkeys(texts, TokenType.NORMAL)
    for token in added:
        if texts.setdefault(token.id, token.content) != token.content or vocab.get(token.content, token.id) != token.id:
            other = (
                f"{texts[token.id]!a:.40} has that id" if texts[token.id] != token.content else "vocab has another id"
            )
            raise CheckpointError(f"{path}: added_tokens: {token.content!a:.40} is given id {token.id}, but {other}")
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


def _sequence_ends(root: Config, bos: int, eos: int) -> tuple[bool, bool]:
    """Whether BOS and EOS are put around a text, by the post-processor.

    Without a template for it BOS is put: Llama 3's first tokenizer.json had none, and the model was trained with it.
    """
    step = root.sub("post_processor").values
    parts = step.get("processors") if step.get("type") == "Sequence" else [step] if step else []
    if not isinstance(parts, list) or not all(isinstance(p, dict) for p in parts):
        raise CheckpointError(f"{root.name('post_processor')}.processors must be a list of objects")
    templates = [p for p in parts if p.get("type") == "TemplateProcessing"]
    others = [p.get("type") for p in parts if p.get("type") not in ("TemplateProcessing", "ByteLevel")]
    if others or len(templates) > 1:
        raise CheckpointError(
            f"{root.name('post_processor')} has {(others or ['two templates'])[0]!a:.40}; "
            "supported are ByteLevel and one TemplateProcessing"
        )
    if not templates:
        return True, False
    before, after = _template_ids(root, templates[0])
    if before not in ([], [bos]) or after not in ([], [eos]):
        raise CheckpointError(
            f"{root.name('post_processor')}.single puts the ids {before} before and {after} after a text; "
            f"only BOS ({bos}) before and EOS ({eos}) after are supported"
        )
    return bool(before), bool(after)


def _template_ids(root: Config, template: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Ids before and after the text in a TemplateProcessing's `single`."""
    try:
        names = [None if "Sequence" in piece else str(piece["SpecialToken"]["id"]) for piece in template["single"]]
        ids = [[int(i) for i in template["special_tokens"][name]["ids"]] if name is not None else [] for name in names]
        text = names.index(None)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise CheckpointError(f"{root.name('post_processor')}.single is not a valid template") from e
    return [i for part in ids[:text] for i in part], [i for part in ids[text:] for i in part]


def _end_of_turn(template: str, added: Sequence[AddedToken]) -> int | None:
    """The chat's end of turn: the known token that its template writes, else the first one the vocabulary has."""
    ids = {t.content: t.id for t in added}
    known = [text for text in END_OF_TURN if text in ids]
    return next((ids[text] for text in known if text in template), ids[known[0]] if known else None)


@dataclass(frozen=True)
class _SpecialIds:
    """Finds special ids in the files that may hold them."""

    directory: Path
    config: Mapping[str, Any]
    added: Sequence[AddedToken]

    def find(self, name: str) -> int | None:
        """The id of "bos", "eos" or "pad": by number in the configurations, else by text in the tokenizer's.

        Only ids of added tokens count: transformers' defaults for what a configuration leaves out are Llama 2's.
        """
        known = {t.id for t in self.added}
        by_text = {t.content: t.id for t in self.added}
        for where in (self.config.get("text_config"), self.config, self._read("generation_config.json")):
            value = where.get(f"{name}_token_id") if isinstance(where, Mapping) else None
            # A list of ends holds the model's own first.
            for i in value if isinstance(value, list) else [value]:
                if isinstance(i, int) and not isinstance(i, bool) and i in known:
                    return i
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            value = self._read(file).get(f"{name}_token")
            text = value.get("content") if isinstance(value, Mapping) else value
            if isinstance(text, str) and text in by_text:
                return by_text[text]
        return None

    def need(self, name: str) -> int:
        found = self.find(name)
        if found is None:
            path = self.directory / "tokenizer_config.json"
            raise CheckpointError(
                f"{path}: {name}_token is missing, and config.json's {name}_token_id is no added token"
            )
        return found

    def image(self, n_rows: int) -> int | None:
        path = self.directory / "config.json"
        for key in ("image_token_index", "image_token_id"):
            value = self.config.get(key)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value >= n_rows:
                raise CheckpointError(f"{path}: {key} must be a token id below {n_rows}, not {value!a:.40}")
            if value >= 0:  # the official code's -200 is no token
                return value
        return next((t.id for t in self.added if t.content == "<image>"), None)

    def _read(self, name: str) -> dict[str, Any]:
        path = self.directory / name
        return read_json(path) if path.is_file() else {}
