"""Load embedded shards into LanceDB and search them.

    python examples/corpus_lancedb.py VECTORS MODEL QUERY

``pip install lancedb``.
"""

from __future__ import annotations

import sys
import tempfile

import lancedb
import pyarrow.dataset as ds

from qwen3_embeddings import Embedder


def main(vectors: str, model: str, query: str, engine: str | None = None) -> None:
    """Make a table and print the nearest rows."""
    data = ds.dataset(vectors)
    with tempfile.TemporaryDirectory() as folder, Embedder(model, engine=engine) as embedder:
        table = lancedb.connect(folder).create_table(
            "passages", data.to_batches(), schema=data.schema
        )
        (vector,) = embedder.encode_query([query])
        found = table.search(vector, vector_column_name="embedding").metric("cosine").limit(2)
        for row in found.to_list():
            print(f"{1 - row['_distance']:.3f} {row['id']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
