"""Store vectors of several sizes in FAISS, through LangChain.

    python examples/store_faiss.py [MODEL [SIZE ...]]
    python examples/store_faiss.py MODEL 0 256 128     for the demo model

SIZE is a number of dimensions; 0 is the model's native size. All vectors have length 1, so the
inner product is the cosine.
"""

from __future__ import annotations

import sys

import faiss
from langchain_community.docstore.in_memory import InMemoryDocstore
from langchain_community.vectorstores import FAISS
from langchain_community.vectorstores.utils import DistanceStrategy
from langchain_qwen3_embeddings import Qwen3Embeddings

PASSAGES = [
    "Bread dough rises because yeast turns sugar into carbon dioxide.",
    "The Moon causes the tides: its gravity pulls the oceans towards it.",
    "Bees tell each other where flowers are by dancing.",
]
QUERY = "Why does the sea come in and go out?"


def main(model: str | None = None, *sizes: str) -> None:
    """Fill and search one index per size."""
    with Qwen3Embeddings(model=model) as native:
        for size in sizes or ("0", "512", "256"):
            with native.model_copy(update={"dimensions": int(size) or None}) as embeddings:
                store = FAISS(
                    embeddings,
                    faiss.IndexFlatIP(embeddings.embedding_dimension),
                    InMemoryDocstore(),
                    index_to_docstore_id={},
                    distance_strategy=DistanceStrategy.MAX_INNER_PRODUCT,
                )
                store.add_texts(PASSAGES)
                [(best, cosine)] = store.similarity_search_with_score(QUERY, k=1)
                print(f"{embeddings.embedding_dimension} {cosine:.3f} {best.page_content}")


if __name__ == "__main__":
    main(*sys.argv[1:])
