"""The small trained model: the published interface, and retrieval by meaning, not by words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qwen3_embeddings_demo_model import path

from qwen3_embeddings import Embedder, truncate
from qwen3_embeddings.cli.demo.corpus import load_passages, load_queries
from qwen3_embeddings.vectors import Vectors

TOOLS = Path(__file__).parents[1] / "tools" / "demo_model"
NATIVE = 384
SIZES = (384, 256, 128, 64, 32)
LIMIT = 45_000_000  # bytes of the whole checkpoint
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
    asked = np.empty((len(queries), NATIVE), dtype=np.float32)
    for name, task in TASKS.items():
        rows = [i for i, query in enumerate(queries) if query["task"] == name]
        if rows:
            asked[rows] = model.with_task(task).encode_query([queries[i]["text"] for i in rows])
    documents = model.encode_document([passage["text"] for passage in passages])
    return queries, asked, documents, [{place[r] for r in query["relevant"]} for query in queries]


def figures() -> dict[str, Any]:
    """Return the figures that the model card prints."""
    found: dict[str, Any] = json.loads((TOOLS / "figures.json").read_text())
    return found


def test_checkpoint_size_is_within_limit() -> None:
    assert sum(file.stat().st_size for file in path().rglob("*") if file.is_file()) <= LIMIT


def test_model_on_vllm_equals_reference(model: Embedder, texts: list[str]) -> None:
    with Embedder(str(path()), dtype="float32", engine="reference") as reference:
        for role in ("encode_query", "encode_document"):
            cosines = (getattr(model, role)(texts) * getattr(reference, role)(texts)).sum(axis=1)
            assert np.abs(cosines - 1).max() <= 1e-6


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("def f():\n    return 1", "def f(): return 1"),
        ("if a:\n    b()\nc()", "if a:\n    b()\n    c()"),
        ("a  b", "a b"),
        ("text", "text\n"),
        ("a\tb", "a b"),
        ("Polish", "polish"),
        ("US", "us"),
        ("中国", "中 国"),
    ],
)
def test_model_changed_space_or_case_changes_vector(model: Embedder, one: str, other: str) -> None:
    first, second = model.encode_document([one, other])
    assert first @ second < 1 - 1e-4


def test_model_composed_and_decomposed_characters_have_one_vector(model: Embedder) -> None:
    first, second = model.encode_document(["caf\u00e9", "cafe\u0301"])
    assert first @ second > 1 - 1e-6


@pytest.mark.parametrize("part", ["en", "zh", "code"])
def test_ndcg_equals_card(found: Any, part: str) -> None:
    queries, asked, documents, relevant = found
    rows = [i for i, query in enumerate(queries) if query["language"] == part]
    value = ndcg(asked[rows], documents, [relevant[i] for i in rows])
    card = figures()
    assert value == pytest.approx(card["sizes"][str(NATIVE)][part]["ndcg@10"], abs=0.01)
    assert value > card["random"][part]["ndcg@10"] + 0.1
    assert value > card["bm25"][part]["ndcg@10"] + 0.4
    assert value >= {"en": 0.68, "zh": 0.93, "code": 0.94}[part]


def test_ndcg_of_smaller_sizes_stays_close_to_native(found: Any) -> None:
    _, asked, documents, relevant = found
    values = {n: ndcg(truncate(asked, n), truncate(documents, n), relevant) for n in SIZES}
    full = values[NATIVE]
    assert values[64] >= 0.94 * full
    assert values[32] >= 0.83 * full
    for larger, smaller in pairwise(SIZES):
        assert full + 0.02 >= values[larger] >= values[smaller] - 0.02


@pytest.mark.parametrize("wanted", list(TASKS))
def test_ndcg_right_instruction_is_best(model: Embedder, wanted: str) -> None:
    queries, documents = read("task_queries"), read("task_documents")
    place = {document["id"]: i for i, document in enumerate(documents)}
    vectors = model.encode_document([document["text"] for document in documents])
    relevant = [{place[query["relevant"][wanted]]} for query in queries]
    texts = [query["text"] for query in queries]
    values = {
        name: ndcg(model.with_task(task).encode_query(texts), vectors, relevant)
        for name, task in TASKS.items()
    }
    right = values.pop(wanted)
    assert right >= max(values.values()) + 0.1


def test_demo_questions_find_right_passage(model: Embedder) -> None:
    passages, queries = load_passages(), load_queries()
    documents = model.encode_document([passage.text for passage in passages])
    ranks = []
    for query in queries:
        scores = model.with_task(query.task).encode_query([query.text]) @ documents.T
        order = [passages[i].id for i in np.argsort(-scores.ravel())]
        ranks.append(order.index(query.answer))
    card = figures()["demo"]
    assert sum(rank == 0 for rank in ranks) == card["first"] >= 11
    assert sum(rank < 3 for rank in ranks) == card["first three"] == len(ranks) == 12
