"""The output in the libraries that people load it with, in each number type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from corpus_fake import FakeEmbedder, vector

from qwen3_embeddings.corpus import JobRefusedError, embed

COUNT, SIZE = 1000, 64
TEXTS = [f"row {i}" for i in range(COUNT)]
VECTORS = np.stack([vector(text, SIZE) for text in TEXTS])
DTYPES = ("float32", "float16", "int8", "binary")
ERROR = {"float32": 0.0, "float16": 3e-4, "int8": 3e-3}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One output of several shards per number type."""
    folder = tmp_path_factory.mktemp("outputs")
    table = pa.table({"id": range(COUNT), "text": TEXTS})
    pq.write_table(table, folder / "a.parquet")
    for dtype in DTYPES:
        embed(str(folder / "a.parquet"), str(folder / dtype), embedder=FakeEmbedder(size=SIZE),
              id_column="id", keep=["text"], dtype=dtype, shard_rows=400)  # fmt: skip
    return {dtype: folder / dtype for dtype in DTYPES}


def check(dtype: str, ids: Any, vectors: Any, scale: Any) -> None:
    """Compare what a library returned with the vectors."""
    order = np.argsort(np.asarray(ids))
    stored = np.stack([np.asarray(row) for row in vectors])[order]
    if dtype == "binary":
        np.testing.assert_array_equal(stored, np.packbits(VECTORS > 0, axis=1))
        return
    found = stored.astype(np.float32)
    if dtype == "int8":
        found *= np.asarray(scale)[order][:, None]
    np.testing.assert_allclose(found, VECTORS, atol=ERROR[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_output_in_pyarrow_is_a_fixed_size_list(outputs: dict[str, Path], dtype: str) -> None:
    table = ds.dataset(outputs[dtype]).to_table()
    stored = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8()}
    kind = table.schema.field("embedding").type
    assert kind.value_type == stored.get(dtype, pa.uint8())
    assert kind.list_size == (SIZE // 8 if dtype == "binary" else SIZE)
    rows = table.to_pydict()
    check(dtype, rows["id"], rows["embedding"], rows.get("scale"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_output_in_pandas(outputs: dict[str, Path], dtype: str) -> None:
    import pandas as pd

    frame = pd.read_parquet(outputs[dtype])
    check(dtype, frame["id"], frame["embedding"], frame.get("scale"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_output_in_polars(outputs: dict[str, Path], dtype: str) -> None:
    import polars as pl

    frame = pl.read_parquet(outputs[dtype] / "*.parquet")
    assert isinstance(frame.schema["embedding"], pl.Array)
    scale = frame["scale"].to_numpy() if dtype == "int8" else None
    check(dtype, frame["id"].to_numpy(), frame["embedding"].to_numpy(), scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_output_in_duckdb(outputs: dict[str, Path], dtype: str) -> None:
    import duckdb

    scale = "scale" if dtype == "int8" else "NULL"
    query = f"SELECT id, embedding, {scale} FROM '{outputs[dtype]}/*.parquet'"
    ids, vectors, scales = zip(*duckdb.sql(query).fetchall(), strict=True)
    check(dtype, ids, vectors, scales)


def test_output_in_duckdb_is_searched_by_cosine(outputs: dict[str, Path]) -> None:
    import duckdb

    query = f"""
        SELECT id FROM '{outputs["float32"]}/*.parquet'
        ORDER BY array_cosine_similarity(embedding::FLOAT[{SIZE}], $1::FLOAT[{SIZE}]) DESC LIMIT 1
    """
    assert duckdb.execute(query, [VECTORS[42].tolist()]).fetchone() == (42,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_output_in_datasets(outputs: dict[str, Path], dtype: str, tmp_path: Path) -> None:
    import datasets

    files = sorted(map(str, outputs[dtype].glob("part-*.parquet")))
    loaded = datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(tmp_path)
    )
    scale = loaded["scale"][:] if dtype == "int8" else None
    check(dtype, loaded["id"][:], loaded["embedding"][:], scale)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_output_in_lancedb_is_searched(
    outputs: dict[str, Path], dtype: str, tmp_path: Path
) -> None:
    import lancedb

    table = lancedb.connect(tmp_path).create_table("t", ds.dataset(outputs[dtype]).to_table())
    found = table.search(VECTORS[42], vector_column_name="embedding").limit(1).to_list()
    assert [row["id"] for row in found] == [42]
    rows = table.to_arrow().to_pydict()
    check(dtype, rows["id"], rows["embedding"], None)


def test_output_int8_has_the_room_of_bytes(outputs: dict[str, Path]) -> None:
    """Parquet stores int8 in four bytes unless a dictionary is used."""
    sizes = {}
    for dtype in DTYPES:
        metadata = pq.read_metadata(next(outputs[dtype].glob("part-*")))
        columns = [metadata.row_group(0).column(i) for i in range(metadata.num_columns)]
        paths = {column.path_in_schema: column.total_compressed_size for column in columns}
        sizes[dtype] = paths["embedding.list.element"]
    assert sizes["float16"] < 0.55 * sizes["float32"]
    assert sizes["int8"] < 0.5 * sizes["float32"]
    assert sizes["binary"] < 0.1 * sizes["float32"]


def test_output_binary_of_a_size_that_fills_no_bytes_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet")
    with pytest.raises(JobRefusedError, match="not a multiple of 8"):
        embed(str(tmp_path / "a.parquet"), str(tmp_path / "out"), dtype="binary",
              embedder=FakeEmbedder(size=36))  # fmt: skip
