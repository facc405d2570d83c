"""The parts of a LLaVA that lie outside its checkpoint.

Knows where they are looked for. Does not know what is in them (`families`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Companions:
    """What the user named, a directory or a Hub name each; None for what the checkpoint itself names."""

    vision_tower: str | None = None
    """A CLIP or SigLIP checkpoint."""
    llm: str | None = None
    """The language model that an adapter belongs to."""


NO_COMPANIONS = Companions()
