"""NiceGUI as a part of the server's app: let through as little of it as the page needs, and without the network.

Pictures come by a route of our own, since NiceGUI's upload would write large ones into files.
"""

from __future__ import annotations

import importlib.resources
import logging
from typing import Any

from fastapi import FastAPI, Request
from nicegui import Client, core, ui
from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.routing import Match, Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from local_llava.server.backend import Backend
from local_llava.server.settings import ServerSettings
from local_llava.server.ui.page import Page

PREFIX = "/page"
"""Of what the page sends by itself."""

_PREFIXES = ("/_nicegui/", "/_nicegui_ws/", "/favicon.ico")
"""Of what NiceGUI serves beside the page."""

# Vue compiles templates in the browser, which takes eval. But whatever runs in the page can talk to this server alone.
_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' blob: data:",
        "media-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)


def mount_page(app: FastAPI, backend: Backend, settings: ServerSettings) -> None:
    """Serve the page at `/`."""
    pages: dict[str, Page] = {}
    style = _file("page.css")

    @ui.page("/", favicon=_file("favicon.svg"))
    def root(client: Client) -> None:
        ui.add_head_html(f"<style>{style}</style>")
        pages[client.id] = Page(client, backend, settings, PREFIX)

        def gone() -> None:
            del pages[client.id]

        client.on_delete(gone)

    @app.post(PREFIX + "/pictures/{page}/{picture}", include_in_schema=False)
    async def picture_arrives(request: Request, page: str, picture: str) -> Response:
        found = pages.get(page)
        return Response(status_code=204 if found and found.arrive(picture, await request.body()) else 404)

    @app.post(PREFIX + "/left/{page}", include_in_schema=False)
    async def page_left(page: str) -> Response:
        if found := pages.get(page):
            found.stop()
        return Response(status_code=204)

    core.app.middleware_stack = None  # An earlier app of this process may have built it.
    core.app.config.socket_io_js_transports = ["polling"]
    ui.run_with(
        app,
        title="local-llava",
        dark=None,
        language="en-US",
        tailwind=False,
        binding_refresh_interval=None,
        show_welcome_message=False,
        gzip_middleware_factory=None,
    )
    core.app.config.quasar_config["loadingBar"] = {"skipHijack": True}  # Long polling loads without an end.
    core.sio.eio.logger.setLevel(logging.CRITICAL)  # It calls it an error that a browser was left.
    app.router.routes[-1] = _PageMount("", app=_Around(core.app))


class _PageMount(Mount):
    """What NiceGUI gets to see. It would answer all that no route knows, with pages of its own."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        path: Any = scope.get("path", "")
        if scope["type"] == "http" and (path == "/" or path.startswith(_PREFIXES)):
            return super().matches(scope)
        return Match.NONE, {}


class _Around:
    """NiceGUI, with the page's Content-Security-Policy on all that it answers, and without clients that are gone.

    Those are no request at all for Socket.IO's server, which fails at them.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        first: Message | None = await receive()
        if first is not None and first["type"] == "http.disconnect":
            return

        async def received() -> Message:
            nonlocal first
            message, first = first, None
            return message if message is not None else await receive()

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = _POLICY
            await send(message)

        await self._app(scope, received, marked)


def _file(name: str) -> str:
    return importlib.resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
