"""Keep an index up to date with LangChain's indexing API: embed only what changed.

    python examples/langchain_indexing.py [MODEL]

The record manager remembers what is indexed. Its namespace holds the fingerprint, so another model
or size indexes everything again. `SQLRecordManager` of langchain-classic keeps it in a database.
"""

from __future__ import annotations

import sys

from langchain_core.documents import Document
from langchain_core.indexing import InMemoryRecordManager, index
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_qwen3_embeddings import Qwen3Embeddings


def page(source: str, text: str) -> Document:
    """Return a document from a file."""
    return Document(text, metadata={"source": source})


BREAD = page("bread.md", "Bread dough rises because yeast turns sugar into carbon dioxide.")
TIDES = page("tides.md", "The tides come twice a day.")
NEW_TIDES = page("tides.md", "The Moon causes the tides: its gravity pulls the oceans.")


def main(model: str | None = None) -> None:
    """Index three states of a corpus and print what each run did."""
    with Qwen3Embeddings(model=model) as embeddings:
        store = InMemoryVectorStore(embeddings)
        records = InMemoryRecordManager(namespace=f"docs/{embeddings.fingerprint('document')}")
        records.create_schema()
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
