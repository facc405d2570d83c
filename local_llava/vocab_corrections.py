"""What published language models get wrong about their vocabulary and their chat.

Knows the vocabularies of Llama 3, Qwen2, Phi 3 and Llama 2, and judges a chat template by the tokens that it writes: a
model was trained with the marks that its vocabulary has. Does not know the tensors.
"""

from __future__ import annotations

import re

from local_llava.chat import ChatFormat, Part, Special
from local_llava.default_chats import DEFAULT_CHATS, DefaultChat, find_default_chat
from local_llava.errors import PromptError
from local_llava.gguf_draft import Draft
from local_llava.llm_vocab import (
    CONTROL,
    END_OF_TURN,
    LLAMA3_PRE,
    NORMAL,
    PHI3_TOKENS,
    QWEN2_PRE,
    RSTRIP_KEY,
    SPACE_PREFIX_KEY,
    UNUSED,
    USER_DEFINED,
    is_mark,
    is_named_phi3,
    special_tokens,
)
from local_llava.types import PAIR_KEY, Message

_BEGINS = {"gpt2": ("<|begin_of_text|>",), "llama": ("<s>",)}
_ENDS = {"gpt2": ("<|end_of_text|>", "<|endoftext|>"), "llama": ("</s>",)}
"""Kind of the vocabulary -> texts of BOS and EOS."""

_LLAMA3_MARKS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_QWEN2_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

MARKS = frozenset(
    {mark for chat in DEFAULT_CHATS for mark in chat.marks}
    | {*END_OF_TURN, *_LLAMA3_MARKS, "<|end_of_text|>", "<|endoftext|>", "<|eom_id|>", "<|system|>"}
)
"""Tokens that nothing but a chat template or a tokenizer writes. Not </s>: in Phi 3 text may hold it."""

_LOOKS_LIKE_A_MARK = re.compile(r"<\|\w+\|>|<(?:start|end)_of_turn>")

_QUESTION, _ANSWER = "How?", "Thus."
"""What templates are tried with. They may trim it, but hardly say it themselves."""

GIVEN_KEY = "local_llava.tokenizer.chat_template_given"
"""In files whose chat template somebody chose: it is not judged by what the vocabulary shows."""


def correct_vocab(draft: Draft, chat_template: str | None = None) -> None:
    """Put the `tokenizer.*` metadata of a language model right, as far as it is well-formed at all.

    Args:
        draft: The file.
        chat_template: Jinja source to be taken.

    Raises:
        PromptError: With `chat_template` no question can be put.
    """
    model = draft.get("tokenizer.ggml.model", "str")
    tokens = draft.get("tokenizer.ggml.tokens", "arr[str]")
    types = draft.get("tokenizer.ggml.token_type", "arr[i32]")
    if model not in _ENDS or not tokens or types is None or len(types) != len(tokens):
        return  # `check_vocab` will tell
    vocabulary = _Vocabulary(draft, model, {text: i for i, text in enumerate(tokens)})
    vocabulary.correct_pre()
    vocabulary.correct_ends()
    vocabulary.correct_types()
    parts = vocabulary.correct_template() if chat_template is None else vocabulary.take_template(chat_template)
    vocabulary.correct_end_of_turn(parts)
    vocabulary.correct_phi3()


