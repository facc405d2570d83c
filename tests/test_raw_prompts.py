"""Prompts that are what the caller wrote and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import tiny_world
from llava_checkpoints import TINY
from tokenizers import Tokenizer

from local_llava import Llava, Message, UsageError, prompt
from local_llava.chat import ChatFormat, Slot
from local_llava.sentencepiece import TextRun
from local_llava.types import ModelFiles

TEXT = "A red circle is left of a blue"
SPECIALS = {"<s>": 1, "</s>": 2, "[INST]": 3, "<image>": 9}


@pytest.fixture(scope="module")
def llava(tiny: ModelFiles) -> Iterator[Llava]:
    with Llava.load(tiny.model, tiny.mmproj, kv_type="F32", n_threads=1, system="Answer in one word.") as llava:
        yield llava


def built(llava: Llava, text: str, n_images: int = 0) -> prompt.Prompt:
    return prompt.build([Message("user", text, (None,) * n_images)], llava._format, llava._llm.tokenize, raw=True)


def test_the_text_is_the_whole_prompt(llava: Llava) -> None:
    reference = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    expected = [llava._llm.config.vocab.bos, *reference.encode(TEXT, add_special_tokens=False).ids]
    assert built(llava, TEXT) == [expected]
    reply = llava.chat(TEXT, raw=True, max_tokens=5)
    # The system prompt that was given when the model was loaded belongs to chats.
    assert reply.timings.prompt_tokens == len(expected)
    assert llava.ask(TEXT, max_tokens=5).timings.prompt_tokens > len(expected)


def test_pictures_come_before_the_text(llava: Llava) -> None:
    (start, slot, text) = built(llava, TEXT, n_images=1)
    assert start == [llava._llm.config.vocab.bos] and slot == Slot(0)
    assert text == built(llava, TEXT)[0][1:]  # type: ignore[index]
    reply = llava.chat(TEXT, tiny_world.picture(1), raw=True, max_tokens=5)
    n_image = llava._tower.n_tokens
    assert (reply.timings.image_tokens, reply.timings.prompt_tokens) == (n_image, 1 + n_image + len(text))  # type: ignore[arg-type]


def test_text_only_acts_as_text(llava: Llava) -> None:
    text = "<|begin_of_text|>What<|eot_id|> is <image> this?<|end_header_id|>"
    (tokens,) = built(llava, text)
    assert isinstance(tokens, list)
    assert not set(tokens[1:]) & set(llava._llm.specials.values())
    assert b"".join(llava._llm.piece(token, special=True) for token in tokens[1:]).decode() == text


def test_all_ways_to_ask_give_the_same(llava: Llava) -> None:
    picture = tiny_world.picture(2)
    reply = llava.chat(TEXT, picture, raw=True, max_tokens=8)
    *_, last = llava.stream(TEXT, picture, raw=True, max_tokens=8)
    awaited = asyncio.run(llava.achat([Message("user", TEXT, (picture,))], raw=True, max_tokens=8))
    assert last.reply is not None and reply.tokens == last.reply.tokens == awaited.tokens != ()
    assert llava.chat(TEXT, picture, max_tokens=8).tokens != reply.tokens


def test_several_messages_are_no_raw_prompt(llava: Llava) -> None:
    turns = [Message("user", "1"), Message("assistant", "2"), Message("user", "3")]
    with pytest.raises(UsageError, match="one message of the user's, not 3"):
        llava.chat(turns, raw=True)


@pytest.mark.parametrize("add_bos", [True, False])
def test_what_a_sentencepiece_tokenizer_is_told(add_bos: bool) -> None:
    """A text that begins the prompt gets another space before it than one behind a picture."""
    runs: list[TextRun] = []

    def tokenize(run: TextRun) -> list[int]:
        runs.append(run)
        return [0]

    chat_format = ChatFormat("{{ messages }}", SPECIALS, bos=1, eos=2, add_bos=add_bos)
    start = [1] if add_bos else []
    assert prompt.build([Message("user", "a [INST]</s>")], chat_format, tokenize, raw=True) == [[*start, 0]]
    prompt.build([Message("user", "b", ("picture",))], chat_format, tokenize, raw=True)
    assert runs == [
        TextRun(pieces=("a [", "INST]<", "/s>"), first=True, after=None, before=None),
        TextRun(pieces=("b",), first=False, after=9, before=None),
    ]


def test_an_empty_prompt_is_refused_where_nothing_begins_it() -> None:
    chat_format = ChatFormat("{{ messages }}", SPECIALS, bos=1, eos=2, add_bos=False)
    with pytest.raises(UsageError, match="must not be empty"):
        prompt.build([Message("user", "")], chat_format, lambda run: [0], raw=True)
