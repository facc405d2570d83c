"""Ranges of numbers as regular expressions over their digits.

Knows how JSON writes numbers and how far a decimal may be trusted to stay on its side of a bound once it is read as a
64-bit float. Bounds are decimals of any size up to LARGEST.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal

from local_llava.schema.regex import Cat, Chars, Or, Regex, Repeat, text

LARGEST, FINEST = 60, 40
"""Digits before and after the point of the largest and the finest bound."""

MAX_MULTIPLES = 1000
"""Multiples that are written out one by one, where digits alone do not tell them."""

_DIGIT = Chars(((0x30, 0x39),))
_ONE_TO_NINE = Chars(((0x31, 0x39),))
_SURE_DIGITS = 15
"""Decimals of so many digits are different floats if they differ: DBL_DIG of C."""
_MINUS = text("-")


class MultiplesError(ValueError):
    """Multiples that no regular expression of a fair size stands for."""


@dataclass(frozen=True)
class Bounds:
    """A range of numbers; None for no limit. An open end is not in it."""

    low: Decimal | None = None
    high: Decimal | None = None
    low_open: bool = False
    high_open: bool = False

    def holds(self, value: Decimal) -> bool:
        above = self.low is None or value > self.low or (value == self.low and not self.low_open)
        return above and (self.high is None or value < self.high or (value == self.high and not self.high_open))

    @property
    def empty(self) -> bool:
        if self.low is None or self.high is None:
            return False
        return self.low > self.high or (self.low == self.high and (self.low_open or self.high_open))

    def both(self, other: Bounds) -> Bounds:
        """The range of what is in both."""
        first, second = sorted((self, other), key=lambda b: (-math.inf if b.low is None else b.low, b.low_open))
        low, low_open = second.low, second.low_open
        first, second = sorted((self, other), key=lambda b: (math.inf if b.high is None else b.high, not b.high_open))
        return Bounds(low, first.high, low_open and low is not None, first.high_open and first.high is not None)

    def integers(self) -> tuple[int | None, int | None]:
        """First and last integer of the range; None for no limit."""
        low = None if self.low is None else math.ceil(self.low) + (self.low_open and self.low == math.ceil(self.low))
        high = self.high
        return low, None if high is None else math.floor(high) - (self.high_open and high == math.floor(high))

    def negated(self) -> Bounds:
        # Unlike -x, which rounds to the precision of the context.
        low = None if self.high is None else self.high.copy_negate()
        return Bounds(low, None if self.low is None else self.low.copy_negate(), self.high_open, self.low_open)


def in_reach(value: float) -> bool:
    """Whether a number can be a bound."""
    number = Decimal(value) if isinstance(value, int) else Decimal(repr(value))
    return abs(int(number)) <= 10**LARGEST and _places(number) <= FINEST


def integer(bounds: Bounds, multiple: int = 1) -> Regex | None:
    """The integers of a range that are multiples of a number; None if there are none.

    Where the range has no limit the digits have one: 18 of them, or three more than the other limit has.

    Raises:
        MultiplesError: The multiples cannot be told by their digits and are too many to be written out.
    """
    low, high = bounds.integers()
    high = _reach(low) if high is None else high
    low = -_reach(-high) if low is None else low
    ways: list[Regex] = [text("0")] if low <= 0 <= high else []
    if high > 0:
        ways += _multiples(max(low, 1), high, multiple)
    if low < 0:
        ways += [Cat((_MINUS, way)) for way in _multiples(max(-high, 1), -low, multiple)]
    return Or(tuple(ways)) if ways else None


def number(bounds: Bounds) -> Regex | None:
    """The numbers of a range as decimals; None if it is empty. With an exponent only where there are no bounds."""
    if bounds == Bounds():
        exponent = Repeat(Cat((Chars(((0x45, 0x45), (0x65, 0x65))), _sign("+-"), Repeat(_DIGIT, 1, 2))), 0, 1)
        whole = Or((text("0"), Cat((_ONE_TO_NINE, Repeat(_DIGIT, 0, 17)))))
        fraction = Repeat(Cat((text("."), Repeat(_DIGIT, 1, _SURE_DIGITS))), 0, 1)
        return Cat((_sign("-"), whole, fraction, exponent))
    bounds, room = _decimals(bounds)
    ways = list(_positive(bounds.both(Bounds(low=Decimal(0))), room))
    below_zero = bounds.negated().both(Bounds(low=Decimal(0), low_open=True))
    ways += [Cat((_MINUS, way)) for way in _positive(below_zero, room)]
    return Or(tuple(ways)) if ways else None


def _sign(signs: str) -> Regex:
    return Repeat(Or(tuple(text(sign) for sign in signs)), 0, 1)


def _reach(bound: int | None) -> int:
    """A number of digits that is as good as no limit."""
    digits = len(str(bound)) if bound is not None and bound > 0 else 0
    return int(10 ** max(18, digits + 3)) - 1


def _decimals(bounds: Bounds) -> tuple[Bounds, int]:
    """Bounds that hold for what a decimal is read as, and how many decimals there may be."""
    finite = [b for b in (bounds.low, bounds.high) if b is not None]
    whole = max(len(str(abs(int(b)))) for b in finite)
    room = max(_SURE_DIGITS - whole, 0, *(_places(b) for b in finite))
    if whole + room > _SURE_DIGITS:
        # A decimal just inside an open bound could be read as the bound: take the next float for a closed one.
        low, high = bounds.low, bounds.high
        if low and bounds.low_open:
            bounds = Bounds(_next(low, math.inf), high, False, bounds.high_open)
        if high and bounds.high_open:
            bounds = Bounds(bounds.low, _next(high, -math.inf), bounds.low_open, False)
        room = max(room, *(_places(b) for b in (bounds.low, bounds.high) if b is not None))
    return bounds, room


def _places(value: Decimal) -> int:
    return len(_fraction(value))


def _next(value: Decimal, towards: float) -> Decimal:
    if value == int(value) and abs(int(value)) >= 2**53:
        return Decimal(
            int(value) + (1 if towards > 0 else -1)
        )  # only integers are written there, and they are read exactly
    return Decimal(repr(math.nextafter(float(value), towards)))


def _positive(bounds: Bounds, room: int) -> Iterator[Regex]:
    """Decimals >= 0 of a range whose low limit is set."""
    if bounds.empty:
        return
    low = bounds.low or Decimal(0)
    high = Decimal(_reach(int(low))) if bounds.high is None else bounds.high
    first, last = int(low), int(high)
    above, below = _fraction(low), _fraction(high)
    if first == last:
        yield from _with_fraction(text(str(first)), above, bounds.low_open, below, bounds.high_open, room)
        return
    yield from _with_fraction(text(str(first)), above, bounds.low_open, None, False, room)
    if last - first > 1:
        yield from _with_fraction(Or(tuple(_whole(first + 1, last - 1))), None, False, None, False, room)
    yield from _with_fraction(text(str(last)), None, False, below, bounds.high_open, room)


def _fraction(value: Decimal) -> str:
    """The digits after the point."""
    return f"{value:f}".partition(".")[2].rstrip("0")


def _with_fraction(
    whole: Regex, low: str | None, low_open: bool, high: str | None, high_open: bool, room: int
) -> Iterator[Regex]:
    for way in _fractions("", low, low_open, high, high_open, room):
        if way == Cat(()):
            yield whole
        elif isinstance(way, Repeat):  # any digits at all, also none
            more = Cat((text("."), Repeat(_DIGIT, 1, room)))
            yield Cat((whole, Repeat(more, 0, 1))) if room else whole
        else:
            yield Cat((whole, text("."), way))


def _fractions(
    done: str, low: str | None, low_open: bool, high: str | None, high_open: bool, room: int
) -> Iterator[Regex]:
    """Digits after the point, after those done, from `low` to `high`; None for no limit."""
    if low == "" and not low_open:
        low = None
    if low is None and high is None:
        yield Cat((text(done), Repeat(_DIGIT, 0, room))) if done else Repeat(_DIGIT, 0, room)
        return
    if low is None and (high or not high_open):
        yield text(done)
    if room == 0:
        return
    free = []
    least, most = int(low[:1] or 0) if low is not None else 0, int(high[:1] or 0) if high is not None else 9
    for digit in range(least, most + 1):
        after_low = low[1:] if low is not None and digit == least else None
        after_high = high[1:] if high is not None and digit == most else None
        if after_low is None and after_high is None:
            free.append(digit)
        else:
            yield from _fractions(f"{done}{digit}", after_low, low_open, after_high, high_open, room - 1)
    if free:
        yield Cat((text(done), Chars(((0x30 + free[0], 0x30 + free[-1]),)), Repeat(_DIGIT, 0, room - 1)))


def _whole(low: int, high: int) -> Iterator[Regex]:
    """Integers from `low` to `high`, both positive."""
    first, last = str(low), str(high)
    if len(first) == len(last):
        yield from _same_length(first, last)
        return
    yield from _same_length(first, "9" * len(first))
    if len(last) - len(first) > 1:
        yield Cat((_ONE_TO_NINE, Repeat(_DIGIT, len(first), len(last) - 2)))
    yield from _same_length("1" + "0" * (len(last) - 1), last)


def _same_length(low: str, high: str) -> Iterator[Regex]:
    """Integers of one length. Flat, since the regex parser of llguidance bounds how deep groups may nest."""
    n = len(low)
    if set(low[1:]) <= {"0"} and set(high[1:]) <= {"9"}:
        yield Cat((Chars(((ord(low[0]), ord(high[0])),)), Repeat(_DIGIT, n - 1, n - 1)))
        return
    shared = next((i for i in range(n) if low[i] != high[i]), n)
    if shared == n:
        yield text(low)
        return
    yield from _digits(low[:shared], int(low[shared]) + 1, int(high[shared]) - 1, n)
    for i in range(shared + 1, n):
        yield from _digits(low[:i], int(low[i]) + 1, 9, n)
        yield from _digits(high[:i], 0, int(high[i]) - 1, n)
    yield text(low)
    yield text(high)


def _digits(done: str, first: int, last: int, length: int) -> Iterator[Regex]:
    if first <= last:
        rest = length - len(done) - 1
        yield Cat((text(done), Chars(((0x30 + first, 0x30 + last),)), Repeat(_DIGIT, rest, rest)))


def _multiples(low: int, high: int, multiple: int) -> Iterator[Regex]:
    """Multiples from `low` to `high`, both positive."""
    first, last = -(-low // multiple), high // multiple
    if first > last:
        return
    if multiple == 1:
        yield from _whole(low, high)
    elif last - first < MAX_MULTIPLES:
        yield from (text(str(i * multiple)) for i in range(first, last + 1))
    elif 1000 % multiple == 0:
        # The last three digits tell. What is left of the range at both ends is written out.
        start, end = -(-max(low, 1000) // 1000), (high + 1) // 1000
        yield from _multiples(low, min(start * 1000 - 1, high), multiple)
        if start < end:
            endings = Or(tuple(text(f"{i:03}") for i in range(0, 1000, multiple)))
            yield Cat((Or(tuple(_whole(start, end - 1))), endings))
            yield from _multiples(end * 1000, high, multiple)
    else:
        raise MultiplesError(
            f"multipleOf {multiple} needs minimum and maximum with at most {MAX_MULTIPLES} multiples between them"
        )
