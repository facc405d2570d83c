"""Takes the next token from logits, as llama.cpp's samplers do."""

from __future__ import annotations

import llama_cpp.llama_cpp as c
import numpy as np
from numpy.typing import NDArray

from local_llava.llm.context import Context
from local_llava.types import Options

PENALTY_WINDOW = 64
"""Tokens that the repeat penalty looks back on."""


class Sampler:
    """llama.cpp's chain of samplers: takes the next token from a context's logits without copying them."""

    def __init__(self, options: Options, n_vocab: int) -> None:
        # llama.cpp sorts nothing for it either, but writes a record for every token of the vocabulary first.
        self._greedy = options.temperature == 0 and options.repeat_penalty == 1
        self._chain = c.llama_sampler_chain_init(c.llama_sampler_chain_default_params())
        stages = []
        if options.repeat_penalty != 1:
            stages.append(c.llama_sampler_init_penalties(n_vocab, PENALTY_WINDOW, options.repeat_penalty, 0.0, 0.0))
        if options.temperature == 0:
            stages.append(c.llama_sampler_init_greedy())
        else:
            stages += [
                c.llama_sampler_init_top_k(options.top_k),
                c.llama_sampler_init_top_p(options.top_p, 1),
                c.llama_sampler_init_min_p(options.min_p, 1),
                c.llama_sampler_init_temp(options.temperature),
                c.llama_sampler_init_dist(options.seed),
            ]
        for stage in stages:
            c.llama_sampler_chain_add(self._chain, stage)

    def sample(self, context: Context, row: int, logits: NDArray[np.float32]) -> int:
        """The next token, which the sampler also remembers.

        Args:
            context: What the last batch was evaluated in.
            row: Of that batch.
            logits: Those of that row, as `Context.logits` gives them.
        """
        if self._greedy:
            return int(logits.argmax())
        return int(c.llama_sampler_sample(self._chain, context.handle, row))

    def close(self) -> None:
        """Free it; once is enough."""
        chain, self._chain = self._chain, None
        if chain is not None:
            c.llama_sampler_free(chain)
