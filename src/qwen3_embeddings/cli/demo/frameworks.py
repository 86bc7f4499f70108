"""LangChain and LlamaIndex, each used as in its own documentation, behind one interface."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from qwen3_embeddings.cli.demo.corpus import Passage, Query
from qwen3_embeddings.errors import MissingDependencyError

if TYPE_CHECKING:
    from llama_index.core import VectorStoreIndex

TASK = "web_search"
"""Task of the embedding objects; `with_task` derives those of other tasks."""

BATCH = 16
"""Texts per call, few enough for the progress bar to move."""


@dataclass(frozen=True)
class Hit:
    """A passage, and the cosine of its vector and that of the query."""

    id: str
    score: float


class Framework(ABC):
    """Index passages and find the nearest ones.

    Args:
        model: Hub id, folder or the name on the server; None for the model that it serves.
        base_url: URL of the server.
        options: The parameters whose names are the same in both frameworks.

    Attributes:
        name: The usual spelling.
    """

    name: ClassVar[str]

    @abstractmethod
    def __init__(self, model: str | None, base_url: str | None, **options: Any) -> None: ...

    @abstractmethod
    def index(self, passages: Sequence[Passage]) -> None:
        """Embed and store the passages, with a progress bar on a terminal."""

    @abstractmethod
    def search(self, query: Query, count: int) -> list[Hit]:
        """Return the passages nearest to `query`, best first."""

    @abstractmethod
    def close(self) -> None:
        """Release the engine."""


class LangChain(Framework):
    """Use LangChain's InMemoryVectorStore."""

    name = "LangChain"

    def __init__(self, model: str | None, base_url: str | None, **options: Any) -> None:
        from langchain_core.vectorstores import InMemoryVectorStore
        from langchain_qwen3_embeddings import Qwen3Embeddings

        self._embeddings = Qwen3Embeddings(
            model=model,
            base_url=base_url,
            task=TASK,
            chunk_size=BATCH,
            show_progress_bar=_on_terminal(),
            **options,
        )
        self._store = InMemoryVectorStore(self._embeddings)

    def index(self, passages: Sequence[Passage]) -> None:
        """Embed and store the passages."""
        self._store.add_texts([p.text for p in passages], ids=[p.id for p in passages])

    def search(self, query: Query, count: int) -> list[Hit]:
        """Return the passages nearest to `query`, best first."""
        if query.task == TASK:
            found = self._store.similarity_search_with_score(query.text, count)
        else:
            vector = self._embeddings.with_task(query.task).embed_query(query.text)
            found = self._store.similarity_search_with_score_by_vector(vector, count)
        return [Hit(str(document.id), score) for document, score in found]

    def close(self) -> None:
        """Release the engine."""
        self._embeddings.close()


class LlamaIndex(Framework):
    """Use LlamaIndex's VectorStoreIndex and its retriever, without a language model."""

    name = "LlamaIndex"

    def __init__(self, model: str | None, base_url: str | None, **options: Any) -> None:
        from llama_index.embeddings.qwen3 import Qwen3Embedding

        embedding = Qwen3Embedding(
            model, api_base=base_url, task=TASK, embed_batch_size=BATCH, **options
        )
        self._embeddings = {TASK: embedding}
        self._index: VectorStoreIndex

    def index(self, passages: Sequence[Passage]) -> None:
        """Embed and store the passages."""
        from llama_index.core import VectorStoreIndex
        from llama_index.core.schema import TextNode

        nodes = [TextNode(id_=passage.id, text=passage.text) for passage in passages]
        embedding = self._embeddings[TASK]
        self._index = VectorStoreIndex(nodes, embed_model=embedding, show_progress=_on_terminal())

    def search(self, query: Query, count: int) -> list[Hit]:
        """Return the passages nearest to `query`, best first."""
        if query.task not in self._embeddings:
            self._embeddings[query.task] = self._embeddings[TASK].with_task(query.task)
        embedding = self._embeddings[query.task]
        retriever = self._index.as_retriever(similarity_top_k=count, embed_model=embedding)
        return [Hit(found.node_id, found.get_score()) for found in retriever.retrieve(query.text)]

    def close(self) -> None:
        """Release the engine."""
        for embedding in self._embeddings.values():
            embedding.close()


def _on_terminal() -> bool:
    """Return whether a progress bar would be drawn on a terminal, not into a log."""
    return sys.stderr.isatty()


FRAMEWORKS: tuple[type[Framework], ...] = (LangChain, LlamaIndex)


def check_installed() -> None:
    """Check that both integrations are installed, before an engine starts.

    Raises:
        MissingDependencyError: One is missing.
    """
    try:
        import_module("langchain_qwen3_embeddings")
        import_module("llama_index.embeddings.qwen3")
    except ImportError as error:
        raise MissingDependencyError(
            f"the demo runs in LangChain and LlamaIndex ({error}). Run "
            "pip install 'qwen3-embeddings[demo]'."
        ) from error
