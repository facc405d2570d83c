"""Answers as HTML, and what they cost in words. Knows no NiceGUI."""

from __future__ import annotations

from functools import cache

from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml

from local_llava.types import Reply


@cache
def _markdown() -> MarkdownIt:
    # HTML in an answer is text. So are pictures: the browser must not fetch what a model wrote the address of.
    return MarkdownIt("js-default", {"html": False, "linkify": False, "breaks": True}).disable("image")


def html(text: str) -> str:
    """An answer as HTML that holds neither scripts nor pictures nor foreign HTML.

    It is read as Markdown, which models write, unless it is JSON or becomes it, whose backslashes Markdown would take.
    """
    if text.lstrip().startswith(("{", "[{", "[]", '["')):
        return f"<pre><code>{escapeHtml(text)}</code></pre>\n"
    rendered: str = _markdown().render(text)
    return rendered


def typed(text: str) -> str:
    """A question as HTML: as it was typed."""
    return f'<p class="llava-typed">{escapeHtml(text)}</p>\n'


def caption(reply: Reply, first_s: float) -> str:
    """What an answer cost, for people.

    Args:
        reply: The answer.
        first_s: Seconds from the question to the first token, loading and waiting included.

    Returns:
        Such as "12 tokens, 1.2 s to the first, picture known already (584 of 600 tokens reused)".
    """
    timings = reply.timings
    parts = [_count(timings.completion_tokens, "token"), f"{first_s:.1f} s to the first"]
    if timings.completion_tokens > 1 and timings.decode_s > 0:
        parts.append(f"{timings.decode_tokens_per_s:.0f} tokens/s")
    parts.append(_reuse(reply))
    if reply.dropped:
        parts.append(f"{_count(reply.dropped, 'older message')} left out, for want of room")
    if reply.finish_reason == "length":
        parts.append("cut off: no more tokens were allowed, or had room")
    return ", ".join(part for part in parts if part)


def _reuse(reply: Reply) -> str:
    timings = reply.timings
    reused = f"{timings.reused_tokens} of {timings.prompt_tokens} tokens reused" if timings.reused_tokens else ""
    if not timings.image_tokens:
        return reused
    if timings.images_encoded:
        pictures = "picture" if timings.images_encoded == 1 else f"{timings.images_encoded} pictures"
        read = f"{pictures} read in {timings.image_s:.1f} s"
        return f"{read} ({reused})" if reused else read
    where = "picture known already"
    if timings.restored_tokens:
        where += ", from disk"
    return f"{where} ({reused})" if reused else where


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
