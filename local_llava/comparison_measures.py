"""How far a model's logits are from another's, in numbers.

Knows arrays only. Everything is computed in float64, from logits in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from local_llava.errors import EngineError

_VALUES = 1 << 20
"""Logits that are looked at in one go: their copies in float64 take some tens of megabytes."""


class Divergence:
    """What is known of one model beside the reference, position by position."""

    def __init__(self) -> None:
        self._kl: list[NDArray[np.float64]] = []
        self._same: list[NDArray[np.bool_]] = []
        self._nll: list[NDArray[np.float64]] = []
        self._reference_nll: list[NDArray[np.float64]] = []
        self._answers: list[bool] = []

    def add(self, reference: NDArray[np.float32], logits: NDArray[np.float32], answer: Sequence[int | None]) -> None:
        """Take the positions of an answer.

        Args:
            reference: Logits of the reference: float32 [n, n_vocab].
            logits: Those of the model.
            answer: The token that the reference took after each; None for the one that it finds likeliest.

        Raises:
            EngineError: Some are not finite.
        """
        step = max(1, _VALUES // reference.shape[1])
        for i in range(0, len(reference), step):
            self._add(reference[i : i + step], logits[i : i + step], answer[i : i + step])
        self._answers.append(bool((reference.argmax(axis=1) == logits.argmax(axis=1)).all()))

    def _add(self, reference: NDArray[np.float32], logits: NDArray[np.float32], answer: Sequence[int | None]) -> None:
        if not (np.isfinite(reference).all() and np.isfinite(logits).all()):
            raise EngineError("its logits are not all finite numbers")
        ours, theirs, best = log_softmax(reference), log_softmax(logits), reference.argmax(axis=1)
        # Rounding may leave a trace below zero.
        self._kl.append(np.maximum(0.0, (np.exp(ours) * (ours - theirs)).sum(axis=1)))
        self._same.append(logits.argmax(axis=1) == best)
        tokens = [likeliest if token is None else token for token, likeliest in zip(answer, best, strict=True)]
        rows = np.arange(len(tokens))
        self._nll.append(-theirs[rows, tokens])
        self._reference_nll.append(-ours[rows, tokens])

    @property
    def n(self) -> int:
        """Positions so far."""
        return sum(map(len, self._kl))

    @property
    def kl_mean(self) -> float:
        """KL(reference || model), the mean of all positions, nats."""
        return float(np.concatenate(self._kl).mean())

    @property
    def kl_p99(self) -> float:
        """The same, the 99th percentile, with linear interpolation."""
        return float(np.percentile(np.concatenate(self._kl), 99))

    @property
    def same_top(self) -> float:
        """Share of the positions at which both find the same token likeliest."""
        return float(np.concatenate(self._same).mean())

    @property
    def same_answers(self) -> float:
        """Share of the answers at all of whose positions both do: the model would give the same ones."""
        return float(np.mean(self._answers))

    @property
    def perplexity(self) -> float:
        """Of the reference's answers under the model: exp of the mean negative log-likelihood of a token."""
        return float(np.exp(np.concatenate(self._nll).mean()))

    @property
    def perplexity_ratio(self) -> float:
        """To the perplexity under the reference itself."""
        return float(np.exp((np.concatenate(self._nll) - np.concatenate(self._reference_nll)).mean()))


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Logarithms of the probabilities: float64 [n, n_vocab]."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def relative_error(values: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Distance to the reference in parts of its length, both by L2."""
    exact = reference.astype(np.float64)
    distance, length = np.linalg.norm(values - exact), np.linalg.norm(exact)
    return float(distance / length) if distance else 0.0
