"""Checks what a target may set in its requests: body fields, headers, and names of fields to drop or rename."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

# Calls set these. Routing, prices or budgets would be wrong if a target replaced, dropped or renamed them.
_OF_THE_CALL = ("model", "messages", "input", "instructions", "stream", "n", "previous_response_id")
_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
# Credentials, which a pool must not hold, and headers of the transport.
_RESERVED_HEADERS = (
    "authorization|proxy-authorization|cookie|(x-)?api-key|x-goog-api-key|x-auth-token"
    "|host|connection|expect|te|trailer|upgrade|transfer-encoding|accept-encoding|content-.*"
)
_RESERVED_HEADER = re.compile(_RESERVED_HEADERS, re.IGNORECASE)
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")  # RFC 9110, 5.1
_HEADER_VALUE = re.compile(r"[!-~]([ -~]*[!-~])?")


def check_fields(names: Iterable[str]) -> None:
    """Raises ValueError for a field that a target must neither set nor drop; a limit can only be renamed."""
    _check_names(names, (*_OF_THE_CALL, *_LIMITS))


def check_renamed(names: Mapping[str, str]) -> None:
    """Raises ValueError for a field of the call, or for a new name that is empty or one."""
    _check_names([*names, *names.values()], ("", *_OF_THE_CALL))


def check_headers(headers: Mapping[str, str]) -> None:
    """Raises ValueError for an invalid or reserved header."""
    for name, value in headers.items():
        if _RESERVED_HEADER.fullmatch(name):
            raise ValueError(f'must not contain "{name}": credentials belong in the variable named by key_env')
        if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
            raise ValueError(f'must contain valid header names and printable ASCII values, unlike "{name}"')


def _check_names(names: Iterable[str], reserved: Iterable[str]) -> None:
    found = next((name for name in names if name in reserved), None)
    if found is not None:
        raise ValueError(f'must not contain "{found}", which belongs to the call')
