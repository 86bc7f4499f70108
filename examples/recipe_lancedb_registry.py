"""Register Qwen3-Embedding in LanceDB, so that tables embed their rows and queries.

    python examples/recipe_lancedb_registry.py [MODEL]

LanceDB knows both roles: `compute_source_embeddings` for rows and `compute_query_embeddings` for
queries. It stores the arguments of `create` with the table. A key is read from
QWEN3_EMBEDDINGS_API_KEY. A later process imports this class before it opens the table.
"""

from __future__ import annotations

import sys
import tempfile
from functools import cache
from typing import Any

import lancedb
import numpy as np
from lancedb.embeddings import EmbeddingFunction, register
from lancedb.pydantic import LanceModel

from qwen3_embeddings import Embedder

PASSAGES = [
    "Bread dough rises because yeast turns sugar into carbon dioxide.",
    "The Moon causes the tides: its gravity pulls the oceans towards it.",
    "Bees tell each other where flowers are by dancing.",
]


@cache
def open_embedder(model: str, dimensions: int | None) -> Embedder:
    """Return the one embedder of all objects that LanceDB makes of a stored function."""
    return Embedder(model, dimensions=dimensions)


@register("qwen3")
class Qwen3EmbeddingFunction(EmbeddingFunction):
    """Qwen3-Embedding. LanceDB does not retry, because the embedder does."""

    model: str  # stored with the table, so it does not depend on a later process's environment
    dimensions: int | None = None
    max_retries: int = 0

    @property
    def embedder(self) -> Embedder:
        """The embedder; its engine starts at the first call."""
        return open_embedder(self.model, self.dimensions)

    def ndims(self) -> int:
        """Return the size of the vector column."""
        return self.embedder.embedding_dimension

    def compute_source_embeddings(self, texts: Any, *_: Any, **__: Any) -> list[np.ndarray]:
        """Embed rows as documents."""
        return list(self.embedder.encode_document(self.sanitize_input(texts)))

    def compute_query_embeddings(self, query: str, *_: Any, **__: Any) -> list[np.ndarray]:
        """Embed a query under the task's instruction."""
        return [self.embedder.encode_query(query)]


def main(model: str | None = None) -> None:
    """Create a table that embeds, and search it by text."""
    with Embedder(model) as default:
        name = default.model or default.start().model
    function = Qwen3EmbeddingFunction.create(model=name, dimensions=256)

    class Passage(LanceModel):
        text: str = function.SourceField()
        vector: list[float] = function.VectorField()

    with tempfile.TemporaryDirectory() as folder, function.embedder:
        table = lancedb.connect(folder).create_table("passages", schema=Passage)
        table.add([{"text": text} for text in PASSAGES])
        question = table.search("Why does the sea come in and go out?")
        for row in question.metric("cosine").limit(2).to_list():
            print(f"{1 - row['_distance']:.3f} {row['text']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
