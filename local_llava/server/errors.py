"""The one place where an error becomes an HTTP status. Each API puts it into its own form.

Knows the exceptions of `local_llava.errors` and `backend`. Anything else is a defect: status 500, and in the log.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

from local_llava.errors import BusyError, EngineError, ImageError, LocalLlavaError, PromptError, UsageError
from local_llava.server.backend import EngineDiedError, RestartingError, StoppingError, UnknownModelError

log = logging.getLogger("local_llava")


class RequestError(LocalLlavaError):
    """A request that is refused: its form is wrong, or a limit of the server forbids it."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        """
        Args:
            message: One line for the client's user.
            status: Of HTTP.
            param: The field that is wrong, such as `messages[0].content`.
            code: In OpenAI's words, such as "invalid_value".
        """
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def unsupported(name: str, reason: str) -> RequestError:
    """A field that asks for what there is not."""
    return RequestError(f"{name} {reason}", param=name, code="unsupported_value")


@dataclass(frozen=True)
class Failure:
    """What a client is told of an error."""

    status: int
    message: str
    type: str
    """In OpenAI's words: invalid_request_error, authentication_error, not_found_error, rate_limit_error,
    server_error."""
    param: str | None = None
    code: str | None = None
    retry_after_s: float | None = None
    """Sent as Retry-After, in whole seconds."""

    @property
    def headers(self) -> dict[str, str]:
        """What the response says of it besides its body."""
        return {} if self.retry_after_s is None else {"Retry-After": str(math.ceil(self.retry_after_s))}

    def openai(self) -> dict[str, Any]:
        """The body in OpenAI's form."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def ollama(self) -> dict[str, Any]:
        """The body in Ollama's form."""
        return {"error": self.message}


_BUSY_RETRY_S = 2.0
_STOPPED_RETRY_S = 10.0


def failure(error: BaseException) -> Failure:
    """What a client is told of an error."""
    text = " ".join(str(error).split())
    match error:
        case RequestError():
            return Failure(error.status, text, _TYPES.get(error.status, _of(error.status)), error.param, error.code)
        case UnknownModelError():
            return Failure(404, text, "not_found_error", "model", "model_not_found")
        case BusyError():
            return Failure(429, text, "rate_limit_error", None, "rate_limit_exceeded", _BUSY_RETRY_S)
        case RestartingError():
            return Failure(503, text, "server_error", None, "model_restarting", error.retry_after_s)
        case StoppingError():
            return Failure(503, text, "server_error", None, "stopping", _STOPPED_RETRY_S)
        case EngineDiedError():
            return Failure(503, text, "server_error", None, "model_died", _BUSY_RETRY_S)
        case PromptError():
            return Failure(400, text, "invalid_request_error", "messages", "context_length_exceeded")
        case ImageError():
            return Failure(400, text, "invalid_request_error", "messages", "invalid_image")
        case UsageError():
            return Failure(400, text, "invalid_request_error", None, "invalid_value")
        case EngineError():
            return Failure(503, text, "server_error", None, "engine_error", _BUSY_RETRY_S)
        case TimeoutError():
            return Failure(504, text or "the answer took too long", "server_error", None, "timeout")
        case LocalLlavaError():
            return Failure(500, text, "server_error", None, "model_error")
    return Failure(500, "a defect of local-llava; its log says more", "server_error", None, "internal_error")


def reported(error: BaseException) -> Failure:
    """What a client is told of an error; the log is told of a defect."""
    failed = failure(error)
    if failed.code == "internal_error":
        log.error("a request failed", exc_info=error)
    return failed


_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def _of(status: int) -> str:
    return "invalid_request_error" if status < 500 else "server_error"
