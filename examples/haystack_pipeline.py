"""Index and search with Haystack pipelines.

    python examples/haystack_pipeline.py [MODEL]

The document embedder and the text embedder share one engine. They need the same model and size.
"""

from __future__ import annotations

import sys

from haystack import Document, Pipeline
from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
from haystack.components.writers import DocumentWriter
from haystack.document_stores.in_memory import InMemoryDocumentStore
from haystack_integrations.components.embedders.qwen3 import (
    Qwen3DocumentEmbedder,
    Qwen3TextEmbedder,
)

DOCUMENTS = [
    Document(content="Dough rises because yeast turns sugar into gas.", meta={"title": "Bread"}),
    Document(content="The Moon's gravity pulls the oceans towards it.", meta={"title": "Tides"}),
    Document(content="They show where flowers are by dancing.", meta={"title": "Bees"}),
]


def main(model: str | None = None) -> None:
    """Index the documents with their titles, and print the best two for a question."""
    store = InMemoryDocumentStore(embedding_similarity_function="cosine")
    with (
        Qwen3DocumentEmbedder(model, meta_fields_to_embed=["title"]) as document_embedder,
        Qwen3TextEmbedder(model) as text_embedder,
    ):
        index = Pipeline()
        index.add_component("embed", document_embedder)
        index.add_component("write", DocumentWriter(store))
        index.connect("embed.documents", "write.documents")
        index.run({"embed": {"documents": DOCUMENTS}})

        search = Pipeline()
        search.add_component("embed", text_embedder)
        search.add_component("retrieve", InMemoryEmbeddingRetriever(store, top_k=2))
        search.connect("embed.embedding", "retrieve.query_embedding")
        found = search.run({"embed": {"text": "Why does the sea come in and go out?"}})
    for document in found["retrieve"]["documents"]:
        print(f"{document.score:.3f} {document.meta['title']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
