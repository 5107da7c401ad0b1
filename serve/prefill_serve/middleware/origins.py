"""Checks of Host, Origin and content type that protect an endpoint without keys from web pages of other sites.

A browser sends requests to this machine for any page its user opens, even to ports on loopback. A page may post forms
and plain text to other sites without a preflight request, and its own host name may be made to resolve to this machine
(DNS rebinding): the Host header then still has that name.
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
    """A host and an optional port, as in the Host and Origin headers."""

    host: str
    port: int | None

    @classmethod
    def parse(cls, text: str) -> Authority | None:
        """Returns None for invalid text."""
        match = _AUTHORITY.fullmatch(text.lower())
        return None if match is None else cls(match[1].removesuffix("."), int(match[2]) if match[2] else None)


def has_allowed_host(headers: Headers, allowed: Collection[str]) -> bool:
    """Whether there is one Host header and it names loopback or an allowed host, with any port."""
    hosts = headers.getlist("host")
    authority = Authority.parse(hosts[0]) if len(hosts) == 1 else None
    if authority is None:
        return False
    names = {name.lower().removesuffix(".") for name in allowed}
    return is_loopback(authority.host.strip("[]")) or authority.host in names


def is_from_own_page(headers: Headers) -> bool:
    """Whether the request comes from a page of this endpoint, from its user, or from a program that is not a browser.

    Browsers send Sec-Fetch-Site; those that do not yet send Origin with a POST.
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
    """Whether the content type is JSON or the body is empty. Pages cannot send JSON cross-site without a preflight."""
    if headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers:
        return True
    types = headers.getlist("content-type")
    return len(types) == 1 and _JSON.fullmatch(types[0].partition(";")[0].strip().lower()) is not None
