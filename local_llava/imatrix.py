"""Importance matrices: which columns of a language model's matrices pictures and questions excite, and how much.

Knows what is read by the model, and what is summed up of it: for each column of a matrix the squares of what it is
multiplied with, as llama.cpp's llama-imatrix does, in whose GGUF form it is saved. That tool reads texts; here the
model also reads pictures, as embeddings of its own tower, in its own chat format, and writes greedy answers, which are
summed up too: answers are what it is for. Who quantizes with it is `convert`, where `convert.imatrix` reads the file.

A picture is read once for all questions about it, as it is in a conversation. The output matrix and the embeddings are
left out, as llama-imatrix does unless it is told otherwise: they get more bits than the rest.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from local_llava import hub, prompt
from local_llava.convert.imatrix import CHUNK_COUNT, CHUNK_SIZE, COUNTS, DATASETS, SUMS
from local_llava.convert.plan import Field, GGUFPlan, TensorPlan
from local_llava.convert.write import write
from local_llava.embeddings import Embeddings
from local_llava.errors import EngineError, PromptError, UsageError
from local_llava.images import ImageLike, load_image, preprocess_tiles, with_mode
from local_llava.llm import InterruptedDecodeError, Rows
from local_llava.loading import Loaded, load
from local_llava.request import Picture, Shown, Unit, as_units, n_tokens
from local_llava.types import Message, Options
from local_llava.worker import Ticket, Worker

CHUNK = 512
"""Tokens of a piece of text that is read by itself: llama-imatrix's default."""

QUESTIONS = (
    "Describe the picture in detail.",
    "What is the most important thing in the picture, and where is it?",
    "What text, numbers or signs can be seen? If there are none, how many things are there, and of which colours?",
)
"""What is asked about each picture unless other questions are given."""


_TOWER_S = 0.5
"""Seconds that the tower computes before somebody who wants to stop is heard."""


@dataclass(frozen=True)
class Progress:
    """How far the collecting is."""

    done: int
    """Questions and pieces of text that were read."""
    total: int
    rows: int
    """Tokens, pictures' included."""


