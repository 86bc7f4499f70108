"""Let Chroma embed by itself, with a role for documents and one for queries.

    python examples/chroma_embedding_function.py [MODEL [FOLDER]]

Chroma stores the configuration with the collection, without a key. A later process imports the
package and opens the collection by its name.
"""

from __future__ import annotations

import sys
import tempfile

import chromadb
from chromadb_qwen3_embeddings import Qwen3EmbeddingFunction

PASSAGES = {
    "bread": "Bread dough rises because yeast turns sugar into carbon dioxide.",
    "tides": "The Moon causes the tides: its gravity pulls the oceans towards it.",
    "bees": "Bees tell each other where flowers are by dancing.",
}


def main(model: str | None = None, folder: str | None = None) -> None:
    """Fill a collection, open it again and search it."""
    with (
        tempfile.TemporaryDirectory() as temporary,
        chromadb.PersistentClient(folder or temporary) as client,
        Qwen3EmbeddingFunction(model, dimensions=256) as function,
    ):
        passages = client.create_collection("passages", embedding_function=function)
        passages.add(ids=list(PASSAGES), documents=list(PASSAGES.values()))
        reopened = client.get_collection("passages")
        found = reopened.query(query_texts=["Why does the sea come in and go out?"], n_results=2)
    for name, distance in zip(found["ids"][0], found["distances"][0], strict=True):
        print(f"{1 - distance:.3f} {name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
