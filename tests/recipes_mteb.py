"""Run examples/recipe_mteb.py on two tiny tasks without the hub, and print what came out as JSON.

tests/recipes.py runs it in the environment that has mteb.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mteb
import numpy as np
from datasets import Dataset, DatasetDict
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.types import PromptType

from qwen3_embeddings import Embedder

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from recipe_mteb import Qwen3Encoder

COMMON: dict[str, Any] = {
    "description": "A test.",
    "reference": None,
    "dataset": {"path": "none", "revision": "none"},
    "category": "t2t",
    "eval_splits": ["test"],
    "eval_langs": ["eng-Latn"],
    "date": None,
    "dialect": None,
    "domains": None,
    "task_subtypes": None,
    "license": None,
    "annotations_creators": None,
    "modalities": ["text"],
    "sample_creation": None,
    "bibtex_citation": None,
}
PASSAGES = {
    "bread": "Bread dough rises because yeast turns sugar into carbon dioxide.",
    "tides": "The Moon causes the tides: its gravity pulls the oceans towards it.",
    "bees": "Bees tell each other where flowers are by dancing.",
}
QUERIES = {
    "bread": "what makes bread rise",
    "tides": "why does the sea come in and go out",
    "bees": "how do bees tell others where flowers are",
}


class TinyRetrieval(AbsTaskRetrieval):
    """Three passages and their questions."""

    metadata = TaskMetadata(
        name="TinyRetrieval", type="Retrieval", main_score="ndcg_at_10",
        prompt={"query": "Given a question, find the passage"}, **COMMON,
    )  # fmt: skip

    def load_data(self, num_proc: int | None = None, **_: Any) -> None:
        """Make the data."""
        split = RetrievalSplitData(
            queries=Dataset.from_list([{"id": k, "text": v} for k, v in QUERIES.items()]),
            corpus=Dataset.from_list(
                [{"id": k, "text": v, "title": ""} for k, v in PASSAGES.items()]
            ),
            relevant_docs={name: {name: 1} for name in QUERIES},
            top_ranked=None,
        )
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


class TinySimilarity(AbsTaskSTS):
    """Three pairs, from the same to another subject."""

    metadata = TaskMetadata(
        name="TinySimilarity", type="STS", main_score="cosine_spearman",
        prompt="Retrieve semantically similar text", **COMMON,
    )  # fmt: skip
    min_score, max_score = 0, 2

    def load_data(self, num_proc: int | None = None, **_: Any) -> None:
        """Make the data."""
        bread = PASSAGES["bread"]
        others = [bread, "Yeast makes the dough of bread rise.", PASSAGES["tides"]]
        rows = {"sentence1": [bread] * 3, "sentence2": others, "score": [2, 1, 0]}
        self.dataset = DatasetDict({"test": Dataset.from_dict(rows)})
        self.data_loaded = True


def difference(encoder: Qwen3Encoder, task: Any, role: str | None, expected: Any) -> float:
    """Return the largest difference between the encoder's vectors and the expected ones."""
    found = encoder.encode(
        [{"text": list(PASSAGES.values())}],
        task_metadata=task.metadata,
        hf_split="test",
        hf_subset="default",
        prompt_type=PromptType(role) if role else None,
    )
    return float(np.abs(found - expected).max())


def main() -> None:
    """Score both tasks, and compare the vectors of each role with the embedder's own."""
    texts = list(PASSAGES.values())
    tasks = [TinyRetrieval(), TinySimilarity()]
    with Embedder() as embedder:
        encoder = Qwen3Encoder(embedder)
        results = mteb.evaluate(encoder, tasks, cache=None, show_progress_bar=False)
        search = embedder.with_task(query_instruction="Given a question, find the passage")
        similar = embedder.with_task("similarity")
        differences = {
            "query": difference(encoder, tasks[0], "query", search.encode_query(texts)),
            "document": difference(encoder, tasks[0], "document", embedder.encode_document(texts)),
            "sentence": difference(encoder, tasks[1], None, similar.encode_document(texts)),
        }
    scores = {result.task_name: result.get_score() for result in results}
    print(json.dumps({"scores": scores, "differences": differences}))


main()
