"""Ranges of numbers as regular expressions, against arithmetic."""

from __future__ import annotations

import json
import math
import random
from decimal import Decimal

import pytest

from local_llava.schema.automata import Automaton, Expression, Work
from local_llava.schema.numbers import Bounds, MultiplesError, integer, number
from local_llava.schema.regex import Regex


def automaton(tree: Regex) -> Expression:
    work = Work()
    work.release()
    return Expression(tree, work)


def written(automaton: Automaton, chance: random.Random) -> bytes:
    """A text that an automaton accepts, by chance."""
    key, text = automaton.start, b""
    while not automaton.accepts(key) or (automaton.edges(key) and chance.random() < 0.85):
        if len(text) > 60:
            return text + automaton.text(min(automaton.points(key), key=automaton.distance))
        low, high, key = chance.choice(automaton.edges(key))
        text += bytes((chance.randint(low, high),))
    return text


def test_integers_are_those_of_the_range() -> None:
    chance = random.Random(1)
    for _ in range(150):
        low, high = sorted(chance.choice([0, 7, 99, 2000, 10**20]) * chance.randint(-3, 3) for _ in range(2))
        high += chance.choice([0, 1, 50, 10**6])
        multiple = chance.choice([1, 1, 2, 5, 8, 25, 1000])
        tree = integer(Bounds(Decimal(low), Decimal(high)), multiple)
        expected = range(-(-low // multiple) * multiple, high + 1, multiple)
        if tree is None:
            assert not expected
            continue
        accepts = automaton(tree).matches
        near = [end + chance.randint(-1500, 1500) for end in (low, high) for _ in range(60)]
        for value in (low - 1, low, low + 1, high - 1, high, high + 1, 0, 1, -1, *near):
            assert accepts(str(value).encode()) == (value in expected), (value, low, high, multiple)
        assert not any(accepts(text) for text in (b"-0", b"00", b"01", b"", b"-", b"1.0", b"+1"))


@pytest.mark.parametrize("bound", [0, 17, -17, 10**30, -(10**30)])
def test_half_open_ranges_end_somewhere(bound: int) -> None:
    above, below = integer(Bounds(low=Decimal(bound))), integer(Bounds(high=Decimal(bound)))
    assert above is not None and below is not None
    for shift in (0, 1, 123456):
        assert automaton(above).matches(str(bound + shift).encode())
        assert automaton(below).matches(str(bound - shift).encode())
    assert not automaton(above).matches(str(bound - 1).encode())
    assert not automaton(below).matches(str(bound + 1).encode())
    assert not automaton(above).matches(b"9" * 5000)  # which int() would refuse


def test_decimals_stay_on_their_side_of_a_bound_when_they_are_read() -> None:
    chance = random.Random(2)
    awkward = [0, 0.1, 0.30000000000000004, 1e-7, 123456789.123456789, 1e22, -1e22, 2**54 + 3, 10**40 + 1, 5e-20]
    for _ in range(300):
        low, high = sorted(chance.choice([*awkward, chance.uniform(-5, 5), chance.randint(-20, 20)]) for _ in range(2))
        opens = chance.random() < 0.3, chance.random() < 0.3
        bounds = Bounds(*(Decimal(v) if isinstance(v, int) else Decimal(repr(v)) for v in (low, high)), *opens)
        bounds = chance.choice([bounds, Bounds(low=bounds.low, low_open=opens[0]), Bounds(high=bounds.high)])
        tree = number(bounds)
        if tree is None:
            assert low == high or any(opens)
            continue
        accepted = automaton(tree)
        for _ in range(20):
            value = json.loads(written(accepted, chance))
            assert bounds.low is None or value > low or (value == low and not bounds.low_open), (bounds, value)
            assert bounds.high is None or value < high or (value == high and not bounds.high_open), (bounds, value)


@pytest.mark.parametrize(
    ("bounds", "inside", "outside"),
    [
        (Bounds(Decimal(0), Decimal(1)), "0 1 0.5 0.125 1.0 0.000 0.999999999999", "-0.1 1.1 1.01 2 .5 00.5 1e0 -0"),
        (Bounds(Decimal("-2.5"), Decimal("-0.25")), "-2.5 -2 -1 -0.25 -0.3 -1.75", "-2.51 -0.2 0 1 -3 -0"),
        (Bounds(Decimal("0.1"), Decimal("0.3"), True, True), "0.2 0.11 0.1000001 0.29", "0.1 0.10 0.3 0.30 0 1"),
        (Bounds(Decimal(9), Decimal(11)), "9 10 11 9.5 10.99 11.0", "8.99 11.01 12 8 1"),
        (Bounds(), "0 -0 12 -3.25 1e10 6.02E+23 1.5e-7", "01 1. .1 1e100 1e 99999999999999999999"),
    ],
)
def test_numbers_by_hand(bounds: Bounds, inside: str, outside: str) -> None:
    tree = number(bounds)
    assert tree is not None
    assert [text for text in inside.split() if not automaton(tree).matches(text.encode())] == []
    assert [text for text in outside.split() if automaton(tree).matches(text.encode())] == []


def test_numbers_without_bounds_can_all_be_read() -> None:
    tree = number(Bounds())
    assert tree is not None
    chance = random.Random(3)
    accepted = automaton(tree)
    assert all(math.isfinite(json.loads(written(accepted, chance))) for _ in range(200))


def test_multiples_that_digits_do_not_tell_are_refused() -> None:
    with pytest.raises(MultiplesError, match="multipleOf 7 needs minimum and maximum with at most 1000 multiples"):
        integer(Bounds(), 7)
    tree = integer(Bounds(Decimal(0), Decimal(6999)), 7)
    assert tree is not None and automaton(tree).matches(b"6993") and not automaton(tree).matches(b"6994")
