"""Where a request says that it comes from: what its headers Host, Origin and Sec-Fetch-* mean.

Browsers send what any web page tells them to, to this computer as well. The Host header tells by which name the server
was called: a name of a stranger that resolves to this computer (DNS rebinding) is not one of ours. The Origin header
tells whose page it is. Pure functions of headers; knows no ASGI.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection

from local_llava.errors import UsageError

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,255})(?::([0-9]{1,5}))?")
_ORIGIN = re.compile(rf"(https?)://{_HOST.pattern}")
_DEFAULT_PORTS = {"http": 80, "https": 443}

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


def canonical(host: str) -> str:
    """One spelling of a name or an address: lower case, no brackets, no dot at the end, IPv4 as such."""
    name = host.lower().removesuffix(".").removeprefix("[").removesuffix("]")
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name
    return str(getattr(address, "ipv4_mapped", None) or address)


def parse_host(value: str) -> tuple[str, int | None] | None:
    """Name or address, as `canonical` spells it, and port of a Host header; None if that is none."""
    found = _HOST.fullmatch(value)
    return None if found is None else (canonical(found[1]), None if found[2] is None else int(found[2]))


def is_same_origin(origin: str, host: str, port: int | None) -> bool:
    """Whether an Origin header names the server that a Host header names.

    The scheme is left aside: where something in between adds TLS, the server does not know of it.
    """
    found = _ORIGIN.fullmatch(origin.lower())
    if found is None:
        return False
    default = _DEFAULT_PORTS[found[1]]
    theirs = default if found[3] is None else int(found[3])
    return canonical(found[2]) == host and theirs == (default if port is None else port)


def checked_hosts(names: Collection[str]) -> frozenset[str]:
    """Names that a Host header may have, as `canonical` spells them.

    Raises:
        UsageError: One is no name and no address.
    """
    for name in names:
        parsed = parse_host(f"[{name}]" if name.count(":") > 1 and not name.startswith("[") else name)
        if parsed is None or parsed[1] is not None:
            raise UsageError(f"allowed host {name!r:.80}: a name or an address is accepted, such as box.lan; no port")
    return frozenset(map(canonical, names))


def checked_origins(origins: Collection[str]) -> tuple[str, ...]:
    """Origins as browsers spell them.

    Raises:
        UsageError: One is no origin.
    """
    checked = tuple(origin if origin == "*" else origin.removesuffix("/").lower() for origin in origins)
    for origin in checked:
        # Browsers' extensions have schemes of their own.
        if origin not in ("*", "null") and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^\s/?#@*,]+", origin):
            raise UsageError(
                f"CORS origin {origin!r:.80}: https://example.com, with a port if it has one, is accepted, or * for all"
            )
    return checked


def is_foreign_embedding(method: str, site: str, mode: str, dest: str) -> bool:
    """Whether a page of somebody else has the browser ask for something to be shown or run within it.

    For requests without Origin: pictures, scripts, frames, links. A link that a user follows to here is fine.

    Args:
        method: Of HTTP.
        site: Sec-Fetch-Site, "" where the client sends none.
        mode: Sec-Fetch-Mode.
        dest: Sec-Fetch-Dest.
    """
    if site not in ("cross-site", "same-site"):
        return False
    return not (method in ("GET", "HEAD") and mode == "navigate" and dest in ("document", ""))
