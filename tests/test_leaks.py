"""Memory does not grow with the number of questions and of loads: resident memory of a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from local_llava.types import ModelFiles

MARGIN = 6 << 20
"""Bytes by which a process may grow all the same: what its allocator keeps, caches of tokenizer and templates."""


def growth(files: ModelFiles, what: str, n: int, leak: str = "") -> int:
    script = Path(__file__).parent / "leaking.py"
    # glibc gives each thread an arena of its own, whose free parts do not go back.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, str(script), str(files.model), str(files.mmproj), what, str(n), leak]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_thousand_questions_about_a_hundred_pictures(tiny: ModelFiles) -> None:
    assert growth(tiny, "requests", 1000) < MARGIN


def test_fifty_loads(tiny: ModelFiles) -> None:
    assert growth(tiny, "loads", 50) < MARGIN


@pytest.mark.parametrize(
    ("what", "n", "leak"),
    [("requests", 400, "embeddings"), ("loads", 4, "context"), ("loads", 10, "tower")],
)
def test_a_leak_would_be_seen(tiny: ModelFiles, what: str, n: int, leak: str) -> None:
    """The same programs, where something is kept on purpose, and fewer rounds are enough."""
    assert growth(tiny, what, n, leak) > MARGIN
