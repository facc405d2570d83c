"""The language model: load, tokenize, evaluate tokens and image embeddings, sample.

This package is the one importer of llama_cpp, at the level of llama.h. Knows no chat format and no pictures.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import unicodedata
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import llama_cpp.llama_cpp as c

from local_llava.corrections import open_model
from local_llava.detokenizer import ByteLevelDetokenizer, Detokenizer, SentencePieceDetokenizer
from local_llava.devices import physical_cores
from local_llava.errors import PromptError
from local_llava.gguf_file import GGUFFile
from local_llava.llm.context import Context, InterruptedDecodeError
from local_llava.llm.embedding import TokenEmbeddings
from local_llava.llm.native import KV_TYPES, Settings, load_model, new_context, start
from local_llava.llm.observing import Observation, Observer
from local_llava.llm.rows import Rows
from local_llava.llm.sampler import Sampler
from local_llava.llm_file import LLMConfig, check_llm
from local_llava.llm_vocab import CONTROL, QWEN2_PRE, special_tokens
from local_llava.schema.constraint import Vocabulary
from local_llava.sentencepiece import SentencePiece, TextRun
from local_llava.types import KVType, Options

__all__ = ["LLM", "N_BATCH", "Context", "InterruptedDecodeError", "Observer", "Rows"]

log = logging.getLogger("local_llava")

N_BATCH = 256
"""Tokens that one call evaluates at most, unless another number is asked for: more of them read the weights less often,
but progress, Ctrl-C and other answers wait for each call."""


class LLM(Context):
    """A language model, with the context that its answers are given in. One thread at a time may use it.

    Attributes:
        gguf: The file's header, corrected.
        config: The model's sizes and vocabulary.
        specials: Text -> id of the tokens that only a template may write.
        token_embeddings: Gives rows of the embedding matrix.
    """

    def __init__(
        self,
        gguf: GGUFFile,
        config: LLMConfig,
        model: int,
        context: int,
        settings: Settings,
        stack: ExitStack,
        observation: Observation | None = None,
    ) -> None:
        """Use `load`."""
        self.token_embeddings = TokenEmbeddings(config.path, gguf.tensors["token_embd.weight"])
        super().__init__(context, settings, config.n_vocab, self.token_embeddings, observation)
        self.gguf, self.config, self.specials = gguf, config, special_tokens(gguf)
        self._model, self._settings, self._stack = model, settings, stack
        self._vocab = c.llama_model_get_vocab(model)
        types = gguf.metadata["tokenizer.ggml.token_type"]
        self._control = {i for i in self.specials.values() if types[i] == CONTROL}

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
        observer: Observer | None = None,
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
            observer: Looks at what the matrices are multiplied with; slower.

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
            observation = None if observer is None else Observation(observer)
            context = new_context(config, model, settings, observation)
            stack.callback(c.llama_free, context)
            return cls(gguf, config, model, context, settings, stack.pop_all(), observation)

    def close(self) -> None:
        """Free the memory; the model cannot be used after."""
        self._stack.close()

    def another_context(self, n_cells: int) -> Context:
        """Another KV cache of the model, for one sequence; it is freed with the model.

        Args:
            n_cells: Tokens that it holds, a multiple of 256.

        Raises:
            EngineError: llama.cpp failed, mostly for lack of memory.
        """
        n_batch = min(self.n_batch, n_cells)
        settings = replace(self._settings, n_cells=n_cells, n_seq_max=1, n_batch=n_batch, n_outputs=1)
        handle = new_context(self.config, self._model, settings)
        self._stack.callback(c.llama_free, handle)
        return Context(handle, settings, self.config.n_vocab, self.token_embeddings)

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

    def vocabulary(self) -> Vocabulary:
        """The tokens as a constraint needs them."""
        ends = [i for i in range(self.config.n_vocab) if self.ends_turn(i)]
        pieces = [self.piece(i) for i in range(self.config.n_vocab)]
        return Vocabulary(pieces, ends, self.specials.values())

    def sampler(self, options: Options) -> Sampler:
        """A new sampler for an answer of this model."""
        return Sampler(options, self.config.n_vocab)
