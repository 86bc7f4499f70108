"""Split a text where its subject changes, with LangChain's SemanticChunker.

    python examples/langchain_semantic_chunking.py [MODEL]

The splitter compares neighbouring sentences with each other. The symmetric task "similarity" is
made for that. The index uses the same engine with a retrieval task.
"""

from __future__ import annotations

import sys

from langchain_experimental.text_splitter import SemanticChunker
from langchain_qwen3_embeddings import Qwen3Embeddings

TEXT = (
    "Bread dough rises because yeast turns sugar into gas. Bakers let the dough rest until it has "
    "doubled. A hot oven then sets the crumb of the bread. The Moon pulls the oceans towards it. "
    "So the sea rises and falls twice a day. The tides are highest at new moon and full moon."
)


def main(model: str | None = None) -> None:
    """Print the chunks, one per line."""
    with Qwen3Embeddings(model=model) as embeddings, embeddings.with_task("similarity") as similar:
        splitter = SemanticChunker(similar, number_of_chunks=2, buffer_size=0)
        for chunk in splitter.split_text(TEXT):
            print(chunk)


if __name__ == "__main__":
    main(*sys.argv[1:])
