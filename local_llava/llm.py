"""The language model: load, tokenize, evaluate tokens and image embeddings, sample.

The one importer of llama_cpp, at the level of llama.h. Knows no chat format and no pictures.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import unicodedata
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as c
import numpy as np
from numpy.typing import NDArray

from local_llava import ggml
from local_llava.corrections import open_model
from local_llava.detokenizer import ByteLevelDetokenizer, Detokenizer, SentencePieceDetokenizer
from local_llava.errors import EngineError, PromptError
from local_llava.gguf_file import GGUFFile
from local_llava.llm_file import LLMConfig, check_llm
from local_llava.llm_vocab import CONTROL, QWEN2_PRE, special_tokens
from local_llava.schema.constraint import Vocabulary
from local_llava.sentencepiece import SentencePiece, TextRun
from local_llava.types import KVType, Options

log = logging.getLogger("local_llava")

N_BATCH = 128
"""Most tokens that one call evaluates: seconds of work on a laptop, between which progress and Ctrl-C get through."""

KV_TYPES: dict[KVType, int] = {"F32": 0, "F16": 1, "Q8_0": 8}

PENALTY_WINDOW = 64
"""Tokens that the repeat penalty looks back on."""

_first_error = ""
"""What llama.cpp logged first in the call under way: it names the reason, and the lines after it only the caller."""


def _on_log(level: int, text: bytes, user_data: object) -> None:
    global _first_error
    if level == 4 and not _first_error:
        _first_error = " ".join(text.decode("utf-8", "replace").split())[:500]
    ggml.on_log(level, text, None)


def _forget_error() -> None:
    global _first_error
    _first_error = ""


# llama.cpp keeps the pointer: it must live as long as the process.
_log_callback = c.llama_log_callback(_on_log)


class LLM:
    """A language model with one context. One thread at a time may use it.

    Attributes:
        gguf: The file's header, corrected.
        config: The model's sizes and vocabulary.
        n_ctx: Tokens that the context holds.
        n_past: Tokens that it holds now.
        specials: Text -> id of the tokens that only a template may write.
    """

    def __init__(
        self, gguf: GGUFFile, config: LLMConfig, model: int, context: int, n_ctx: int, stack: ExitStack
    ) -> None:
        """Use `load`."""
        self.gguf, self.config, self.specials = gguf, config, special_tokens(gguf)
        self._model, self._context, self._stack = model, context, stack
        self._vocab = c.llama_model_get_vocab(model)
        types = gguf.metadata["tokenizer.ggml.token_type"]
        self._control = {i for i in self.specials.values() if types[i] == CONTROL}
        self.n_ctx = n_ctx  # llama.cpp rounds it up to a multiple of 256
        self.n_past = 0

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        n_ctx: int,
        kv_type: KVType = "F16",
        n_threads: int | None = None,
        n_gpu_layers: int = -1,
    ) -> LLM:
        """Load a language model.

        Args:
            path: A GGUF that `check_llm` accepts, after `corrections`.
            n_ctx: Context length in tokens, at most what the model was trained for.
            kv_type: Type of the KV cache.
            n_threads: CPU threads; None for as many as the process may run on.
            n_gpu_layers: Layers to put on the GPU, if there is one; -1 for all.

        Raises:
            ModelFileError: The file cannot be used; the message names the field or tensor.
            EngineError: llama.cpp failed, mostly for lack of memory.
        """
        gguf = open_model(path)
        config = check_llm(gguf)
        c.llama_log_set(_log_callback, ctypes.c_void_p(0))
        c.llama_backend_init()
        with ExitStack() as stack:
            model = _load_model(config, n_gpu_layers)
            stack.callback(c.llama_model_free, model)
            context = _new_context(config, model, n_ctx, KV_TYPES[kv_type], n_threads or ggml.available_cpus())
            stack.callback(c.llama_free, context)
            return cls(gguf, config, model, context, n_ctx, stack.pop_all())

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

    def truncate(self, n: int) -> bool:
        """Keep the first n tokens of the context. Where llama.cpp cannot, everything is forgotten: returns False."""
        memory = c.llama_get_memory(self._context)
        kept = bool(c.llama_memory_seq_rm(memory, 0, n, -1))
        if not kept:
            c.llama_memory_clear(memory, True)
        self.n_past = n if kept else 0
        return kept

    def decode(self, inputs: Sequence[int] | NDArray[np.float32], last: bool) -> None:
        """Append to the context, in one batch.

        Args:
            inputs: At most N_BATCH tokens, or embeddings float32 [n, n_embd].
            last: Whether the logits after the last one are wanted.

        Raises:
            PromptError: The context is full.
            EngineError: llama.cpp failed.
        """
        n = len(inputs)
        if self.n_past + n > self.n_ctx:
            raise PromptError(f"{self.n_past + n} tokens do not fit the context of {self.n_ctx} (n_ctx)")
        position = np.arange(self.n_past, self.n_past + n, dtype=np.int32)
        n_sequences, output = np.ones(n, np.int32), np.zeros(n, np.int8)
        output[-1] = last
        sequence = ctypes.pointer(ctypes.c_int32(0))
        # The arrays must outlive the call; llama_batch holds plain pointers to them.
        batch: Any = c.llama_batch(n_tokens=n)
        if isinstance(inputs, np.ndarray):
            embeddings = np.ascontiguousarray(inputs, np.float32)
            batch.embd = embeddings.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        else:
            tokens = np.asarray(inputs, np.int32)
            batch.token = tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        batch.pos = position.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        batch.n_seq_id = n_sequences.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        batch.seq_id = (ctypes.POINTER(ctypes.c_int32) * n)(*[sequence] * n)
        batch.logits = output.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        _forget_error()
        status = c.llama_decode(self._context, batch)
        if status != 0:
            raise EngineError(
                f"llama.cpp cannot evaluate {n} tokens (status {status}): {_first_error or 'no reason given'}"
            )
        self.n_past += n

    def logits(self) -> NDArray[np.float32]:
        """The logits after the last input: float32 [n_vocab], llama.cpp's own, from which samplers take the token."""
        pointer = c.llama_get_logits_ith(self._context, -1)
        if not pointer:
            raise EngineError("llama.cpp has no logits: nothing was evaluated")
        logits: NDArray[np.float32] = np.ctypeslib.as_array(pointer, (self.config.n_vocab,))
        return logits

    def vocabulary(self) -> Vocabulary:
        """The tokens as a constraint needs them."""
        ends = [i for i in range(self.config.n_vocab) if self.ends_turn(i)]
        pieces = [self.piece(i) for i in range(self.config.n_vocab)]
        return Vocabulary(pieces, ends, self.specials.values())

    def sampler(self, options: Options) -> Sampler:
        """A new sampler for this model."""
        return Sampler(self._context, options, self.config.n_vocab)


