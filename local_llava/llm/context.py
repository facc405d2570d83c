"""llama.cpp's context: a KV cache, and what is computed with it.

Knows sequences, rows and logits. Knows no vocabulary but its size, and no files.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import llama_cpp.llama_cpp as c
import numpy as np
from numpy.typing import NDArray

from local_llava.errors import EngineError
from local_llava.llm.batch import Batch
from local_llava.llm.native import Settings, first_error, forget_error, note_stop
from local_llava.llm.observing import Observation
from local_llava.llm.rows import Rows, faster_size

_NO_CALLBACK = c.ggml_abort_callback()
_ABORTED = 2
"""`llama_decode` was told to stop."""

_MAX_VIEWS = 128


class _Stop:
    """Who is asked whether to leave off."""

    asked: Callable[[], bool] | None = None

    def wanted(self) -> bool:
        wanted = self.asked is not None and self.asked()
        if wanted:
            note_stop()
        return wanted


class InterruptedDecodeError(Exception):
    """A batch was stopped, since nobody wants it any more."""


class Context:
    """A KV cache, which sequences share. One thread at a time may use it, and the model that it is of.

    Attributes:
        handle: llama.cpp's.
        n_cells: Tokens that the KV cache holds, of all sequences; what two sequences share counts once.
        n_seq_max: Sequences that may be in it: 0 to n_seq_max - 1.
        n_batch: Rows that one call of `decode` takes at most.
        on_cpu: Whether all of the model is on the CPU.
    """

    def __init__(
        self,
        handle: int,
        settings: Settings,
        n_vocab: int,
        look_up: Callable[[Sequence[int]], NDArray[np.float32]],
        observation: Observation | None = None,
    ) -> None:
        """
        Args:
            handle: llama.cpp's, of a context that was made with one sequence more than `settings` has.
            settings: What it was made with.
            n_vocab: Logits of a row.
            look_up: Gives the embeddings of tokens: float32 [n, n_embd].
            observation: What it was made with, if somebody looks at what is computed.
        """
        self._observation = observation
        self.handle, self._n_vocab, self._look_up = handle, n_vocab, look_up
        self._memory = c.llama_get_memory(handle)
        self.n_cells, self.n_seq_max, self.n_batch = settings.n_cells, settings.n_seq_max, settings.n_batch
        self.on_cpu = settings.on_cpu
        # llama.cpp keeps the pointer to the callback, which must not keep the model.
        self._stop = stop = _Stop()
        self._abort_callback = c.ggml_abort_callback(lambda _: stop.wanted())
        self._batch = Batch(self.n_batch, self.n_seq_max + 1)
        self._views: dict[int, NDArray[np.float32]] = {}

    def keep(self, sequence: int, n: int) -> bool:
        """Forget what a sequence holds after its first n tokens. Where llama.cpp cannot, all of it: returns False."""
        kept = bool(c.llama_memory_seq_rm(self._memory, sequence, n, -1))
        if not kept:
            c.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        return kept

    def copy(self, source: int, target: int, n: int) -> None:
        """Let an empty sequence share another one's first n tokens; nothing is computed or moved."""
        c.llama_memory_seq_cp(self._memory, source, target, 0, n)

    def save(self, sequence: int) -> NDArray[np.uint8]:
        """What the KV cache holds of a sequence, for `restore`: uint8 [n_bytes].

        Raises:
            EngineError: llama.cpp failed.
        """
        state = np.empty(c.llama_state_seq_get_size(self.handle, sequence), np.uint8)
        pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        n = c.llama_state_seq_get_data(self.handle, pointer, state.nbytes, sequence)
        if n == 0:
            raise EngineError(f"llama.cpp cannot save a sequence: {first_error()}")
        return state[:n]

    def restore(self, sequence: int, state: NDArray[np.uint8], n: int) -> bool:
        """Put into an empty sequence what `save` gave for n tokens, by the same model with the same settings.

        llama.cpp checks shapes and types, but not the numbers: whoever calls vouches for the bytes. Returns False, with
        the sequence empty, where llama.cpp refuses them.
        """
        pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        done = c.llama_state_seq_set_data(self.handle, pointer, state.nbytes, sequence)
        if done and c.llama_memory_seq_pos_max(self._memory, sequence) == n - 1:
            return True
        c.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        return False

    def move_in(self, sequence: int, state: NDArray[np.uint8], n: int) -> bool:
        """Append to a sequence what `save` gave of another context, of the tokens that come next there.

        Args:
            sequence: Its number.
            state: As of `restore`.
            n: Tokens that it holds after.

        Returns:
            False, with nothing appended, where llama.cpp refuses the state.
        """
        # llama.cpp empties the sequence that a state is put into.
        done = self.restore(self.n_seq_max, state, n)
        if done:
            c.llama_memory_seq_cp(self._memory, self.n_seq_max, sequence, -1, -1)
            c.llama_memory_seq_rm(self._memory, self.n_seq_max, -1, -1)
        return done

    def forget_first(self, sequence: int, n: int) -> None:
        """Forget a sequence's first n tokens, to `save` those after them. It can only be emptied after."""
        c.llama_memory_seq_rm(self._memory, sequence, 0, n)

    def decode(self, rows: Rows, stop: Callable[[], bool] | None = None, n_spare: int = 0) -> None:
        """Append rows to their sequences, in one batch.

        A batch of llama.cpp carries token ids or embeddings. Where there are embeddings among the rows, token ids
        become what llama.cpp would look up for them, so that answers go on while pictures are read: both in one pass
        over the weights.

        Args:
            rows: 1 to n_batch of them.
            stop: Asked about a thousand times, on a CPU, while it is computed: whether to leave off.
            n_spare: Cells that are free beyond those of the rows, where rows may be added that make the batch faster.

        Raises:
            InterruptedDecodeError: It was. Of the rows the same is true as after an error.
            EngineError: llama.cpp failed. Nothing of the rows is in the KV cache then, if `keep` is called.
        """
        n_asked = len(rows)
        if self.on_cpu and 0 < (n_added := faster_size(n_asked) - n_asked) <= min(n_spare, self.n_batch - n_asked):
            rows = rows.filled_up(n_added, self.n_seq_max)
        try:
            self._decode(rows, n_asked, stop)
        finally:
            if len(rows) > n_asked:
                c.llama_memory_seq_rm(self._memory, self.n_seq_max, -1, -1)

    def _decode(self, rows: Rows, n_asked: int, stop: Callable[[], bool] | None) -> None:
        if any(isinstance(part, np.ndarray) for part in rows.inputs):
            parts = [p if isinstance(p, np.ndarray) else self._look_up(p) for p in rows.inputs]
            batch = self._batch.of_embeddings(rows, np.ascontiguousarray(np.concatenate(parts), np.float32))
        else:
            batch = self._batch.of_tokens(rows, [token for part in rows.inputs for token in part])
        forget_error()
        if (stop is None) != (self._stop.asked is None):
            c.llama_set_abort_callback(self.handle, self._abort_callback if stop else _NO_CALLBACK, None)
        self._stop.asked = stop
        status = c.llama_decode(self.handle, batch)
        if self._observation is not None:
            self._observation.check()
        if status == _ABORTED:
            raise InterruptedDecodeError
        if status != 0:
            raise EngineError(f"llama.cpp cannot evaluate {n_asked} tokens (status {status}): {first_error()}")
        c.llama_synchronize(self.handle)  # a GPU may still be at it, and how long a batch takes is measured

    def logits(self, row: int = -1) -> NDArray[np.float32]:
        """The logits after a row of the last batch that has `output`: float32 [n_vocab].

        They are llama.cpp's own memory, from which samplers take the token.
        """
        pointer = c.llama_get_logits_ith(self.handle, row)
        if not pointer:
            raise EngineError("llama.cpp has no logits: nothing was evaluated")
        address = ctypes.addressof(pointer.contents)
        logits = self._views.get(address)
        if logits is None:  # there are as many places as a batch has rows with logits, until llama.cpp makes room anew
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            logits = self._views[address] = np.ctypeslib.as_array(pointer, (self._n_vocab,))
        return logits
