"""Text of an answer: stop texts over several pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from local_llava.text import AnswerText


def pushed(pieces: list[str], stop: list[str]) -> tuple[str, bool]:
    text = AnswerText(stop)
    shown = "".join(text.push(piece) for piece in pieces)
    return shown + text.finish(), text.stopped


def test_a_stop_text_is_cut_out_and_what_follows_it_dropped() -> None:
    assert pushed(["one", "tw", "o\nUS", "ER: three"], ["\nUSER:"]) == ("onetwo", True)
    assert pushed(["a", "b", "c"], ["cd", "bd"]) == ("abc", False)
    assert pushed(["aab"], ["ab", "aa"]) == ("", True), "the first to occur counts"


def test_nothing_is_held_back_without_need() -> None:
    text = AnswerText(["END"])
    assert [text.push(p) for p in ("a E", "xE", "N", "ot")] == ["a ", "Ex", "", "ENot"]


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_any_split_gives_the_same_text(whole: str, stop: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    first = min((i for s in stop if (i := whole.find(s)) >= 0), default=None)
    text, stopped = pushed(pieces, stop)
    assert stopped == (first is not None)
    if first is None:
        assert text == whole
    else:
        # A stop text that ends earlier may be seen before one that begins earlier.
        assert whole.startswith(text) and any(whole.startswith(s, len(text)) for s in stop)
    assert pushed([whole], stop)[1] == stopped
