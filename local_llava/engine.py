"""LLaVA, put together: pictures and a conversation in, an answer out.

Knows in which order the parts work, and which thread does what: conversations are read and checked in the caller's,
both models belong to one thread of their own (`worker`), which gives many answers at a time (`scheduler`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, aclosing, closing
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from local_llava import hub, prompt
from local_llava.chat import ChatFormat, Slot
from local_llava.conversation import Conversation, Images, as_list, as_messages
from local_llava.embeddings import Embeddings, Given
from local_llava.errors import EngineError, PromptError, UsageError
from local_llava.fitting import fit
from local_llava.images import ImageLike, load_image, preprocess_tiles, with_mode
from local_llava.loading import Loaded, load
from local_llava.request import Picture, Request, n_tokens, units_of
from local_llava.scheduler import Scheduler
from local_llava.schema.compiler import compile_schema
from local_llava.schema.constraint import Constraint, Vocabulary
from local_llava.schema.value import value_of
from local_llava.types import Chunk, Message, Options, Reply
from local_llava.worker import CLOSED, Ticket, Worker

log = logging.getLogger("local_llava")

OnPrefill = Callable[[int, int], None]


class Llava:
    """A loaded pair of models. Any thread and any event loop may ask it; many answers are given at the same time.

    with Llava.load("models/llava-llama-3-8b") as llava:
        print(llava.ask("What is in the picture?", images="cat.jpg").text)

    Attributes:
        files: The pair.
        options: The defaults of all answers.
        placement: Where its parts went, and how large they are.
        n_ctx: Tokens that one conversation may have.
        parallel: Answers that are given at the same time; more wait.
    """

    def __init__(self, loaded: Loaded, chat_format: ChatFormat, scheduler: Scheduler, stack: ExitStack) -> None:
        """Use `load`. `stack` frees both models."""
        self.files, self.options, self.placement = loaded.files, loaded.options, loaded.placement
        self.n_ctx, self.parallel = loaded.placement.n_ctx, loaded.placement.parallel
        self._llm, self._tower, self._encoder = loaded.llm, loaded.tower, loaded.encoder
        self._format, self._scheduler = chat_format, scheduler
        self._given = Given()
        self._vocabulary: Vocabulary | None = None
        # Of what callers' threads do with the language model's vocabulary: it must not be freed meanwhile.
        self._tokenizing = threading.Lock()
        self._closed = threading.Event()
        self._warned = False
        self._worker = Worker("local-llava", scheduler, self.parallel + self.options.max_waiting)
        stack.callback(_end, self._worker, self._closed, self._tokenizing)  # before the models are freed
        # Also where a program forgets to close: the thread must not be in llama.cpp when Python ends.
        self._close = weakref.finalize(self, _free, self._worker, stack)

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
        with ExitStack() as stack:
            loaded = load(files, settings, options, stack)
            chat_format = loaded.chat_format()
            placed = loaded.placement
            scheduler = Scheduler(
                loaded.llm,
                loaded.encoder,
                loaded.store,
                n_ctx=placed.n_ctx,
                parallel=placed.parallel,
                max_stall=loaded.options.max_stall,
                load_s=time.perf_counter() - started,
                n_cells_aside=placed.n_cells_aside,
            )
            return cls(loaded, chat_format, scheduler, stack.pop_all())

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
            UsageError: An option is unknown or out of its range, or the schema does not fit max_tokens.
            BusyError: Too many questions wait already.
            EngineError: llama.cpp or ggml failed.
        """
        return self.chat(question, images, on_prefill=on_prefill, **options)

    def chat(
        self,
        messages: Conversation,
        images: Images = (),
        *,
        on_prefill: OnPrefill | None = None,
        raw: bool = False,
        **options: Any,
    ) -> Reply:
        """Continue a conversation.

        What is still known of it, pictures included, from whatever conversation, is not computed again.

        Args:
            messages: Turns, oldest first, the last one the user's: `Message`s, or dictionaries with `role` and
                `content` as in OpenAI's chat format.
            images: Pictures for the last turn, besides those it brings.
            on_prefill: As of `ask`, as are the errors.
            raw: The text of the one message is the whole prompt, after its pictures, and the answer continues it: no
                chat format and no system prompt. Nothing in it acts as a control token here either.
            **options: Fields of `Options`, for this answer.
        """
        reply: Reply | None = None
        with closing(self.stream(messages, images, on_prefill=on_prefill, raw=raw, **options)) as chunks:
            for chunk in chunks:
                reply = chunk.reply
        return _complete(reply)

    def stream(
        self,
        messages: Conversation,
        images: Images = (),
        *,
        on_prefill: OnPrefill | None = None,
        raw: bool = False,
        **options: Any,
    ) -> Generator[Chunk, None, None]:
        """As `chat` (or, with a text for `messages`, as `ask`), but yields the answer in pieces as they come.

        The work begins with the first piece asked for. Closing the iterator stops it.
        """
        return self._chunks(self._request(messages, images, options, raw=raw), on_prefill)

    async def aask(self, question: str, images: Images = (), **options: Any) -> Reply:
        """`ask` for an event loop. Cancelling the task stops the work."""
        return await self.achat(question, images, **options)

    async def achat(self, messages: Conversation, images: Images = (), *, raw: bool = False, **options: Any) -> Reply:
        """`chat` for an event loop. Cancelling the task stops the work."""
        reply: Reply | None = None
        async with aclosing(self.astream(messages, images, raw=raw, **options)) as chunks:
            async for chunk in chunks:
                reply = chunk.reply
        return _complete(reply)

    async def astream(
        self, messages: Conversation, images: Images = (), *, raw: bool = False, **options: Any
    ) -> AsyncGenerator[Chunk, None]:
        """`stream` for an event loop. Closing the iterator, or cancelling the task, stops the work."""
        # Reading pictures may take long, above all from the network.
        request = await asyncio.to_thread(self._request, messages, images, options, raw=raw)
        async with aclosing(self._worker.aiterate(self._order(request))) as results:
            async for item in results:
                if isinstance(item, Chunk):
                    # Making the value may run code of the caller's, which must not hold up the event loop.
                    yield item if _has_no_value(item) else await asyncio.to_thread(_with_value, item, request)

    def embed_images(self, images: Images) -> NDArray[np.float32] | list[NDArray[np.float32]]:
        """Image embeddings as the language model gets them: float32 [n_images, n_tokens, n_embd].

        Of LLaVA-NeXT, where the number of tokens depends on a picture's size, pictures that do not all take as many
        come as a list with one [n_tokens, n_embd] for each. Either may be indexed and iterated by picture.

        Raises:
            ImageError: A picture cannot be read.
        """
        pictures = self._pictures(as_list(images), self.options)
        embeddings: list[NDArray[np.float32]] = []
        n = self._tower.images_per_graph
        for first in range(0, max(1, len(pictures)), n):  # new pictures of questions come in between
            some = pictures[first : first + n]
            known = self._encoded(some)
            embeddings += [known[picture.digest] for picture in some]
        if not pictures:
            return np.empty((0, self._tower.n_tokens, self._tower.n_embd), np.float32)
        # Copies: what is kept for questions must not change with them.
        return np.stack(embeddings) if len({len(e) for e in embeddings}) == 1 else [e.copy() for e in embeddings]

    def logits(self, question: str, images: Images = (), *, system: str | None = None) -> NDArray[np.float32]:
        """Logits of the answer's first token: float32 [n_vocab]."""
        options = {} if system is None else {"system": system}
        first: NDArray[np.float32] = self._logits(replace(self._request(question, images, options), given=()))[0]
        return first

    def answer_logits(
        self, prompt: Sequence[int | None], answer: Sequence[int], images: Images = ()
    ) -> NDArray[np.float32]:
        """Logits along an answer that is given, whatever the model would say: float32 [len(answer) + 1, n_vocab].

        The first ones follow the prompt, the others each token of the answer. It is evaluated many tokens at a time.

        Args:
            prompt: As `prompt_tokens` gives it, of this model or of another one with the same vocabulary.
            answer: Token ids.
            images: The pictures that the prompt has places for.

        Raises:
            ImageError: A picture cannot be read.
            PromptError: Prompt and answer do not fit the context, or the prompt is empty.
            UsageError: A token is not in the vocabulary, or the pictures do not fit the prompt's places.
            EngineError: llama.cpp or ggml failed.
        """
        started = time.perf_counter()
        pictures = self._pictures(as_list(images), self.options)
        n_vocab, total = self._llm.config.n_vocab, len(prompt) + len(answer)
        units, given = units_of(prompt, pictures, n_vocab), units_of(answer, (), n_vocab)
        if not units or total > self.n_ctx:
            raise PromptError(f"prompt and answer have {total} tokens; the context holds 1 to {self.n_ctx} (--n-ctx)")
        now = time.perf_counter()
        return self._logits(Request(units, pictures, self.options, None, now - started, now, given=given))

    def use_embeddings(self, images: Images, embeddings: Sequence[NDArray[np.float32]]) -> None:
        """Take embeddings for what the tower sees of pictures: the next questions about them do without it.

        Args:
            images: As of `ask`.
            embeddings: For each of them float32 [n_tokens, n_embd], as `embed_images` gives them, be it of another
                tower. The latest ones stay, 128 MiB.

        Raises:
            ImageError: A picture cannot be read.
            UsageError: The embeddings are of another number or shape, or not finite.
        """
        pictures = self._seen_by_tower(as_list(images), self.options)
        wanted = [(picture.arrangement.n_tokens, self._tower.n_embd) for picture in pictures]
        known = [np.array(values, np.float32, order="C") for values in embeddings]  # copies: the caller's may change
        if [values.shape for values in known] != wanted:
            raise UsageError(f"embeddings must be of shapes {wanted}, not {[values.shape for values in known]}")
        if not all(np.isfinite(values).all() for values in known):
            raise UsageError("embeddings must be finite numbers")
        pairs = list(zip(pictures, known, strict=True))
        # What is kept of pictures stays of use where they are the tower's own.
        own = self._worker.call(lambda: [self._encoder.is_own(*pair) for pair in pairs])
        for (picture, values), is_own in zip(pairs, own, strict=True):
            if is_own:
                self._given.forget(picture)
            else:
                self._given.keep(picture, values)

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
        parts = self._build(messages)
        tokens: list[int | None] = []
        for part in parts:
            if isinstance(part, Slot):
                tokens += [None] * self._tower.arrangement(sizes[part.image], how).n_tokens
            else:
                tokens += part
        return tokens

    def _request(
        self,
        conversation: Conversation,
        images: Images,
        options: Mapping[str, Any],
        raw: bool = False,
    ) -> Request:
        """All of an answer that needs no computing: what is wrong with the arguments or the pictures is raised here."""
        settings = self.options.updated(options, loaded=True)
        schema = None if settings.json_schema is None else compile_schema(settings.json_schema)
        messages = as_messages(conversation, images, None if raw else settings.system)
        self._worker.check()
        started = time.perf_counter()
        pictures = self._pictures([image for message in messages for image in message.images], settings)
        prepared_s = time.perf_counter() - started
        fitted = fit(messages, pictures, settings, self.n_ctx, lambda some: self._build(some, raw))
        constraint = None if schema is None else self._constraint(schema)
        if constraint is not None:
            constraint.require(min(settings.max_tokens, self.n_ctx - n_tokens(fitted.units)))
        now = time.perf_counter()
        return Request(fitted.units, fitted.pictures, settings, constraint, prepared_s, now, fitted.dropped)

    def _encoded(self, pictures: Sequence[Picture]) -> Embeddings:
        def order(ticket: Ticket[Embeddings]) -> None:
            self._scheduler.encode(pictures, ticket)

        with closing(self._worker.iterate(order, bounded=False)) as results:
            return next(results)

    def _logits(self, request: Request) -> NDArray[np.float32]:
        """Those of a request that has an answer given: float32 [n, n_vocab]."""
        with closing(self._worker.iterate(self._order(request))) as results:
            parts = [item for item in results if isinstance(item, np.ndarray)]
        if not parts:
            raise EngineError("the model was closed before the logits were complete")
        return np.concatenate(parts)

    def _order(self, request: Request) -> Callable[[Ticket[Any]], None]:
        scheduler = self._scheduler
        return lambda ticket: scheduler.add(request, ticket)

    def _build(self, messages: Sequence[Message], raw: bool = False) -> prompt.Prompt:
        with self._using_vocabulary():
            return prompt.build(messages, self._format, self._llm.tokenize, raw)

    def _constraint(self, schema: str) -> Constraint:
        with self._using_vocabulary():
            if self._vocabulary is None:
                self._vocabulary = self._llm.vocabulary()
        return Constraint(schema, self._vocabulary)

    @contextlib.contextmanager
    def _using_vocabulary(self) -> Iterator[None]:
        with self._tokenizing:
            if self._closed.is_set():
                raise UsageError(CLOSED)
            yield

    def _pictures(self, images: Sequence[ImageLike], options: Options) -> tuple[Picture, ...]:
        return tuple(self._given.applied(picture) for picture in self._seen_by_tower(images, options))

    def _seen_by_tower(self, images: Sequence[ImageLike], options: Options) -> list[Picture]:
        if len(images) > 1 and not self._warned:
            self._warned = True
            log.warning("%d pictures in one conversation: LLaVA was trained on one, and may mix them up", len(images))
        how = with_mode(self._tower.preprocessing, options.preprocess)
        pictures = []
        for source in images:
            image = load_image(source)
            pictures.append(Picture.of(preprocess_tiles(image, how), self._tower.arrangement(image.size, how)))
        return pictures

    def _chunks(self, request: Request, on_prefill: OnPrefill | None) -> Generator[Chunk, None, None]:
        with closing(self._worker.iterate(self._order(request))) as results:
            for item in results:
                if isinstance(item, Chunk):
                    yield item if _has_no_value(item) else _with_value(item, request)
                elif on_prefill:
                    on_prefill(item.done, item.total)


def _has_no_value(chunk: Chunk) -> bool:
    return chunk.reply is None or chunk.reply.parsed is None


def _with_value(chunk: Chunk, request: Request) -> Chunk:
    """The last piece of a complete answer to a schema, with the value in the place of its text."""
    assert chunk.reply is not None
    return replace(chunk, reply=replace(chunk.reply, parsed=value_of(chunk.reply.parsed, request.options.json_schema)))


def _free(worker: Worker, stack: ExitStack) -> None:
    """Free both models; not before a step that is under way has ended, also where this is called in the middle of it,
    as the garbage collector may do."""
    if worker.is_current():
        threading.Thread(target=stack.close, name="local-llava-close").start()
    else:
        stack.close()


def _end(worker: Worker, closed: threading.Event, tokenizing: threading.Lock) -> None:
    with tokenizing:
        closed.set()
    worker.close()


def _complete(reply: Reply | None) -> Reply:
    if reply is None:
        raise EngineError("the model was closed before the answer was complete")
    return reply
