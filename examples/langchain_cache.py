"""Cache vectors on disk with LangChain's CacheBackedEmbeddings.

    python examples/langchain_cache.py [MODEL [FOLDER]]

The same text has another vector as a query than as a document. Each role therefore has a store of
its own, named by its fingerprint, which changes with model, size and instruction.
"""

from __future__ import annotations

import sys
import tempfile

from langchain_classic.embeddings import CacheBackedEmbeddings
from langchain_classic.storage import LocalFileStore
from langchain_qwen3_embeddings import Qwen3Embeddings

PASSAGES = [
    "Bread dough rises because yeast turns sugar into carbon dioxide.",
    "The Moon causes the tides: its gravity pulls the oceans towards it.",
]


def main(model: str | None = None, folder: str | None = None) -> None:
    """Embed the same texts twice and print how many the engine embedded each time."""
    with tempfile.TemporaryDirectory() as temporary, Qwen3Embeddings(model=model) as embeddings:
        folder = folder or temporary
        cached = CacheBackedEmbeddings.from_bytes_store(
            embeddings,
            LocalFileStore(f"{folder}/documents"),
            namespace=embeddings.fingerprint("document"),
            query_embedding_cache=LocalFileStore(f"{folder}/{embeddings.fingerprint('query')}"),
            key_encoder="blake2b",
        )
        for attempt in ("first", "second"):
            before = embeddings.usage.texts
            cached.embed_documents(PASSAGES)
            cached.embed_query(PASSAGES[0])
            print(f"{attempt}: {embeddings.usage.texts - before} texts embedded")


if __name__ == "__main__":
    main(*sys.argv[1:])
