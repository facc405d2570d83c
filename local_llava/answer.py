"""An answer as it grows: sampling, stop texts, logprobs, and the end.

Knows the language model's logits and vocabulary. Does not know how the prompt came into the context, or what else is
evaluated beside the answer.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from local_llava.llm import LLM, Context
from local_llava.schema.constraint import Constraint
from local_llava.text import AnswerText
from local_llava.types import Chunk, FinishReason, Options, Reply, Timings, TokenLogprob


class Answer:
    """An answer after a prompt, token by token.

    Attributes:
        tokens: Those sampled so far, without the end of turn.
        n_sampled: How many were sampled, the end of turn included.
        finished: Whether it is complete, or a limit is reached.
    """

    def __init__(self, llm: LLM, options: Options, constraint: Constraint | None, limit: int) -> None:
        """
        Args:
            llm: The model.
            options: How to sample.
            constraint: Of the schema that the answer must follow.
            limit: Most tokens that it may have, >= 1.
        """
        self._llm, self._options, self._constraint, self._limit = llm, options, constraint, limit
        self._detokenizer, self._text = llm.detokenizer(), AnswerText(options.stop)
        self._sampler = llm.sampler(options)
        self.tokens: list[int] = []
        self._pieces: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._reason: FinishReason = "length"
        self.n_sampled = 0
        self.finished = False

    def take(self, context: Context, row: int) -> Chunk | None:
        """Sample the next token after a row of a context's last batch. None where it is the end of turn."""
        remaining = self._limit - len(self.tokens)
        logits = context.logits(row)
        logprobs = None if self._options.logprobs is None else _log_softmax(logits)
        if self._constraint is not None:
            self._constraint.apply(logits, remaining)
        token = self._sampler.sample(context, row, logits)
        if logits[token] == -np.inf:  # by rounding, the last of the candidates may be one that is not allowed
            token = int(logits.argmax())
        self.n_sampled += 1
        if self._constraint is not None:
            self._constraint.accept(token)
        if self._llm.ends_turn(token):
            self._reason, self.finished = "stop", True
            return None
        chunk = self._append(token, logprobs)
        if self._text.stopped:
            self._reason = "stop"
        self.finished = self._text.stopped or remaining <= 1
        return chunk

    def close(self) -> None:
        """Free the sampler; no token can be taken after."""
        self._sampler.close()

    def last(self, timings: Timings, dropped: int = 0) -> Chunk:
        """The rest of the text, with the whole answer.

        What is `parsed` is still its text: making a value of it may run code of the caller's (a validator of pydantic),
        which is not for the thread that gives everybody's answers.
        """
        rest = self._text.push(self._detokenizer.finish()) + self._text.finish()
        text = "".join([*self._pieces, rest])
        complete = self._constraint is not None and self._constraint.complete and not self._text.stopped
        reply = Reply(
            text,
            tuple(self.tokens),
            "stop" if complete else self._reason,
            timings,
            None if self._options.logprobs is None else tuple(self._logprobs),
            text if complete else None,
            dropped,
        )
        return Chunk(rest, reply=reply)

    def _append(self, token: int, logprobs: NDArray[np.float32] | None) -> Chunk:
        self.tokens.append(token)
        text = self._text.push(self._detokenizer.push(token))
        self._pieces.append(text)
        if logprobs is None:
            return Chunk(text, (token,))
        self._logprobs.append(self._report(token, logprobs))
        return Chunk(text, (token,), (self._logprobs[-1],))

    def _report(self, token: int, logprobs: NDArray[np.float32]) -> TokenLogprob:
        n = min(self._options.logprobs or 0, len(logprobs))
        likeliest = np.argpartition(-logprobs, n - 1)[:n] if n else np.empty(0, np.int64)
        likeliest = likeliest[np.argsort(-logprobs[likeliest], kind="stable")]
        top = tuple((i, self._shown(i), float(logprobs[i])) for i in likeliest.tolist())
        return TokenLogprob(token, self._shown(token), float(logprobs[token]), top)

    def _shown(self, token: int) -> str:
        return self._llm.piece(token, special=True).decode("utf-8", "replace")


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    shifted = logits - logits.max()
    result: NDArray[np.float32] = shifted - np.log(np.exp(shifted, dtype=np.float64).sum()).astype(np.float32)
    return result
