"""Split a text where its subject changes, with LlamaIndex's SemanticSplitterNodeParser.

    python examples/llamaindex_semantic_chunking.py [MODEL]

The splitter compares neighbouring sentences with each other. The symmetric task "similarity" is
made for that. The index uses the same engine with a retrieval task.
"""

from __future__ import annotations

import re
import sys

from llama_index.core import Document
from llama_index.core.node_parser import SemanticSplitterNodeParser
from llama_index.embeddings.qwen3 import Qwen3Embedding

TEXT = (
    "Bread dough rises because yeast turns sugar into gas. Bakers let the dough rest until it has "
    "doubled. A hot oven then sets the crumb of the bread. The Moon pulls the oceans towards it. "
    "So the sea rises and falls twice a day. The tides are highest at new moon and full moon."
)


def sentences(text: str) -> list[str]:
    """Return the sentences; the default splitter would download a tokenizer of NLTK."""
    return re.split(r"(?<=[.!?] )", text)


def main(model: str | None = None) -> None:
    """Print the chunks, one per line."""
    with Qwen3Embedding(model) as embedding, embedding.with_task("similarity") as similar:
        splitter = SemanticSplitterNodeParser(
            embed_model=similar,
            buffer_size=0,
            breakpoint_percentile_threshold=80,
            sentence_splitter=sentences,
        )
        for node in splitter.get_nodes_from_documents([Document(text=TEXT)]):
            print(node.get_content())


if __name__ == "__main__":
    main(*sys.argv[1:])
