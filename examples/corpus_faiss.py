"""Load embedded shards into FAISS, one after the other, and search them.

    python examples/corpus_faiss.py VECTORS MODEL QUERY

``pip install faiss-cpu``. The vectors have unit length, so the inner product is the cosine.
"""

from __future__ import annotations

import sys

import faiss
import numpy as np
import pyarrow.dataset as ds

from qwen3_embeddings import Embedder


def main(vectors: str, model: str, query: str, engine: str | None = None) -> None:
    """Build an index and print the nearest rows."""
    data = ds.dataset(vectors)
    index = faiss.IndexFlatIP(data.schema.field("embedding").type.list_size)
    ids: list[str] = []
    for batch in data.to_batches(columns=["id", "embedding"]):
        flat = batch.column("embedding").flatten().to_numpy()
        index.add(flat.reshape(len(batch), index.d))
        ids += batch.column("id").to_pylist()
    with Embedder(model, engine=engine) as embedder:
        scores, rows = index.search(np.asarray(embedder.encode_query([query])), 2)
    for score, row in zip(scores[0], rows[0], strict=True):
        print(f"{score:.3f} {ids[row]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
