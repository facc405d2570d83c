"""LLaVA, put together: pictures and a question in, an answer out.

Knows in which order the parts work. The tower is `vision`'s, the language model `llm`'s, prompts `chat`'s.
"""

from __future__ import annotations

import codecs
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from local_llava import hub, prompt
from local_llava.chat import ChatFormat, Slot
from local_llava.errors import ModelFileError, PromptError, UsageError
from local_llava.gguf_file import GGUFFile
from local_llava.images import ImageLike, load_image, preprocess
from local_llava.llm import LLM
from local_llava.llm_file import check_pair
from local_llava.prompt import Prompt
from local_llava.types import FinishReason, KVType, Message, ModelFiles, Options, Reply, Timings
from local_llava.vision import VisionTower

log = logging.getLogger("local_llava")

Images = ImageLike | Sequence[ImageLike]
Prefill = Callable[[int, int], None]


class Llava:
    """A loaded pair of models. One thread at a time may use it.

    with Llava.load("models/llava-llama-3-8b") as llava:
        print(llava.ask("What is in the picture?", images="cat.jpg").text)
    """

    def __init__(self, files: ModelFiles, llm: LLM, tower: VisionTower, load_s: float, stack: ExitStack) -> None:
        """Use `load`."""
        self.files = files
        self._llm, self._tower, self._load_s, self._stack = llm, tower, load_s, stack
        vocab = llm.config.vocab
        if vocab.chat_template is None:
            raise ModelFileError(f"{files.model}: tokenizer.chat_template is missing; it says how a question is put")
        self._format = ChatFormat(vocab.chat_template, llm.specials, vocab.bos, vocab.eos, vocab.add_bos)

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str] | None = None,
        mmproj: str | os.PathLike[str] | None = None,
        *,
        n_ctx: int | None = None,
        kv_type: KVType = "F16",
        n_threads: int | None = None,
        n_gpu_layers: int = -1,
        flash_attention: bool = False,
    ) -> Llava:
        """Load a pair.

        Args:
            model: The language model's GGUF; or a directory with one pair; or a checkpoint, which is converted once and
                kept; None for the built-in model.
            mmproj: Tower and projector; None to take the one beside `model`.
            n_ctx: Context length in tokens; None for the lesser of 4096 and what the model was trained for.
            kv_type: Type of the KV cache: F32, F16 or Q8_0.
            n_threads: CPU threads; None for as many as the process may run on.
            n_gpu_layers: Layers to put on the GPU, if there is one; -1 for all. 0 keeps the tower on the CPU, too.
            flash_attention: Of the tower: less memory, for an error of about 3e-4.

        Raises:
            ModelFileError: A file cannot be used, or the two do not belong together.
            CheckpointError: A checkpoint cannot be converted.
            UsageError: An argument is not accepted.
            EngineError: llama.cpp or ggml failed, mostly for lack of memory.
        """
        started = time.perf_counter()
        files = hub.resolve(model, mmproj)
        with ExitStack() as stack:
            tower = VisionTower.load(
                files.mmproj, n_threads=n_threads, use_gpu=n_gpu_layers != 0, flash_attention=flash_attention
            )
            stack.callback(tower.close)
            llm = LLM.load(files.model, n_ctx=n_ctx, kv_type=kv_type, n_threads=n_threads, n_gpu_layers=n_gpu_layers)
            stack.callback(llm.close)
            check_pair(llm.config, files.mmproj, tower.n_embd)
            hub.check_pair_ids(llm.gguf, GGUFFile.open(files.mmproj))
            return cls(files, llm, tower, time.perf_counter() - started, stack.pop_all())

    def __enter__(self) -> Llava:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the memory of both models; they cannot be used after."""
        self._stack.close()

    def ask(
        self,
        question: str,
        images: Images = (),
        *,
        on_text: Callable[[str], None] | None = None,
        on_prefill: Prefill | None = None,
        **options: Any,
    ) -> Reply:
        """Ask a question about pictures.

        Args:
            question: What the user typed. It is text: nothing in it acts as a control token.
            images: A picture, or several: paths or PIL images.
            on_text: Called with each piece of the answer as it comes.
            on_prefill: Called with the prompt tokens done and their total while the prompt is read.
            **options: Fields of `Options`.

        Raises:
            ImageError: A picture cannot be read.
            PromptError: The prompt does not fit the context.
            UsageError: An option is unknown or out of its range.
            EngineError: llama.cpp or ggml failed.
        """
        settings = _options(options)
        started = time.perf_counter()
        embeddings = self.embed_images(images)
        encoded = time.perf_counter()
        n_prompt = self._prefill(self._prompt(question, len(embeddings), settings.system), embeddings, on_prefill)
        prefilled = time.perf_counter()
        tokens, text, reason, n_sampled = self._generate(settings, on_text)
        done = time.perf_counter()
        timings = Timings(
            load_s=self._load_s,
            image_s=encoded - started,
            prefill_s=prefilled - encoded,
            decode_s=done - prefilled,
            prompt_tokens=n_prompt,
            image_tokens=len(embeddings) * self._tower.n_tokens,
            completion_tokens=n_sampled,
        )
        return Reply(text, tuple(tokens), reason, timings)

    def embed_images(self, images: Images) -> NDArray[np.float32]:
        """Image embeddings as the language model gets them: float32 [n_images, n_tokens, n_embd].

        Raises:
            ImageError: A picture cannot be read.
        """
        if isinstance(images, (str, os.PathLike, Image.Image)):
            images = [images]
        pictures = [load_image(image) for image in images]
        if not pictures:
            return np.empty((0, self._tower.n_tokens, self._tower.n_embd), np.float32)
        return self._tower.encode(preprocess(pictures, self._tower.preprocessing))

    def logits(self, question: str, images: Images = (), *, system: str | None = None) -> NDArray[np.float32]:
        """Logits of the answer's first token: float32 [n_vocab]."""
        embeddings = self.embed_images(images)
        self._prefill(self._prompt(question, len(embeddings), system), embeddings, None)
        return self._llm.logits()

    def prompt_tokens(self, question: str, n_images: int = 0, *, system: str | None = None) -> list[int | None]:
        """The prompt of a question as token ids, None for each token of a picture."""
        tokens: list[int | None] = []
        for part in self._prompt(question, n_images, system):
            tokens += [None] * self._tower.n_tokens if isinstance(part, Slot) else part
        return tokens

    def _prompt(self, question: str, n_images: int, system: str | None) -> Prompt:
        messages = [Message("system", system)] if system is not None else []
        messages.append(Message("user", question, images=tuple(range(n_images))))
        return prompt.build(messages, self._format, self._llm.tokenize)

    def _prefill(self, parts: Prompt, embeddings: NDArray[np.float32], progress: Prefill | None) -> int:
        """Evaluate a prompt in an empty context; returns its length."""
        total = sum(self._tower.n_tokens if isinstance(part, Slot) else len(part) for part in parts)
        if total >= self._llm.n_ctx:
            pictures = f", {len(embeddings) * self._tower.n_tokens} of them for pictures" if len(embeddings) else ""
            raise PromptError(
                f"the prompt has {total} tokens{pictures}, the context {self._llm.n_ctx}: "
                "shorten the question, or raise n_ctx (--n-ctx)"
            )
        self._llm.clear()
        report = None if progress is None else lambda _: progress(self._llm.n_past, total)
        for i, part in enumerate(parts):
            inputs = embeddings[part.image] if isinstance(part, Slot) else part
            self._llm.evaluate(inputs, last=i == len(parts) - 1, progress=report)
        return total

    def _generate(
        self, options: Options, on_text: Callable[[str], None] | None
    ) -> tuple[list[int], str, FinishReason, int]:
        """Sample until the turn ends or a limit is reached: tokens, text, why it ended, number of tokens sampled."""
        tokens: list[int] = []
        pieces: list[str] = []
        # A character may be spread over several tokens.
        decoder = codecs.getincrementaldecoder("utf-8")("replace")

        def emit(piece: str) -> None:
            if piece:
                pieces.append(piece)
                if on_text:
                    on_text(piece)

        reason: FinishReason = "length"
        sampler = self._llm.sampler(options)
        try:
            while True:
                token = sampler.sample()
                if self._llm.ends_turn(token):
                    reason = "stop"
                    break
                tokens.append(token)
                emit(decoder.decode(self._llm.piece(token)))
                if len(tokens) == options.max_tokens or self._llm.n_past == self._llm.n_ctx:
                    break
                self._llm.evaluate([token], last=True)
        finally:
            sampler.close()
        emit(decoder.decode(b"", final=True))
        return tokens, "".join(pieces), reason, len(tokens) + (reason == "stop")


def _options(values: dict[str, Any]) -> Options:
    known = Options.__dataclass_fields__
    unknown = [name for name in values if name not in known]
    if unknown:
        raise UsageError(f"no option is called {unknown[0]!r}; there are {', '.join(sorted(known))}")
    return replace(Options(), **values)
