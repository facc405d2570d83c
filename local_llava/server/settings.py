"""What `local-llava serve` was told: one frozen set of values, with its defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ServerSettings:
    """How the server listens, what it lets in, and what it loads."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 for any that is free."""
    model: str | None = None
    """The default model, as `--model` of the other commands takes it; None for the built-in one."""
    mmproj: Path | None = None
    """Of the default model, if not beside it."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Options` for every model that is loaded."""
    keep_alive_s: float = 300.0
    """Seconds that a model stays in memory after its last answer; negative for ever, 0 to unload at once."""
    api_key: str | None = None
    """What clients must send as `Authorization: Bearer ...`; None to let all in."""
    allow_network: bool = False
    """Whether an address beyond this computer may be listened on without a key."""
    allowed_hosts: tuple[str, ...] = ()
    """Names in a Host header that are accepted, beside localhost's and the address that is listened on."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may use the server; "*" for all."""
    allow_remote_images: bool = False
    """Whether http(s) URLs of pictures are fetched."""
    media_root: Path | None = None
    """A directory whose pictures may be named by path or file: URL."""
    ui: bool = True
    """Whether the page is served, where the extra for it is installed."""
    max_body_bytes: int = 64 << 20
    """Of a request."""
    max_images: int = 16
    """Of a request."""
    max_tokens: int = 8192
    """Of an answer, at most; more is cut down to it."""
    max_requests: int = 64
    """That are answered or wait at the same time, over all models."""
    request_timeout_s: float = 1800.0
    """For a whole answer, waiting included."""
    read_timeout_s: float = 30.0
    """For a client to send its whole request, and to take what was written for it."""
