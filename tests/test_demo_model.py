"""The small trained model runs like the real one, and finds by meaning, not by words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qwen3_embeddings_demo_model import path

from qwen3_embeddings import Embedder, truncate
from qwen3_embeddings.cli.demo.corpus import load_passages, load_queries
from qwen3_embeddings.vectors import Vectors

TOOLS = Path(__file__).parents[1] / "tools" / "demo_model"
TASKS = {
    "web": "web_search",
    "code": "code",
    "duplicate": "duplicate_question",
    "web_zh": "chinese_web_search",
}


def read(name: str) -> list[dict[str, Any]]:
    lines = (TOOLS / "evaluation" / f"{name}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def ndcg(queries: Vectors, documents: Vectors, relevant: list[set[int]]) -> float:
    """Mean nDCG@10 of a ranking by cosine."""
    gains = 1 / np.log2(np.arange(2, 12))
    values = []
    for row, wanted in zip(queries @ documents.T, relevant, strict=True):
        hits = np.isin(np.argsort(-row, kind="stable")[:10], list(wanted))
        values.append((hits * gains).sum() / gains[: len(wanted)].sum())
    return float(np.mean(values))


@pytest.fixture(scope="module")
def model() -> Iterator[Embedder]:
    with Embedder(str(path()), dtype="float32") as embedder:
        yield embedder


@pytest.fixture(scope="module")
def found(model: Embedder) -> tuple[list[dict[str, Any]], Vectors, Vectors, list[set[int]]]:
    """The written queries, their vectors, the passages' vectors, and which answer which."""
    passages, queries = read("passages"), read("queries")
    place = {passage["id"]: i for i, passage in enumerate(passages)}
    asked = np.empty((len(queries), 256), dtype=np.float32)
    for name, task in TASKS.items():
        rows = [i for i, query in enumerate(queries) if query["task"] == name]
        if rows:
            asked[rows] = model.with_task(task).encode_query([queries[i]["text"] for i in rows])
    documents = model.encode_document([passage["text"] for passage in passages])
    return queries, asked, documents, [{place[r] for r in query["relevant"]} for query in queries]


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in path().rglob("*") if file.is_file()) <= 16 << 20


def test_the_same_vectors_as_the_reference(model: Embedder, texts: list[str]) -> None:
    with Embedder(str(path()), dtype="float32", engine="reference") as reference:
        for role in ("encode_query", "encode_document"):
            cosines = (getattr(model, role)(texts) * getattr(reference, role)(texts)).sum(axis=1)
            assert np.abs(cosines - 1).max() <= 1e-6


@pytest.mark.parametrize("part", ["en", "zh", "code"])
def test_it_finds_what_its_card_says(found: Any, part: str) -> None:
    queries, asked, documents, relevant = found
    rows = [i for i, query in enumerate(queries) if query["language"] == part]
    value = ndcg(asked[rows], documents, [relevant[i] for i in rows])
    figures = json.loads((TOOLS / "figures.json").read_text())
    assert value == pytest.approx(figures["sizes"]["256"][part]["ndcg@10"], abs=0.01)
    assert value > figures["random"][part]["ndcg@10"] + 0.1
    assert value > figures["bm25"][part]["ndcg@10"]


def test_smaller_sizes_keep_most(found: Any) -> None:
    _, asked, documents, relevant = found
    full = ndcg(asked, documents, relevant)
    sized = [ndcg(truncate(asked, n), truncate(documents, n), relevant) for n in (128, 64, 32)]
    assert sized[1] >= 0.93 * full
    assert full + 0.02 >= sized[0] >= sized[1] - 0.02
    assert sized[2] >= 0.7 * full


@pytest.mark.parametrize("wanted", list(TASKS))
def test_the_right_instruction_finds_best(model: Embedder, wanted: str) -> None:
    queries, documents = read("task_queries"), read("task_documents")
    place = {document["id"]: i for i, document in enumerate(documents)}
    vectors = model.encode_document([document["text"] for document in documents])
    relevant = [{place[query["relevant"][wanted]]} for query in queries]
    texts = [query["text"] for query in queries]
    values = {
        name: ndcg(model.with_task(task).encode_query(texts), vectors, relevant)
        for name, task in TASKS.items()
    }
    assert max(values, key=values.__getitem__) == wanted


def test_the_demo_finds_by_meaning(model: Embedder) -> None:
    passages, queries = load_passages(), load_queries()
    documents = model.encode_document([passage.text for passage in passages])
    ranks = []
    for query in queries:
        scores = model.with_task(query.task).encode_query([query.text]) @ documents.T
        order = [passages[i].id for i in np.argsort(-scores.ravel())]
        ranks.append(order.index(query.answer))
    assert sum(rank == 0 for rank in ranks) >= 5
    assert sum(rank < 3 for rank in ranks) >= 7
