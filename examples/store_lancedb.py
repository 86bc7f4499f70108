"""Store vectors of several sizes in LanceDB, as columns of one table.

    python examples/store_lancedb.py [MODEL [SIZE ...]]
    python examples/store_lancedb.py MODEL 0 256 128     for the demo model

SIZE is a number of dimensions; 0 is the model's native size. The texts are embedded once: a smaller
vector is the first part of the larger one, normalized again (`truncate`).
"""

from __future__ import annotations

import sys
import tempfile

import lancedb
import pyarrow as pa

from qwen3_embeddings import Embedder, truncate

PASSAGES = [
    "Bread dough rises because yeast turns sugar into carbon dioxide.",
    "The Moon causes the tides: its gravity pulls the oceans towards it.",
    "Bees tell each other where flowers are by dancing.",
]
QUERY = "Why does the sea come in and go out?"


def main(model: str | None = None, *sizes: str) -> None:
    """Fill one table, and search each of its vector columns."""
    with Embedder(model) as embedder:
        documents, query = embedder.encode_document(PASSAGES), embedder.encode_query(QUERY)
        widths = [
            int(size) or embedder.embedding_dimension for size in sizes or ("0", "512", "256")
        ]
    columns: dict[str, pa.Array] = {"text": pa.array(PASSAGES)}
    for width in widths:
        flat = pa.array(truncate(documents, width).ravel())
        columns[f"vector_{width}"] = pa.FixedSizeListArray.from_arrays(flat, width)
    with tempfile.TemporaryDirectory() as folder:
        table = lancedb.connect(folder).create_table("passages", pa.table(columns))
        for width in widths:
            found = table.search(truncate(query, width), vector_column_name=f"vector_{width}")
            [best] = found.metric("cosine").limit(1).to_list()
            print(f"{width} {1 - best['_distance']:.3f} {best['text']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
