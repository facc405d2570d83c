"""What the KV cache holds, sequence by sequence, against a model of llama.cpp's unified cache and against llama.cpp."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as c
import numpy as np
import pytest
from gguf_bytes import TinyLLM
from hypothesis import HealthCheck, settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from numpy.typing import NDArray

from local_llava.llm import LLM
from local_llava.llm.rows import Rows
from local_llava.request import Shown, Unit, n_tokens
from local_llava.sequences import Sequence, Sequences

N_CELLS, N_SEQ_MAX, PARALLEL = 40, 6, 3

PICTURES = [Shown(b"a", 5), Shown(b"b", 3), Shown(b"a2", 5)]
# Few different pieces, so that prompts begin alike.
UNITS: list[Unit] = [1, 2, *PICTURES]
PROMPTS = strategies.lists(strategies.sampled_from(UNITS), min_size=1, max_size=8).filter(
    lambda units: n_tokens(units) <= 24
)
RARELY_SO_LARGE = strategies.integers(0, 15) | strategies.just(N_CELLS)

Token = tuple[Unit, int]
"""What a cell holds: a piece, and which of its tokens."""


def tokens(units: list[Unit]) -> list[Token]:
    return [(unit, i) for unit in units for i in range(n_tokens([unit]))]


class Cells:
    """llama.cpp's unified KV cache: cells, each of which holds one token at one position for one or more sequences."""

    def __init__(self, n_cells: int = N_CELLS, n_seq_max: int = N_SEQ_MAX) -> None:
        self.n_cells, self.n_seq_max = n_cells, n_seq_max
        self.cells: list[tuple[int, Token, set[int]] | None] = [None] * n_cells
        self.cuttable = True

    @property
    def n_used(self) -> int:
        return sum(cell is not None for cell in self.cells)

    def held(self, sequence: int) -> list[Token]:
        mine = [cell for cell in self.cells if cell is not None and sequence in cell[2]]
        mine.sort(key=lambda cell: cell[0])
        assert [cell[0] for cell in mine] == list(range(len(mine))), "positions without gaps"
        return [cell[1] for cell in mine]

    def keep(self, sequence: int, n: int) -> bool:
        n = n if self.cuttable else 0
        for i, cell in enumerate(self.cells):
            if cell is not None and sequence in cell[2] and cell[0] >= n:
                cell[2].remove(sequence)
                if not cell[2]:
                    self.cells[i] = None
        return self.cuttable

    def copy(self, source: int, target: int, n: int) -> None:
        assert source != target and not self.held(target) and len(self.held(source)) >= n
        for cell in self.cells:
            if cell is not None and source in cell[2] and cell[0] < n:
                cell[2].add(target)

    def restore(self, sequence: int, state: Any, n: int) -> bool:
        assert not self.held(sequence)
        if state is None:
            return False
        assert len(state) == n
        self.evaluate(sequence, state)
        return True

    def save(self, sequence: int) -> Any:
        return self.held(sequence)

    def evaluate(self, sequence: int, what: list[Token]) -> None:
        """What `llama_decode` does: it takes any free cells, and fails if there are too few."""
        assert self.n_used + len(what) <= self.n_cells, "no room, though it was promised"
        free = (i for i, cell in enumerate(self.cells) if cell is None)
        start = len(self.held(sequence))
        for i, token in enumerate(what):
            self.cells[next(free)] = (start + i, token, {sequence})

    def check(self, sequence: Sequence) -> None:
        pass


