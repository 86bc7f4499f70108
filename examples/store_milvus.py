"""Store vectors of several sizes in Milvus Lite, through LangChain.

    python examples/store_milvus.py [MODEL [SIZE ...]]
    python examples/store_milvus.py MODEL 0 256 128     for the demo model

SIZE is a number of dimensions; 0 is the model's native size. Do not set MILVUS_URI to a path in the
environment: pymilvus reads it and refuses to start. A MilvusClient that opens an existing file must
call `load_collection` before it searches.
"""

from __future__ import annotations

import sys
import tempfile

from langchain_milvus import Milvus
from langchain_qwen3_embeddings import Qwen3Embeddings

PASSAGES = [
    "Bread dough rises because yeast turns sugar into carbon dioxide.",
    "The Moon causes the tides: its gravity pulls the oceans towards it.",
    "Bees tell each other where flowers are by dancing.",
]
QUERY = "Why does the sea come in and go out?"


def main(model: str | None = None, *sizes: str) -> None:
    """Fill and search one collection per size."""
    with tempfile.TemporaryDirectory() as folder, Qwen3Embeddings(model=model) as native:
        for size in sizes or ("0", "512", "256"):
            with native.model_copy(update={"dimensions": int(size) or None}) as embeddings:
                store = Milvus(
                    embedding_function=embeddings,
                    collection_name=f"passages_{embeddings.embedding_dimension}",
                    connection_args={"uri": f"{folder}/milvus.db"},
                    index_params={"index_type": "FLAT", "metric_type": "COSINE"},
                    auto_id=True,
                )
                store.add_texts(PASSAGES)
                [(best, cosine)] = store.similarity_search_with_score(QUERY, k=1)
                print(f"{embeddings.embedding_dimension} {cosine:.3f} {best.page_content}")
                store.client.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
