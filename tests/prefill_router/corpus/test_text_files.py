"""Reading JSON documents in pieces gives what the standard library reads, wherever the pieces end."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefill_router.common.errors import UserError
from prefill_router.corpus import text_files
from prefill_router.corpus.text_files import Member, read_json

TEXTS = st.text(st.characters(codec="utf-8"))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
DOCUMENTS = st.lists(VALUES, max_size=5) | st.dictionaries(TEXTS, VALUES, max_size=5)


def members(data: bytes, chunk_bytes: int) -> list[Member]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "_CHUNK_BYTES", chunk_bytes)
        return list(read_json("j.json", io.BytesIO(data), 1 << 20))


def expected(document: object) -> list[Member]:
    if isinstance(document, list):
        return [Member(None, place, value) for place, value in enumerate(document)]
    assert isinstance(document, dict)
    return [
        member
        for key, value in document.items()
        for member in (
            [Member(key, place, element) for place, element in enumerate(value)]
            if isinstance(value, list)
            else [Member(key, None, value)]
        )
    ]


@given(
    document=DOCUMENTS, chunk_bytes=st.integers(1, 40), indent=st.none() | st.integers(0, 3), ascii_only=st.booleans()
)
def test_any_document_in_pieces_of_any_size(
    document: object, chunk_bytes: int, indent: int | None, ascii_only: bool
) -> None:
    data = json.dumps(document, indent=indent, ensure_ascii=ascii_only).encode("utf-8-sig") + b"\r\n"
    assert members(data, chunk_bytes) == expected(document)


@given(document=DOCUMENTS, chunk_bytes=st.integers(1, 40), where=st.floats(0, 1, exclude_max=True))
def test_no_document_that_ends_early_is_taken_for_whole(document: object, chunk_bytes: int, where: float) -> None:
    data = json.dumps(document).encode()
    with pytest.raises(UserError, match=r"^j.json: "):
        members(data[: int(where * len(data))], chunk_bytes)
