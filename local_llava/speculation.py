"""Guesses of an answer's next tokens, so that one pass over the weights can give several of them.

A guess costs a row of the batch, and is checked by sampling in turn, after each row, what would have been sampled
anyway: a wrong one costs time and changes nothing. Guesses come from three places:

- The prompt's text and the answer so far: where the last two or three tokens came before, what followed them there
  (prompt lookup: A. Saxena, https://github.com/apoorvumang/prompt-lookup-decoding, 2023). The longest match counts, of
  those the newest. Pictures match nothing.
- Earlier answers to the same schema, or those without one, looked up likewise: keys and phrases come again.
- The schema, where it leaves one text only (`Constraint.forced`).

When to guess. A token of a guess is right as often as such tokens were right lately, judged apart for each number of
tokens before it that agree with the place looked up, and for the schema's. That is learned from every token of an
answer, guessed in earnest or not, and kept for the next answer to the same schema. What a batch takes is measured by
its number of rows. With these two, as many tokens are guessed as make the time per token shortest, and none where that
saves less than `_MARGIN`. So what is always wrong is not guessed any more after a few times, nor is anything where rows
are dear, and guessing begins again by itself where a text gets predictable. What more rows take is found out by going
on to at most twice as many as were measured, and is forgotten if it was not measured for `_EXPIRES` batches: another
program may have slowed the machine then.

Knows tokens and seconds. Knows no text and no model.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from local_llava.request import Request, Unit

MAX_GUESSED = 16
"""Tokens that are guessed at a time, at most."""

_LENGTHS = (3, 2)
"""Tokens that must agree for a place to be found, best first."""

_MARGIN = 0.05
"""Part of the time per token that a guess must promise to save."""

_FIRST_ROW = 0.1
"""What a second row costs, in parts of the first, as long as it was never measured."""

_LEAST = 0.02
"""What a further row costs at least, in parts of the first."""

_AVERAGED = 8
"""Batches of a number of rows that are averaged, about."""

_EXPIRES = 128
"""Batches after which the cost of a number of rows is not known any more."""

_KEPT = 4096
"""Tokens of earlier answers that are kept for each schema, at most."""

_N_KINDS = 8
"""Schemas that earlier answers are kept for; the least recently used one goes first."""

_FORCED = 0
"""The rank of what a schema forces; that of other guesses is the number of tokens that agree before them."""

_MAX_RANK = 8

_END = -1
"""Behind each earlier answer. No token is negative."""

_FADES = 0.95
"""What an earlier outcome counts for when a new one comes."""


@dataclass(frozen=True)
class _Guess:
    """Tokens that may come, and how each of them ranks."""

    tokens: Sequence[int]
    ranks: Sequence[int]


class _Chances:
    """How often guesses of a rank were right lately. A new one is taken for right once in two times."""

    def __init__(self) -> None:
        self._right = [0.0] * (_MAX_RANK + 1)
        self._all = [0.0] * (_MAX_RANK + 1)

    def of(self, rank: int) -> float:
        return (self._right[rank] + 1) / (self._all[rank] + 2)

    def judge(self, guess: _Guess, came: Sequence[int]) -> None:
        """Learn from what came instead, up to the first difference."""
        for token, rank, right in zip(guess.tokens, guess.ranks, came, strict=False):
            self._right[rank] = _FADES * self._right[rank] + (token == right)
            self._all[rank] = _FADES * self._all[rank] + 1
            if token != right:
                return


@dataclass
class _Cost:
    """Seconds that a batch takes, the mean of the last ones."""

    seconds: float
    n: int
    """Batches that were measured."""
    last: int
    """The number of the last one of them among all batches."""


class _Costs:
    """Seconds that batches take, by their number of rows."""

    def __init__(self) -> None:
        self._measured: dict[int, _Cost] = {}
        self._n = 0

    def measure(self, n_rows: int, seconds: float) -> None:
        self._n += 1
        if n_rows > MAX_GUESSED + 1:
            return
        cost = self._measured.get(n_rows)
        if cost is None or self._expired(cost):
            cost = self._measured[n_rows] = _Cost(seconds, 0, 0)
        cost.n, cost.last = min(cost.n + 1, _AVERAGED), self._n
        # A pause of the whole machine would hide for long what a batch takes.
        cost.seconds += (min(seconds, 2 * cost.seconds) - cost.seconds) / cost.n

    def up_to(self, n_rows: int) -> list[float]:
        """The cost of 1, 2, ... rows, as far as it is known or worth a try."""
        if 1 not in self._measured:
            return []
        one = self._measured[1].seconds
        # By chance more rows may have taken less than one; they are never free.
        points = [(1, one)] + [
            (n, max(cost.seconds, one * (1 + _LEAST * (n - 1))))
            for n, cost in sorted(self._measured.items())
            if n > 1 and not self._expired(cost)
        ]
        # Beyond what was measured it is taken to go on as before.
        last, before = points[-1], points[-2] if len(points) > 1 else (0, one * (1 - _FIRST_ROW))
        slope = max(0.0, (last[1] - before[1]) / (last[0] - before[0]))
        points.append((2 * last[0], last[1] + slope * last[0]))
        costs = [one]
        for (n, seconds), (to, then) in itertools.pairwise(points):
            costs += [seconds + (then - seconds) * (i - n) / (to - n) for i in range(n + 1, to + 1)]
        return costs[:n_rows]

    def _expired(self, cost: _Cost) -> bool:
        return cost.last <= self._n - _EXPIRES


class _Index:
    """Tokens, and where each few of them came last. Takes about a microsecond a token."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: Iterable[int]) -> None:
        known, places = self.tokens, self._places
        for token in tokens:
            end = len(known)
            for n in _LENGTHS:
                if n <= end:
                    places[tuple(known[end - n :])] = end
            known.append(token)

    def find(self, context: Sequence[int]) -> tuple[int, int]:
        """Where the end of a context came last, and how many tokens agree there; 0 if too few."""
        for n in _LENGTHS:
            place = self._places.get(tuple(context[-n:]))
            if place is not None:
                known, most = self.tokens, min(place, len(context), _MAX_RANK)
                while n < most and known[place - n - 1] == context[-n - 1]:
                    n += 1
                return place, n
        return 0, 0

    def after(self, place: int, most: int) -> list[int]:
        """What followed a place, up to what is no token."""
        return list(itertools.takewhile(lambda token: token >= 0, self.tokens[place : place + most]))


