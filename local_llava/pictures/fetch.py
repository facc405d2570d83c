"""A file from an http(s) URL: bounded in bytes, time and redirects, and in the addresses that are asked where need be.

Knows http. Proxies come from the environment (`http_proxy`, `https_proxy`, `no_proxy`, and the system's on Windows and
macOS), certificates from the system or $SSL_CERT_FILE, and they are always checked. No cookies, no cache.
"""

from __future__ import annotations

import base64
import http
import http.client
import io
import ipaddress
import socket
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from email.message import Message
from typing import IO, Any, TypeAlias

from local_llava.errors import ImageError

MAX_SECONDS = 60.0
"""Most seconds for a picture, redirects and all. Looking up names comes on top, within the system's own limit."""

CONNECT_SECONDS = 10.0
"""Most seconds to reach one address of a server."""

MAX_REDIRECTS = 5

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

# Left alone in a path or query: what RFC 3986 allows there, and escapes that are there already.
_SAFE = "%/:=&?~+!$,;'@()*[]"


def fetch(
    url: str,
    where: str,
    max_bytes: int,
    *,
    allowed: Callable[[Address], bool] | None = None,
    max_seconds: float | None = None,
) -> bytes:
    """The content of a URL.

    Args:
        url: http or https; `user:password@` is sent as basic authentication to that server only.
        where: Names it in errors.
        max_bytes: Longest content.
        allowed: Which addresses may be connected to, for a URL that comes from strangers. A name is looked up once, for
            each redirect again; all its addresses must be allowed, and they are what is connected to. Proxies are not
            used then: they look names up themselves.
        max_seconds: Most seconds for all of it; None for MAX_SECONDS.

    Raises:
        ImageError: The URL is not valid, the server cannot be reached or not be trusted, its answer is an error, too
            long, cut short or late, it redirects too often or to something other than http(s), or an address is not
            allowed.
    """
    deadline = _Deadline(MAX_SECONDS if max_seconds is None else min(max_seconds, MAX_SECONDS))
    try:
        with _opener(deadline, where, allowed).open(_request(url), timeout=deadline.left()) as response:
            return _read(response, where, max_bytes)
    except urllib.error.HTTPError as e:
        e.close()
        raise ImageError(f"{where}: {_status(e.code)}") from e
    except (OSError, http.client.HTTPException, ValueError) as e:
        reason = e.reason if isinstance(e, urllib.error.URLError) else e
        raise ImageError(f"{where}: {_why(reason)}") from e


def without_secrets(url: str) -> str:
    """A URL to be shown: without user, password, query and fragment, any of which may be a key to something."""
    head = url.partition("#")[0].partition("?")[0]
    scheme, slashes, rest = head.partition("://")
    authority, slash, path = rest.partition("/")
    return scheme + slashes + authority.rpartition("@")[2] + slash + path


class _Deadline:
    """A moment by which all has to be done."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds left, > 0; raises TimeoutError when there are none."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


class _TimedReader(io.RawIOBase):
    """What comes from a socket until the deadline. A timeout of the socket alone lets a server drip for ever."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, deadline: _Deadline) -> None:
        self._raw, self._sock, self._deadline = raw, sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(self._deadline.left())
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


def _opener(
    deadline: _Deadline, where: str, allowed: Callable[[Address], bool] | None
) -> urllib.request.OpenerDirector:
    """urllib's machinery for http and https only, under the deadline."""

    def timeout() -> float:
        return min(CONNECT_SECONDS, deadline.left())

    def pin(connection: Any) -> None:
        # Host, server name and certificate stay those of the URL: this is only asked for a socket.
        if allowed is not None:
            connection._create_connection = lambda at, *_: _connected(at, timeout, where, allowed)

    class Response(http.client.HTTPResponse):
        def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
            super().__init__(sock, *args, **kwargs)
            self.fp = io.BufferedReader(_TimedReader(self.fp.detach(), sock, deadline))

    class Plain(http.client.HTTPConnection):
        response_class = Response

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "timeout": timeout()})
            pin(self)

    class Secure(http.client.HTTPSConnection):
        response_class = Response

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "timeout": timeout(), "context": ssl.create_default_context()})
            pin(self)

    class PlainHandler(urllib.request.HTTPHandler):
        def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
            return self.do_open(Plain, req)

    class SecureHandler(urllib.request.HTTPSHandler):
        def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
            return self.do_open(Secure, req)

    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler({} if allowed else None),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        PlainHandler(),
        SecureHandler(),
        _Redirects(where),
    ):
        opener.add_handler(handler)
    return opener


