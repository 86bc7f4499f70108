"""Load embedded shards into Milvus Lite and search them.

    python examples/corpus_milvus.py VECTORS MODEL QUERY

``pip install 'pymilvus[milvus-lite]'``.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import closing

import pyarrow.dataset as ds
from pymilvus import MilvusClient

from qwen3_embeddings import Embedder


def main(vectors: str, model: str, query: str, engine: str | None = None) -> None:
    """Fill a collection and print the nearest rows."""
    data = ds.dataset(vectors)
    size = data.schema.field("embedding").type.list_size
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(MilvusClient(f"{folder}/milvus.db")) as client,
        Embedder(model, engine=engine) as embedder,
    ):
        client.create_collection(
            "passages", dimension=size, id_type="string", max_length=64,
            vector_field_name="embedding", metric_type="COSINE",
        )  # fmt: skip
        for batch in data.to_batches(columns=["id", "text", "embedding"], batch_size=1000):
            client.insert("passages", batch.to_pylist())
        (vector,) = embedder.encode_query([query])
        (hits,) = client.search("passages", [vector.tolist()], limit=2)
        for hit in hits:
            print(f"{hit['distance']:.3f} {hit['id']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
