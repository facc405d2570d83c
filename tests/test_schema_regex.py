"""Patterns, formats and the automata made of them, against Python's re and jsonschema's format checks."""

from __future__ import annotations

import json
import random
import re
from datetime import date

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_schema_numbers import written

from local_llava.schema.automata import Automaton, Counted, Expression, Words, Work, string
from local_llava.schema.formats import FORMATS
from local_llava.schema.intersection import Both
from local_llava.schema.regex import ANYTHING, RegexError, lengths, parse_pattern, size
from local_llava.schema.text import quote

PATTERNS = [
    r"^[A-Z]{2,3}-\d{4}$", "^(a|b)*abb$", "colou?r", r"^\S+@\S+$", r"^[^\d\W]\w*$", r"^(?:\+\d{1,3})? ?\d{3,}$",
    "^.{2,5}$", r'^"\\/\n$', "^[\u00e9-\uffff]", r"^\W+$", "^\U0001f600+$", "^(foo|bar)|baz$", "^$", r"[\]\-x]",
    r"^[a\-z]+$", "(^a|b$)", r"^\s*\S.*$", r"^\x41\u00e9\t[\x00-\x1f]{3}$", "^[^a]{2}$", "^{a}$", "^a{2}b{1,}c*?$", "",
]  # fmt: skip


def work() -> Work:
    unlimited = Work()
    unlimited.release()
    return unlimited


def shortest(automaton: Automaton) -> bytes:
    return automaton.text(min(automaton.points(automaton.start), key=automaton.distance))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_is_written_matches_the_pattern(pattern: str) -> None:
    automaton, chance = string(parse_pattern(pattern), work()), random.Random(pattern)
    for text in [shortest(automaton), *(written(automaton, chance) for _ in range(100))]:
        value = json.loads(text.decode())
        assert re.search(pattern, value), value
        assert quote(value).encode() == text  # there is one way to write it


@pytest.mark.parametrize("pattern", PATTERNS)
@given(st.text(alphabet='aAb-10 \u00e9\u0663\n"\\/@', max_size=9))
@settings(max_examples=60, deadline=None)
def test_what_matches_for_sure_and_possibly(pattern: str, value: str) -> None:
    """What only one of ECMA-262 and Python lets through lies between the two readings."""
    text, found = quote(value).encode(), bool(re.search(pattern, value))
    assert string(parse_pattern(pattern), work()).matches(text) <= found
    assert found <= string(parse_pattern(pattern, possible=True), work()).matches(text)
    if value.isascii() and "\n" not in value:
        assert string(parse_pattern(pattern), work()).matches(text) == found


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("(?=a)", "(?=...) is not supported"),
        ("(?P<x>a)", "(?P...) is not supported"),
        (r"\bx", r"\b is not supported"),
        (r"(a)\1", r"\1 is not supported"),
        (r"\p{L}", r"\p is not supported"),
        (r"\ud800", "surrogates are not characters"),
        (r"\u12", "4 hexadecimal digits"),
        (r"\012", "octal"),
        ("(a", "( is not closed"),
        ("a)", ") is not opened"),
        ("[a", "it ends too early"),
        ("\\", "it ends too early"),
        ("[]", "[] and [^] are not supported"),
        (r"[^\w\W]", "matches no character"),
        ("[b-a]", "from one character up to another"),
        (r"[\d-x]", "from one character up to another"),
        ("a**", "nothing to repeat at character 2"),
        ("a++", "nothing to repeat"),
        ("*", "nothing to repeat"),
        ("a{,3}", "nothing to repeat"),
        ("a{2,1}", "{2,1} counts down"),
        ("a^b", "at its ends only"),
        ("(^a)*", "at its ends only"),
        ("(a{1,100}){1,100}", "it stands for 10003 characters"),
        ("(" * 50 + ")" * 50, "nests more than 40"),
        ("a" * 2001, "has 2001 characters"),
    ],
)
def test_patterns_that_are_refused(pattern: str, problem: str) -> None:
    with pytest.raises(RegexError, match=re.escape(problem)):
        parse_pattern(pattern)


