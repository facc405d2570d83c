"""From a prompt to an answer on one context: what is reused of it, and what is evaluated.

Knows the language model, the tower and the order of steps. Runs in the thread that owns both (`worker`). Sampling is
`answer`'s. Knows no picture files and no chat format.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from local_llava.answer import Answer
from local_llava.chat import Slot
from local_llava.errors import PromptError
from local_llava.llm import LLM, N_BATCH
from local_llava.pictures.anyres import Arrangement
from local_llava.prompt import Prompt
from local_llava.schema.constraint import Constraint, Vocabulary
from local_llava.types import Chunk, Options, Timings
from local_llava.vision import VisionTower

KNOWN_BYTES = 128 << 20
"""Most bytes of embeddings that are kept in memory: 14 pictures of the 8B model, or two of LLaVA-NeXT's largest."""


class Shown(NamedTuple):
    """A whole picture in the context."""

    digest: bytes
    n_tokens: int


Unit: TypeAlias = "int | Shown"
"""What the context holds, piece by piece: a token, or a whole picture."""


@dataclass(frozen=True)
class Picture:
    """A picture, ready for the tower."""

    pixels: NDArray[np.float32]
    """float32 [n_tiles, 3, image_size, image_size]"""
    arrangement: Arrangement
    """Of the tiles' embeddings."""
    digest: bytes
    """Of both."""

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


@dataclass(frozen=True)
class Request:
    """What an answer is made from."""

    prompt: Prompt
    pictures: tuple[Picture, ...]
    options: Options
    schema: str | None
    """Canonical text of a JSON schema that the answer must follow."""
    prepared_s: float
    """Seconds that reading and preprocessing the pictures took."""

    def units(self) -> list[Unit]:
        """The prompt, piece by piece."""
        units: list[Unit] = []
        for part in self.prompt:
            if isinstance(part, Slot):
                units.append(self.pictures[part.image].shown)
            else:
                units += part
        return units

    @property
    def image_tokens(self) -> int:
        """Tokens of the prompt that pictures take."""
        return sum(picture.arrangement.n_tokens for picture in self.pictures)


@dataclass(frozen=True)
class Progress:
    """How much of a prompt is read."""

    done: int
    total: int


