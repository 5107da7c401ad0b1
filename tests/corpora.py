"""Test corpora in every supported file format, with the variations that are hard for a reader."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "name a river"}]


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def packed(path: Path, data: bytes) -> bytes:
    """The data compressed according to the file name."""
    if path.suffix == ".gz":
        half = len(data) // 2  # in two members, as in logs that were appended to
        return gzip.compress(data[:half]) + gzip.compress(data[half:])
    if path.suffix == ".bz2":
        return bz2.compress(data)
    if path.suffix == ".zst":
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()
    return data


def write_parquet(path: Path, columns: dict[str, Any], row_group_size: int | None = None) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def write_jsonl(path: Path, *records: Any) -> Path:
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


def write_corpus(path: Path, prompts: list[str], prefix: str = "p") -> Path:
    """Writes prompts with the ids p0, p1, ...; creates the folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_jsonl(path, *({"prompt_id": f"{prefix}{i}", "prompt": prompt} for i, prompt in enumerate(prompts)))


def write_rows(path: Path, rows: list[tuple[str | None, str | None]], *, with_ids: bool = True) -> Path:
    """Writes rows (prompt_id, prompt) in the format of the path's suffix."""
    columns: dict[str, list[str | None]] = {"extra": ["x"] * len(rows), "prompt": [prompt for _, prompt in rows]}
    if with_ids:
        columns["prompt_id"] = [prompt_id for prompt_id, _ in rows]
    records = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=3)
        return path
    if path.suffix in (".arrow", ".feather"):  # written by Hugging Face datasets and by pandas, respectively
        new = pa.ipc.new_stream if path.suffix == ".arrow" else pa.ipc.new_file
        with new(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
        return path
    if ".json" in path.suffixes:
        document = "\ufeff\n" + json.dumps(records, ensure_ascii=False, indent=1) + "\r\n"
        return write(path, packed(path, document.encode()))
    if {".jsonl", ".ndjson"}.intersection(path.suffixes):
        text = "\ufeff\n" + "\r\n\n".join(json.dumps(r, ensure_ascii=False) for r in records)
        return write(path, packed(path, text.encode()))
    stream, delimiter = io.StringIO(), "\t" if ".tsv" in path.suffixes else ","
    csv.writer(stream, delimiter=delimiter, lineterminator="\r\n\r\n").writerow(columns)
    csv.writer(stream, delimiter=delimiter, lineterminator="\r\n\n").writerows(record.values() for record in records)
    return write(path, packed(path, ("\ufeff" + stream.getvalue()).encode()))
