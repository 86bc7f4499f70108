"""Search a LangChain vector store with a retriever.

    python examples/langchain_retriever.py [MODEL]

`add_texts` embeds documents and the retriever embeds queries, each in its own role.
"""

from __future__ import annotations

import sys

from langchain_core.vectorstores import InMemoryVectorStore
from langchain_qwen3_embeddings import Qwen3Embeddings

PASSAGES = [
    "Bread dough rises because yeast turns sugar into carbon dioxide.",
    "The Moon causes the tides: its gravity pulls the oceans towards it.",
    "Bees tell each other where flowers are by dancing.",
    "A violin string vibrates faster when it is shorter or tighter.",
]


def main(model: str | None = None) -> None:
    """Index the passages and print the best two for a question."""
    with Qwen3Embeddings(model=model) as embeddings:
        store = InMemoryVectorStore(embeddings)
        store.add_texts(PASSAGES)
        retriever = store.as_retriever(search_kwargs={"k": 2})
        for document in retriever.invoke("Why does the sea come in and go out?"):
            print(document.page_content)


if __name__ == "__main__":
    main(*sys.argv[1:])
