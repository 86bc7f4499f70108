"""Find the topics of a corpus with BERTopic.

    python examples/recipe_bertopic.py [MODEL]

BERTopic knows one role only: it embeds documents and topic words alike, and compares them. Use a
symmetric task, which puts its instruction before every text. "clustering" was trained on topics.
"""

from __future__ import annotations

import sys

import numpy as np
from bertopic import BERTopic
from bertopic.backend import BaseEmbedder
from hdbscan import HDBSCAN
from sklearn.decomposition import PCA
from sklearn.feature_extraction.text import CountVectorizer

from qwen3_embeddings import Embedder

SUBJECTS = {
    "bread": ["yeast", "dough", "flour", "oven", "crust", "baker", "loaf", "sourdough"],
    "sea": ["tide", "wave", "harbour", "coast", "Moon", "sailor", "storm", "beach"],
}
TEXTS = [
    f"The {word} matters to everyone who works with {subject} every day."
    for subject, words in SUBJECTS.items()
    for word in words
]


class Qwen3Backend(BaseEmbedder):
    """BERTopic's backend over an embedder."""

    def __init__(self, embedder: Embedder) -> None:
        super().__init__(embedding_model=embedder)

    def embed(self, documents: list[str], verbose: bool = False) -> np.ndarray:
        """Return one vector per document or word."""
        return self.embedding_model.encode_document(documents, show_progress=verbose)


def main(model: str | None = None) -> None:
    """Print the words of each topic, and which texts belong to it."""
    with Embedder(model, task="clustering") as embedder:
        topics = BERTopic(
            embedding_model=Qwen3Backend(embedder),
            umap_model=PCA(n_components=2, random_state=0),  # UMAP needs more texts than these
            hdbscan_model=HDBSCAN(min_cluster_size=4),
            vectorizer_model=CountVectorizer(stop_words="english"),
        )
        assigned, _ = topics.fit_transform(TEXTS)
        for topic in sorted(set(assigned)):
            words = [word for word, _ in topics.get_topic(topic)[:3]]
            print(f"{topic} {words} {[i for i, t in enumerate(assigned) if t == topic]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
