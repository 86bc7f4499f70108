"""Store vectors of several sizes in Chroma, through LangChain.

    python examples/store_chroma.py [MODEL [SIZE ...]]
    python examples/store_chroma.py MODEL 0 256 128     for the demo model

SIZE is a number of dimensions; 0 is the model's native size. A collection has one size, so each
size has a collection of its own. The engine is shared.
"""

from __future__ import annotations

import sys

import chromadb
from langchain_chroma import Chroma
from langchain_qwen3_embeddings import Qwen3Embeddings

PASSAGES = [
    "Bread dough rises because yeast turns sugar into carbon dioxide.",
    "The Moon causes the tides: its gravity pulls the oceans towards it.",
    "Bees tell each other where flowers are by dancing.",
]
QUERY = "Why does the sea come in and go out?"


def main(model: str | None = None, *sizes: str) -> None:
    """Fill and search one collection per size."""
    with chromadb.EphemeralClient() as client, Qwen3Embeddings(model=model) as native:
        for size in sizes or ("0", "512", "256"):
            with native.model_copy(update={"dimensions": int(size) or None}) as embeddings:
                store = Chroma(
                    collection_name=f"passages-{embeddings.embedding_dimension}",
                    client=client,
                    embedding_function=embeddings,
                    # Chroma's default is the squared Euclidean distance.
                    collection_configuration={"hnsw": {"space": "cosine"}},
                )
                store.add_texts(PASSAGES)
                [(best, distance)] = store.similarity_search_with_score(QUERY, k=1)
                print(f"{embeddings.embedding_dimension} {1 - distance:.3f} {best.page_content}")


if __name__ == "__main__":
    main(*sys.argv[1:])