class LlamaCells(Cells):
    """The same, while llama.cpp does it, too: `check` compares what it computes from a sequence with a fresh one."""

    def __init__(self, llm: LLM) -> None:
        super().__init__()
        # One more for fresh sequences, for which there must be room, too.
        assert llm.n_cells >= 2 * N_CELLS and llm.n_seq_max > N_SEQ_MAX
        self.llm = llm
        for sequence in range(llm.n_seq_max):
            llm.keep(sequence, 0)

    def keep(self, sequence: int, n: int) -> bool:
        super().keep(sequence, n)
        return self.llm.keep(sequence, n)

    def copy(self, source: int, target: int, n: int) -> None:
        super().copy(source, target, n)
        self.llm.copy(source, target, n)

    def restore(self, sequence: int, state: Any, n: int) -> bool:
        if state is None:
            return self.llm.restore(sequence, np.zeros(100, np.uint8), n)
        held, data = state
        super().restore(sequence, held, n)
        return self.llm.restore(sequence, data, n)

    def save(self, sequence: int) -> Any:
        return super().save(sequence), self.llm.save(sequence)

    def evaluate(self, sequence: int, what: list[Token]) -> None:
        start = len(self.held(sequence))
        super().evaluate(sequence, what)
        if what:
            self._decode(sequence, start, what)

    def check(self, sequence: Sequence) -> None:
        held = self.held(sequence.id)
        assert c.llama_memory_seq_pos_max(self.llm._memory, sequence.id) == len(held) - 1
        if not held:
            return
        # What comes after the last token depends on all that is there before it.
        self.llm.keep(sequence.id, len(held) - 1)
        ours = self._decode(sequence.id, len(held) - 1, held[-1:])
        fresh = self._decode(N_SEQ_MAX, 0, held)
        self.llm.keep(N_SEQ_MAX, 0)
        # A cell that is shared is not recomputed for all who have it.
        np.testing.assert_allclose(ours, fresh, atol=2e-5)

    def _decode(self, sequence: int, start: int, what: list[Token]) -> NDArray[np.float32]:
        rows = Rows()
        for i, (unit, part) in enumerate(what):
            if isinstance(unit, Shown):
                seed = [*unit.digest, part]
                inputs: Any = np.random.default_rng(seed).normal(0, 0.05, (1, 64)).astype(np.float32)
            else:
                inputs = [unit]
            row = rows.add(sequence, start + i, inputs, "last" if i == len(what) - 1 else "")
        self.llm.decode(rows)
        return self.llm.logits(row).copy()


@dataclass(eq=False)
class Asked:
    """A request on its way, as `Run` goes about it."""

    sequence: Sequence
    units: list[Unit]
    n_new: int
    partial: int = 0
    answer: list[Unit] = field(default_factory=list)

    @property
    def whole(self) -> list[Unit]:
        return [*self.units, *self.answer]

    @property
    def reading(self) -> bool:
        return len(self.sequence.units) < len(self.units)