class Context:
    """Answers requests one after the other, and keeps of the context what the next prompt begins with."""

    def __init__(self, llm: LLM, tower: VisionTower) -> None:
        self._llm, self._tower = llm, tower
        self._held: list[Unit] = []
        self._known: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()
        self._vocabulary: Vocabulary | None = None

    def answer(self, request: Request, load_s: float) -> Iterator[Progress | Chunk]:
        """Evaluate a prompt and sample the answer.

        Yields:
            Progress while the prompt is read, then chunks; the last one carries the reply.

        Raises:
            PromptError: The prompt does not fit the context.
            UsageError: The schema does not fit max_tokens.
            EngineError: llama.cpp or ggml failed.
        """
        total = self._check_fits(request)
        constraint = self._constraint(request.schema)
        if constraint is not None:
            constraint.require(min(request.options.max_tokens, self._llm.n_ctx - total))
        started = time.perf_counter()
        embeddings, n_encoded = self._encode(request)
        encoded = time.perf_counter()
        reused = yield from self._prefill(request, embeddings, total)
        prefilled = time.perf_counter()
        answer = Answer(self._llm, request.options, constraint)
        yield from answer.sample(self._append)
        timings = Timings(
            load_s=load_s,
            image_s=request.prepared_s + encoded - started,
            prefill_s=prefilled - encoded,
            decode_s=time.perf_counter() - prefilled,
            prompt_tokens=total,
            image_tokens=request.image_tokens,
            reused_tokens=reused,
            images_encoded=n_encoded,
            completion_tokens=answer.n_sampled,
        )
        yield answer.last(timings)

    def logits(self, request: Request) -> NDArray[np.float32]:
        """Logits after a prompt: float32 [n_vocab]."""
        total = self._check_fits(request)
        embeddings, _ = self._encode(request)
        for _ in self._prefill(request, embeddings, total):
            pass
        logits: NDArray[np.float32] = self._llm.logits().copy()
        return logits

    def embeddings(self, pictures: Sequence[Picture]) -> dict[bytes, NDArray[np.float32]]:
        """Image embeddings by the picture's digest: float32 [n_tokens, n_embd]."""
        new = {p.digest: p for p in pictures if p.digest not in self._known}
        if new:
            features = self._tower.encode(np.concatenate([p.pixels for p in new.values()]))
            for picture in new.values():
                tiles, features = np.split(features, [len(picture.pixels)])
                self._known[picture.digest] = picture.arrangement.apply(tiles, self._tower.newline)
        for picture in pictures:
            self._known.move_to_end(picture.digest)
        found = {p.digest: self._known[p.digest] for p in pictures}
        excess = sum(known.nbytes for known in self._known.values()) - KNOWN_BYTES
        while excess > 0:
            excess -= self._known.popitem(last=False)[1].nbytes
        return found

    def _check_fits(self, request: Request) -> int:
        """Tokens of the prompt."""
        n_image = request.image_tokens
        total = n_image + sum(len(part) for part in request.prompt if not isinstance(part, Slot))
        if total >= self._llm.n_ctx:
            pictures = f", {n_image} of them for pictures" if n_image else ""
            one_tile = any(len(p.pixels) > 1 for p in request.pictures)
            raise PromptError(
                f"the prompt has {total} tokens{pictures}, the context {self._llm.n_ctx}: "
                "shorten the conversation, or raise n_ctx (--n-ctx)"
                + (", or show pictures with less detail (--preprocess pad)" if one_tile else "")
            )
        return total

    def _constraint(self, schema: str | None) -> Constraint | None:
        if schema is None:
            return None
        if self._vocabulary is None:
            self._vocabulary = self._llm.vocabulary()
        return Constraint(schema, self._vocabulary)

    def _encode(self, request: Request) -> tuple[dict[bytes, NDArray[np.float32]], int]:
        """Embeddings of the pictures that the context does not hold yet, and how many were not known."""
        units = request.units()
        kept = set(units[: self._common(units)])
        needed = [p for p in request.pictures if p.shown not in kept]
        n_new = len({p.digest for p in needed} - self._known.keys())
        return self.embeddings(needed), n_new

    def _common(self, units: Sequence[Unit]) -> int:
        """How many units of a prompt the context holds already. The last one is evaluated again, for its logits."""
        n = 0
        while n < min(len(self._held), len(units) - 1) and self._held[n] == units[n]:
            n += 1
        return n

    def _prefill(
        self, request: Request, embeddings: Mapping[bytes, NDArray[np.float32]], total: int
    ) -> Generator[Progress, None, int]:
        """Bring the context to a prompt; returns how many tokens of it were there."""
        units = request.units()
        n_kept = self._common(units)
        del self._held[n_kept:]
        if not self._llm.truncate(sum(unit.n_tokens if isinstance(unit, Shown) else 1 for unit in self._held)):
            self._held.clear()
            embeddings = self.embeddings(request.pictures)  # those that were held were not asked for
        reused = self._llm.n_past
        for piece in _pieces(units[len(self._held) :]):
            inputs = embeddings[piece[0].digest] if isinstance(piece[0], Shown) else cast("list[int]", piece)
            for start in range(0, len(inputs), N_BATCH):
                batch = inputs[start : start + N_BATCH]
                self._llm.decode(batch, last=self._llm.n_past + len(batch) == total)
                # Last of all, since the job may be cancelled here: what was evaluated of a picture is no picture yet.
                if start + len(batch) == len(inputs):
                    self._held += piece
                yield Progress(self._llm.n_past, total)
        return reused

    def _append(self, token: int) -> None:
        self._llm.decode([token], last=True)
        self._held.append(token)


def _pieces(units: Sequence[Unit]) -> Iterator[list[Unit]]:
    """Runs of tokens, and pictures one by one: llama.cpp's batches carry either tokens or embeddings."""
    run: list[Unit] = []
    for unit in units:
        if run and (isinstance(unit, Shown) or isinstance(run[-1], Shown)):
            yield run
            run = []
        run.append(unit)
    if run:
        yield run
