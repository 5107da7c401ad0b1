"""Each causal LM of transformers is read as CENSUS.md says."""

from __future__ import annotations

import pytest

from census import census, table

pytestmark = [pytest.mark.slow("a checkpoint of each of 189 kinds of models"), pytest.mark.usefixtures("one_thread")]


def test_the_table_has_a_row_of_every_kind() -> None:
    kinds = [*census.causal_lms(), *census.conditional_lms()]
    assert list(table.read()) == kinds, "transformers has other kinds: write CENSUS.md anew, tests/census/census.py"


@pytest.mark.parametrize("kind", table.read("Causal LMs"))
def test_a_kind_is_read_as_the_table_says(kind: str) -> None:
    assert census.row_of(kind).outcome == table.read()[kind], f"CENSUS.md: another outcome of {kind}"
