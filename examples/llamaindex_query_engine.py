"""Answer a question with a LlamaIndex query engine.

    python examples/llamaindex_query_engine.py [MODEL]

`MockLLM` repeats its prompt in place of an answer. Replace it with your own model.
"""

from __future__ import annotations

import sys

from llama_index.core import Document, VectorStoreIndex
from llama_index.core.llms import MockLLM
from llama_index.embeddings.qwen3 import Qwen3Embedding

PASSAGES = {
    "bread.md": "Bread dough rises because yeast turns sugar into carbon dioxide.",
    "tides.md": "The Moon causes the tides: its gravity pulls the oceans towards it.",
    "bees.md": "Bees tell each other where flowers are by dancing.",
}


def main(model: str | None = None) -> None:
    """Index the passages and print the answer with its sources."""
    documents = [Document(text=t, metadata={"file": f}) for f, t in PASSAGES.items()]
    with Qwen3Embedding(model) as embedding:
        index = VectorStoreIndex.from_documents(documents, embed_model=embedding)
        engine = index.as_query_engine(llm=MockLLM(), similarity_top_k=2)
        response = engine.query("Why does the sea come in and go out?")
    for source in response.source_nodes:
        print(f"{source.score:.3f} {source.metadata['file']}")
    print(response)


if __name__ == "__main__":
    main(*sys.argv[1:])
