"""A short run of fuzz_server.py, with a seed of its own each time."""

from __future__ import annotations

import random
from collections.abc import Iterator

import fuzz_server
import pytest

SECONDS = 1.0
"""For each kind of nonsense."""


@pytest.fixture(scope="module")
def server() -> Iterator[fuzz_server.Client]:
    with fuzz_server.checking_server() as client:
        yield client


@pytest.mark.parametrize("kind", [kind for kind in fuzz_server.KINDS if kind != "bulk"])
def test_nonsense_is_refused(server: fuzz_server.Client, kind: str) -> None:
    seed = random.randrange(1_000_000)
    n, finding = fuzz_server.fuzz(server, kind, SECONDS, seed)
    assert finding is None, f"python tests/fuzz_server.py --seed {seed} --only {kind}\n{finding}"
    assert n > 0


def test_what_costs_more_than_its_length(server: fuzz_server.Client) -> None:
    assert fuzz_server.bulk(server, 0, 0, size=20_000) > 30


def test_nothing_is_left(server: fuzz_server.Client) -> None:
    fuzz_server.fuzz(server, "requests", 0.5, 1)
    before = fuzz_server.Taken(server)
    for seed in range(3):
        assert fuzz_server.fuzz(server, "requests", 0.7, seed)[1] is None
    assert fuzz_server.Taken(server).since(before) == []
    # Some of it was right.
    assert server.statuses[200] > 20 and server.statuses[400] > 20
