"""Retrieve passages in DSPy.

    python examples/recipe_dspy.py [MODEL]

DSPy knows one role only: `dspy.retrievers.Embeddings` embeds the corpus and the questions with the
same function. Give it the function for documents, and after it has embedded the corpus the one for
queries. Switch its cache off: the key of a function is its source code, so another model or size
would get the vectors of the first.
"""

from __future__ import annotations

import sys

import dspy

from qwen3_embeddings import Embedder

PASSAGES = [
    "Bread dough rises because yeast turns sugar into carbon dioxide.",
    "The Moon causes the tides: its gravity pulls the oceans towards it.",
    "Bees tell each other where flowers are by dancing.",
]


def main(model: str | None = None) -> None:
    """Index the passages and print the best two for a question."""
    with Embedder(model, task="question_answering") as embedder:
        documents = dspy.Embedder(embedder.encode_document, caching=False)
        search = dspy.retrievers.Embeddings(PASSAGES, documents, k=2)
        search.embedder = dspy.Embedder(embedder.encode_query, caching=False)
        for passage in search("Why does the sea come in and go out?").passages:
            print(passage)


if __name__ == "__main__":
    main(*sys.argv[1:])
