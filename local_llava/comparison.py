"""How far models are from a reference: what each finds likely along the answers that the reference gives.

Knows the order of things. The reference answers questions about pictures greedily. Then it and every model, one after
the other, are given the same prompts with the same answers, all at once (teacher forcing), and their logits are
compared at every place of the answers, the end of turn included. So one slip does not hide what follows, and many
places come from few questions. The reference's logits wait on disk: of a vocabulary of 128,000 they take half a
megabyte a token. A tower sees each picture once, whichever models share it.

The way is that of llama.cpp's `llama-perplexity --kl-divergence`, with pictures, and with answers of the model in the
place of a text.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from local_llava import comparison_pairs, hub
from local_llava.comparison_measures import Divergence, relative_error
from local_llava.comparison_pairs import Matrix, Pair
from local_llava.comparison_store import StoredRows, check_room
from local_llava.engine import Llava
from local_llava.errors import EngineError, LocalLlavaError, UsageError
from local_llava.images import load_image
from local_llava.picture_sets import Question
from local_llava.types import ModelFiles, Options

__all__ = ["DEFAULT_MAX_TOKENS", "DEFAULT_QUESTIONS", "Comparison", "Matrix", "Progress", "compare"]

log = logging.getLogger("local_llava")

DEFAULT_QUESTIONS = ("Describe the picture.",)
DEFAULT_MAX_TOKENS = 64
"""Of an answer of the reference."""

OPTIONS = ("system", "preprocess", "n_ctx", "kv_type", "n_gpu_layers", "n_threads", "n_batch", "flash_attention")
"""Fields of `types.Options` that a comparison takes."""

_SPEED_TOKENS, _SPEED_QUESTIONS = 64, 16
"""The speed of a model is measured on answers of its own, until these are so many tokens or questions."""


@dataclass(frozen=True)
class Comparison:
    """One model beside the reference."""

    model: str
    """As it was named."""
    files: ModelFiles
    quant: str
    """Type of the language model; "" where its file does not say."""
    mmproj_quant: str
    """Type of the mmproj, likewise."""
    model_bytes: int
    mmproj_bytes: int
    matrix: Matrix | None
    """The importance matrix that the language model was quantized with, if its file names one."""
    positions: int
    """Places of the answers at which logits were compared."""
    kl_mean: float
    """KL(reference || model) of the next token's probabilities, nats: the mean of all positions."""
    kl_p99: float
    """Likewise, the 99th percentile."""
    same_top: float
    """Share of the positions at which both find the same token likeliest, 0 to 1."""
    same_answers: float
    """Share of the questions to which the model would give the reference's answer, token by token."""
    perplexity: float
    """Of the reference's answers under the model."""
    perplexity_ratio: float
    """To their perplexity under the reference."""
    feature_error: float
    """Distance (L2) of the pictures' embeddings from those of the reference's tower, in parts of their length; the mean
    of the pictures."""
    decode_tokens_per_s: float
    """Tokens of the answer that the model writes in a second: one answer at a time, in an empty context but for the
    questions before it; of up to 64 tokens, or 16 questions."""


@dataclass(frozen=True)
class Progress:
    """How far one model is."""

    model: str
    step: str
    """What it does: "answers" (the reference, at first), or "compares"."""
    done: int
    total: int
    """Questions."""


OnProgress = Callable[[Progress], None]


