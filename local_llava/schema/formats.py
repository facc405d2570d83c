"""What values of `format` look like, as patterns.

Knows a part of each format's own standard that every validator accepts: a date that exists, an address without the
rare forms. A model is held to that part.
"""

from __future__ import annotations

_MONTH_DAY = (
    r"(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)|02-(?:0[1-9]|1\d|2[0-8]))"
)
_YEAR = r"(?:000[1-9]|00[1-9]\d|0[1-9]\d\d|[1-9]\d{3})"
_BY_FOUR = r"(?:0[48]|[2468][048]|[13579][26])"
_DATE = rf"(?:{_YEAR}-{_MONTH_DAY}|(?:\d\d{_BY_FOUR}|{_BY_FOUR}00)-02-29)"
_TIME = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,6})?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
_CLOCK = r"(?:\d{1,4}H(?:\d{1,4}M(?:\d{1,4}S)?)?|\d{1,4}M(?:\d{1,4}S)?|\d{1,4}S)"
_DAYS = r"(?:\d{1,4}Y(?:\d{1,4}M(?:\d{1,4}D)?)?|\d{1,4}M(?:\d{1,4}D)?|\d{1,4}D)"
_BYTE = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,30}[A-Za-z0-9])?"
_HOST = rf"(?:{_LABEL}\.){{0,5}}[A-Za-z](?:[A-Za-z0-9-]{{0,16}}[A-Za-z0-9])?"
_ATOM = r"[A-Za-z0-9_+-]{1,20}"
_PATH = r"(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-F]{2})"
_QUERY = rf"(?:{_PATH}|[/?]){{0,60}}"
_SCHEME = r"[a-z][a-z0-9+.-]{1,15}"
_GROUP = r"[0-9a-fA-F]{1,4}"


def _ipv6() -> str:
    """RFC 4291, 2.2: eight groups, or fewer with `::` for the zeros left out."""
    shortened = [
        rf"(?:{_GROUP}(?::{_GROUP}){{0,{left - 1}}})?::(?:{_GROUP}(?::{_GROUP}){{0,{6 - left}}})?"
        for left in range(1, 7)
    ]
    return rf"(?:{_GROUP}:){{7}}{_GROUP}|" + "|".join(shortened)


FORMATS: dict[str, str] = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "duration": rf"^P(?:{_DAYS}(?:T{_CLOCK})?|T{_CLOCK}|\d{{1,4}}W)$",
    "email": rf"^{_ATOM}(?:\.{_ATOM}){{0,2}}@(?:{_LABEL}\.){{1,4}}[A-Za-z]{{2,12}}$",
    "hostname": f"^{_HOST}$",
    "ipv4": rf"^(?:{_BYTE}\.){{3}}{_BYTE}$",
    "ipv6": f"^(?:{_ipv6()})$",
    "uri": f"^{_SCHEME}://{_HOST}(?::[1-9]\\d{{0,3}})?(?:/{_PATH}{{0,40}}){{0,8}}(?:\\?{_QUERY})?(?:#{_QUERY})?$",
    "uuid": r"^[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}$",
}
"""Name -> pattern. Sources: RFC 3339 (date, time, date-time, duration), RFC 5321 (email), RFC 1123 (hostname),
RFC 2673 (ipv4), RFC 4291 (ipv6), RFC 3986 (uri), RFC 4122 (uuid)."""
