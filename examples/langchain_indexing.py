"""Keep an index up to date with LangChain's indexing API: embed only what changed.

    python examples/langchain_indexing.py [MODEL]

The record manager remembers what the store holds, but not by which model. So both are named by the
fingerprint: another model, size or document instruction fills another collection. Delete the old
collection then. To keep them, use `chromadb.PersistentClient`, and `SQLRecordManager` of
langchain-classic.
"""

from __future__ import annotations

import sys

import chromadb
from chromadb.api import ClientAPI
from langchain_chroma import Chroma
from langchain_core.documents import Document
from langchain_core.indexing import InMemoryRecordManager, RecordManager, index
from langchain_qwen3_embeddings import Qwen3Embeddings


def page(source: str, text: str) -> Document:
    """Return a document from a file."""
    return Document(text, metadata={"source": source})


BREAD = page("bread.md", "Bread dough rises because yeast turns sugar into carbon dioxide.")
TIDES = page("tides.md", "The tides come twice a day.")
NEW_TIDES = page("tides.md", "The Moon causes the tides: its gravity pulls the oceans.")


def open_index(client: ClientAPI, embeddings: Qwen3Embeddings) -> tuple[Chroma, RecordManager]:
    """Return the collection of the embeddings' fingerprint, and the record of what it holds."""
    name = embeddings.fingerprint("document")
    records = InMemoryRecordManager(namespace=name)
    records.create_schema()
    return Chroma(name, embeddings, client=client), records


def main(model: str | None = None) -> None:
    """Index three states of a corpus and print what each run did."""
    with chromadb.EphemeralClient() as client, Qwen3Embeddings(model=model) as embeddings:
        store, records = open_index(client, embeddings)
        for corpus in ([BREAD, TIDES], [BREAD, TIDES], [BREAD, NEW_TIDES]):
            before = embeddings.usage.texts
            done = index(
                corpus, records, store,
                cleanup="incremental", source_id_key="source", key_encoder="blake2b",
            )  # fmt: skip
            embedded = embeddings.usage.texts - before
            print(f"added {done['num_added']}, skipped {done['num_skipped']}, "
                  f"deleted {done['num_deleted']}, embedded {embedded}")  # fmt: skip
        print(store.similarity_search("What causes the tides?", k=1)[0].page_content)


if __name__ == "__main__":
    main(*sys.argv[1:])
