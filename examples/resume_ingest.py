"""Continue an ingest after an error, without embedding anything twice.

    python examples/resume_ingest.py [MODEL]

An error in the middle of a call carries the vectors that are finished: `error.computed`. Here one
text is too long: it is put aside, and the vectors of all others are kept. After an engine or server
error the next call embeds what is left. `qwen3-embeddings embed` does the same for files.
"""

from __future__ import annotations

import sys

import numpy as np

from qwen3_embeddings import Embedder, Qwen3EmbeddingsError, TextError

PASSAGES = [
    "Bread dough rises because yeast turns sugar into carbon dioxide.",
    "word " * 50_000,
    "The Moon causes the tides: its gravity pulls the oceans towards it.",
    "Bees tell each other where flowers are by dancing.",
]


def ingest(embedder: Embedder, texts: list[str]) -> tuple[dict[int, np.ndarray], list[int]]:
    """Return the vectors by position, and the positions of texts that cannot be embedded."""
    vectors: dict[int, np.ndarray] = {}
    rejected: list[int] = []
    left = list(range(len(texts)))
    while left:
        try:
            vectors |= zip(left, embedder.encode_document([texts[i] for i in left]), strict=True)
            left = []
        except Qwen3EmbeddingsError as error:
            done = error.computed
            if done:
                rows = zip(done.positions, done.vectors, strict=True)
                vectors |= {left[i]: row for i, row in rows}
            bad = [left[i] for i in error.positions] if isinstance(error, TextError) else []
            if not done and not bad:
                raise  # no progress: the engine or server needs attention
            print(f"{type(error).__name__}: {len(vectors)} vectors kept, {bad} put aside")
            rejected += bad
            left = [i for i in left if i not in vectors and i not in rejected]
    return vectors, rejected


def main(model: str | None = None) -> None:
    """Ingest the passages; print what has a vector and how many texts the engine embedded."""
    with Embedder(model, on_error="finish") as embedder:
        vectors, rejected = ingest(embedder, PASSAGES)
        print(f"vectors of {sorted(vectors)}, rejected {rejected}")
        print(f"{embedder.usage.texts} texts embedded")


if __name__ == "__main__":
    main(*sys.argv[1:])