@dataclass(frozen=True)
class Imatrix:
    """What was collected."""

    sums: Mapping[str, NDArray[np.float32]]
    """By tensor name: squares of what each column is multiplied with, float32 [n_columns]."""
    counts: Mapping[str, int]
    """Rows that they are sums of."""
    datasets: tuple[str, ...] = ()
    """What was read."""

    @property
    def n_chunks(self) -> int:
        """Pieces of `CHUNK` tokens that as much would be; what llama.cpp reckons with."""
        return max(self.counts.values()) // CHUNK or 1

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write a GGUF as llama-imatrix does. It appears when it is complete.

        Raises:
            OutputError: The file exists or cannot be written.
        """
        number = GGUFValueType.UINT32
        fields = (
            Field("general.type", "imatrix", GGUFValueType.STRING),
            Field(DATASETS, list(self.datasets), GGUFValueType.ARRAY, GGUFValueType.STRING),
            Field(CHUNK_COUNT, self.n_chunks, number),
            Field(CHUNK_SIZE, CHUNK, number),
        )
        tensors = [
            _tensor(name + suffix, values)
            for name in sorted(self.sums)
            for suffix, values in ((SUMS, self.sums[name]), (COUNTS, np.array([self.counts[name]], np.float32)))
        ]
        write(GGUFPlan(fields, tuple(tensors)), Path(path), threads=1, overwrite=overwrite)


def _about(question: tuple[ImageLike, str]) -> object:
    """What tells one picture from the next."""
    source = question[0]
    return source if isinstance(source, (str, os.PathLike)) else id(source)


def _tensor(name: str, values: NDArray[np.float32]) -> TensorPlan:
    rows = values.reshape(1, -1)
    return TensorPlan(name, values.shape, GGMLQuantizationType.F32, lambda start, stop: rows[start:stop], "the sums")


def collect(
    model: str | os.PathLike[str] | None = None,
    mmproj: str | os.PathLike[str] | None = None,
    *,
    questions: Iterable[tuple[ImageLike, str]] = (),
    texts: Iterable[str] = (),
    max_tokens: int = 64,
    max_chunks: int | None = None,
    datasets: Sequence[str] = (),
    on_progress: Callable[[Progress], None] | None = None,
    **options: Any,
) -> Imatrix:
    """Let a model read pictures, questions and texts, and sum up what goes through its matrices.

    Args:
        model: As of `Llava.load`; better not a quantized one.
        mmproj: As of `Llava.load`.
        questions: Pictures, each with a question; those about the same picture follow each other.
        texts: Read without a chat format, in pieces of `CHUNK` tokens, each with the token that begins a text in the
            place of its first one, as llama-imatrix does. The rest of a text is not read, unless it is all of it.
        max_tokens: Of a greedy answer to each question; 0 for none.
        max_chunks: Pieces of all texts together, at most.
        datasets: What the file will say that it was made with.
        on_progress: Called after each batch.
        **options: Fields of `Options` that say how to load, and `preprocess` and `system`.

    Raises:
        UsageError: There is nothing to be read, or an option is not accepted.
        ImageError: A picture cannot be read. All are opened before anything is computed.
        PromptError: A question does not fit the context.
        ModelFileError: As of `Llava.load`, as is EngineError.
    """
    asked, texts = list(questions), [text for text in texts if text]
    if not asked and not texts:
        raise UsageError("an importance matrix needs pictures with questions, or texts")
    settings = Options().updated({"parallel": 1, **options})
    for _, group in itertools.groupby(asked, key=_about):
        load_image(next(group)[0])
    sums = _Sums()
    with ExitStack() as stack:
        loaded = load(hub.resolve(model, mmproj), settings, options, stack, sums)
        worker = Worker("local-llava-imatrix", _NothingElse(), 1)
        stack.callback(worker.close)

        def start(ticket: Ticket[Progress]) -> None:
            reader = _Reader(loaded, max_tokens, ticket)
            pieces = list(itertools.islice(reader.pieces(texts), max_chunks))
            reader.read_all(asked, pieces)
            ticket.end()

        with closing(worker.iterate(start, bounded=False)) as steps:
            for progress in steps:
                if on_progress:
                    on_progress(progress)
    return sums.result(tuple(datasets))


class _NothingElse:
    """The thread has no other work."""

    def step(self) -> bool:
        return False

    def fail(self, error: BaseException) -> None:
        pass


class _Sums:
    """The observer: sums of squares, of the matrices of the layers."""

    def __init__(self) -> None:
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._counts: Counter[str] = Counter()

    def wants(self, name: str) -> bool:
        # What attention multiplies in the KV cache has other names.
        return name.startswith("blk.") and name.endswith(".weight")

    def take(self, name: str, inputs: NDArray[np.float32]) -> None:
        squares = np.einsum("ij,ij->j", inputs, inputs)  # of the few hundred rows of a batch
        if not np.isfinite(squares).all():
            raise EngineError(f"{name}: what it is multiplied with is not finite; the model is damaged")
        if name in self._sums:
            self._sums[name] += squares
        else:
            self._sums[name] = squares.astype(np.float64)
        self._counts[name] += len(inputs)

    def result(self, datasets: tuple[str, ...]) -> Imatrix:
        return Imatrix({name: sums.astype(np.float32) for name, sums in self._sums.items()}, self._counts, datasets)


class _Reader:
    """Makes the model read, in the thread that owns it."""

    def __init__(self, loaded: Loaded, max_tokens: int, ticket: Ticket[Progress]) -> None:
        """
        Args:
            loaded: The pair.
            max_tokens: Of an answer.
            ticket: Gets the progress; when it is cancelled, the reading ends.
        """
        self._llm, self._tower, self._encoder = loaded.llm, loaded.tower, loaded.encoder
        self._format, self._options, self._n_ctx = loaded.chat_format(), loaded.options, loaded.placement.n_ctx
        self._max_tokens, self._ticket = max_tokens, ticket
        self._held: list[Unit] = []
        self._embeddings: Embeddings = {}
        self._done = self._total = self._n_rows = 0

    def pieces(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """Texts, cut into pieces."""
        size, vocab = min(CHUNK, self._n_ctx), self._llm.config.vocab
        for text in texts:
            parts = prompt.build([Message("user", text)], self._format, self._llm.tokenize, raw=True)
            tokens = [token for part in parts if isinstance(part, list) for token in part]
            for at in range(0, max(1, len(tokens) - size + 1), size):
                first = [vocab.bos] if vocab.add_bos and vocab.bos is not None else tokens[at : at + 1]
                yield [*first, *tokens[at + 1 : at + size]]

    def read_all(self, questions: Sequence[tuple[ImageLike, str]], pieces: Sequence[list[int]]) -> None:
        """Read everything, one after the other."""
        self._total = len(questions) + len(pieces)
        for _, about_one in itertools.groupby(questions, key=_about):
            self._keep(0)
            (source, question), *others = about_one
            picture = self._see(source)
            for text in (question, *(text for _, text in others)):
                self._ask(picture, text)
                self._done += 1
        for piece in pieces:
            self._keep(0)
            self._read(piece)
            self._done += 1
        self._tell()

    def _see(self, source: ImageLike) -> Picture:
        """Encode a picture."""
        how, image = with_mode(self._tower.preprocessing, self._options.preprocess), load_image(source)
        picture = Picture.of(preprocess_tiles(image, how), self._tower.arrangement(image.size, how))
        encoding = self._encoder.begin([picture])
        while not encoding.done:
            if self._ticket.cancelled:
                raise InterruptedDecodeError
            encoding.advance(_TOWER_S)
        self._embeddings = encoding.embeddings
        return picture

    def _ask(self, picture: Picture, question: str) -> None:
        """Read a question about a picture, and answer it."""
        system = [] if self._options.system is None else [Message("system", self._options.system)]
        messages = [*system, Message("user", question, (picture,))]
        units = as_units(prompt.build(messages, self._format, self._llm.tokenize), [picture])
        total = n_tokens(units)
        if total > self._n_ctx:
            raise PromptError(f"a question takes {total} tokens, the context {self._n_ctx}: raise n_ctx (--n-ctx)")
        differ = (i for i, (held, unit) in enumerate(zip(self._held, units, strict=False)) if held != unit)
        self._keep(min(next(differ, len(self._held)), len(units) - 1))
        self._read(units)
        for _ in range(min(self._max_tokens, self._n_ctx - total)):
            token = int(self._llm.logits().argmax())
            if self._llm.ends_turn(token):
                break
            self._read([*self._held, token])

    def _keep(self, n: int) -> None:
        """Forget all but the first pieces of what is held."""
        kept = self._llm.keep(0, n_tokens(self._held[:n]))
        self._held = self._held[:n] if kept else []

    def _read(self, units: Sequence[Unit]) -> None:
        """Read what is not held yet. All rows have logits, or llama.cpp would leave them out in the last layer."""
        position, rows = n_tokens(self._held), Rows()
        for part in self._inputs(units[len(self._held) :]):
            left = part
            while len(left):
                now = left[: self._llm.n_batch - len(rows)]
                rows.add(0, position, now, "all")
                position, left = position + len(now), left[len(now) :]
                if len(rows) == self._llm.n_batch:
                    self._decode(rows)
                    rows = Rows()
        if len(rows):
            self._decode(rows)
        self._held = [*units]

    def _inputs(self, units: Iterable[Unit]) -> Iterator[list[int] | NDArray[np.float32]]:
        """Runs of tokens, and pictures' embeddings."""
        tokens: list[int] = []
        for unit in units:
            if isinstance(unit, Shown):
                yield tokens
                tokens = []
                yield self._embeddings[unit.digest]
            else:
                tokens.append(unit)
        yield tokens

    def _decode(self, rows: Rows) -> None:
        self._llm.decode(rows, lambda: self._ticket.cancelled)
        self._n_rows += len(rows)
        self._tell()

    def _tell(self) -> None:
        self._ticket.deliver(Progress(self._done, self._total, self._n_rows))
