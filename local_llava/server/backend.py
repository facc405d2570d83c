"""What the routes ask of the models, and what they get: the seam between HTTP and the engine.

Knows neither. `model_manager.ModelManager` is the one implementation; tests of the routes bring their own.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from local_llava.errors import EngineError, LocalLlavaError
from local_llava.types import Chunk, Message


class UnknownModelError(LocalLlavaError):
    """No model on this computer is called that."""


class EngineDiedError(EngineError):
    """The process that held the model ended while it was at work: a crash, or the system ended it."""


class RestartingError(LocalLlavaError):
    """The model's process died several times in a row, and is not started again yet."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StoppingError(LocalLlavaError):
    """The server was asked to end, and takes no new questions."""


@dataclass(frozen=True)
class ModelInfo:
    """A model on this computer."""

    name: str
    """As requests name it, `NAME:TYPE`; the default model's may be anything."""
    size: int
    """Bytes of both files."""
    modified: float
    """Seconds since 1970."""
    digest: str
    """Names its content, hexadecimal."""
    quant: str = ""
    """Type of the language model, such as Q4_K_M; "" where the file does not say."""
    family: str = "llava"
    """Architecture of the language model, such as llama or phi3."""
    parameters: int = 0
    """Of the language model; 0 if not known."""
    loaded: bool = False
    expires: float | None = None
    """When it is unloaded if nobody asks, seconds since 1970; None for never, or where it is not loaded."""
    n_ctx: int = 0
    """Tokens of a conversation, where it is loaded."""
    template: str = ""
    """Its chat template."""


@dataclass(frozen=True)
class Job:
    """One answer to be given."""

    messages: Sequence[Message]
    """Pictures in them are bytes of a file, or what `local_llava.images.load_image` takes and the guard let through."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Options` for this answer."""
    raw: bool = False
    """Whether the one message's text is the whole prompt, without the chat's format around it."""


@dataclass(frozen=True)
class Health:
    """How things stand."""

    status: str
    """"ok", or "restarting" while a model's process is started again after it died, or "failing" in a crash loop."""
    loaded: tuple[str, ...]
    """Names of the models in memory."""
    answering: int
    """Answers being given, or waiting."""
    restarts: int
    """Times that a model's process died and was started again."""
    detail: str = ""
    """What went wrong last, in words."""


class Backend(Protocol):
    """The models, by name."""

    def models(self) -> list[ModelInfo]:
        """All that may be asked; the default one first."""
        ...

    def info(self, name: str | None) -> ModelInfo:
        """One of them; None or "" for the default one. Clients of Ollama may put `:latest` behind a name.

        Raises:
            UnknownModelError: There is none of that name. Nothing is downloaded.
        """
        ...

    def stream(self, name: str | None, job: Job, *, keep_alive_s: float | None = None) -> AsyncGenerator[Chunk, None]:
        """An answer in pieces; the last one has `reply`. Loads the model if need be. Closing it stops the work.

        Args:
            name: Of the model, as `info` has it (metrics are kept by this name); None or "" for the default one.
            job: What is asked.
            keep_alive_s: Seconds that the model stays in memory after this; None for the server's default.

        Raises:
            UnknownModelError: There is no such model.
            BusyError: Too many questions wait.
            RestartingError: The model's process keeps dying.
            EngineDiedError: It died with this answer under way.
            LocalLlavaError: As `Llava.astream`.
        """
        ...

    async def load(self, name: str | None, *, keep_alive_s: float | None = None) -> None:
        """Have a model in memory; with `keep_alive_s` 0, have it out of memory as soon as its answers are given."""
        ...

    def health(self) -> Health:
        """How things stand, without waiting."""
        ...