class _Vocabulary:
    def __init__(self, draft: Draft, model: str, ids: dict[str, int]) -> None:
        self.draft, self.model, self.ids = draft, model, ids
        self.tokens: list[str] = draft.metadata["tokenizer.ggml.tokens"]
        # Of our own conversions, the checkpoint's; or one that somebody chose by hand.
        self.trusted = bool({PAIR_KEY, GIVEN_KEY} & draft.metadata.keys())

    def has(self, marks: tuple[str, ...]) -> bool:
        return all(mark in self.ids for mark in marks)

    def special(self, name: str) -> int | None:
        """A special id, if there is one and it is a token."""
        i = self.draft.get(f"tokenizer.ggml.{name}_token_id", "u32")
        return i if i is not None and i < len(self.tokens) else None

    def correct_pre(self) -> None:
        key = "tokenizer.ggml.pre"
        pre = self.draft.metadata.get(key, "default")
        if self.model != "gpt2":
            return
        if pre in ("default", "smaug-bpe") and self.has(_LLAMA3_MARKS):
            # llama.cpp's converter took one for the other for a while; Smaug's does not look for whole words first.
            why = ", and files of before May 2024 do not name it" if pre == "default" else ""
            self.draft.set(key, "str", LLAMA3_PRE[0], f"the vocabulary is Llama 3's{why}")
        elif pre == "default" and self.has(_QWEN2_MARKS) and self.draft.metadata["general.architecture"] == "qwen2":
            self.draft.set(key, "str", QWEN2_PRE, "the architecture and the vocabulary are Qwen2's")

    def correct_ends(self) -> None:
        """BOS and EOS that are missing, or ordinary tokens."""
        for name, texts in (("bos", _BEGINS[self.model]), ("eos", _ENDS[self.model])):
            key = f"tokenizer.ggml.{name}_token_id"
            right = next((self.ids[text] for text in texts if text in self.ids), None)
            stored = self.special(name)
            if right is None or stored == right or (stored is None and key in self.draft.metadata):
                continue
            if stored is None:
                problem = f"the vocabulary has {self.tokens[right]}"
            elif self.draft.metadata["tokenizer.ggml.token_type"][stored] == NORMAL and not is_mark(
                self.tokens[stored]
            ):
                problem = f"{self.tokens[stored][:40]!a} is an ordinary token"
            elif name == "eos" and self.tokens[stored] == "<s>":
                problem = "<s> begins a text"
            else:
                continue
            self.draft.set(key, "u32", right, problem)

    def correct_types(self) -> None:
        key = "tokenizer.ggml.token_type"
        types: list[int] = self.draft.metadata[key]
        ends = {self.special(name) for name in ("bos", "eos", "eot")}
        # A conversion of ours has the checkpoint's word for what is user-defined.
        wrong_types = (NORMAL, UNUSED) if self.trusted else (NORMAL, UNUSED, USER_DEFINED)
        wrong = [
            i
            for text, i in self.ids.items()
            if (text in MARKS and types[i] in wrong_types) or (i in ends and types[i] == NORMAL)
        ]
        if wrong:
            right = list(types)
            for i in wrong:
                right[i] = CONTROL
            names = ", ".join(ascii(self.tokens[i][:40])[1:-1] for i in wrong[:4])
            more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            self.draft.set(
                key, "arr[i32]", right, f"only a chat template may write {names}{more}: they are control tokens"
            )

    def take_template(self, template: str) -> list[Part]:
        key = "tokenizer.chat_template"
        parts = self.parts(template)
        same = self.draft.get(key, "str") == template
        if not (same and self.trusted):
            self.draft.set(key, "str", template, "was given by hand" if same else "another one was given by hand")
        self.draft.metadata[GIVEN_KEY], self.draft.types[GIVEN_KEY] = True, "bool"
        return parts

    def correct_template(self) -> list[Part]:
        """The parts of a conversation by the right template; empty if there is none."""
        key = "tokenizer.chat_template"
        default = find_default_chat(self.model, self.ids)
        stored = self.draft.get(key, "str")
        parts: list[Part] = []
        if stored is None:
            problem: str | None = "models with this vocabulary were trained with one"
        else:
            try:
                parts = self.parts(stored)
                problem = None if self.trusted else self.fault(parts, default)
            except PromptError as e:
                problem = str(e)
        if problem is None:
            return parts
        if default is None or (self.trusted if stored is not None else key in self.draft.metadata):
            self.draft.note(f"{key}: {'there is none' if stored is None else problem}")
            return []
        self.draft.set(key, "str", default.template, f"{problem}; that of {default.name} is taken")
        return self.parts(default.template)

    def parts(self, template: str) -> list[Part]:
        """A conversation of three turns; of one where the template takes no more.

        Raises:
            PromptError: The template cannot put a question at all.
        """
        bos, eos = self.special("bos"), self.special("eos")
        add_bos = self.draft.get("tokenizer.ggml.add_bos_token", "bool") is not False
        chat = ChatFormat(
            template,
            special_tokens(self.draft.gguf),
            -1 if bos is None else bos,
            -1 if eos is None else eos,
            add_bos and bos is not None,
        )
        question = Message("user", _QUESTION)
        try:
            return chat.parts([question, Message("assistant", _ANSWER), question])
        except PromptError:
            return chat.parts([question])

    def fault(self, parts: list[Part], default: DefaultChat | None) -> str | None:
        """What shows that a template is another model's."""
        text = "".join(part for part in parts if isinstance(part, str))
        foreign = sorted(set(_LOOKS_LIKE_A_MARK.findall(text)))
        ends = {self.special("bos"), self.special("eos")}
        own = {part.token for part in parts if isinstance(part, Special)} - ends
        if own and not foreign:
            return None
        problem = f"it writes {', '.join(foreign[:3])}, which the vocabulary does not have"
        if own or (foreign and not (default and default.marks)):
            self.draft.note(f"tokenizer.chat_template: {problem}")
            return None
        if default is None or not default.marks:
            return None
        return problem if foreign else f"it writes none of the vocabulary's marks, such as {default.marks[-1]}"

    def correct_end_of_turn(self, parts: list[Part]) -> None:
        """The id by which a runtime knows that an answer is complete."""
        right = self.turn_end(parts)
        if right is None and self.special("eot") is None:
            right = next((self.ids[text] for text in END_OF_TURN if text in self.ids), None)
        eos, eot = self.special("eos"), self.special("eot")
        if right is not None and right not in (eos, eot):
            other = "no EOS is named" if eos is None else f"EOS is {self.tokens[eos][:40]!a}"
            why = f"turns end with {self.tokens[right][:40]!a}, and {other}, at which an answer never stops"
            self.draft.set("tokenizer.ggml.eot_token_id", "u32", right, why)

    def turn_end(self, parts: list[Part]) -> int | None:
        """The token that the template writes after an answer, if it is one that ends something."""
        at = next((i for i, part in enumerate(parts) if isinstance(part, str) and _ANSWER in part), None)
        if at is None or at + 1 == len(parts) or not str(parts[at]).rstrip().endswith(_ANSWER):
            return None
        token = parts[at + 1]
        known = {*END_OF_TURN, *_ENDS[self.model], "<|eom_id|>"}
        return token.token if isinstance(token, Special) and self.tokens[token.token] in known else None

    def correct_phi3(self) -> None:
        """Phi 3's marks swallow the white space after them; llama.cpp goes by the model's name, GGUF has no key."""
        metadata = self.draft.metadata
        if self.model != "llama" or not is_named_phi3(metadata) or {RSTRIP_KEY, SPACE_PREFIX_KEY} & metadata.keys():
            return
        types: list[int] = metadata["tokenizer.ggml.token_type"]
        marks = {
            i for text, i in self.ids.items() if types[i] == CONTROL or (types[i] == USER_DEFINED and is_mark(text))
        }
        swallow = sorted(marks - {self.ids[text] for text in PHI3_TOKENS if text in self.ids and text != "</s>"})
        if swallow:
            why = "these tokens of a Phi 3 swallow the white space after them"
            self.draft.set(RSTRIP_KEY, "arr[u32]", swallow, why)
