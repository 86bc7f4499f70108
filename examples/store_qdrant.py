"""Store vectors of several sizes in a local Qdrant, through LlamaIndex.

    python examples/store_qdrant.py [MODEL [SIZE ...]]
    python examples/store_qdrant.py MODEL 0 256 128     for the demo model

SIZE is a number of dimensions; 0 is the model's native size. The local mode suits small corpora: it
scans all vectors. For a server pass `QdrantClient(url=...)`.
"""

from __future__ import annotations

import sys
from contextlib import closing

from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.schema import TextNode
from llama_index.embeddings.qwen3 import Qwen3Embedding
from llama_index.vector_stores.qdrant import QdrantVectorStore
from qdrant_client import QdrantClient

PASSAGES = [
    "Bread dough rises because yeast turns sugar into carbon dioxide.",
    "The Moon causes the tides: its gravity pulls the oceans towards it.",
    "Bees tell each other where flowers are by dancing.",
]
QUERY = "Why does the sea come in and go out?"


def main(model: str | None = None, *sizes: str) -> None:
    """Fill and search one collection per size."""
    with closing(QdrantClient(":memory:")) as client, Qwen3Embedding(model) as native:
        for size in sizes or ("0", "512", "256"):
            with native.model_copy(update={"dimensions": int(size) or None}) as embedding:
                name = f"passages-{embedding.embedding_dimension}"
                store = QdrantVectorStore(name, client=client)
                index = VectorStoreIndex(
                    [TextNode(text=text) for text in PASSAGES],
                    embed_model=embedding,
                    storage_context=StorageContext.from_defaults(vector_store=store),
                )
                [best] = index.as_retriever(similarity_top_k=1).retrieve(QUERY)
                print(f"{embedding.embedding_dimension} {best.score:.3f} {best.text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
