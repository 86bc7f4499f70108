"""Embed a small corpus with the demo model, for the other examples here.

    python examples/corpus_embed.py FOLDER

It writes FOLDER/passages.jsonl and FOLDER/vectors, and needs
``pip install 'qwen3-embeddings[embed,vllm]' qwen3-embeddings-demo-model``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from qwen3_embeddings import Embedder
from qwen3_embeddings.corpus import embed

PASSAGES = [
    "Bread dough rises because yeast turns sugar into carbon dioxide.",
    "The Moon causes the tides: its gravity pulls the oceans towards it.",
    "A glacier is a slow river of ice that carves valleys.",
    "Bees tell each other where flowers are by dancing.",
    "A violin string vibrates faster when it is shorter or tighter.",
    "Vaccines train the immune system with a harmless part of a germ.",
]


def main(folder: Path, engine: str | None = None) -> None:
    """Write the corpus and embed it."""
    import json

    import qwen3_embeddings_demo_model

    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"id": f"p{i}", "text": text}) for i, text in enumerate(PASSAGES))
    (folder / "passages.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with Embedder(str(qwen3_embeddings_demo_model.path()), engine=engine) as embedder:
        summary = embed(
            str(folder / "passages.jsonl"),
            str(folder / "vectors"),
            embedder=embedder,
            id_column="id",
            keep=["text"],
        )
    print(summary)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
