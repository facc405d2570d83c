"""What an answer is made from, before and while it waits: the prompt's pieces, pictures, options.

Knows no model and no thread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from local_llava.chat import Slot
from local_llava.errors import UsageError
from local_llava.pictures.anyres import Arrangement
from local_llava.prompt import Prompt
from local_llava.schema.constraint import Constraint
from local_llava.types import Options


class Shown(NamedTuple):
    """A whole picture in the context."""

    digest: bytes
    n_tokens: int


Unit: TypeAlias = "int | Shown"
"""What a sequence holds, piece by piece: a token, or a whole picture."""


def n_tokens(units: Sequence[Unit]) -> int:
    """Tokens that pieces take."""
    return sum(unit.n_tokens if isinstance(unit, Shown) else 1 for unit in units)


@dataclass(frozen=True)
class Picture:
    """A picture, ready for the tower."""

    pixels: NDArray[np.float32]
    """float32 [n_tiles, 3, image_size, image_size]"""
    arrangement: Arrangement
    """Of the tiles' embeddings."""
    digest: bytes
    """Of both, and of `given`."""
    given: NDArray[np.float32] | None = None
    """Embeddings in the place of the tower's: float32 [n_tokens, n_embd]."""

    @classmethod
    def of(cls, pixels: NDArray[np.float32], arrangement: Arrangement) -> Picture:
        """Computes the digest. Pictures of two sizes may have the same pixels, but show other parts of them."""
        digest = hashlib.blake2b(repr(arrangement).encode(), digest_size=16)
        digest.update(np.ascontiguousarray(pixels).data)
        return cls(pixels, arrangement, digest.digest())

    @property
    def shown(self) -> Shown:
        """What the context holds of it."""
        return Shown(self.digest, self.arrangement.n_tokens)


@dataclass(frozen=True, eq=False)
class Request:
    """An answer to be given."""

    units: Sequence[Unit]
    """The prompt, piece by piece."""
    pictures: tuple[Picture, ...]
    """Those that it shows, in order."""
    options: Options
    constraint: Constraint | None
    """Of the schema that the answer must follow."""
    prepared_s: float
    """Seconds that reading and preprocessing the pictures took."""
    asked_at: float
    """When it was ready to be handed over, by `time.perf_counter`."""
    dropped: int = 0
    """Messages that were left out."""
    given: Sequence[Unit] | None = None
    """Tokens of an answer that is known: the logits after the prompt, and after each of these, are wanted, and no other
    answer. None where one is to be given."""

    @property
    def image_tokens(self) -> int:
        """Tokens of the prompt that pictures take."""
        return sum(picture.arrangement.n_tokens for picture in self.pictures)


@dataclass(frozen=True)
class Progress:
    """How much of a prompt is read."""

    done: int
    total: int


def units_of(tokens: Sequence[int | None], pictures: Sequence[Picture], n_vocab: int) -> list[Unit]:
    """A prompt that is given as tokens, piece by piece.

    Args:
        tokens: None for each token of a picture.
        pictures: Those that it shows, in order.
        n_vocab: Tokens that there are.

    Raises:
        UsageError: The places are not those of the pictures, or a token is none.
    """
    n_places, n_needed = sum(token is None for token in tokens), sum(p.arrangement.n_tokens for p in pictures)
    if n_places != n_needed:
        raise UsageError(f"the prompt has {n_places} places for tokens of pictures, and the pictures take {n_needed}")
    units: list[Unit] = []
    left, i = list(pictures), 0
    while i < len(tokens):
        token = tokens[i]
        if token is not None:
            if not 0 <= token < n_vocab:
                raise UsageError(f"a token must be 0 to {n_vocab - 1}, not {token}")
            units.append(token)
            i += 1
            continue
        shown = left.pop(0).shown
        if any(place is not None for place in tokens[i : i + shown.n_tokens]):
            raise UsageError(f"a picture takes {shown.n_tokens} tokens, for which the prompt has no place side by side")
        units.append(shown)
        i += shown.n_tokens
    return units


def as_units(prompt: Prompt, pictures: Sequence[Picture]) -> list[Unit]:
    """A prompt, piece by piece."""
    units: list[Unit] = []
    for part in prompt:
        if isinstance(part, Slot):
            units.append(pictures[part.image].shown)
        else:
            units += part
    return units
