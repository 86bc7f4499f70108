"""Load embedded shards into Chroma and query it from LangChain, without embedding again.

    python examples/corpus_chroma.py VECTORS MODEL QUERY

``pip install langchain-qwen3-embeddings langchain-chroma``.
"""

from __future__ import annotations

import sys

import chromadb
import pyarrow.dataset as ds
from langchain_chroma import Chroma
from langchain_qwen3_embeddings import Qwen3Embeddings


def main(vectors: str, model: str, query: str, engine: str | None = None) -> None:
    """Fill a collection, then search it with LangChain's vector store."""
    cosine = {"hnsw": {"space": "cosine"}}
    with (
        chromadb.EphemeralClient() as client,
        Qwen3Embeddings(model=model, engine=engine) as embeddings,
    ):
        collection = client.create_collection(
            "passages", embedding_function=None, configuration=cosine
        )
        columns = ["id", "text", "embedding"]
        for batch in ds.dataset(vectors).to_batches(columns=columns, batch_size=1000):
            rows = batch.to_pydict()
            collection.add(rows["id"], embeddings=rows["embedding"], documents=rows["text"])
        store = Chroma("passages", embeddings, client=client, collection_configuration=cosine)
        for document, distance in store.similarity_search_with_score(query, k=2):
            print(f"{1 - distance:.3f} {document.id} {document.page_content}")


if __name__ == "__main__":
    main(*sys.argv[1:])