class Machine(RuleBasedStateMachine):
    """Requests come, are read, answered, cancelled, as chance will have it."""

    make_cells: Callable[[], Cells] = Cells
    check_share = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.cells = type(self).make_cells()
        self.sequences = Sequences(self.cells)
        self.live: list[Asked] = []
        self.used: dict[int, int] = {}
        self.clock = itertools.count()
        self.saved: list[tuple[list[Unit], Any]] = []
        self.chance = np.random.default_rng(0)

    def pick(self, data: Any, among: list[Any]) -> Any:
        return data.draw(strategies.sampled_from(among))

    @rule(units=PROMPTS, n_new=RARELY_SO_LARGE)
    def begin(self, units: list[Unit], n_new: int) -> None:
        if len(self.live) == PARALLEL:
            return
        need = min(n_tokens(units) + n_new, N_CELLS)
        n_new = need - n_tokens(units)
        best = self.longest(units)
        n_free, n_ids = self.sequences.n_free, N_SEQ_MAX - len(self.sequences._all)
        before = {s: list(s.units) for s in self.sequences._all}
        sequence = self.sequences.begin(units, n_new)
        if sequence is None:
            assert self.live, "alone, it has all the cells"
            assert {s: list(s.units) for s in self.sequences._all if s.live} == {
                s: u for s, u in before.items() if s.live
            }
            return
        assert all(sequence is not asked.sequence for asked in self.live)
        assert sequence.live and sequence.units == units[: len(sequence.units)] and len(sequence.units) < len(units)
        assert sequence.reserved == need - sequence.n_past
        assert len(sequence.units) <= best
        if n_free >= need and n_ids:
            assert len(sequence.units) == best, "there was room for it beside everything"
        self.live.append(Asked(sequence, units, n_new))

    @precondition(lambda self: any(a.reading for a in self.live))
    @rule(data=strategies.data(), n=strategies.integers(1, 7), fails=strategies.integers(0, 9))
    def read(self, data: Any, n: int, fails: int) -> None:
        """The next tokens of the prompt, which may end inside a picture; now and then the batch fails."""
        asked = self.pick(data, [a for a in self.live if a.reading])
        sequence = asked.sequence
        todo = tokens(asked.units)[sequence.n_past :][:n]
        self.cells.evaluate(sequence.id, todo)
        if fails == 0:
            self.sequences.cut(sequence, len(sequence.units))
            asked.partial = 0
            return
        self.sequences.add(sequence, len(todo))
        while asked.reading and n_tokens(asked.units[: len(sequence.units) + 1]) <= sequence.n_past:
            sequence.units.append(asked.units[len(sequence.units)])
        asked.partial = sequence.n_past - n_tokens(sequence.units)

    @precondition(lambda self: any(not a.reading and len(a.answer) < a.n_new for a in self.live))
    @rule(data=strategies.data(), n=strategies.integers(1, 4), right=strategies.integers(0, 3))
    def answer(self, data: Any, n: int, right: int) -> None:
        """Tokens of the answer, some of them wrong guesses, which are forgotten."""
        asked = self.pick(data, [a for a in self.live if not a.reading and len(a.answer) < a.n_new])
        n = min(n, asked.n_new - len(asked.answer))
        new: list[Unit] = [data.draw(strategies.sampled_from([1, 2])) for _ in range(n)]
        self.cells.evaluate(asked.sequence.id, tokens(new))
        self.sequences.add(asked.sequence, n)
        kept = new[: max(1, right)]
        asked.answer += kept
        asked.sequence.units += kept
        if len(kept) < n:
            self.sequences.cut(asked.sequence, len(asked.sequence.units))

    @precondition(lambda self: self.live)
    @rule(data=strategies.data(), right=strategies.booleans())
    def end(self, data: Any, right: bool) -> None:
        """It is answered or cancelled, and retired; or it failed, and is discarded."""
        asked = self.pick(data, self.live)
        self.live.remove(asked)
        units = list(asked.sequence.units)
        if right:
            self.sequences.retire(asked.sequence)
            if units:
                assert any(s.units[: len(units)] == units for s in self.sequences.retired), "kept, or in a longer one"
        else:
            self.sequences.discard(asked.sequence)

    @precondition(lambda self: any(a.partial == 0 and a.reading for a in self.live))
    @rule(data=strategies.data())
    def rejoin(self, data: Any) -> None:
        asked = self.pick(data, [a for a in self.live if a.partial == 0 and a.reading])
        sequence, before, best = asked.sequence, len(asked.sequence.units), self.longest(asked.units)
        assert self.sequences.rejoin(sequence, asked.units) == (best > before)
        assert sequence.units == asked.units[: max(before, best)]

    @precondition(lambda self: self.live)
    @rule(data=strategies.data())
    def save(self, data: Any) -> None:
        """What the image cache does: share the beginning, save that, let go of it."""
        asked = self.pick(data, self.live)
        n = sum(isinstance(unit, Shown) for unit in asked.sequence.units[:-1]) + 1
        n = min(n, len(asked.sequence.units))
        if n:
            part = self.sequences.scratch(asked.sequence, n)
            if part is not None:
                self.saved = [*self.saved[-3:], (asked.whole[:n], self.cells.save(part.id))]
                self.sequences.discard(part)

    @precondition(lambda self: self.saved and any(a.partial == 0 and a.reading for a in self.live))
    @rule(data=strategies.data(), refused=strategies.integers(0, 3))
    def restore(self, data: Any, refused: int) -> None:
        asked = self.pick(data, [a for a in self.live if a.partial == 0 and a.reading])
        units, state = self.pick(data, self.saved)
        if len(units) >= len(asked.units) or asked.units[: len(units)] != units:
            return
        if self.sequences.restore(asked.sequence, units, None if refused == 0 else state):
            assert refused and asked.sequence.units == units
        else:
            assert not asked.sequence.units
            self.sequences.rejoin(asked.sequence, asked.units)

    def longest(self, units: list[Unit]) -> int:
        """By trying everything."""
        return max(
            (
                n
                for s in self.sequences._all
                for n in range(len(units))
                if n <= len(s.units) and s.units[:n] == units[:n]
            ),
            default=0,
        )

    @invariant()
    def mirrors_the_cells(self) -> None:
        everything = self.sequences._all
        reserved = sum(s.reserved for s in everything)
        assert self.sequences.n_free == N_CELLS - self.cells.n_used - reserved >= 0
        assert len({s.id for s in everything}) == len(everything) <= N_SEQ_MAX
        for s in everything:
            held = self.cells.held(s.id)
            assert s.n_past == len(held)
            assert tokens(s.units) == held[: n_tokens(s.units)]
        for number in set(range(N_SEQ_MAX)) - {s.id for s in everything}:
            assert not self.cells.held(number), "cells that nobody has would never be free again"

    @invariant()
    def keeps_its_promises(self) -> None:
        assert [s for s in self.sequences._all if s.live] == [
            s for s in self.sequences._all if any(s is a.sequence for a in self.live)
        ]
        for asked in self.live:
            left = n_tokens(asked.units) + asked.n_new - asked.sequence.n_past
            assert asked.sequence.reserved == left >= 0
            assert asked.sequence.units == asked.whole[: len(asked.sequence.units)]
            assert asked.sequence.n_past - n_tokens(asked.sequence.units) == asked.partial

    @invariant()
    def retires_in_order_and_nothing_twice(self) -> None:
        retired = self.sequences.retired
        assert all(not s.live and s.reserved == 0 and s.n_past == n_tokens(s.units) for s in retired)
        assert [s.last_used for s in retired] == sorted({s.last_used for s in retired})
        for one, other in itertools.permutations(retired, 2):
            assert one.units != other.units[: len(one.units)], "it serves nobody whom the other does not serve"

    @invariant()
    def computes_what_it_holds(self) -> None:
        if self.sequences._all and self.chance.random() < self.check_share:
            self.cells.check(self.sequences._all[self.chance.integers(len(self.sequences._all))])


