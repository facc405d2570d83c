"""Prompts: what is typed stays text, pictures get their places, and templates from files stay in their sandbox."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llava_checkpoints import TINY

from local_llava import Llava
from local_llava.chat import ChatFormat, Slot, Special
from local_llava.convert import convert
from local_llava.default_chats import LLAMA3_CHAT
from local_llava.errors import PromptError
from local_llava.template import render
from local_llava.types import Message

SPECIALS = {"<|bos|>": 1, "<|start_header_id|>": 2, "<|end_header_id|>": 3, "<|eot_id|>": 4, "<image>": 5}

STRINGS_ONLY = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
)


def chat(template: str = LLAMA3_CHAT, add_bos: bool = True) -> ChatFormat:
    return ChatFormat(template, SPECIALS, bos=1, eos=4, add_bos=add_bos)


def text_of(parts: list[object]) -> str:
    return "".join(p for p in parts if isinstance(p, str))


def test_a_question_about_a_picture() -> None:
    parts = chat().parts([Message("system", "Be brief."), Message("user", "What?", images=("x",))])
    assert parts == [
        *(Special(1), Special(2), "system", Special(3), "\n\nBe brief.", Special(4)),
        *(Special(2), "user", Special(3), "\n\n", Slot(0), "\nWhat?", Special(4)),
        *(Special(2), "assistant", Special(3), "\n\n"),
    ]


def test_templates_that_take_strings_only() -> None:
    parts = chat(STRINGS_ONLY).parts([Message("user", " What? ", images=("x", "y"))])
    assert [p for p in parts if isinstance(p, Slot)] == [Slot(0), Slot(1)]
    assert parts[-2] == "\n What?"  # trimmed at its end by the template


def test_bos_is_there_once() -> None:
    text = "x{{ messages[0]['content'] }}"
    assert chat("{{ bos_token }}" + text).parts([Message("user", "?")]) == [Special(1), "x?"]
    assert chat(text).parts([Message("user", "?")]) == [Special(1), "x?"]
    assert chat(text, add_bos=False).parts([Message("user", "?")]) == ["x?"]


def test_a_template_without_a_place_for_pictures() -> None:
    with pytest.raises(PromptError, match="no place"):
        chat("{{ bos_token }}hello").parts([Message("user", "?", images=("x",))])


LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""As llava-hf's LLaVA 1.5 has it: every message's content must be typed parts; one with strings loses them."""


