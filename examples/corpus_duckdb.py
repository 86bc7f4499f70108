"""Search embedded shards with DuckDB, without loading them anywhere.

    python examples/corpus_duckdb.py VECTORS MODEL QUERY

``pip install duckdb``. It reads all vectors for each query: fine for a million rows.
"""

from __future__ import annotations

import sys

import duckdb

from qwen3_embeddings import Embedder


def main(vectors: str, model: str, query: str, engine: str | None = None) -> None:
    """Print the nearest rows."""
    with Embedder(model, engine=engine) as embedder:
        (vector,) = embedder.encode_query([query])
    array = f"FLOAT[{len(vector)}]"
    rows = duckdb.execute(
        f"""
        SELECT array_cosine_similarity(embedding::{array}, $1::{array}) AS score, id
        FROM '{vectors}/*.parquet' ORDER BY score DESC LIMIT 2
        """,
        [vector.tolist()],
    )
    for score, row in rows.fetchall():
        print(f"{score:.3f} {row}")


if __name__ == "__main__":
    main(*sys.argv[1:])
