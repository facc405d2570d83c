"""How much goes into a batch: against a computer whose times are given."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from local_llava.pace import Pace, shares


def run(pace: Pace, n: int, seconds: Callable[[int], float], batches: int) -> list[int]:
    """Sizes of batches of n answers."""
    sizes = []
    for _ in range(batches):
        sizes.append(pace.together(n))
        pace.note_answers(sizes[-1], seconds(sizes[-1]))
    return sizes


@pytest.mark.parametrize("n", [5, 8, 33])
def test_answers_go_together_as_is_faster(n: int) -> None:
    for seconds, expected in ((lambda k: 0.1 + 0.001 * k, n), (lambda k: 0.05 * k + 0.001 * k * k, 4)):
        sizes = run(Pace(256, True), n, seconds, 1000)
        assert set(sizes) == {4, n}, "both are tried"
        assert sizes.count(expected) > 970, (seconds(4), seconds(n))


def test_it_notices_that_another_way_is_faster_now() -> None:
    pace = Pace(256, True)
    assert run(pace, 8, lambda k: 0.1 + 0.001 * k, 200)[-1] == 8
    assert run(pace, 8, lambda k: 0.05 * k * k, 200)[-1] == 4


def test_one_long_pause_is_forgotten() -> None:
    pace = Pace(256, True)
    run(pace, 8, lambda k: 0.1 + 0.001 * k, 100)
    pace.note_answers(8, 3600.0)
    assert run(pace, 8, lambda k: 0.1 + 0.001 * k, 200)[-10:] == [8] * 10


def test_a_gpu_has_all_in_one_batch() -> None:
    pace = Pace(256, False)
    assert run(pace, 20, lambda k: float(k * k), 100) == [20] * 100
    assert pace.share(20, 200)


def test_few_or_small_share_a_batch_on_a_cpu() -> None:
    pace = Pace(256, True)
    assert [pace.share(*n) for n in ((0, 256), (1, 255), (2, 61), (2, 62), (4, 252))] == [
        True,
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("row_s", [0.001, 0.0125, 0.1, 0.4, 3.0])
def test_prompts_are_as_long_as_answers_may_wait(row_s: float) -> None:
    pace = Pace(256, True)
    assert pace.room(1, 1, 0.0) <= 16, "until it is known how long rows take"
    pace.note(100, 100 * row_s)
    assert pace.room(0, 0, 0.0) == 256
    for n_together in (0, 1, 4):
        for seconds in (1.0, 0.5, -6.0):
            room = pace.room(n_together, 8, seconds)
            assert 1 <= room <= 256 - n_together
            # 16 rows take hardly longer than 13, 64 than 48 and a few answers.
            fitting = max(1.0, seconds / row_s)
            assert room <= max(fitting + 20 - n_together, fitting * 1.3), (room, fitting)
            assert room >= min(fitting - 16, 240)


@pytest.mark.parametrize(
    ("needs", "n_together", "rows"),
    [([12] * 8, 0, 48), ([12] * 8, 4, 44), ([12, 63], 1, 47), ([40], 0, 200), ([12, 64], 0, 200), ([12] * 8, 50, 200)],
)
def test_short_prompts_stay_out_of_one_tile(needs: list[int], n_together: int, rows: int) -> None:
    """On CPUs, 64 rows of many prompts pass over the cells of all of them."""
    assert Pace(256, True).side_by_side(needs, 200, n_together) == rows
    assert Pace(256, True).side_by_side(needs, 5, n_together) == 5
    assert Pace(256, False).side_by_side(needs, 200, n_together) == 200


@given(st.lists(st.integers(1, 700), max_size=20), st.integers(0, 300))
def test_shares(needs: list[int], room: int) -> None:
    given_rows = shares(needs, room)
    assert len(given_rows) == len(needs)
    assert all(0 <= n <= need for n, need in zip(given_rows, needs, strict=True))
    assert sum(given_rows) == min(room, sum(needs)), "all of the room is used"
    if needs and room:
        assert given_rows[0] >= min(needs[0], max(1, room // 2)), "the oldest has half of it"


def test_a_short_prompt_does_not_wait_for_long_ones() -> None:
    assert shares([600, 600, 20], 64) == [44, 0, 20]
    assert shares([600, 10, 600, 7], 64) == [47, 10, 0, 7]