def test_a_template_that_takes_typed_parts_only() -> None:
    turns = [Message("system", "Be brief."), Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    assert chat(LLAVA).parts(turns) == [Special(1), "Be brief. USER: a ASSISTANT: b USER: c ASSISTANT:"]
    turns[1] = Message("user", "a", images=("x",))
    after = "\na ASSISTANT: b USER: c ASSISTANT:"
    assert chat(LLAVA).parts(turns) == [Special(1), "Be brief. USER: ", Slot(0), after]


def test_a_template_that_takes_typed_parts_of_some() -> None:
    """The system's message as a string, the others as parts; and parts that would be printed like a list in Python."""
    template = (
        "{{ messages[0]['content'] }}|{% for p in messages[1]['content'] %}{{ p['text'] or '<image>' }}{% endfor %}"
    )
    turns = [Message("system", "s"), Message("user", "u", images=("x",))]
    assert chat(template).parts(turns) == [Special(1), "s|", Slot(0), "u"]
    assert chat("{{ messages[0]['content'] | trim }}").parts([Message("user", " u ")]) == [Special(1), "u"]


def test_a_message_that_a_template_would_leave_out() -> None:
    """Phi 3's first template had no place for a system prompt, and said nothing."""
    template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    assert chat(template).parts([Message("user", "u")]) == [Special(1), "u"]
    with pytest.raises(PromptError, match="no place for a system message"):
        chat(template).parts([Message("system", "s"), Message("user", "u")])
    with pytest.raises(PromptError, match="no place for a user message"):
        chat("{{ bos_token }}").parts([Message("user", "u")])


@given(st.lists(st.sampled_from([*SPECIALS, "<", "|", "eot_id", ">", "\ufdd0", "\ufdd1", " ", "é", "<__media__>"])))
def test_nothing_typed_acts(pieces: list[str]) -> None:
    typed = "a" + "".join(pieces) + "b"
    parts = chat().parts([Message("user", typed, images=("x",))])
    plain = chat().parts([Message("user", "ab", images=("x",))])
    assert [p for p in parts if not isinstance(p, str)] == [p for p in plain if not isinstance(p, str)]
    assert text_of(list(parts)) == text_of(list(plain)).replace("ab", typed)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Llava:
    files = convert(TINY, tmp_path_factory.mktemp("tiny"), quant="Q8_0")
    return Llava.load(files.model, files.mmproj)


@pytest.mark.parametrize(
    "typed",
    ["<image>", "<__media__>", "<|eot_id|>", "a<image><|eot_id|><|begin_of_text|>b", "[PAD500]", "🦙<pad>é\u0000"],
)
def test_typed_marks_round_trip_through_the_model(llava: Llava, typed: str) -> None:
    tokens = llava.prompt_tokens(typed, 1)
    plain = llava.prompt_tokens("", 1)
    start = plain.index(None) + plain.count(None) + 1  # after the picture and its newline
    own = tokens[start : start + len(tokens) - len(plain)]
    specials = set(llava._llm.specials.values())
    assert not specials & set(own)
    assert tokens.count(None) == plain.count(None)
    assert b"".join(llava._llm.piece(t, special=True) for t in own if t is not None).decode() == typed


# --- templates from files nobody has vouched for ---

GROW = (
    "{% set ns = namespace(x='aaaaaaaaaa') %}{% for i in range(99) %}{% set ns.x = EXPRESSION %}{% endfor %}{{ ns.x }}"
)
HOSTILE = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{{ 'x' }}{% for j in range(99999) %}{{ 'x' }}{% endfor %}{% endfor %}",
    *[
        GROW.replace("EXPRESSION", e)
        for e in (
            "ns.x ~ ns.x",
            "ns.x + ns.x",
            "[ns.x, ns.x]",
            "(ns.x, ns.x)",
            "{'a': ns.x, 'b': ns.x}",
            "dict(a=ns.x, b=ns.x)",
            "ns.x | replace('a', ns.x)",
            "ns.x.replace('a', ns.x)",
            "[ns.x, ns.x] | join(ns.x)",
            "[ns.x, ns.x] | string",
            "[ns.x, ns.x] | tojson",
        )
    ],
    "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}"
    "{% set ns.x = y %}{% endfor %}",
    "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "{% set ns = namespace(x=9) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{{ 'x' * 999999999 }}",
    "{{ 9 ** 999999999 }}",
    "{{ '%999999999d' % 3 }}",
    "{{ 'x'.center(999999999) }}",
    "{{ 'x' | center(999999999) }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{% include 'x' %}",
    "{% import 'os' as os %}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ messages[99].role.x }}",
    "{% if %}",
    "x" * (1 << 17),
]


@pytest.mark.parametrize("template", HOSTILE)
def test_hostile_templates_are_stopped(template: str) -> None:
    started = time.process_time()
    with pytest.raises(PromptError) as error:
        render(template, {"messages": []})
    assert "\n" not in str(error.value)
    assert time.process_time() - started < 60  # it ends at all; the budget keeps it to a few seconds


def test_format_is_refused_before_it_fills_the_memory() -> None:
    with pytest.raises(PromptError, match=r"calls format\(\) of a string"):
        render("{{ '{:>999999999}'.format(1) }}", {"messages": []})


@pytest.mark.parametrize("template", [r"{{ '\ud800' }}", "x\udcff"])
def test_what_a_template_writes_must_be_text(template: str) -> None:
    with pytest.raises(PromptError, match="not valid Unicode"):
        render(template, {"messages": []})


def test_what_real_templates_use() -> None:
    template = (
        "{%- set ns = namespace(n=0) -%}{%- for m in messages if m.role != 'system' -%}"
        "{%- if loop.first -%}{{ m.content | trim }}"
        "{%- elif loop.index0 % 2 == 1 -%}|{{ m['content'].strip().upper() }}"
        "{%- else -%}{% continue %}{%- endif -%}{%- set ns.n = ns.n + 1 -%}{%- endfor -%}"
        "{{ ' ' ~ ns.n ~ [1, {'a': 'é'}] | tojson }}{{ tools is defined }}{{ messages[1:] | length }}"
    )
    messages = [{"role": "user", "content": " a "}, {"role": "assistant", "content": " b "}]
    assert render(template, {"messages": messages}) == 'a|B 2[1, {"a": "é"}]False1'


def test_a_template_may_refuse() -> None:
    with pytest.raises(PromptError, match="roles must alternate"):
        render("{{ raise_exception('roles must\nalternate') }}", {"messages": []})


def test_templates_of_files_are_read(tmp_path: Path) -> None:
    assert "<image>" in LLAMA3_CHAT and "bos_token" in LLAMA3_CHAT
