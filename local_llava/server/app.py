"""The server's parts, put together: routes around a backend, errors as the API expects them that was spoken.

Knows which path belongs to which API. Knows nothing of sockets and processes: see `run`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, PlainTextResponse, Response

from local_llava import __version__
from local_llava.errors import LocalLlavaError
from local_llava.pictures.sources import printable
from local_llava.server import docs_page, openapi, routes_ollama, routes_openai, routes_status
from local_llava.server.answering import ClientGoneError
from local_llava.server.backend import Backend
from local_llava.server.errors import RequestError
from local_llava.server.image_refs import ImagePolicy
from local_llava.server.metrics import Measured, Metrics
from local_llava.server.settings import ServerSettings

log = logging.getLogger("local_llava")

_GONE = 499
"""What nginx logs for a client that went; nobody reads it but the metrics."""


def create(
    backend: Backend,
    settings: ServerSettings,
    *,
    metrics: Metrics | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> FastAPI:
    """The application, without the guard around it.

    Args:
        backend: The models.
        settings: What `local-llava serve` was told.
        metrics: To count with; None for new ones.
        stopping: Whether the server was asked to end.

    Raises:
        UsageError: The media root is no directory.
    """
    metrics = metrics or Metrics()
    metrics.watch(backend)
    measured, images = Measured(backend, metrics), ImagePolicy(settings)
    # FastAPI's pages for openapi.json load their scripts from somebody else's server.
    app = FastAPI(title="local-llava", version=__version__, docs_url=None, redoc_url=None, description=_ABOUT)
    app.openapi = lambda: openapi.describe(app)  # type: ignore[method-assign]
    app.include_router(routes_openai.router(measured, settings, images))
    app.include_router(routes_ollama.router(measured, settings, images))
    app.include_router(routes_status.router(backend, metrics, stopping))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(docs_page.html(app.openapi()))

    for kind in (LocalLlavaError, HTTPException, TimeoutError, ClientGoneError, Exception):
        app.add_exception_handler(kind, _handle)
    _serve_root(app, measured, settings)
    return app


_ABOUT = "LLaVA models on this computer, through the APIs of OpenAI and of Ollama."


def _serve_root(app: FastAPI, backend: Backend, settings: ServerSettings) -> None:
    """What is at /: the page for people, or a line for programs that look there for Ollama."""

    @app.head("/", include_in_schema=False)
    async def probe() -> Response:
        return Response(media_type="text/plain")

    if settings.ui:
        from local_llava.server import ui

        try:
            ui.mount(app, backend, settings)
            return
        except ImportError as e:
            log.debug("no page is served: %s", e)
            page: Response = HTMLResponse(ui.placeholder_html())
    else:
        page = PlainTextResponse("local-llava is running. (For programs that look for it here: Ollama is running)\n")

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return page


async def _handle(request: Request, error: Exception) -> Response:
    """An error, as the API tells it that a path belongs to."""
    if isinstance(error, ClientGoneError):
        return Response(status_code=_GONE)
    path = request.url.path
    refusal = routes_ollama.refusal if path.startswith("/api/") else routes_openai.refusal
    if not isinstance(error, HTTPException):
        return refusal(error)
    text = str(error.detail)
    if error.status_code == 404:
        text = f"there is nothing at {printable(path, 200)}"
    elif error.status_code == 405:
        text = f"{request.method} is not accepted at {printable(path, 200)}"
    response = refusal(RequestError(text, status=error.status_code))
    response.headers.update(error.headers or {})
    return response
