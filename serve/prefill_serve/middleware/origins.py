"""Where requests come from, as far as browsers tell: what keeps web pages away from an endpoint without keys.

A browser sends requests to this machine for any page that its user opens, also to ports that only this machine reaches.
A page may post a form or plain text to another site unasked, and its own site's name may be made to point to this
machine (DNS rebinding): the Host header then still has that name.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

from starlette.datastructures import Headers

from prefill_router.common.addresses import is_loopback

_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[0-9a-z._-]+)(?::([0-9]{0,5}))?")
_DEFAULT_PORTS = {"http": 80, "https": 443}
_JSON = re.compile(r"application/([a-z0-9.+-]+\+)?json")


class Authority(NamedTuple):
    """A host and perhaps a port, as in a Host header and an origin."""

    host: str
    port: int | None

    @classmethod
    def parse(cls, text: str) -> Authority | None:
        """None for text that is no authority."""
        match = _AUTHORITY.fullmatch(text.lower())
        return None if match is None else cls(match[1].removesuffix("."), int(match[2]) if match[2] else None)


def has_allowed_host(headers: Headers, allowed: Collection[str]) -> bool:
    """Is the request's one Host header a loopback name or address, or one of those allowed, with any port?"""
    hosts = headers.getlist("host")
    authority = Authority.parse(hosts[0]) if len(hosts) == 1 else None
    if authority is None:
        return False
    names = {name.lower().removesuffix(".") for name in allowed}
    return is_loopback(authority.host.strip("[]")) or authority.host in names


def is_from_own_page(headers: Headers) -> bool:
    """Was the request sent by a page of this endpoint, by its user, or by a program that is no browser?

    Browsers say so in Sec-Fetch-Site; those that do not yet name the page's origin when they post.
    """
    if (site := headers.get("sec-fetch-site")) is not None:
        return site in ("same-origin", "none")
    origin = headers.get("origin")
    return origin is None or _is_origin_of(origin, headers.get("host", ""))


def _is_origin_of(origin: str, host: str) -> bool:
    scheme, _, rest = origin.partition("://")
    there, here, port = Authority.parse(rest), Authority.parse(host), _DEFAULT_PORTS.get(scheme)
    if there is None or here is None or port is None:
        return False
    return (there.host, there.port or port) == (here.host, here.port or port)


def has_json_or_nothing(headers: Headers) -> bool:
    """Is the body JSON by its content type, or is there none? Pages cannot send JSON to another site unasked."""
    if headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers:
        return True
    types = headers.getlist("content-type")
    return len(types) == 1 and _JSON.fullmatch(types[0].partition(";")[0].strip().lower()) is not None
