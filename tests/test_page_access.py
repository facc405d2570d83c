"""The page for all: with the keyboard, with a screen reader, in the dark, on a phone."""

from __future__ import annotations

import re

import pytest
from page_actions import (
    Server,
    add,
    answered,
    answers,
    opened,
    png,
    until,
)
from playwright.sync_api import Browser, Locator, Page, expect


def focused(page: Page) -> str:
    """What has the focus, as a screen reader calls it; "" for nothing."""
    focus = page.locator(":focus:not(body)")
    return next(iter(re.findall(r'"([^"]*)"', focus.aria_snapshot())), "") if focus.count() else ""


def test_everything_is_done_with_the_keyboard(page: Page) -> None:
    until(lambda: focused(page) == "Question", "nobody can type at once")
    page.keyboard.type("write one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    expect(answers(page).last.locator(".llava-note")).to_contain_text("to the first")
    expect(page.get_by_role("article", name="Question")).to_contain_text("write one\ntwo")
    assert focused(page) == "Question"

    reached = []
    page.evaluate("() => document.activeElement.blur()")
    for _ in range(25):
        page.keyboard.press("Tab")
        reached.append(focused(page))
    wanted = [
        "To the question",
        "Conversations",
        "Model",
        "Settings",
        "New conversation",
        "write one two",
        "Delete write one two",
        "Copy",
        "Edit",
        "Answer again",
        "Add pictures",
        "Take a picture",
        "Question",
        "Ask",
    ]
    assert [name for name in wanted if name not in reached] == []

    page.get_by_role("button", name="Answer again").focus()
    page.keyboard.press("Enter")
    expect(answers(page).last.locator(".llava-note")).to_contain_text("to the first")
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Add pictures").focus()
        page.keyboard.press("Enter")
    chooser.value.set_files({"name": "keys.png", "mimeType": "image/png", "buffer": png()})
    expect(page.get_by_role("img", name="Picture keys.png")).to_be_visible()
    page.get_by_role("button", name="Settings").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)


UNNAMED = re.compile(r"^\s*- (button|textbox|combobox|img|link|dialog|spinbutton)(?! \").*$", re.MULTILINE)


def test_everything_has_a_name_for_screen_readers(page: Page) -> None:
    add(page)
    answered(page, "write something")
    add(page, "next.png")
    assert page.locator("html").get_attribute("lang") == "en-US"
    tree = page.locator("body").aria_snapshot()
    assert UNNAMED.findall(tree) == []
    for role in ("banner", "navigation", "main", "contentinfo", "log", "heading"):
        assert f"- {role}" in tree, role
    # What was said when it was complete, and not before.
    expect(page.get_by_role("status").first).to_have_text("next.png is added")
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_role("dialog", name="Settings")).to_be_visible()
    assert UNNAMED.findall(page.locator("body").aria_snapshot()) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_and_nothing_sticks_out_of_a_phone(chromium: Browser, server: Server, scheme: str) -> None:
    how = {"viewport": {"width": 360, "height": 740}, "color_scheme": scheme, "has_touch": True, "is_mobile": True}
    for page in opened(chromium, server.url, **how):
        add(page)
        answered(page, "write " + "averyverylongword" * 20)
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
        for name in (".llava-text", ".llava-note", ".llava-heading", ".llava-question textarea"):
            assert contrast(page.locator(name).last) >= 4.5, name
        assert page.get_by_role("navigation", name="Conversations").is_hidden()
        page.get_by_role("button", name="Conversations").click()
        page.get_by_role("button", name="New conversation").click()
        expect(answers(page)).to_have_count(0)


def contrast(element: Locator) -> float:
    """Of text and what is behind it, as WCAG counts it."""
    colors: list[str] = element.evaluate(
        """(element) => {
            const color = getComputedStyle(element).color;
            while (element && /rgba\\(.*, 0\\)|transparent/.test(getComputedStyle(element).backgroundColor))
                element = element.parentElement;
            return [color, element ? getComputedStyle(element).backgroundColor : "rgb(255, 255, 255)"];
        }"""
    )
    text, behind = sorted(map(_luminance, colors))
    return (behind + 0.05) / (text + 0.05)


def _luminance(color: str) -> float:
    channels = [int(float(value)) / 255 for value in re.findall(r"[\d.]+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
