"""Load embedded shards into Qdrant and query it from LlamaIndex, without embedding again.

    python examples/corpus_qdrant.py VECTORS MODEL QUERY

``pip install llama-index-embeddings-qwen3 llama-index-vector-stores-qdrant``. Qdrant's ids are
integers or UUIDs. One derived from file and row makes loading idempotent.
"""

from __future__ import annotations

import sys
import uuid
from contextlib import closing

import pyarrow.dataset as ds
from llama_index.core import VectorStoreIndex
from llama_index.embeddings.qwen3 import Qwen3Embedding
from llama_index.vector_stores.qdrant import QdrantVectorStore
from qdrant_client import QdrantClient
from qdrant_client.models import Distance, PointStruct, VectorParams


def main(vectors: str, model: str, query: str, engine: str | None = None) -> None:
    """Fill a collection, then search it with LlamaIndex's vector store."""
    data = ds.dataset(vectors)
    size = data.schema.field("embedding").type.list_size
    with (
        closing(QdrantClient(":memory:")) as client,
        Qwen3Embedding(model_name=model, engine=engine) as embedding,
    ):
        client.create_collection(
            "passages", vectors_config=VectorParams(size=size, distance=Distance.COSINE)
        )
        for batch in data.to_batches(batch_size=256):
            points = [
                PointStruct(
                    id=str(uuid.uuid5(uuid.NAMESPACE_URL, f"{row['file']}#{row['row']}")),
                    vector=row["embedding"],
                    payload={"text": row["text"], "id": row["id"]},
                )
                for row in batch.to_pylist()
            ]
            client.upsert("passages", points)
        store = QdrantVectorStore("passages", client=client)
        index = VectorStoreIndex.from_vector_store(store, embed_model=embedding)
        for found in index.as_retriever(similarity_top_k=2).retrieve(query):
            print(f"{found.score:.3f} {found.metadata['id']} {found.text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
