"""Search with txtai.

    python examples/recipe_txtai.py [MODEL]

An external function of txtai knows one role only, but txtai puts `instructions` before queries.
So the function embeds every text as it is, and the prompt of the task is the instruction. It needs
a real line break and no space at its end. The function must be a plain one: txtai calls anything
else, such as a bound method, without arguments.
"""

from __future__ import annotations

import sys

import numpy as np
from txtai import Embeddings

from qwen3_embeddings import Embedder

PASSAGES = [
    "Bread dough rises because yeast turns sugar into carbon dioxide.",
    "The Moon causes the tides: its gravity pulls the oceans towards it.",
    "Bees tell each other where flowers are by dancing.",
]


def main(model: str | None = None) -> None:
    """Index the passages and print the best two for a question."""
    with Embedder(model) as embedder:

        def embed(texts: list[str]) -> np.ndarray:
            return embedder.encode_document(texts)

        index = Embeddings(
            method="external",
            transform=embed,
            instructions={"query": f"Instruct: {embedder.task.instruction}\nQuery:", "data": ""},
        )
        index.index(PASSAGES)
        for row, score in index.search("Why does the sea come in and go out?", 2):
            print(f"{score:.3f} {PASSAGES[row]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
