"""Removes credentials and account ids from error texts before a caller or a log sees them."""

from __future__ import annotations

import re

REDACTED = "[redacted]"
_MAX_CHARACTERS = 2000
_RUN = 6  # consecutive characters of a key; a word that has so many is treated as part of it
_MIN_WORD = 4  # characters of a word that may be part of a key, as in "the key that ends in 9f3c"
_HEADER = re.compile(r"\b(bearer|basic)\s+[^\s\"',;]+", re.IGNORECASE)
_USERINFO = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
_WORD = re.compile(r"[^\s\"'`<>()\[\]{},;=]+")
_CREDENTIAL = re.compile(
    r"(sk|pk|rk|pr|gsk|xai|hf|ghp|glpat|pplx|nvapi|r8|key|org|proj|project|user|acct|cus|tenant)[-_].*[\d*.…]"
    r"|(org|proj)-[a-z0-9]{6}"
    r"|(AKIA|ASIA)[0-9A-Z]{12}|AIza[\w-]{20}|eyJ[\w-]{8}"
    r"|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"  # UUIDs, which some providers use as account ids
    r"|(?=.*\d)(?=.*[a-z])[\w-]{32,}",
    re.IGNORECASE,
)
_MASKED = re.compile(r"\*{3}|•{3}|[xX]{6}|\w(\.{3}|…)\w")


def redacted(text: str, key: str | None = None) -> str:
    """Removes credentials, account ids and any part of `key` from `text`, and cuts it to 2,000 characters."""
    text = _USERINFO.sub(REDACTED, _HEADER.sub(rf"\1 {REDACTED}", text[:_MAX_CHARACTERS]))
    return _WORD.sub(lambda word: REDACTED if _is_secret(word[0], key or "") else word[0], text)


def _is_secret(word: str, key: str) -> bool:
    bare = word.strip(".:!?…")
    if _CREDENTIAL.match(bare) or _MASKED.search(bare):
        return True
    if len(bare) >= _MIN_WORD and bare in key:
        return True
    return any(key[start : start + _RUN] in word for start in range(len(key) - _RUN + 1))
