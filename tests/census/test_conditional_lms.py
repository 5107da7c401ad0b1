"""Each model of transformers that writes text about images is read as CENSUS.md says."""

from __future__ import annotations

import pytest

from census import census, table

pytestmark = [pytest.mark.slow("a checkpoint of each of 83 kinds of models"), pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("kind", table.read("Conditional generation"))
def test_a_kind_is_read_as_the_table_says(kind: str) -> None:
    assert census.row_of(kind).outcome == table.read()[kind], f"CENSUS.md: another outcome of {kind}"
