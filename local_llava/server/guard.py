"""What stands between the network and the app: who may ask, and in the end how much (`limits`).

Knows the headers of a request and the server's settings; knows no API beyond the form of its errors. Pure ASGI, so that
answers stream through. Where a check looks like another, each has its reason:

- Host: a web page under a stranger's name may point that name at this computer (DNS rebinding); then it is the same
  origin for the browser, and only the name gives it away.
- Origin: any page may send a form or a simple POST here, without reading the answer. It is refused, not only unread.
- The key: for those who are no browser's page at all, when the server listens beyond this computer.
"""

from __future__ import annotations

import base64
import binascii
import hmac

from starlette.datastructures import MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from local_llava.errors import UsageError
from local_llava.server import limits, origins
from local_llava.server.errors import RequestError, failure
from local_llava.server.refusals import refuse, values
from local_llava.server.settings import ServerSettings

_SINGLE = ("host", "origin", "authorization", "content-type", "content-length", "sec-fetch-site")
"""Headers that make no sense twice, and that two programs would read differently."""

_RESPONSE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "SAMEORIGIN",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
}


def guarded(app: ASGIApp, settings: ServerSettings) -> ASGIApp:
    """The app behind all checks and limits.

    Raises:
        UsageError: A host, an origin or the key of the settings cannot be one.
    """
    listed = origins.checked_origins(settings.cors_origins)
    app = limits.WholeBodies(app, settings.max_body_bytes, settings.read_timeout_s)
    app = limits.TimeLimit(app, settings.request_timeout_s)
    app = limits.InFlight(app, settings.max_requests)
    if settings.api_key is not None:
        app = KeyCheck(app, settings.api_key)
    if listed:
        app = CORSMiddleware(
            app,
            allow_origins=listed,
            allow_methods=("GET", "HEAD", "POST", "DELETE"),
            allow_headers=("*",),  # the clients of OpenAI send many of their own
            allow_private_network=True,
            expose_headers=("Retry-After",),
        )
    return OriginCheck(app, settings.host, settings.allowed_hosts, listed)


class OriginCheck:
    """Lets in what calls the server by its own name, and no page but its own and the listed ones."""

    def __init__(self, app: ASGIApp, host: str, allowed_hosts: tuple[str, ...], listed: tuple[str, ...]) -> None:
        """
        Args:
            app: What is behind.
            host: The address that is listened on.
            allowed_hosts: More names for it.
            listed: Origins of `checked_origins`.
        """
        self._app, self._listed = app, listed
        self._hosts = origins.LOOPBACK | {origins.canonical(host)} | origins.checked_hosts(allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            # There are none here, and browsers let any page open one.
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _RESPONSE_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._check(scope)
        except RequestError as e:
            await refuse(scope, receive, marked, failure(e))
        else:
            await self._app(scope, receive, marked)

    def _check(self, scope: Scope) -> None:
        """
        Raises:
            RequestError: The request is not let in.
        """
        for name in _SINGLE:
            if len(values(scope, name.encode())) > 1:
                raise RequestError(f"the header {name} is there more than once")
        host = self._checked_host(scope)
        origin = _header(scope, "origin")
        if origin is None:
            how = (_header(scope, f"sec-fetch-{what}") or "" for what in ("site", "mode", "dest"))
            if origins.is_foreign_embedding(scope["method"], *how):
                raise RequestError("pages of other sites may not use this server", status=403)
        elif not ({"*", origin.lower()} & set(self._listed)) and not origins.is_same_origin(origin, *host):
            raise RequestError(
                f"pages of {_shown(origin)} may not use this server; --cors-origin lists those that may", status=403
            )

    def _checked_host(self, scope: Scope) -> tuple[str, int | None]:
        """Name and port by which the server was called."""
        value = _header(scope, "host")
        if value is None:
            raise RequestError("the header Host is missing")
        parsed = origins.parse_host(value)
        if parsed is None:
            raise RequestError("the header Host is not valid")
        # Where all addresses are listened on, the one that was connected to; no stranger's name is an address.
        server = scope.get("server")
        if parsed[0] not in self._hosts and not (server and parsed[0] == origins.canonical(str(server[0]))):
            raise RequestError(
                f"this server is not called {_shown(parsed[0])}; --allowed-host adds a name to localhost", status=403
            )
        return parsed


class KeyCheck:
    """Lets in who knows the key: as `Authorization: Bearer KEY`, or as the password that a browser asks for."""

    FREE = "/health"
    """Whoever keeps the server running asks this."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        """
        Raises:
            UsageError: No header can carry the key.
        """
        if not key or not key.isascii() or not key.isprintable() or key != key.strip():
            raise UsageError("the API key must be printable ASCII, not empty, without blanks around it")
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        free = scope["type"] != "http" or (scope["path"] == self.FREE and scope["method"] in ("GET", "HEAD"))
        given = b"" if free else _key_in(_header(scope, "authorization") or "")
        if free or hmac.compare_digest(given, self._key):
            await self._app(scope, receive, send)
            return
        words = "this API key is not the server's" if given else "an API key is needed: Authorization: Bearer KEY"
        # A person at a browser is asked for it. A page's own requests are not: the window would pop up over the page.
        asks = b"text/html" in b",".join(values(scope, b"accept"))
        challenge = b'Basic realm="local-llava: any user, the API key as password"' if asks else b"Bearer"
        await refuse(
            scope,
            receive,
            send,
            failure(RequestError(words, status=401, code="invalid_api_key")),
            headers=[(b"www-authenticate", challenge)],
        )


def _key_in(authorization: str) -> bytes:
    scheme, _, rest = authorization.partition(" ")
    rest = rest.strip()
    if scheme.lower() == "bearer":
        return rest.encode("latin-1")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(rest, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""


def _header(scope: Scope, name: str) -> str | None:
    found = values(scope, name.encode())
    return found[0].decode("latin-1").strip() if found else None


def _shown(text: str) -> str:
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text[:100])
