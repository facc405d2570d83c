"""`local-llava serve`: the server, until it is told to end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from local_llava.commands import console
from local_llava.commands.options import MmprojOption, ModelOption, as_bytes, takes_options
from local_llava.errors import UsageError
from local_llava.types import Options

_KEEP_PICTURES_AFTER = 2
"""Questions about a picture until its KV cache is kept on disk: a server sees many pictures only once."""


@takes_options("max_tokens", "seed", "stop", "json_schema", "logprobs", image_cache="kv")
def serve(
    model: ModelOption = None,
    mmproj: MmprojOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this computer's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any that is free.")] = 8000,
    keep_alive: Annotated[
        str, typer.Option(help="How long a model stays in memory after its last answer: 5m, 1h30m, 0; -1 for ever.")
    ] = "5m",
    no_ui: Annotated[bool, typer.Option("--no-ui", help="Serve no page at /.")] = False,
    parallel: Annotated[
        int | None, typer.Option(help="Answers at the same time. Default: what memory allows, at most 8.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="LOCAL_LLAVA_API_KEY",
            help="What clients must send as `Authorization: Bearer KEY`. In the variable, other users cannot see it.",
            show_default=False,
        ),
    ] = None,
    allow_network: Annotated[
        bool, typer.Option("--allow-network", help="Listen beyond this computer without a key.")
    ] = False,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="A name of this server besides localhost; may be given several times.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Whose pages may use the server, such as https://example.com, or *; may be given several times."
        ),
    ] = None,
    allow_remote_images: Annotated[
        bool, typer.Option("--allow-remote-images", help="Fetch pictures that requests name by http(s) URLs.")
    ] = False,
    media_root: Annotated[
        Path | None, typer.Option(help="Directory whose pictures requests may name by path or file: URL.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of an answer; to requests for more, so many are given.")
    ] = 8192,
    default_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of an answer whose request does not say.")
    ] = 512,
    max_images: Annotated[int, typer.Option(min=0, help="Most pictures of a request.")] = 16,
    max_body: Annotated[str, typer.Option(help="Most bytes of a request.")] = "64MB",
    max_requests: Annotated[int, typer.Option(min=1, help="Most requests that are answered or wait.")] = 64,
    request_timeout: Annotated[str, typer.Option(help="Longest time of an answer, waiting included.")] = "30m",
    read_timeout: Annotated[str, typer.Option(help="Longest time for a client to send its request.")] = "30s",
    *,
    options: dict[str, Any],
) -> None:
    """Serve the model through OpenAI's and Ollama's HTTP APIs, and a page for people."""
    from local_llava.server.settings import ServerSettings

    settings = ServerSettings(
        host=host,
        port=port,
        model=model,
        mmproj=mmproj,
        options=_for_loading(options, parallel, min(default_tokens, max_tokens)),
        keep_alive_s=_seconds(keep_alive, "--keep-alive"),
        api_key=api_key or None,
        allow_network=allow_network,
        allowed_hosts=tuple(allowed_host or ()),
        cors_origins=tuple(cors_origin or ()),
        allow_remote_images=allow_remote_images,
        media_root=media_root,
        ui=not no_ui,
        max_body_bytes=as_bytes(max_body, "--max-body"),
        max_images=max_images,
        max_tokens=max_tokens,
        max_requests=max_requests,
        request_timeout_s=_limit(request_timeout, "--request-timeout"),
        read_timeout_s=_limit(read_timeout, "--read-timeout"),
    )
    from local_llava.server import run

    if model is None:
        console.note("No --model was named: the built-in tiny-llava answers. It knows coloured shapes, nothing else.")
    run.serve(settings, lambda url: print(f"local-llava listens on {url}", flush=True))
    console.note("Stopped")


def _for_loading(options: dict[str, Any], parallel: int | None, max_tokens: int) -> dict[str, Any]:
    """Fields of `Options` that were named.

    Raises:
        UsageError: One is not accepted.
    """
    options |= {"parallel": parallel, "max_tokens": max_tokens}
    if options["image_cache"] == "kv":
        options["image_cache_after"] = _KEEP_PICTURES_AFTER
    try:
        Options(**options)
    except UsageError as e:
        raise UsageError(f"--{e}") from None
    # What was not named leaves room for what was measured for this machine.
    return {name: value for name, value in options.items() if value != getattr(Options(), name)}


def _seconds(text: str, flag: str) -> float:
    from local_llava.server import durations

    try:
        return durations.seconds(text)
    except ValueError as e:
        raise UsageError(f"{flag}: {e}") from None


def _limit(text: str, flag: str) -> float:
    """A time that has an end."""
    seconds = _seconds(text, flag)
    if seconds <= 0:
        raise UsageError(f"{flag} must be a time above 0, such as 30s, not {text!r:.40}")
    return seconds