def compare(
    reference: str | os.PathLike[str],
    models: Sequence[str | os.PathLike[str]],
    questions: Sequence[Question],
    *,
    mmproj: str | os.PathLike[str] | None = None,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    on_progress: OnProgress = lambda _: None,
    on_done: Callable[[Comparison], None] = lambda _: None,
    on_failure: Callable[[str, LocalLlavaError], None] | None = None,
    on_convert: hub.OnConvert | None = None,
    **options: Any,
) -> list[Comparison]:
    """Compare models with a reference.

    Only one of them is in memory at a time.

    Args:
        reference: As of `Llava.load`.
        models: Likewise. A language model that has no mmproj beside it takes the reference's.
        questions: What the reference is asked.
        mmproj: Tower and projector of all of them; None for their own.
        max_tokens: Of an answer of the reference, at most.
        on_progress: Called after each question.
        on_done: Called with each result.
        on_failure: Called with a model and its error, where one cannot be loaded or fails later; the others are still
            compared. None to raise the error.
        on_convert: As of `hub.resolve`.
        **options: Fields of `types.Options`, those of `OPTIONS`. The KV cache is F16 unless another is named.

    Returns:
        The reference beside itself, then the models, without those that failed.

    Raises:
        UsageError: An option is not accepted, or there are no questions.
        ModelFileError: A file cannot be used, or a model has another vocabulary than the reference, or pictures take
            another number of its tokens. This and the next are found before anything is computed.
        ImageError: A picture cannot be read.
        OutputError: The disk has no room for the reference's logits.
        EngineError: The reference has nothing to say, or it failed.
    """
    settings = _settings(options, max_tokens)
    if not questions:
        raise UsageError("there are no questions")
    pairs = comparison_pairs.find(reference, models, mmproj, on_convert)
    comparison_pairs.check_pictures(pairs, list(dict.fromkeys(q.image for q in questions)), settings.preprocess)
    with ExitStack() as stack:
        session = _Session(pairs[0], questions, settings, options, on_progress, stack)
        session.answer()
        results = []
        for i, pair in enumerate(pairs):
            try:
                results.append(session.measure(pair))
            except LocalLlavaError as e:
                if i == 0 or on_failure is None:
                    raise
                on_failure(pair.name, e)
                continue
            on_done(results[-1])
        return results


@dataclass(frozen=True)
class _Exchange:
    """A question, and the reference's answer."""

    question: Question
    prompt: list[int | None]
    given: tuple[int, ...]
    """The answer as far as it is read: its last token need not be, unless the end of turn follows it."""
    taken: tuple[int | None, ...]
    """The token that the reference took after the prompt and after each of those; None for the end of turn."""
    first: int
    """Row of the reference's logits."""

    @property
    def n(self) -> int:
        return len(self.taken)