def _connected(
    at: tuple[str, int], timeout: Callable[[], float], where: str, allowed: Callable[[Address], bool]
) -> socket.socket:
    """A connection to an address that was checked: looked up once, so that a second answer cannot be another one.

    Raises:
        ImageError: An address is not allowed. It is not told, since strangers need not learn what a name means here.
        OSError: None can be reached.
    """
    found = socket.getaddrinfo(*at, type=socket.SOCK_STREAM)
    if not all(allowed(ipaddress.ip_address(str(place[0]).partition("%")[0])) for *_, place in found):
        raise ImageError(f"{where}: pictures are fetched from public addresses only, and this server has another one")
    failed: OSError = socket.gaierror(socket.EAI_NONAME, "no address")
    for family, kind, protocol, _, place in found:
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(timeout())
            connection.connect(place)
            return connection
        except OSError as e:
            connection.close()
            failed = e
    raise failed


class _Redirects(urllib.request.BaseHandler):
    """Follows few redirects, to http and https only, and takes no password along. (urllib's own reads whole bodies.)"""

    def __init__(self, where: str) -> None:
        self._where, self._followed = where, 0

    def http_error_302(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message
    ) -> http.client.HTTPResponse:
        fp.close()
        self._followed += 1
        if self._followed > MAX_REDIRECTS:
            raise ImageError(f"{self._where}: redirects more than {MAX_REDIRECTS} times")
        location = urllib.parse.urljoin(req.full_url, headers.get("Location", "nowhere:"))
        if not location.lower().startswith(("http://", "https://")):
            raise ImageError(f"{self._where}: redirects to something other than http and https")
        response: http.client.HTTPResponse = self.parent.open(_request(location), timeout=req.timeout)
        return response

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _request(url: str) -> urllib.request.Request:
    """A request for a URL as users type it: with spaces and letters of any script, with a user and password."""
    from local_llava import __version__

    parts = urllib.parse.urlsplit(url)
    if not parts.hostname:
        raise ValueError("it names no server")
    host = parts.hostname if parts.hostname.isascii() else parts.hostname.encode("idna").decode()
    host = f"[{host}]" if ":" in host else host
    path, query = (urllib.parse.quote(part, safe=_SAFE) for part in (parts.path or "/", parts.query))
    netloc = host if parts.port is None else f"{host}:{parts.port}"
    request = urllib.request.Request(
        urllib.parse.urlunsplit((parts.scheme, netloc, path, query, "")),
        headers={"User-Agent": f"local-llava/{__version__}", "Accept": "image/*, application/pdf, */*;q=0.1"},
    )
    if parts.username is not None:
        pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(pair.encode()).decode()}")
    return request


def _read(response: http.client.HTTPResponse, where: str, max_bytes: int) -> bytes:
    encoding = response.headers.get("Content-Encoding", "identity").lower()
    if encoding != "identity":
        raise ImageError(f"{where}: the server sent it compressed, though it was asked not to")
    too_long = ImageError(f"{where}: larger than {max_bytes >> 20} MiB")
    promised = response.length  # None where the server does not say
    if promised is not None and promised > max_bytes:
        raise too_long
    content = bytearray()
    while piece := response.read(1 << 16):
        content += piece
        if len(content) > max_bytes:
            raise too_long
    if promised is not None and len(content) < promised:
        raise ImageError(f"{where}: the connection ended after {len(content)} of {promised} bytes")
    return bytes(content)


def _status(code: int) -> str:
    # The server's own words may hold anything.
    phrase = http.HTTPStatus(code).phrase if code in set(http.HTTPStatus) else "no known status"
    return f"the server answered {code} ({phrase})"


def _why(reason: object) -> str:
    """What went wrong, in words. Of the exceptions' own texts some repeat the URL, so few are shown."""
    match reason:
        case TimeoutError():
            return f"no answer within the time; {MAX_SECONDS:g} seconds are allowed, {CONNECT_SECONDS:g} to connect"
        case ssl.SSLCertVerificationError():
            return f"the server's certificate is not trusted: {reason.verify_message} ($SSL_CERT_FILE may name another)"
        case ssl.SSLError():
            return f"no secure connection: {reason.reason or 'TLS failed'}"
        case socket.gaierror():
            return "the server's name cannot be found"
        case http.client.InvalidURL() | ValueError():
            return "not a valid URL"
        case http.client.HTTPException():
            return "the server broke off, or its answer is not http"
        case OSError():
            return f"no connection: {reason.strerror or 'it was refused'}"
    return "cannot be fetched; is the proxy one for http?"
