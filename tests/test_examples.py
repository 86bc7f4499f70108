"""Every example that needs no environment of its own runs, and finds what it should.

They run in this process and share one engine of the demo model. Its native size is 384, so stores
are tested at 384, 256 and 128 dimensions. tests/test_corpus_examples.py runs the examples for
corpora, and tests/recipes.py those with packages that do not fit into this environment.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import qwen3_embeddings_demo_model
from leases import all_closed
from load import load

from conftest import free_port
from qwen3_embeddings import DimensionsError, Embedder

if TYPE_CHECKING:
    from tests.conftest import FaultyServer, Request

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))
MODEL = str(qwen3_embeddings_demo_model.path())
BREAD = "Bread dough rises because yeast turns sugar into carbon dioxide."
TIDES = "The Moon causes the tides: its gravity pulls the oceans towards it."
BEES = "Bees tell each other where flowers are by dancing."
QUERY = "Why does the sea come in and go out?"
Run = Callable[..., list[str]]


def example(name: str) -> ModuleType:
    """Import an example; what other packages warn of is theirs."""
    module: ModuleType = load(EXAMPLES / f"{name}.py")
    return module


@pytest.fixture(scope="module")
def engine() -> Iterator[Embedder]:
    """The demo model on vLLM in this process, which all examples share."""
    with Embedder(MODEL) as embedder:
        embedder.start()
        yield embedder


@pytest.fixture
def run(engine: Embedder, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run an example's `main` with the demo model and return the lines that it printed.

    Every engine that the example started must be closed then.
    """

    def run_main(name: str, *arguments: str) -> list[str]:
        with warnings.catch_warnings(), all_closed():
            warnings.simplefilter("ignore")
            example(name).main(MODEL, *arguments)
        return capsys.readouterr().out.splitlines()

    return run_main


# LangChain.


def test_langchain_retriever_finds_the_passage(run: Run) -> None:
    best, second = run("langchain_retriever")
    assert best == TIDES
    assert second != TIDES


def test_langchain_rag_answers_from_the_passage(run: Run) -> None:
    assert run("langchain_rag") == [BEES]


def test_langchain_cache_embeds_each_role_once(run: Run, tmp_path: Path, engine: Embedder) -> None:
    printed = ["first: 3 texts embedded", "second: 0 texts embedded"]
    assert run("langchain_cache", str(tmp_path)) == printed
    assert {path.name for path in tmp_path.iterdir()} == {
        "documents",
        engine.fingerprint("query"),
    }
    assert run("langchain_cache", str(tmp_path))[0] == "first: 0 texts embedded"


def test_langchain_indexing_embeds_only_what_changed(run: Run) -> None:
    assert run("langchain_indexing") == [
        "added 2, skipped 0, deleted 0, embedded 2",
        "added 0, skipped 2, deleted 0, embedded 0",
        "added 1, skipped 1, deleted 1, embedded 1",
        "The Moon causes the tides: its gravity pulls the oceans.",
    ]


def test_langchain_indexing_of_another_fingerprint_has_a_collection_of_its_own(
    engine: Embedder,
) -> None:
    import chromadb
    from langchain_core.indexing import index
    from langchain_qwen3_embeddings import Qwen3Embeddings

    module = example("langchain_indexing")
    with chromadb.EphemeralClient() as client, Qwen3Embeddings(model=MODEL) as embeddings:
        update = {"document_instruction": "Represent the document"}  # the size stays the same
        with embeddings.model_copy(update=update) as other:
            for each, corpus in (
                (embeddings, [module.BREAD, module.TIDES]),
                (other, [module.BREAD]),
            ):
                store, records = module.open_index(client, each)
                index(corpus, records, store, cleanup="full", key_encoder="blake2b")
                held = store.get(include=["embeddings", "documents"])
                assert sorted(held["documents"]) == sorted(page.page_content for page in corpus)
                expected = each.embed_documents(held["documents"])
                assert np.abs(held["embeddings"] - np.array(expected)).max() < 1e-5
            assert len(client.list_collections()) == 2


# LlamaIndex.


def test_llamaindex_query_engine_answers_from_the_passage(run: Run) -> None:
    best, second, *answer = run("llamaindex_query_engine")
    assert best.split()[1] == "tides.md"
    assert float(best.split()[0]) > float(second.split()[0])
    assert TIDES in answer