def test_any_order_of_events() -> None:
    run_state_machine_as_test(Machine, settings=settings(max_examples=100, stateful_step_count=50, deadline=None))


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path: Path = tmp_path_factory.mktemp("llm") / "tiny.gguf"
    path.write_bytes(TinyLLM().bytes)
    llm = LLM.load(path, n_cells=256, n_seq_max=N_SEQ_MAX + 1, kv_type="F32", n_threads=1)
    yield llm
    llm.close()


def test_any_order_of_events_in_llama_cpp(llm: LLM) -> None:
    class LlamaMachine(Machine):
        make_cells = staticmethod(lambda: LlamaCells(llm))  # type: ignore[assignment]
        check_share = 0.5

    run_state_machine_as_test(
        LlamaMachine,
        settings=settings(
            max_examples=20, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )


# --- one by one ---


class Case:
    """Sequences with a cache that requests can be read into at once."""

    def __init__(self, n_cells: int = N_CELLS, n_seq_max: int = N_SEQ_MAX) -> None:
        self.cells = Cells(n_cells, n_seq_max)
        self.sequences = Sequences(self.cells)

    def ask(self, units: list[Unit], n_new: int = 0) -> Sequence:
        sequence = self.sequences.begin(units, n_new)
        assert sequence is not None
        rest = units[len(sequence.units) :]
        self.cells.evaluate(sequence.id, tokens(rest))
        self.sequences.add(sequence, n_tokens(rest))
        sequence.units += rest
        return sequence

    def retire(self, units: list[Unit], n_new: int = 0) -> Sequence:
        sequence = self.ask(units, n_new)
        self.sequences.retire(sequence)
        return sequence


A, B, A2 = PICTURES


def test_the_least_recently_used_goes_first() -> None:
    case = Case(n_cells=13)
    for token in (1, 2, 3):
        case.retire([token, token, token, token])
    case.retire([1, 1, 1, 1])  # used again
    assert [s.units[0] for s in case.sequences.retired] == [2, 3, 1]
    case.ask([4, 4, 4])
    assert [s.units[0] for s in case.sequences.retired] == [3, 1], "one was enough"
    case.ask([5] * 9)
    assert case.sequences.retired == []


def test_numbers_run_out_before_cells() -> None:
    case = Case(n_cells=100, n_seq_max=3)
    for token in (1, 2, 3, 4):
        case.retire([token, token])
    assert [s.units[0] for s in case.sequences.retired] == [2, 3, 4]


def test_a_running_sequence_is_a_source() -> None:
    case = Case()
    running = case.ask([1, A, 2], n_new=3)
    used = case.cells.n_used
    other = case.sequences.begin([1, A, 3], 3)
    assert other is not None and other.units == [1, A]
    assert case.cells.n_used == used, "nothing is copied"
    case.sequences.retire(running)
    assert case.cells.held(other.id) == tokens([1, A])
    assert other.reserved == 4


def test_what_goes_on_is_continued_and_what_branches_off_is_kept() -> None:
    case = Case()
    first = case.retire([1, A, 2, 1, 1])
    branch = case.sequences.begin([1, A, 1, 2], 0)
    assert branch is not None and branch is not first and branch.units == [1, A]
    assert case.sequences.retired == [first]
    longer = case.sequences.begin([1, A, 2, 1, 1, 2, 2], 0)
    assert longer is first and longer.units == [1, A, 2, 1, 1]


def test_where_there_is_no_room_beside_it_the_source_is_cut() -> None:
    case = Case(n_cells=12)
    first = case.retire([1, A, 2, 2, 2, 2])
    cut = case.sequences.begin([1, A, 1, 1, 1], 3)
    assert cut is first and cut.units == [1, A] and case.cells.n_used == 6
    assert cut.reserved == 6 and case.sequences.n_free == 0


def test_what_a_running_one_shares_is_not_freed_by_a_cut() -> None:
    case = Case(n_cells=12)
    case.retire([1, A, 2, 2, 2, 2])
    running = case.sequences.begin([1, A, 2, 2, 2, 1], 0)
    assert running is not None and running.n_past == 9 and case.sequences.n_free == 1
    # Three cells more than what there is of it: one is free, one would be, and the others are the running one's.
    assert case.sequences.begin([1, A, 1, 1, 1], 0) is None and case.sequences.n_free >= 0
    assert case.sequences.begin([1, A, 1, 1], 0) is not None and case.sequences.n_free == 0


def test_no_room_is_taken_from_what_runs() -> None:
    case = Case(n_cells=12)
    running = case.ask([1, 1], n_new=6)
    retired = case.retire([2, 2])
    assert case.sequences.begin([3, 3, 3], 2) is None, "8 are promised, so 4 are left"
    assert case.sequences.retired == [retired], "nothing is dropped in vain"
    assert case.sequences.begin([3, 3, 3], 1) is not None
    assert case.sequences.retired == [] and running.reserved == 6


def test_another_picture_is_another_piece() -> None:
    case = Case()
    case.retire([1, A, 2])
    other = case.sequences.begin([1, A2, 2], 0)
    assert other is not None and other.units == [1]


def test_the_last_piece_is_always_evaluated() -> None:
    case = Case()
    case.retire([1, 2, 1])
    again = case.sequences.begin([1, 2, 1], 0)
    assert again is not None and again.units == [1, 2]
    case.sequences.retire(again)
    picture = case.sequences.begin([1, 2, A], 0)
    assert picture is not None
    case.sequences.discard(picture)
    assert case.sequences.begin([1], 0).units == []  # type: ignore[union-attr]


def test_half_a_picture_is_no_piece() -> None:
    case = Case()
    sequence = case.sequences.begin([1, A, 2], 0)
    assert sequence is not None
    case.cells.evaluate(sequence.id, tokens([1, A])[:4])
    case.sequences.add(sequence, 4)
    sequence.units.append(1)
    other = case.sequences.begin([1, A, 2], 0)
    assert other is not None and other.units == [1] and case.cells.held(other.id) == [(1, 0)]
    case.sequences.retire(sequence)
    assert case.cells.n_used == 1


def test_a_restored_state_does_not_take_what_others_are_promised() -> None:
    case = Case(n_cells=16)
    running = case.ask([1, A], n_new=3)
    saved = tokens([1, A, B])
    # It shares six cells with the running one; of its own, there is no room for them.
    sequence = case.sequences.begin([1, A, B, 2], 0)
    assert sequence is not None and sequence.n_past == 6
    assert not case.sequences.restore(sequence, [1, A, B], saved)
    assert case.sequences.rejoin(sequence, [1, A, B, 2]) and sequence.units == [1, A]
    assert case.sequences.n_free >= 0
    case.cells.evaluate(running.id, tokens([1, 1, 1]))
    case.cells.evaluate(sequence.id, tokens([B, 2]))


def test_where_nothing_can_be_cut_all_is_forgotten() -> None:
    """llama.cpp may refuse to forget a part, though not with the kinds of model that are supported."""
    case = Case()
    case.retire([1, A, 2, 2, 2, 2])
    case.cells.cuttable = False
    sequence = case.sequences.begin([1, A, 1, 1, 1], N_CELLS - 9)
    assert sequence is not None and case.cells.held(sequence.id) == tokens(sequence.units)
    assert sequence.n_past + sequence.reserved == N_CELLS and case.sequences.n_free == 0
