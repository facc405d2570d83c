"""What the server and a model's process say to each other, and how it is written into their pipes.

Knows the messages and the frames, and how errors of `local_llava.errors` are named so that they come out of the pipe as
themselves. Both ends are the same program, run by the same user: frames are pickles. A frame holds all messages that
were there when it was written, so that under load its cost is shared.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from local_llava import errors
from local_llava.hub import Checkpoint
from local_llava.server.backend import Job
from local_llava.types import Chunk, ModelFiles

Source: TypeAlias = "ModelFiles | Checkpoint"
"""What is loaded: a pair, or a checkpoint of which one is made and kept first."""

LENGTH_BYTES = 8
"""Every frame begins with its length, little endian."""


@dataclass(frozen=True)
class Prepare:
    """Have the pair on disk, which may mean to convert it. Answered with `Prepared` or a `Failed` without number."""

    source: Source


@dataclass(frozen=True)
class Load:
    """Load the pair, in place of one that is loaded. Answered with `Loaded` or a `Failed` without number."""

    options: dict[str, Any]
    """Fields of `Options`."""
    reserved: int
    """Bytes of the computer's memory that belong to other models; see `local_llava.memory.reserve`."""


@dataclass(frozen=True)
class Ask:
    """Give an answer: `Said` until one has the reply, or `Failed`."""

    number: int
    job: Job


@dataclass(frozen=True)
class Cancel:
    """Nobody waits for this answer any more. Nothing need come after."""

    number: int


@dataclass(frozen=True)
class Close:
    """Free everything, and end."""


@dataclass(frozen=True)
class Prepared:
    """The pair is on disk."""

    files: ModelFiles


@dataclass(frozen=True)
class Loaded:
    """The pair is in memory."""

    n_ctx: int
    """Tokens of one conversation."""
    parallel: int
    """Answers at the same time."""
    weights: int
    """Bytes of the weights in the computer's memory. They are mapped from the files: the system counts them as free."""
    short: bool
    """Whether something was given up for lack of memory, such as a part of the context."""


@dataclass(frozen=True)
class Said:
    """A piece of an answer."""

    number: int
    chunk: Chunk


@dataclass(frozen=True)
class Failed:
    """What was asked for is not to be had."""

    number: int | None
    """Of the answer; None where it is the model that is not to be had."""
    kind: str
    """Name of the class in `local_llava.errors`; "" for a defect."""
    text: str

    @classmethod
    def of(cls, number: int | None, error: BaseException) -> Failed:
        """What to send of an error."""
        # A class that is at home elsewhere is told as the one that it is a kind of.
        kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__]
        if isinstance(error, MemoryError):
            return cls(number, errors.NotEnoughMemoryError.__name__, "the model's process has not enough memory")
        return cls(number, kinds[0], str(error)) if kinds else cls(number, "", f"{type(error).__name__}: {error}")

    def error(self) -> Exception:
        """The error itself."""
        if not self.kind:
            return RuntimeError(f"in the model's process: {self.text}")
        error: Exception = getattr(errors, self.kind)(self.text)
        return error


Message: TypeAlias = "Prepare | Load | Ask | Cancel | Close | Prepared | Loaded | Said | Failed"


def pack(messages: Sequence[Message]) -> bytes:
    """A frame with its length before it."""
    content = pickle.dumps(messages, pickle.HIGHEST_PROTOCOL)
    return len(content).to_bytes(LENGTH_BYTES, "little") + content


def length(head: bytes) -> int:
    """Bytes of a frame, by the bytes before it."""
    return int.from_bytes(head, "little")


def unpack(content: bytes) -> Sequence[Message]:
    """The messages of a frame."""
    messages: Sequence[Message] = pickle.loads(content)
    return messages
