"""A conversation that outgrows the context: an error that says what to shorten, or whole turns are left out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from tiny_world import QUESTION, picture

from local_llava import Llava, Message, PromptError
from local_llava.prompt import Prompt
from local_llava.request import as_units, n_tokens
from local_llava.types import ModelFiles

N_CTX = 256
SYSTEM = Message("system", "Be brief.")


@pytest.fixture(scope="module")
def llava(tiny: ModelFiles) -> Iterator[Llava]:
    with Llava.load(tiny.model, tiny.mmproj, kv_type="F32", n_threads=1, n_ctx=N_CTX) as llava:
        yield llava


def turn(i: int, n_words: int = 8, n_pictures: int = 1) -> list[Message]:
    return [
        Message("user", f"{i}: " + "word " * n_words, tuple(picture(i + k) for k in range(n_pictures))),
        Message("assistant", f"{i} it is."),
    ]


def conversation(n: int, **how: Any) -> list[Message]:
    return [SYSTEM, *(message for i in range(n) for message in turn(i, **how)), Message("user", QUESTION)]


def test_the_error_says_what_to_shorten(llava: Llava) -> None:
    with pytest.raises(PromptError) as error:
        llava.chat(conversation(5))
    message = str(error.value)
    for part in (
        "180 of them for pictures, the context 256",
        "shorten the conversation of 6 turns",
        "overflow",
        "fewer than 5 pictures",
        "raise n_ctx",
    ):
        assert part in message, message
    with pytest.raises(PromptError, match=r"the context 256: shorten the question, or raise n_ctx"):
        llava.ask("word " * 200)
    with pytest.raises(PromptError):
        asyncio.run(llava.achat(conversation(5)))


def test_nothing_is_dropped_while_it_fits(llava: Llava) -> None:
    turns = conversation(2)
    plain, dropping = (llava.chat(turns, overflow=how) for how in ("error", "drop_oldest"))
    assert plain.dropped == dropping.dropped == 0 and plain.tokens == dropping.tokens


def test_the_oldest_turns_go_with_their_pictures(llava: Llava) -> None:
    turns = conversation(6)
    reply = llava.chat(turns, overflow="drop_oldest")
    assert reply.dropped > 0 and reply.dropped % 2 == 0, "questions with their answers"
    rest = [SYSTEM, *turns[1 + reply.dropped :]]
    shorter = llava.chat(rest)
    assert reply.tokens == shorter.tokens
    assert reply.timings.prompt_tokens == shorter.timings.prompt_tokens < N_CTX
    assert reply.timings.image_tokens == 36 * sum(len(m.images) for m in rest) > 0
    assert shorter.timings.prefilled_tokens == 1, "it is the very same prompt"
    # No more was dropped than had to be: with one turn more, too little would be left for an answer.
    one_more = [SYSTEM, *turns[1 + reply.dropped - 2 :]]
    with contextlib.suppress(PromptError):
        assert llava.chat(one_more).timings.prompt_tokens > N_CTX - N_CTX // 4


def test_a_chat_goes_on_for_ever(llava: Llava) -> None:
    """Each answer is appended, as `local-llava chat` does it."""
    turns = [SYSTEM]
    dropped = []
    for i in range(10):
        shown = (picture(i),) if i % 2 == 0 else ()
        turns.append(Message("user", QUESTION, shown))
        reply = llava.chat(turns, overflow="drop_oldest", max_tokens=20)
        turns.append(Message("assistant", reply.text))
        dropped.append(reply.dropped)
        assert reply.tokens and reply.timings.prompt_tokens < N_CTX
        if shown:
            assert reply.timings.image_tokens >= 36, "the last turn's own picture is there"
            alone = llava.ask(QUESTION, shown, system=SYSTEM.text)
            assert alone.timings.images_encoded == 0
    assert dropped[0] == 0 and dropped[-1] > 0 and dropped == sorted(dropped)


def test_a_long_conversation_is_not_built_turn_by_turn(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    n_built, build = 0, llava._build

    def counting(messages: Sequence[Message], raw: bool = False) -> Prompt:
        nonlocal n_built
        n_built += 1
        return build(messages, raw)

    monkeypatch.setattr(llava, "_build", counting)
    turns = conversation(250, n_pictures=0)
    reply = llava.chat(turns, overflow="drop_oldest", max_tokens=1)
    assert n_built <= 10
    assert reply.dropped and reply.dropped % 2 == 0
    # As few as can be, as if each number had been tried.
    one_more, same = (llava._build([SYSTEM, *turns[1 + n :]]) for n in (reply.dropped - 2, reply.dropped))
    assert n_tokens(as_units(one_more, ())) + 1 >= N_CTX > n_tokens(as_units(same, ())) + 1


def test_without_a_system_prompt(llava: Llava) -> None:
    turns = conversation(6)[1:]
    reply = llava.chat(turns, overflow="drop_oldest")
    assert reply.dropped and reply.tokens == llava.chat(turns[reply.dropped :]).tokens
    # The default one is no part of the conversation, and stays, too.
    with_default = llava.chat(turns, overflow="drop_oldest", system=SYSTEM.text)
    assert with_default.tokens == llava.chat(conversation(6), overflow="drop_oldest").tokens


def test_the_last_turn_is_never_shortened(llava: Llava) -> None:
    long = [*conversation(2)[:-1], Message("user", "word " * 200)]
    for overflow in ("error", "drop_oldest"):
        with pytest.raises(PromptError, match="the context 256"):
            llava.chat(long, overflow=overflow)
    many = [*conversation(2)[:-1], Message("user", QUESTION, tuple(picture(i) for i in range(8)))]
    with pytest.raises(PromptError, match="show fewer than 8 pictures"):
        llava.chat(many, overflow="drop_oldest")


def test_the_last_turn_may_fill_the_context(llava: Llava) -> None:
    """Where it alone leaves little for an answer, it is answered all the same, as without the turns before it."""
    last = Message("user", "word " * 44)
    alone = llava.chat([last])
    assert N_CTX - N_CTX // 4 < alone.timings.prompt_tokens < N_CTX
    reply = llava.chat([*conversation(3)[1:-1], last], overflow="drop_oldest")
    assert reply.dropped == 6 and reply.tokens == alone.tokens
    assert reply.timings.image_tokens == reply.timings.images_encoded == 0


def test_a_schema_has_its_room(llava: Llava) -> None:
    reply = llava.chat(conversation(6), overflow="drop_oldest", json_schema={"type": "boolean"})
    assert reply.dropped and isinstance(reply.parsed, bool)


def test_an_answer_ends_where_the_context_ends(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is shifted out for it."""
    monkeypatch.setattr(llava._llm, "ends_turn", lambda token: False)
    reply = llava.ask(QUESTION, picture(3))
    assert reply.finish_reason == "length"
    assert reply.timings.prompt_tokens + len(reply.tokens) == N_CTX + 1, "the last one need not be evaluated"