class Sampler:
    """llama.cpp's chain of samplers: takes the next token from the context's logits without copying them."""

    def __init__(self, context: int, options: Options, n_vocab: int) -> None:
        self._context = context
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

    def sample(self) -> int:
        """The next token, which the sampler also remembers."""
        return int(c.llama_sampler_sample(self._chain, self._context, -1))

    def close(self) -> None:
        c.llama_sampler_free(self._chain)


def _load_model(config: LLMConfig, n_gpu_layers: int) -> int:
    _forget_error()
    params = c.llama_model_default_params()
    params.n_gpu_layers = n_gpu_layers
    overrides = _kv_overrides(config)
    params.kv_overrides = overrides
    # ggml's AMX kernels crash when the compiler drops their tile configuration, as GCC 12 does (llama.cpp #20824,
    # #26954), and this is the only way to load without them.
    params.use_extra_bufts = "AMX_INT8" not in ggml.cpu_features()
    # llama.cpp takes the path in the file system's own encoding.
    model = c.llama_model_load_from_file(os.fsencode(config.path), params)
    if not model:
        raise EngineError(f"{config.path}: llama.cpp cannot load it: {_first_error or 'no reason given'}")
    return int(model)


def _kv_overrides(config: LLMConfig) -> Any:
    """Metadata in place of what the file says; the list ends with an empty key."""
    fitting = {key: value for key, value in config.overrides.items() if _fits(key, value)}
    if not fitting:
        return None
    array = (c.llama_model_kv_override * (len(fitting) + 1))()
    for entry, (key, value) in zip(array, fitting.items(), strict=False):
        entry.key = key.encode()
        if isinstance(value, str):
            entry.tag = c.LLAMA_KV_OVERRIDE_TYPE_STR
            entry.value.val_str = value.encode(errors="surrogateescape")
        elif isinstance(value, bool):
            entry.tag = c.LLAMA_KV_OVERRIDE_TYPE_BOOL
            entry.value.val_bool = value
        elif isinstance(value, int):
            entry.tag = c.LLAMA_KV_OVERRIDE_TYPE_INT
            entry.value.val_i64 = value
        else:
            entry.tag = c.LLAMA_KV_OVERRIDE_TYPE_FLOAT
            entry.value.val_f64 = value
    return array


def _fits(key: str, value: Any) -> bool:
    """Whether an override can hold an entry. The others are not llama.cpp's: the chat template, and keys of our own."""
    short = not isinstance(value, str) or len(value.encode(errors="surrogateescape")) < 128
    return len(key.encode()) < 128 and short and isinstance(value, (str, bool, int, float))


def _new_context(config: LLMConfig, model: int, n_ctx: int, kv_type: int, n_threads: int) -> int:
    params = c.llama_context_default_params()
    params.n_ctx = n_ctx
    params.n_batch = params.n_ubatch = min(N_BATCH, n_ctx)
    params.n_seq_max = 1
    params.n_threads = params.n_threads_batch = n_threads
    params.type_k = params.type_v = kv_type
    if kv_type == KV_TYPES["F32"]:
        # Flash attention rounds on the way: logits off by up to 1e-2, against 1e-5 without.
        params.flash_attn_type = c.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.no_perf = True
    _forget_error()
    context = c.llama_init_from_model(model, params)
    if not context:
        raise EngineError(f"{config.path}: no context of {n_ctx} tokens: {_first_error or 'no reason given'}")
    return int(context)