class _Kind:
    """What is known of answers to the same schema."""

    def __init__(self) -> None:
        self.chances = _Chances()
        self.earlier = _Index()

    def remember(self, tokens: Sequence[int]) -> None:
        if len(self.earlier.tokens) + len(tokens) > _KEPT:
            kept, self.earlier = self.earlier.tokens, _Index()
            self.earlier.extend(kept[len(kept) // 2 :])
        self.earlier.extend(tokens[: _KEPT // 2])


class Guesser:
    """What is known of answers and of batches in general."""

    def __init__(self) -> None:
        self._costs = _Costs()
        self._kinds: OrderedDict[str | None, _Kind] = OrderedDict()

    def measure(self, n_rows: int, seconds: float) -> None:
        """Note how long a batch of answers' tokens took."""
        self._costs.measure(n_rows, seconds)

    def wanted(self, request: Request) -> bool:
        """Whether to guess, by `Options.speculate`."""
        wanted = request.options.speculate
        return request.constraint is not None if wanted is None else wanted

    def begin(self, prompt: Sequence[Unit], request: Request) -> Guesses:
        """Guesses for a new answer."""
        key = None if request.constraint is None else request.constraint.schema
        kind = self._kinds.setdefault(key, _Kind())
        self._kinds.move_to_end(key)
        if len(self._kinds) > _N_KINDS:
            self._kinds.popitem(last=False)
        return Guesses(prompt, request, kind, self._costs)


class Guesses:
    """Guesses for one answer."""

    def __init__(self, prompt: Sequence[Unit], request: Request, kind: _Kind, costs: _Costs) -> None:
        """Use `Guesser.begin`."""
        self._constraint, self._kind, self._costs = request.constraint, kind, costs
        self._index = _Index()
        # What is no token gets a number that comes nowhere else.
        self._index.extend(unit if isinstance(unit, int) else _END - 1 - i for i, unit in enumerate(prompt))
        self._n_prompt = len(prompt)
        self._last: list[_Guess] = []
        """What might have been guessed last, and is not judged yet."""
        self._n_then = 0
        """The answer's tokens at that time."""

    def next(self, answer: Sequence[int], most: int) -> list[int]:
        """Tokens that may come next, as many as are worth their rows.

        Args:
            answer: All its tokens so far; since the last call, at least one came.
            most: Tokens that may be guessed, at most.
        """
        self._learn(answer)
        most = min(most, MAX_GUESSED)
        self._last, self._n_then = self._candidates(most) if most > 0 else [], len(answer)
        costs = self._costs.up_to(most + 1) if any(guess.tokens for guess in self._last) else []
        if not costs:
            return []
        best, tokens = (1 - _MARGIN) * costs[0], list[int]()
        for guess in self._last:
            expected, chance = 1.0, 1.0
            for n, (rank, cost) in enumerate(zip(guess.ranks, costs[1:], strict=False), 1):
                chance *= self._kind.chances.of(rank)
                expected += chance
                if cost / expected < best:
                    best, tokens = cost / expected, list(guess.tokens[:n])
        return tokens

    def finish(self, answer: Sequence[int]) -> None:
        """Keep a complete answer for later ones."""
        self._learn(answer)
        before = self._index.tokens[max(0, self._n_prompt - _MAX_RANK) : self._n_prompt]
        while before and min(before) < 0:
            del before[0]
        # With the prompt's end, so that the answer's beginning is found.
        self._kind.remember([*before, *answer, _END])

    def _learn(self, answer: Sequence[int]) -> None:
        for guess in self._last:
            self._kind.chances.judge(guess, answer[self._n_then :])
        self._index.extend(answer[len(self._index.tokens) - self._n_prompt :])
        self._last = []

    def _candidates(self, most: int) -> list[_Guess]:
        tokens, n_agree = self._looked_up(most)
        guesses = [_Guess(tokens, [min(n_agree + i, _MAX_RANK) for i in range(len(tokens))])]
        if self._constraint is not None:
            forced = self._constraint.forced()[:most]
            guesses.append(_Guess(forced, [_FORCED] * len(forced)))
        return guesses

    def _looked_up(self, most: int) -> tuple[list[int], int]:
        """What followed where the most tokens agree, and how many do. The answer's own text goes first."""
        own, earlier = self._index, self._kind.earlier
        context = own.tokens[-_MAX_RANK:]
        (place, n), (other, n_other) = own.find(context), earlier.find(context)
        if n_other > n:
            return earlier.after(other, most), n_other
        tokens = own.after(place, most) if n else []
        if tokens and place + len(tokens) == len(own.tokens):
            # What repeats itself goes on so.
            tokens = list(itertools.islice(itertools.cycle(tokens), most))
        return tokens, n