def test_llamaindex_ingestion_embeds_only_what_changed(run: Run, tmp_path: Path) -> None:
    *counts, files, found = run("llamaindex_ingestion", str(tmp_path))
    assert counts == ["2 texts embedded", "0 texts embedded", "1 texts embedded"]
    assert files == "['docstore.json', 'llama_cache']"
    assert found == "The Moon causes the tides: it pulls the oceans."


@pytest.mark.parametrize("framework", ["langchain", "llamaindex"])
def test_semantic_chunking_splits_where_the_subject_changes(run: Run, framework: str) -> None:
    first, second = run(f"{framework}_semantic_chunking")
    assert first.startswith("Bread dough")
    assert first.strip().endswith("the crumb of the bread.")
    assert second.startswith("The Moon pulls")


# A service, and resuming.


def test_fastapi_service_answers_concurrent_searches_over_http(engine: Embedder) -> None:
    import httpx
    import uvicorn

    port = free_port()
    app = example("fastapi_service").make_app(MODEL)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()

    async def ask(questions: list[str]) -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            sent = [client.get("/search", params={"q": q, "k": 1}) for q in questions]
            return await asyncio.gather(*sent)

    try:
        while not server.started and thread.is_alive():
            time.sleep(0.05)
        questions = [QUERY, "why does dough rise", "how do bees tell where flowers are"]
        *answers, refused = asyncio.run(ask([*questions, "word " * 10_000]))
    finally:
        server.should_exit = True
        thread.join()
    assert [answer.json()[0]["text"] for answer in answers] == [TIDES, BREAD, BEES]
    assert refused.status_code == 422
    assert "tokens" in refused.json()["detail"]


def test_resume_ingest_keeps_computed_vectors_and_puts_the_text_aside(run: Run) -> None:
    assert run("resume_ingest") == [
        "TextsFailedError: 3 vectors kept, [1] put aside",
        "vectors of [0, 2, 3], rejected [1]",
        "3 texts embedded",
    ]


def test_resume_ingest_after_server_error_embeds_no_text_twice(faulty: FaultyServer) -> None:
    texts = [f"text {i}" for i in range(12)]
    answered: list[str] = []

    def fail_once_after_six(request: Request) -> tuple[int, Any]:
        if not request.path.startswith("/v1/embeddings"):
            return faulty.answer(request)
        if len(answered) == 6 and "failed" not in faulty.__dict__:
            faulty.__dict__["failed"] = True
            return 401, {"error": {"message": "the key has expired"}}
        answered.extend(text for text in request.body["input"] if text in texts)  # no probes
        return faulty.answer(request)

    faulty.respond = fail_once_after_six
    settings: dict[str, Any] = {"batch_size": 2, "max_concurrency": 1, "max_retries": 0}
    with Embedder("faulty", base_url=faulty.base_url, dimensions=32, **settings) as embedder:
        vectors, rejected = example("resume_ingest").ingest(embedder, texts)
    assert sorted(answered) == sorted(texts)
    assert rejected == []
    expected = np.array([faulty.vector(text) for text in texts])
    assert np.abs(np.array([vectors[i] for i in range(12)]) - expected).max() < 1e-6


def test_resume_ingest_without_progress_raises(faulty: FaultyServer) -> None:
    faulty.respond = lambda _: (401, {"error": {"message": "no key"}})
    with (
        Embedder("faulty", base_url=faulty.base_url, dimensions=32) as embedder,
        pytest.raises(PermissionError),
    ):
        example("resume_ingest").ingest(embedder, ["a text"])


@pytest.mark.parametrize(("k", "status"), [(-1, 422), (0, 422), (1, 200), (100, 200), (101, 422)])
def test_fastapi_service_bounds_the_number_of_passages(
    engine: Embedder, k: int, status: int
) -> None:
    from fastapi.testclient import TestClient

    with TestClient(example("fastapi_service").make_app(MODEL)) as client:
        answer = client.get("/search", params={"q": QUERY, "k": k})
    assert answer.status_code == status
    assert status == 422 or len(answer.json()) == min(k, 3)


# Vector stores.


