from __future__ import annotations

from pathlib import Path

import duckdb
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefill_router import storage
from prefill_router.common import schema
from prefill_router.common.errors import UserError
from prefill_router.common.schema import ActivationColumn, Pooling


def test_a_column_is_named_by_pooling_and_layer() -> None:
    assert ActivationColumn("last", 12).name == "last_012"
    assert ActivationColumn("mean", 0).name == "mean_000"
    assert ActivationColumn("mean", 1234).name == "mean_1234"


@given(st.sampled_from(schema.POOLINGS), st.integers(0, 5000))
def test_a_name_parses_to_its_column(pooling: Pooling, layer: int) -> None:
    column = ActivationColumn(pooling, layer)
    assert ActivationColumn.parse(column.name) == column


@pytest.mark.parametrize("name", ["", "num_tokens", "last_12", "max_012", "last_012x", "last_-12", "last_012\n"])
def test_another_name_is_an_error(name: str) -> None:
    with pytest.raises(UserError, match=r"is not an activation column: expected .* like last_012"):
        ActivationColumn.parse(name)


def test_columns_are_ordered_by_pooling_then_layer_without_repeats() -> None:
    columns = schema.activation_columns([15, 0, 15], ["last", "mean", "last"])
    assert [column.name for column in columns] == ["last_000", "last_015", "mean_000", "mean_015"]


def test_activations_are_a_standard_fixed_size_list_of_float16() -> None:
    table = schema.activations([ActivationColumn("last", 1), ActivationColumn("mean", 1)], hidden_size=8)
    assert table.names == ["prompt_id", "num_tokens", "last_001", "mean_001"]
    assert table.field("prompt_id").type == pa.string()
    assert table.field("num_tokens").type == pa.int32()
    for name in ("last_001", "mean_001"):
        vector = table.field(name).type
        assert pa.types.is_fixed_size_list(vector)
        assert (vector.value_type, vector.list_size) == (pa.float16(), 8)


def test_duckdb_reads_decisions(tmp_path: Path) -> None:
    path = tmp_path / "part-000000.parquet"
    per_target = {"big": 0.75, "small-1.5": 0.25}
    rows = [
        {
            "prompt_id": prompt_id,
            "file": "log.jsonl",
            "row": row,
            "target": target,
            "input_tokens": 12,
            "p_correct": per_target,
            "expected_output_tokens": per_target,
            "expected_cost_usd": per_target,
            "router_version": "v",
            "team": "blue",
        }
        for row, (prompt_id, target) in enumerate([("a", "big"), ("b", None)])
    ]
    table = pa.Table.from_pylist(rows, schema=schema.decisions(["big", "small-1.5"], ["team"]))
    path.write_bytes(storage.encode_parquet(table))
    query = f"""select prompt_id, target, p_correct['small-1.5'], typeof(p_correct.big) from '{path}'"""
    assert duckdb.execute(query).fetchall() == [("a", "big", 0.25, "FLOAT"), ("b", None, 0.25, "FLOAT")]


def test_outcomes_are_as_documented() -> None:
    types = {field.name: field.type for field in schema.OUTCOMES}
    assert types == {
        "prompt_id": pa.string(),
        "target": pa.string(),
        "correct": pa.float32(),
        "output_tokens": pa.int32(),
        "cost_usd": pa.float64(),
    }