@pytest.mark.parametrize("name", FORMATS)
def test_formats_pass_every_check(name: str) -> None:
    automaton, chance = string(parse_pattern(FORMATS[name]), work()), random.Random(name)
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    assert name in checker.checkers, "the development extra lacks what jsonschema checks this format with"
    for text in [shortest(automaton), *(written(automaton, chance) for _ in range(300))]:
        checker.check(json.loads(text), name)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("date", ["2024-02-29", "2000-02-29", "1999-12-31", "0001-01-01"]),
        ("time", ["23:59:59Z", "00:00:00.25+05:30"]),
        ("date-time", ["2026-11-23T03:33:16Z"]),
        ("duration", ["P3Y6M4D", "PT36H", "P1W", "P1DT12H"]),
        ("email", ["a.b+c@example.org"]),
        ("hostname", ["localhost", "www.example.org"]),
        ("ipv4", ["192.168.0.1", "255.255.255.255"]),
        ("ipv6", ["::", "::1", "2001:db8::8a2e:370:7334", "1:2:3:4:5:6:7:8", "1::"]),
        ("uri", ["https://example.org/a/b?c=d&e=%20#f", "ftp://h:21"]),
        ("uuid", ["123e4567-e89b-12d3-a456-426614174000"]),
    ],
)
def test_formats_have_the_common_forms(name: str, values: list[str]) -> None:
    automaton = string(parse_pattern(FORMATS[name]), work())
    assert [value for value in values if not automaton.matches(quote(value).encode())] == []


def test_dates_exist() -> None:
    automaton = string(parse_pattern(FORMATS["date"]), work())
    for year in (*range(1896, 1912), *range(1996, 2012), 2100):
        for day in ("02-28", "02-29", "02-30", "04-31", "12-31", "00-10", "13-01"):
            try:
                exists = bool(date.fromisoformat(f"{year}-{day}"))
            except ValueError:
                exists = False
            assert automaton.matches(f'"{year}-{day}"'.encode()) == exists, (year, day)


def test_lengths_and_sizes() -> None:
    assert lengths(parse_pattern("^(a|bcd)e{2,4}$")) == (3, 7)
    assert lengths(parse_pattern("x")) == (1, None)
    assert size(parse_pattern("^[a-z]{20}$")) == 20


def automata() -> dict[str, Automaton]:
    pattern = string(parse_pattern("^(a|b)*abb$"), work())
    return {
        "words": Words([b'"a"', b'"ab"', b'"b"', b'""'], work()),
        "expression": pattern,
        "counted": Counted(2, 5, work()),
        "counted without a limit": Counted(3, None, work()),
        "pattern and length": Both([pattern, Counted(0, 6, work())], [], work()),
        "names but some": Both([string(ANYTHING, work())], [Words([b'"0"', b'""', b'"a"'], work())], work()),
    }


@pytest.mark.parametrize("name", automata())
def test_every_way_leads_to_an_end(name: str) -> None:
    automaton, chance = automata()[name], random.Random(name)
    farthest, _ = automaton.farthest(10_000)
    for _ in range(200):
        key, text = automaton.start, b""
        while automaton.edges(key) and chance.random() < 0.9:
            low, high, target = chance.choice(automaton.edges(key))
            if not list(automaton.points(target)):
                assert farthest is None and name == "pattern and length"
                continue
            text, key = text + bytes((chance.randint(low, high),)), target
            assert farthest is None or automaton.to_go(key) <= farthest
        for point in automaton.points(key):
            rest = automaton.text(point)
            assert len(rest) == automaton.distance(point)
            assert automaton.matches(text + rest)
            json.loads(text + rest)


def test_a_pattern_and_a_length_that_exclude_each_other_have_no_way() -> None:
    both = Both([string(parse_pattern("^a{9}$"), work()), Counted(0, 5, work())], [], work())
    assert not list(both.points(both.start))


def test_an_automaton_forgets_what_it_need_not_remember(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("local_llava.schema.automata.MAX_REMEMBERED", 50)
    pattern = string(parse_pattern("^(a|b)*a(a|b){30}$"), work())
    for letters in ("a" * 31, "ab" * 40, "b" * 50 + "a" * 31):
        assert pattern.matches(f'"{letters}"'.encode()) == (letters[-31] == "a")


def test_utf8_is_never_invalid() -> None:
    automaton: Expression = string(ANYTHING, work())
    for raw in (
        b'"\xc0\x80"',
        b'"\xed\xa0\x80"',
        b'"\xf5\x80\x80\x80"',
        b'"\xe0\x80\x80"',
        b'"\x80"',
        b'"\n"',
        b'"\xff"',
    ):
        assert not automaton.matches(raw)
    for value in (
        "\u0080",
        "\u07ff",
        "\u0800",
        "\ud7ff",
        "\ue000",
        "\uffff",
        "\U00010000",
        "\U0010ffff",
        "\x7f",
        "\x00",
    ):
        assert automaton.matches(quote(value).encode())
