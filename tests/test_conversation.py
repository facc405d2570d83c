"""Conversations in every accepted form, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from local_llava.conversation import as_list, as_messages
from local_llava.errors import UsageError
from local_llava.types import Message

PICTURE = Image.new("RGB", (2, 2))


def test_a_question_is_a_conversation() -> None:
    assert as_messages("Why?", "a.png", "Be brief.") == [
        Message("system", "Be brief."),
        Message("user", "Why?", ("a.png",)),
    ]


def test_openai_parts_and_dictionaries() -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
                {"type": "text", "text": "What is"},
                {"type": "text", "text": "this?"},
                {"type": "image", "image": PICTURE},
            ],
        },
        {"role": "assistant", "content": "A cat."},
        Message("user", "And this?", (b"raw",)),
    ]
    assert as_messages(turns, system="not used: the conversation has its own") == [
        Message("system", "Be brief."),
        Message("user", "What is\nthis?", ("data:image/png;base64,AA==", PICTURE)),
        Message("assistant", "A cat."),
        Message("user", "And this?", (b"raw",)),
    ]


def test_pictures_for_the_last_turn_come_before_its_own() -> None:
    assert as_messages([Message("user", "?", ("own",))], ["given"])[0].images == ("given", "own")


@pytest.mark.parametrize("one", ["a.png", b"raw", PICTURE, np.zeros((2, 2, 3), np.uint8), bytearray(b"raw")])
def test_one_picture_is_a_list_of_one(one: Any) -> None:
    assert len(as_list(one)) == 1
    assert len(as_list([one, one])) == len(as_list((one, one))) == 2


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "not empty"),
        (None, "not empty"),
        (7, "list of messages"),
        ([7], "messages[0] must be a Message or a dictionary, not int"),
        ([{"role": "user"}], "messages[0].content must be text or a list of parts, not NoneType"),
        ([{"role": "robot", "content": "x"}], "messages[0].role must be one of system, user, assistant, not 'robot'"),
        (
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
            "the last message must be the user's",
        ),
        (
            [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}, Message("user", "z")],
            "only the first",
        ),
        ([{"role": "user", "content": [{"type": "audio", "audio": "x"}]}], "messages[0].content[0] must be a part of"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0] must be a part of"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0]"),
        ([Message("assistant", "x", ("a.png",)), Message("user", "y")], "only the user can show"),
        ([Message("user", 5)], "messages[0].text must be text, not int"),  # type: ignore[arg-type]
    ],
)
def test_refused(turns: Any, message: str) -> None:
    with pytest.raises(UsageError) as error:
        as_messages(turns)
    assert message in str(error.value)
