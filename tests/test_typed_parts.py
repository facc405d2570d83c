"""Chat templates that are made to take texts and lists of parts alike."""

from __future__ import annotations

from typing import Any

import pytest

from local_llava.convert.typed_parts import taking_both
from local_llava.default_chats import LLAMA3_CHAT, PHI3_CHAT, VICUNA_CHAT
from local_llava.template import render

VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}

STRINGS = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
"""As the stock template of Llama 3."""

LISTS = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for part in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}{% endfor %}{% endfor %}"
)
"""As that of LLaVA 1.5's processor."""


def rendered(template: str, *contents: Any) -> str:
    turns = [{"role": role, "content": c} for role, c in zip(("user", "assistant", "user"), contents, strict=False)]
    return render(template, {"messages": turns, "add_generation_prompt": True, **VARIABLES})


def parts(text: str, n_images: int = 0) -> list[dict[str, str]]:
    return [{"type": "image"}] * n_images + [{"type": "text", "text": text}]


def test_a_template_of_texts() -> None:
    both = taking_both(STRINGS, VARIABLES)
    texts = (" What is it? ", "A cat.", "Sure?")
    assert rendered(both, *texts) == rendered(STRINGS, *texts)
    assert rendered(both, parts(" What is it? ", 2), "A cat.", parts("Sure?")) == rendered(
        STRINGS, "<image>\n<image>\n What is it? ", "A cat.", "Sure?"
    )


def test_a_template_of_lists() -> None:
    both = taking_both(LISTS, VARIABLES)
    lists = (parts("What is it?", 1), parts("A cat."), parts("Sure?"))
    assert rendered(both, *lists) == rendered(LISTS, *lists)
    assert rendered(both, lists[0], "A cat.", "Sure?") == rendered(LISTS, *lists)


@pytest.mark.parametrize("template", [LLAMA3_CHAT, PHI3_CHAT, VICUNA_CHAT], ids=("llama3", "phi3", "vicuna"))
def test_our_own_take_both(template: str) -> None:
    assert taking_both(template, VARIABLES) == template
    assert rendered(template, parts("What?", 1)) == rendered(template, "<image>\nWhat?")


@pytest.mark.parametrize("template", ["{{ 1 +", "{{ raise_exception('no') }}", "nothing of the message"])
def test_one_that_takes_neither_is_left_as_it_is(template: str) -> None:
    assert taking_both(template, VARIABLES) == template
