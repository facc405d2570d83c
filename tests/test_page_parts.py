"""What the page is made of, without a browser: conversations, preferences, captions, answers on their way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from local_llava.errors import BusyError
from local_llava.server.backend import EngineDiedError, Job
from local_llava.server.ui import placeholder_html
from local_llava.server.ui import preferences as settings_of_user
from local_llava.server.ui.answering import Progress, answer
from local_llava.server.ui.conversation import (
    NOT_FINISHED,
    Conversation,
    Picture,
    Turn,
    from_record,
    job,
    to_record,
    wanted_pictures,
)
from local_llava.server.ui.preferences import Preferences
from local_llava.server.ui.rendering import caption, html
from local_llava.types import Chunk, Message, Options, Reply, Timings

CAT, DOG = Picture("c1", "cat.png"), Picture("d1", "dog.png")
BYTES = {"c1": b"cat", "d1": b"dog"}


def timings(**values: Any) -> Timings:
    costs: dict[str, Any] = {
        "load_s": 1.0,
        "image_s": 0.5,
        "prefill_s": 1.0,
        "decode_s": 2.0,
        "prompt_tokens": 600,
        "image_tokens": 576,
        "reused_tokens": 0,
        "images_encoded": 1,
        "completion_tokens": 21,
    }
    return Timings(**{**costs, **values})


def reply(text: str = "A cat.", **values: Any) -> Reply:
    known = {name: values.pop(name) for name in ("finish_reason", "dropped") if name in values}
    return Reply(text, (1, 2), known.pop("finish_reason", "stop"), timings(**values), **known)


def test_a_conversation_becomes_messages() -> None:
    talk = Conversation("x").asked("What is it?", [CAT]).answered("A cat.").asked("And this?", [DOG])
    assert wanted_pictures(talk) == ["c1", "d1"]
    assert job(talk, BYTES, {"temperature": 0.5}) == Job(
        [
            Message("user", "What is it?", (b"cat",)),
            Message("assistant", "A cat."),
            Message("user", "And this?", (b"dog",)),
        ],
        {"temperature": 0.5, "seed": 0},
    )


def test_a_question_without_an_answer_is_part_of_the_next_one() -> None:
    talk = Conversation("x").asked("What is it?", [CAT]).answered("", error="too many questions").asked("Well?", [DOG])
    assert job(talk, BYTES, {}).messages == [Message("user", "What is it?\n\nWell?", (b"cat", b"dog"))]


def test_an_answer_that_was_stopped_is_part_of_the_conversation() -> None:
    talk = Conversation("x").asked("What is it?", []).answered("A c", note="stopped").asked("Go on", [])
    assert [message.text for message in job(talk, {}, {}).messages] == ["What is it?", "A c", "Go on"]


def test_asking_again_forgets_what_follows_and_changes_the_seed() -> None:
    talk = Conversation("x").asked("1", [CAT]).answered("one", "n").asked("2", []).answered("two", "n")
    again = talk.asked_again(1)
    assert [turn.text for turn in again.turns] == ["1", ""]
    assert again == talk.asked_again(0)
    assert job(again, BYTES, {"seed": 7}).options["seed"] == 8
    assert job(again.answered("uno").asked_again(1), BYTES, {"seed": 7}).options["seed"] == 9
    edited = talk.asked_again(2, "two?")
    assert [turn.text for turn in edited.turns] == ["1", "one", "two?", ""]
    assert edited.turns[-1].attempt == 0


def test_a_title_is_short() -> None:
    assert Conversation("x").title == "New conversation"
    assert Conversation("x").asked("", [CAT]).title == "cat.png"
    assert Conversation("x").asked("a\nb " * 40, []).title == ("a b " * 15).strip()[:59] + "…"


def test_a_conversation_survives_the_browser() -> None:
    talk = Conversation("x").asked("What?", [CAT]).answered("A cat.", "12 tokens").asked_again(0)
    talk = talk.answered("A c", error="it died")
    assert from_record(to_record(talk)) == talk


def test_an_answer_that_a_reload_cut_off_says_so() -> None:
    kept = from_record(to_record(Conversation("x").asked("What?", []).answered("A c")))
    assert kept is not None
    assert kept.turns[-1] == Turn("assistant", "A c", note=NOT_FINISHED)


@pytest.mark.parametrize(
    "record",
    [
        None,
        [],
        {"id": 5},
        {"id": "../x"},
        {"id": "x" * 65},
    ],
)
def test_what_is_no_conversation_is_none(record: Any) -> None:
    assert from_record(record) is None


def test_what_makes_no_sense_in_a_kept_conversation_is_left_out() -> None:
    turns = [
        {"role": "assistant", "text": "before any question"},
        "no turn",
        {"role": "system", "text": "no role"},
        {"role": "user", "text": "half \ud83d a pair", "pictures": [{"id": "a/b"}, {"id": "ok", "name": 3}, 7]},
        {"role": "user", "text": "twice"},
        {"role": "assistant", "text": ["x"], "attempt": -1},
        {"role": "user", "text": "unanswered"},
    ]
    kept = from_record({"id": "x", "turns": turns})
    assert kept is not None
    assert [(turn.role, turn.text) for turn in kept.turns] == [
        ("user", "half \ufffd a pair"),
        ("assistant", ""),
        ("user", "unanswered"),
        ("assistant", ""),
    ]
    assert kept.turns[0].pictures == (Picture("ok", "picture"),)
    assert kept.turns[1].attempt == 0


def test_preferences_survive_the_browser_and_nonsense_does_not() -> None:
    wanted = Preferences(system="Be brief.", temperature=0.7, max_tokens=64, preprocess="pad", appearance="dark")
    assert settings_of_user.from_record(wanted.to_record()) == wanted
    odd = {"temperature": "hot", "max_tokens": 0, "preprocess": "x", "system": 5, "model": 7, "appearance": []}
    assert settings_of_user.from_record(odd) == Preferences()
    assert settings_of_user.from_record("x") == Preferences()
    assert settings_of_user.complaint("temperature", 500).startswith("temperature must be 0 to 100")


def test_only_what_was_set_goes_beyond_the_servers_options() -> None:
    server = {"max_tokens": 100, "temperature": 0.2, "seed": 5}
    assert settings_of_user.job_options(Preferences(), server, 8192) == {"max_tokens": 100, "seed": 5}
    own = settings_of_user.job_options(Preferences(max_tokens=9999, temperature=0.0), {}, 8192)
    assert own == {"max_tokens": 8192, "temperature": 0.0, "seed": 0}
    Options().updated(own)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (reply(), "21 tokens, 1.2 s to the first, 10 tokens/s, picture read in 0.5 s"),
        (
            reply(images_encoded=0, reused_tokens=584),
            "21 tokens, 1.2 s to the first, 10 tokens/s, picture known already (584 of 600 tokens reused)",
        ),
        (
            reply(images_encoded=0, reused_tokens=584, restored_tokens=580, completion_tokens=1, decode_s=0.0),
            "1 token, 1.2 s to the first, picture known already, from disk (584 of 600 tokens reused)",
        ),
        (
            reply(images_encoded=2, reused_tokens=9),
            "21 tokens, 1.2 s to the first, 10 tokens/s, 2 pictures read in 0.5 s (9 of 600 tokens reused)",
        ),
        (
            reply(image_tokens=0, images_encoded=0, finish_reason="length", dropped=1),
            "21 tokens, 1.2 s to the first, 10 tokens/s, 1 older message left out, for want of room, "
            "cut off: no more tokens were allowed, or had room",
        ),
    ],
)
def test_a_caption_says_what_an_answer_cost(given: Reply, words: str) -> None:
    assert caption(given, 1.23) == words


def test_markdown_is_shown_and_html_is_not() -> None:
    assert html("**Two** shapes:\n\n- a\n- b") == (
        "<p><strong>Two</strong> shapes:</p>\n<ul>\n<li>a</li>\n<li>b</li>\n</ul>\n"
    )
    assert html('{"a": "\\\\n <b>"}') == "<pre><code>{&quot;a&quot;: &quot;\\\\n &lt;b&gt;&quot;}</code></pre>\n"
    assert html("[a](http://b.example)") == '<p><a href="http://b.example">a</a></p>\n'
    assert "<script" not in html("<script>alert(1)</script>")
    assert "<img" not in html("![x](http://example.com/x.png) <img src=x onerror=alert(1)>")
    assert "href" not in html("[x](javascript:alert(1))")


class Scripted:
    """A backend whose one answer is written in the test."""

    def __init__(self, *steps: Chunk | BaseException | float) -> None:
        self.steps, self.closed = steps, False

    async def stream(
        self, name: str | None, job: Job, *, keep_alive_s: float | None = None
    ) -> AsyncGenerator[Chunk, None]:
        try:
            for step in self.steps:
                if isinstance(step, BaseException):
                    raise step
                if isinstance(step, float):
                    await asyncio.sleep(step)
                else:
                    yield step
        finally:
            self.closed = True


def progress(backend: Scripted) -> list[Progress]:
    async def collected() -> list[Progress]:
        return [step async for step in answer(backend, None, Job([]))]  # type: ignore[arg-type]

    return asyncio.run(collected())


def test_an_answer_grows_and_ends_with_its_caption() -> None:
    steps = progress(Scripted(Chunk("A "), Chunk(""), Chunk("cat"), Chunk(".", reply=reply())))
    assert [step.text for step in steps] == ["A ", "A cat", "A cat."]
    assert steps[-1].note.startswith("21 tokens, 0.0 s to the first")
    assert not any(step.error for step in steps)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (EngineDiedError("the model's\nprocess ended"), "the model's process ended"),
        (BusyError("64 questions wait"), "64 questions wait"),
        (KeyError("odd"), "a defect of local-llava; its log says more"),
    ],
)
def test_an_error_is_one_line_and_what_there_is_stays(error: Exception, line: str) -> None:
    backend = Scripted(Chunk("A ca"), error)
    assert progress(backend)[-1] == Progress("A ca", error=line)
    assert backend.closed


def test_closing_an_answer_stops_the_work() -> None:
    backend = Scripted(Chunk("A ca"), 30.0)

    async def stopped() -> None:
        steps = answer(backend, None, Job([]))  # type: ignore[arg-type]
        async for _ in steps:
            break
        await steps.aclose()

    asyncio.run(stopped())
    assert backend.closed


def test_without_the_extra_people_are_told_how_to_get_it() -> None:
    assert 'pip install "local-llava[ui]"' in placeholder_html()
    assert "http" not in placeholder_html()