@pytest.mark.parametrize("store", ["chroma", "milvus", "qdrant", "lancedb", "faiss"])
def test_store_finds_the_passage_at_every_size(run: Run, store: str, engine: Embedder) -> None:
    from qwen3_embeddings import truncate

    query, document = engine.encode_query(QUERY), engine.encode_document(TIDES)
    printed = run(f"store_{store}", "0", "256", "128")
    for line, size in zip(printed, (384, 256, 128), strict=True):
        shown, cosine, text = line.split(" ", 2)
        assert (int(shown), text) == (size, TIDES)
        expected = truncate(query, size) @ truncate(document, size)
        assert float(cosine) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("store", ["chroma", "milvus", "qdrant", "lancedb", "faiss"])
def test_store_size_above_native_is_refused_with_the_range(run: Run, store: str) -> None:
    with pytest.raises(DimensionsError, match=r"dimensions=512 is out of range: .* 32 to 384"):
        run(f"store_{store}")


@pytest.mark.parametrize(
    ("dimensions", "kind", "indexed"),
    [
        (512, "vector", True),
        (2000, "vector", True),
        (2001, "halfvec", True),
        (4000, "halfvec", True),
        (4001, "halfvec", False),
        (4096, "halfvec", False),
    ],
)
def test_pgvector_statements_respect_index_limits(
    dimensions: int, kind: str, indexed: bool
) -> None:
    statements = example("store_pgvector").statements(dimensions)
    assert f"embedding {kind}({dimensions})" in statements
    assert (f"USING hnsw (embedding {kind}_cosine_ops)" in statements) is indexed


@pytest.mark.parametrize("dimensions", [-1, 0, 31, 4097])
def test_pgvector_size_that_no_model_has_is_refused(dimensions: int) -> None:
    with pytest.raises(ValueError, match=f"{dimensions} dimensions: the models have 32 to 4,096"):
        example("store_pgvector").statements(dimensions)


def test_pgvector_table_that_is_no_identifier_is_refused() -> None:
    with pytest.raises(ValueError, match="identifier"):
        example("store_pgvector").statements(256, table="x; DROP TABLE y")


# Adapters and recipes.


def test_chroma_embedding_function_finds_the_passage(run: Run, tmp_path: Path) -> None:
    best, _ = run("chroma_embedding_function", str(tmp_path))
    assert best.split()[1] == "tides"


def test_haystack_pipeline_finds_the_document(run: Run) -> None:
    best, second = run("haystack_pipeline")
    assert best.split()[1] == "Tides"
    assert float(best.split()[0]) > float(second.split()[0])


def test_lancedb_registry_embeds_rows_and_queries_in_their_roles(
    run: Run, engine: Embedder
) -> None:
    from qwen3_embeddings import truncate

    score, _, text = run("recipe_lancedb_registry")[0].partition(" ")
    assert text == TIDES
    query, document = engine.encode_query(QUERY), engine.encode_document(TIDES)
    expected = truncate(query, 256) @ truncate(document, 256)
    assert float(score) == pytest.approx(expected, abs=2e-3)


# All of them.


def test_example_without_argument_uses_the_model_of_the_environment(
    engine: Embedder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QWEN3_EMBEDDINGS_MODEL", MODEL)
    example("langchain_retriever").main()
    assert capsys.readouterr().out.splitlines()[0] == TIDES


def test_example_as_a_script_prints() -> None:
    command = [sys.executable, EXAMPLES / "store_pgvector.py", "1024"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "embedding vector(1024)" in done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_example_says_how_to_run_it(name: str) -> None:
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert f"python examples/{name}.py" in source.split('"""')[1]
    assert 'if __name__ == "__main__":' in source


def test_readme_lists_every_example_once_and_every_example_is_tested() -> None:
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[`(\w+)\.py`\]\(\1\.py\)", readme, re.MULTILINE)
    assert sorted(listed) == SCRIPTS
    files = [Path(__file__), *(ROOT / "tests" / n for n in ("recipes.py", "recipes_mteb.py"))]
    tested = "\n".join(path.read_text(encoding="utf-8") for path in files)
    names = [name for name in SCRIPTS if not name.startswith(("corpus_", "store_"))]
    assert [n for n in names if n not in tested and n.split("_", 1)[1] not in tested] == []