class _Session:
    """What the models of a comparison have in common."""

    def __init__(
        self,
        reference: Pair,
        questions: Sequence[Question],
        settings: Options,
        options: dict[str, Any],
        on_progress: OnProgress,
        stack: ExitStack,
    ) -> None:
        self._reference, self._settings, self._on_progress, self._stack = reference, settings, on_progress, stack
        # Measured settings of this machine may change the number of threads, but not what rounds.
        fixed = ("kv_type", "n_batch", "flash_attention", "max_tokens", "parallel")
        self._options = {**options, **{name: getattr(settings, name) for name in fixed}}
        self._images = list(dict.fromkeys(question.image for question in questions))
        self._questions = sorted(questions, key=lambda question: self._images.index(question.image))
        self._exchanges: list[_Exchange] = []
        self._logits: StoredRows | None = None
        self._features: dict[str, StoredRows] = {}
        self._places: dict[tuple[str, Path], tuple[int, int]] = {}

    def answer(self) -> None:
        """Let the reference answer all questions, and keep what it says.

        Raises:
            EngineError: It says nothing.
            OutputError: Its logits would not fit the disk.
        """
        n_rows = 0
        with self._load(self._reference) as llava:
            for i, (question, image) in enumerate(self._shown(llava, self._reference), 1):
                reply = llava.ask(question.text, image)
                prompt = llava.prompt_tokens(question.text, image, system=self._settings.system)
                ended = reply.finish_reason == "stop"
                given, taken = (reply.tokens, (*reply.tokens, None)) if ended else (reply.tokens[:-1], reply.tokens)
                self._exchanges.append(_Exchange(question, prompt, given, taken, n_rows))
                n_rows += len(taken)
                self._on_progress(Progress(self._reference.name, "answers", i, len(self._questions)))
        if all(not exchange.given for exchange in self._exchanges):
            raise EngineError(f"{self._reference.name} answers none of the questions: there is nothing to compare")
        check_room(4 * n_rows * self._reference.n_vocab, "take fewer pictures, or a smaller --max-tokens")
        self._logits = self._stack.enter_context(StoredRows(self._reference.n_vocab))

    def measure(self, pair: Pair) -> Comparison:
        """Compare one model. The reference comes first."""
        divergence = Divergence()
        with self._load(pair) as llava:
            speed = self._speed(llava, pair)
            exchanges = iter(self._exchanges)
            for i, (_, image) in enumerate(self._shown(llava, pair), 1):
                exchange = next(exchanges)
                logits = llava.answer_logits(exchange.prompt, exchange.given, image)
                divergence.add(self._reference_logits(exchange, pair, logits), logits, exchange.taken)
                self._on_progress(Progress(pair.name, "compares", i, len(self._questions)))
        return Comparison(
            pair.name,
            pair.files,
            pair.quant,
            pair.mmproj_quant,
            *pair.files.sizes,
            pair.matrix,
            divergence.n,
            divergence.kl_mean,
            divergence.kl_p99,
            divergence.same_top,
            divergence.same_answers,
            divergence.perplexity,
            divergence.perplexity_ratio,
            self._feature_error(pair),
            speed,
        )

    def _load(self, pair: Pair) -> Llava:
        return Llava.load(pair.files.model, pair.files.mmproj, **self._options)

    def _shown(self, llava: Llava, pair: Pair) -> Iterator[tuple[Question, Image]]:
        """The questions with their pictures, whose embeddings the model has then."""
        for path, questions in groupby(self._questions, key=lambda question: question.image):
            image = load_image(path)
            self._see(llava, pair, path, image)
            for question in questions:
                yield question, image

    def _see(self, llava: Llava, pair: Pair, path: Path, image: Image) -> None:
        """Send a picture through the tower, unless it went through it with another model."""
        known = self._embeddings(pair, path)
        if known is not None:
            llava.use_embeddings(image, [known])
            return
        values = llava.embed_images(image)[0]
        if pair.tower_digest not in self._features:
            self._features[pair.tower_digest] = self._stack.enter_context(StoredRows(values.shape[1]))
        first = self._features[pair.tower_digest].append(values)
        self._places[pair.tower_digest, path] = first, len(values)

    def _embeddings(self, pair: Pair, path: Path) -> NDArray[np.float32] | None:
        place = self._places.get((pair.tower_digest, path))
        return None if place is None else self._features[pair.tower_digest].read(*place)

    def _feature_error(self, pair: Pair) -> float:
        if pair.tower_digest == self._reference.tower_digest:
            return 0.0
        errors = []
        for path in self._images:
            values, exact = self._embeddings(pair, path), self._embeddings(self._reference, path)
            assert values is not None and exact is not None
            errors.append(relative_error(values, exact))
        return float(np.mean(errors))

    def _reference_logits(self, exchange: _Exchange, pair: Pair, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Those of an exchange: the model's own, which are kept, where it is the reference."""
        assert self._logits is not None
        if pair is self._reference:
            self._logits.append(logits)
            return logits
        return self._logits.read(exchange.first, exchange.n)

    def _speed(self, llava: Llava, pair: Pair) -> float:
        """Tokens of an answer in a second."""
        n_tokens, seconds = 0, 0.0
        for n_asked, (question, image) in enumerate(self._shown(llava, pair)):
            if n_tokens >= _SPEED_TOKENS or n_asked == _SPEED_QUESTIONS:
                break
            timings = llava.ask(question.text, image, max_tokens=_SPEED_TOKENS).timings
            # The first token comes with the prompt.
            n_tokens += timings.completion_tokens - 1
            seconds += timings.decode_s if timings.completion_tokens > 1 else 0.0
        return n_tokens / seconds if seconds else 0.0


def _settings(options: dict[str, Any], max_tokens: int) -> Options:
    for name in options:
        if name not in OPTIONS:
            raise UsageError(f"a comparison takes no option {name!r:.40}; there are {', '.join(OPTIONS)}")
    return Options().updated({"kv_type": "F16", **options, "max_tokens": max_tokens, "parallel": 1})
