"""LLaVA, put together: pictures and a conversation in, an answer out.

Knows in which order the parts work, and which thread does what: pictures are read and prepared in the caller's, both
models belong to one thread of their own (`worker`), which answers one request after the other.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, aclosing, closing
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from local_llava import hub, memory, prompt
from local_llava.chat import ChatFormat, Slot
from local_llava.conversation import Conversation, Images, as_list, as_messages
from local_llava.corrections import corrected
from local_llava.errors import EngineError, ModelFileError, UsageError
from local_llava.generation import Context, Picture, Progress, Request
from local_llava.gguf_file import GGUFFile
from local_llava.images import ImageLike, load_image, preprocess_tiles, with_mode
from local_llava.llm import LLM
from local_llava.llm_file import check_llm, check_pair
from local_llava.mmproj import check_mmproj
from local_llava.pictures import anyres
from local_llava.schema.compiler import compile_schema
from local_llava.types import Chunk, Message, ModelFiles, Options, Preprocessing, Reply
from local_llava.vision import VisionTower
from local_llava.worker import Worker

log = logging.getLogger("local_llava")

OnPrefill = Callable[[int, int], None]


class Llava:
    """A loaded pair of models. Any thread and any event loop may ask it; answers are given one after the other.

    with Llava.load("models/llava-llama-3-8b") as llava:
        print(llava.ask("What is in the picture?", images="cat.jpg").text)

    Attributes:
        files: The pair.
        options: The defaults of all answers.
        n_ctx: Tokens that the context holds.
    """

    def __init__(
        self,
        files: ModelFiles,
        options: Options,
        llm: LLM,
        tower: VisionTower,
        chat_format: ChatFormat,
        load_s: float,
        stack: ExitStack,
    ) -> None:
        """Use `load`. `stack` frees both models."""
        self.files, self.options, self.n_ctx = files, options, llm.n_ctx
        self._llm, self._tower, self._format, self._load_s = llm, tower, chat_format, load_s
        self._context = Context(llm, tower)
        self._warned = False
        self._worker = Worker("local-llava")
        stack.callback(self._worker.close)  # before the models are freed
        # Also where a program forgets to close: the thread must not be in llama.cpp when Python ends.
        self._close = weakref.finalize(self, stack.close)

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str] | None = None,
        mmproj: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> Llava:
        """Load a pair.

        Args:
            model: The language model's GGUF; or a directory with one pair; or a checkpoint, which is converted once and
                kept; or the name of a model that was pulled, or of a repository in the Hugging Face cache; None for the
                built-in model. Nothing is downloaded.
            mmproj: Tower and projector; None to take the one beside `model`.
            **options: Fields of `Options`: how to load, and the defaults of all answers.

        Raises:
            ModelFileError: A file cannot be used, or the two do not belong together.
            CheckpointError: A checkpoint cannot be converted.
            UsageError: An option is unknown or not accepted.
            EngineError: There is not enough memory, or llama.cpp or ggml failed.
        """
        started = time.perf_counter()
        settings = Options().updated(options)
        if settings.json_schema is not None:
            compile_schema(settings.json_schema)
        files = hub.resolve(model, mmproj)
        gguf, mmproj_gguf = (corrected(GGUFFile.open(path)).gguf for path in (files.model, files.mmproj))
        llm_config, tower_config = check_llm(gguf), check_mmproj(mmproj_gguf)
        check_pair(llm_config, files.mmproj, tower_config.n_out)
        hub.check_pair_ids(gguf, mmproj_gguf)
        largest = anyres.most_tokens(tower_config.preprocessing, tower_config.n_tokens)
        n_ctx = memory.choose_n_ctx(llm_config, files, memory.picture_bytes(tower_config), settings, largest)
        with ExitStack() as stack:
            tower = VisionTower.load(
                files.mmproj,
                n_threads=settings.n_threads,
                use_gpu=settings.n_gpu_layers != 0,
                flash_attention=settings.flash_attention,
            )
            stack.callback(tower.close)
            llm = LLM.load(
                files.model,
                n_ctx=n_ctx,
                kv_type=settings.kv_type,
                n_threads=settings.n_threads,
                n_gpu_layers=settings.n_gpu_layers,
            )
            stack.callback(llm.close)
            chat_format = _chat_format(files, llm)
            load_s = time.perf_counter() - started
            return cls(files, settings, llm, tower, chat_format, load_s, stack.pop_all())

    def __enter__(self) -> Llava:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop what is going on and free the memory of both models; they cannot be used after."""
        self._close()

    def ask(self, question: str, images: Images = (), *, on_prefill: OnPrefill | None = None, **options: Any) -> Reply:
        """Ask a question about pictures.

        Args:
            question: What the user typed. It is text: nothing in it acts as a control token.
            images: A picture, or several: whatever `local_llava.images.load_image` takes.
            on_prefill: Called with the prompt tokens done and their total while the prompt is read.
            **options: Fields of `Options`, for this answer.

        Raises:
            ImageError: A picture cannot be read.
            PromptError: The prompt does not fit the context.
            UsageError: An option is unknown or out of its range.
            EngineError: llama.cpp or ggml failed.
        """
        return self.chat(question, images, on_prefill=on_prefill, **options)

    def chat(
        self, messages: Conversation, images: Images = (), *, on_prefill: OnPrefill | None = None, **options: Any
    ) -> Reply:
        """Continue a conversation.

        What the context still holds of it, pictures included, is not computed again.

        Args:
            messages: Turns, oldest first, the last one the user's: `Message`s, or dictionaries with `role` and
                `content` as in OpenAI's chat format.
            images: Pictures for the last turn, besides those it brings.
            on_prefill: As of `ask`, as are the errors.
            **options: Fields of `Options`, for this answer.
        """
        reply: Reply | None = None
        with closing(self.stream(messages, images, on_prefill=on_prefill, **options)) as chunks:
            for chunk in chunks:
                reply = chunk.reply
        return _complete(reply)

    def stream(
        self, messages: Conversation, images: Images = (), *, on_prefill: OnPrefill | None = None, **options: Any
    ) -> Generator[Chunk, None, None]:
        """As `chat` (or, with a text for `messages`, as `ask`), but yields the answer in pieces as they come.

        The work begins with the first piece asked for. Closing the iterator stops it.
        """
        return self._chunks(self._answer(messages, images, options), on_prefill)

    async def aask(self, question: str, images: Images = (), **options: Any) -> Reply:
        """`ask` for an event loop. Cancelling the task stops the work."""
        return await self.achat(question, images, **options)

    async def achat(self, messages: Conversation, images: Images = (), **options: Any) -> Reply:
        """`chat` for an event loop. Cancelling the task stops the work."""
        reply: Reply | None = None
        async with aclosing(self.astream(messages, images, **options)) as chunks:
            async for chunk in chunks:
                reply = chunk.reply
        return _complete(reply)

    async def astream(self, messages: Conversation, images: Images = (), **options: Any) -> AsyncGenerator[Chunk, None]:
        """`stream` for an event loop. Closing the iterator, or cancelling the task, stops the work."""
        # Reading pictures may take long, above all from the network.
        items = await asyncio.to_thread(self._answer, messages, images, options)
        async with aclosing(self._worker.aiterate(items)) as results:
            async for item in results:
                if isinstance(item, Chunk):
                    yield item

    def embed_images(self, images: Images) -> NDArray[np.float32] | list[NDArray[np.float32]]:
        """Image embeddings as the language model gets them: float32 [n_images, n_tokens, n_embd].

        Of LLaVA-NeXT, where the number of tokens depends on a picture's size, pictures that do not all take as many
        come as a list with one [n_tokens, n_embd] for each. Either may be indexed and iterated by picture.

        Raises:
            ImageError: A picture cannot be read.
        """
        pictures = self._pictures(as_list(images), self.options)
        known = self._worker.call(lambda: self._context.embeddings(pictures))
        if not pictures:
            return np.empty((0, self._tower.n_tokens, self._tower.n_embd), np.float32)
        embeddings = [known[picture.digest] for picture in pictures]
        return np.stack(embeddings) if len({len(e) for e in embeddings}) == 1 else embeddings

    def logits(self, question: str, images: Images = (), *, system: str | None = None) -> NDArray[np.float32]:
        """Logits of the answer's first token: float32 [n_vocab]."""
        prepared = self._prepare(question, images, {} if system is None else {"system": system})
        return self._worker.call(lambda: self._context.logits(self._request(*prepared)))

    def prompt_tokens(self, question: str, images: Images | int = (), *, system: str | None = None) -> list[int | None]:
        """The prompt of a question as token ids, None for each token of a picture.

        Args:
            question: As of `ask`.
            images: As of `ask`; or, where all pictures take as many tokens, how many there are.
            system: System prompt.

        Raises:
            ImageError: A picture cannot be read.
            UsageError: The number of pictures is not enough: the model's pictures take as many tokens as their size
                asks for.
        """
        how = with_mode(self._tower.preprocessing, self.options.preprocess)
        if isinstance(images, int):
            if images and how.grid:
                raise UsageError("images must be the pictures, not their number: their tokens depend on their sizes")
            messages = as_messages(question, [*range(images)], system)
            sizes = [(how.image_size, how.image_size)] * images
        else:
            messages = as_messages(question, images, system)
            sizes = [load_image(image).size for message in messages for image in message.images]
        parts = self._worker.call(lambda: prompt.build(messages, self._format, self._llm.tokenize))
        tokens: list[int | None] = []
        for part in parts:
            tokens += [None] * self._arrangement(sizes[part.image], how).n_tokens if isinstance(part, Slot) else part
        return tokens

    def _answer(
        self, conversation: Conversation, images: Images, options: Mapping[str, Any]
    ) -> Generator[Progress | Chunk, None, None]:
        """A job for the worker. What is wrong with the arguments or the pictures is raised here, before it waits."""
        prepared = self._prepare(conversation, images, options)

        def job() -> Generator[Progress | Chunk, None, None]:
            yield from self._context.answer(self._request(*prepared), self._load_s)

        return job()

    def _prepare(
        self, conversation: Conversation, images: Images, options: Mapping[str, Any]
    ) -> tuple[list[Message], tuple[Picture, ...], Options, str | None, float]:
        """The part of a request that needs no model: messages, pictures, options, schema, seconds taken."""
        settings = self.options.updated(options, loaded=True)
        schema = None if settings.json_schema is None else compile_schema(settings.json_schema)
        messages = as_messages(conversation, images, settings.system)
        started = time.perf_counter()
        pictures = self._pictures([image for message in messages for image in message.images], settings)
        return messages, pictures, settings, schema, time.perf_counter() - started

    def _request(self, messages: Sequence[Message], *rest: Any) -> Request:
        """In the worker's thread, since it takes the model's tokenizer."""
        return Request(prompt.build(messages, self._format, self._llm.tokenize), *rest)

    def _pictures(self, images: Sequence[ImageLike], options: Options) -> tuple[Picture, ...]:
        if len(images) > 1 and not self._warned:
            self._warned = True
            log.warning("%d pictures in one conversation: LLaVA was trained on one, and may mix them up", len(images))
        how = with_mode(self._tower.preprocessing, options.preprocess)
        pictures = []
        for source in images:
            image = load_image(source)
            pictures.append(Picture.of(preprocess_tiles(image, how), self._arrangement(image.size, how)))
        return tuple(pictures)

    def _arrangement(self, size: tuple[int, int], how: Preprocessing) -> anyres.Arrangement:
        """Of a picture of that width and height."""
        tower = self._tower
        return anyres.arrangement(size[1], size[0], how, tower.n_tokens, tower.newline is not None)

    def _chunks(self, items: Iterator[Progress | Chunk], on_prefill: OnPrefill | None) -> Generator[Chunk, None, None]:
        with closing(self._worker.iterate(items)) as results:
            for item in results:
                if isinstance(item, Chunk):
                    yield item
                elif on_prefill:
                    on_prefill(item.done, item.total)


def _complete(reply: Reply | None) -> Reply:
    if reply is None:
        raise EngineError("the model was closed before the answer was complete")
    return reply


def _chat_format(files: ModelFiles, llm: LLM) -> ChatFormat:
    vocab = llm.config.vocab
    if vocab.chat_template is None:
        raise ModelFileError(f"{files.model}: tokenizer.chat_template is missing; it says how a question is put")
    return ChatFormat(vocab.chat_template, llm.specials, vocab.bos, vocab.eos, vocab.add_bos)
