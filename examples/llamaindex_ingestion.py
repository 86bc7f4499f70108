"""Ingest documents again and again with LlamaIndex's IngestionPipeline, and embed only new ones.

    python examples/llamaindex_ingestion.py [MODEL [FOLDER]]

The docstore skips unchanged documents and replaces changed ones. The cache keeps the result of each
step. The docstore does not know the model: use another folder, docstore and collection for another
model, size or document instruction, for example named by `fingerprint("document")`.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import closing
from pathlib import Path

from llama_index.core import Document, VectorStoreIndex
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.embeddings.qwen3 import Qwen3Embedding
from llama_index.vector_stores.qdrant import QdrantVectorStore
from qdrant_client import QdrantClient

BREAD = Document(id_="bread", text="Bread dough rises because yeast makes carbon dioxide.")
TIDES = Document(id_="tides", text="The tides come twice a day.")
NEW_TIDES = Document(id_="tides", text="The Moon causes the tides: it pulls the oceans.")


def main(model: str | None = None, folder: str | None = None) -> None:
    """Run the pipeline over three states of a corpus; print how many texts were embedded."""
    with (
        tempfile.TemporaryDirectory() as temporary,
        closing(QdrantClient(":memory:")) as client,
        Qwen3Embedding(model) as embedding,
    ):
        folder = folder or temporary
        store = QdrantVectorStore("documents", client=client)
        pipeline = IngestionPipeline(
            transformations=[SentenceSplitter(chunk_size=256, chunk_overlap=0), embedding],
            vector_store=store,
            docstore=SimpleDocumentStore(),
            docstore_strategy=DocstoreStrategy.UPSERTS,
        )
        for corpus in ([BREAD, TIDES], [BREAD, TIDES], [BREAD, NEW_TIDES]):
            before = embedding.usage.texts
            pipeline.run(documents=corpus)
            print(f"{embedding.usage.texts - before} texts embedded")
        pipeline.persist(folder)
        print(sorted(path.name for path in Path(folder).iterdir()))
        index = VectorStoreIndex.from_vector_store(store, embed_model=embedding)
        print(index.as_retriever(similarity_top_k=1).retrieve("Why is there a tide?")[0].text)


if __name__ == "__main__":
    main(*sys.argv[1:])
