from __future__ import annotations

import pyarrow as pa
import pytest

from prefill_router import storage
from prefill_router.common.errors import UserError


def test_a_parquet_table_comes_back_by_column(root: str) -> None:
    uri = storage.join(root, "table.parquet")
    table = pa.table({"a": [1, 2, 3], "b": ["x", "y", None], "c": [[1.0], [], None]})
    storage.write_bytes(uri, storage.encode_parquet(table))
    assert storage.read_table(uri).equals(table)
    assert storage.read_table(uri, ["c", "a"]).column_names == ["c", "a"]
    with storage.open_parquet(uri) as file:
        assert file.metadata.num_rows == 3
        assert file.metadata.row_group(0).column(0).compression == "ZSTD"


@pytest.mark.parametrize("data", [b"", b"prompt_id,prompt\n", b"PAR1 but no footer"])
def test_what_is_no_parquet_is_an_error(root: str, data: bytes) -> None:
    uri = storage.join(root, "table.parquet")
    storage.write_bytes(uri, data)
    with pytest.raises(UserError, match=r"table\.parquet: not a Parquet file"):
        storage.read_table(uri)
