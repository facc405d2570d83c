"""The language model: load, tokenize, evaluate tokens and image embeddings, sample.

This package is the one importer of llama_cpp, at the level of llama.h. Knows no chat format and no pictures.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import unicodedata
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import llama_cpp.llama_cpp as c
import numpy as np
from numpy.typing import NDArray

from local_llava import ggml_rows
from local_llava.corrections import open_model
from local_llava.detokenizer import ByteLevelDetokenizer, Detokenizer, SentencePieceDetokenizer
from local_llava.devices import physical_cores
from local_llava.errors import EngineError, PromptError
from local_llava.gguf_file import GGUFFile
from local_llava.llm.batch import Batch
from local_llava.llm.native import (
    KV_TYPES,
    Settings,
    first_error,
    forget_error,
    load_model,
    new_context,
    note_stop,
    start,
)
from local_llava.llm.rows import Rows, faster_size
from local_llava.llm.sampler import Sampler
from local_llava.llm_file import LLMConfig, check_llm
from local_llava.llm_vocab import CONTROL, QWEN2_PRE, special_tokens
from local_llava.schema.constraint import Vocabulary
from local_llava.sentencepiece import SentencePiece, TextRun
from local_llava.types import KVType, Options

__all__ = ["LLM", "N_BATCH", "InterruptedDecodeError", "Rows"]

log = logging.getLogger("local_llava")

_NO_CALLBACK = c.ggml_abort_callback()
_ABORTED = 2
"""`llama_decode` was told to stop."""

_MAX_VIEWS = 128

N_BATCH = 256
"""Tokens that one call evaluates at most, unless another number is asked for: more of them read the weights less often,
but progress, Ctrl-C and other answers wait for each call."""


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


class LLM:
    """A language model with one KV cache, which sequences share. One thread at a time may use it.

    Attributes:
        gguf: The file's header, corrected.
        config: The model's sizes and vocabulary.
        n_cells: Tokens that the KV cache holds, of all sequences; what two sequences share counts once.
        n_seq_max: Sequences that may be in it: 0 to n_seq_max - 1.
        n_batch: Rows that one call of `decode` takes at most.
        on_cpu: Whether all of it is on the CPU.
        specials: Text -> id of the tokens that only a template may write.
    """

    def __init__(
        self, gguf: GGUFFile, config: LLMConfig, model: int, context: int, settings: Settings, stack: ExitStack
    ) -> None:
        """Use `load`."""
        self.gguf, self.config, self.specials = gguf, config, special_tokens(gguf)
        self._model, self._context, self._stack = model, context, stack
        self._vocab = c.llama_model_get_vocab(model)
        self._memory = c.llama_get_memory(context)
        types = gguf.metadata["tokenizer.ggml.token_type"]
        self._control = {i for i in self.specials.values() if types[i] == CONTROL}
        self.n_cells, self.n_seq_max, self.n_batch = settings.n_cells, settings.n_seq_max, settings.n_batch
        # llama.cpp keeps the pointer to the callback, which must not keep the model.
        self._stop = stop = _Stop()
        self._abort_callback = c.ggml_abort_callback(lambda _: stop.wanted())
        self._batch = Batch(self.n_batch, self.n_seq_max + 1)
        self._views: dict[int, NDArray[np.float32]] = {}
        self.on_cpu = settings.on_cpu

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        n_cells: int,
        n_seq_max: int = 1,
        n_batch: int = N_BATCH,
        n_outputs: int = 1,
        kv_type: KVType = "F16",
        n_threads: int | None = None,
        n_gpu_layers: int = -1,
        flash_attention: bool | None = None,
    ) -> LLM:
        """Load a language model.

        Args:
            path: A GGUF that `check_llm` accepts, after `corrections`.
            n_cells: Tokens that the KV cache holds; llama.cpp rounds it up to a multiple of 256.
            n_seq_max: Sequences that share it, at most 256.
            n_batch: Rows that one call evaluates at most.
            n_outputs: Rows of a call that logits are wanted of, at most.
            kv_type: Type of the KV cache.
            n_threads: CPU threads; None for one a physical core.
            n_gpu_layers: Layers to put on the GPU, if there is one; -1 for all.
            flash_attention: Whether to; None as llama.cpp chooses, but without it where the KV cache is F32.

        Raises:
            ModelFileError: The file cannot be used; the message names the field or tensor.
            EngineError: llama.cpp failed, mostly for lack of memory.
        """
        gguf = open_model(path)
        config = check_llm(gguf)
        start()
        settings = Settings(
            n_cells,
            n_seq_max,
            min(n_batch, n_cells),
            n_outputs,
            KV_TYPES[kv_type],
            n_threads or physical_cores(),
            flash_attention if kv_type != "F32" or flash_attention is not None else False,
            on_cpu=n_gpu_layers == 0,
        )
        with ExitStack() as stack:
            model = load_model(config, n_gpu_layers)
            stack.callback(c.llama_model_free, model)
            context = new_context(config, model, settings)
            stack.callback(c.llama_free, context)
            return cls(gguf, config, model, context, settings, stack.pop_all())

    def close(self) -> None:
        """Free the memory; the model cannot be used after."""
        self._stack.close()

    @functools.cached_property
    def _sentencepiece(self) -> SentencePiece | None:
        """The tokenizer of a vocabulary of that kind; made when first needed, in a tenth of a second."""
        vocab = self.config.vocab
        return SentencePiece.from_gguf(self.gguf, vocab) if vocab.model == "llama" else None

    def tokenize(self, run: TextRun) -> list[int]:
        """Tokens of plain text: nothing in it becomes a control token."""
        if self._sentencepiece is not None:
            return self._sentencepiece.encode(run)
        return [token for piece in run.pieces for token in self._tokenize(piece)]

    def _tokenize(self, text: str) -> list[int]:
        if self.config.vocab.pre == QWEN2_PRE:
            text = unicodedata.normalize("NFC", text)
        raw = text.encode()
        room = len(raw) + 8
        tokens = (c.llama_token * room)()
        n = c.llama_tokenize(self._vocab, raw, len(raw), tokens, room, False, False)
        if n < 0:
            raise PromptError(f"text of {len(raw)} bytes cannot be tokenized")
        return list(tokens[:n])

    def detokenizer(self) -> Detokenizer:
        """A new one, for one text."""
        if self.config.vocab.model != "llama":
            return ByteLevelDetokenizer(self.piece)
        tokens, types = (self.gguf.metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
        return SentencePieceDetokenizer(tokens, types, self.config.vocab.strip_space)

    def piece(self, token: int, special: bool = False) -> bytes:
        """The text of a token; of control tokens only if `special`."""
        if not special and token in self._control:
            return b""  # llama.cpp goes by the file, where some are no control tokens
        room = 256
        while True:
            buffer = ctypes.create_string_buffer(room)
            n = c.llama_token_to_piece(self._vocab, token, buffer, room, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            room = -n

    def ends_turn(self, token: int) -> bool:
        """Whether the model means to say no more with this token."""
        return bool(c.llama_vocab_is_eog(self._vocab, token))

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
        state = np.empty(c.llama_state_seq_get_size(self._context, sequence), np.uint8)
        pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        n = c.llama_state_seq_get_data(self._context, pointer, state.nbytes, sequence)
        if n == 0:
            raise EngineError(f"llama.cpp cannot save a sequence: {first_error()}")
        return state[:n]

    def restore(self, sequence: int, state: NDArray[np.uint8], n: int) -> bool:
        """Put into an empty sequence what `save` gave for n tokens, by the same model with the same settings.

        llama.cpp checks shapes and types, but not the numbers: whoever calls vouches for the bytes. Returns False, with
        the sequence empty, where llama.cpp refuses them.
        """
        pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        done = c.llama_state_seq_set_data(self._context, pointer, state.nbytes, sequence)
        if done and c.llama_memory_seq_pos_max(self._memory, sequence) == n - 1:
            return True
        c.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        return False

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
            parts = [p if isinstance(p, np.ndarray) else self.token_embeddings(p) for p in rows.inputs]
            batch = self._batch.of_embeddings(rows, np.ascontiguousarray(np.concatenate(parts), np.float32))
        else:
            batch = self._batch.of_tokens(rows, [token for part in rows.inputs for token in part])
        forget_error()
        if (stop is None) != (self._stop.asked is None):
            c.llama_set_abort_callback(self._context, self._abort_callback if stop else _NO_CALLBACK, None)
        self._stop.asked = stop
        status = c.llama_decode(self._context, batch)
        if status == _ABORTED:
            raise InterruptedDecodeError
        if status != 0:
            raise EngineError(f"llama.cpp cannot evaluate {n_asked} tokens (status {status}): {first_error()}")
        c.llama_synchronize(self._context)  # a GPU may still be at it, and how long a batch takes is measured

    def logits(self, row: int = -1) -> NDArray[np.float32]:
        """The logits after a row of the last batch that has `output`: float32 [n_vocab].

        They are llama.cpp's own memory, from which samplers take the token.
        """
        pointer = c.llama_get_logits_ith(self._context, row)
        if not pointer:
            raise EngineError("llama.cpp has no logits: nothing was evaluated")
        address = ctypes.addressof(pointer.contents)
        logits = self._views.get(address)
        if logits is None:  # there are as many places as a batch has rows with logits, until llama.cpp makes room anew
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            logits = self._views[address] = np.ctypeslib.as_array(pointer, (self.config.n_vocab,))
        return logits

    def token_embeddings(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Rows of the embedding matrix, bit for bit as llama.cpp looks them up: float32 [n, n_embd].

        Raises:
            EngineError: The file is not there any more, or a token is none.
        """
        info = self.gguf.tensors["token_embd.weight"]
        size = info.nbytes // info.shape[0]
        if not all(0 <= token < info.shape[0] for token in tokens):
            raise EngineError(f"a token is out of the vocabulary of {info.shape[0]}")
        rows = self._embedding_rows.reshape(info.shape[0], size)[np.asarray(tokens)]
        return ggml_rows.dequantize(info.type, rows).reshape(len(tokens), -1)

    @functools.cached_property
    def _embedding_rows(self) -> NDArray[np.uint8]:
        """The bytes of the embedding matrix, mapped: llama.cpp has the same pages."""
        info = self.gguf.tensors["token_embd.weight"]
        try:
            return np.memmap(self.config.path, np.uint8, "r", info.offset, info.nbytes)
        except (OSError, ValueError) as e:
            raise EngineError(f"{self.config.path}: cannot be read any more: {e}") from e

    def vocabulary(self) -> Vocabulary:
        """The tokens as a constraint needs them."""
        ends = [i for i in range(self.config.n_vocab) if self.ends_turn(i)]
        pieces = [self.piece(i) for i in range(self.config.n_vocab)]
        return Vocabulary(pieces, ends, self.specials.values())

    def sampler(self, options: Options) -> Sampler:
        """A new sampler for an answer of this model."""
        return Sampler(self._context, options, self.config.n_vocab)
