"""The examples that load a corpus job's output into vector stores find the right passage."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import qwen3_embeddings_demo_model
from leases import all_closed
from load import load

EXAMPLES = Path(__file__).parent.parent / "examples"
MODEL = str(qwen3_embeddings_demo_model.path())
STORES = ("faiss", "duckdb", "lancedb", "milvus", "chroma", "qdrant")


def example(name: str) -> Any:
    """Import an example; what its store warns of is the store's."""
    return load(EXAMPLES / f"corpus_{name}.py")


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("passages")
    example("embed").main(folder, "reference")
    return folder / "vectors"


@pytest.mark.parametrize("store", STORES)
def test_example_store_finds_the_passage(
    vectors: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings(), all_closed():
        warnings.simplefilter("ignore")
        example(store).main(str(vectors), MODEL, "why does bread dough rise", "reference")
    best, second = capsys.readouterr().out.splitlines()
    assert best.split()[1] == "p0"
    assert float(best.split()[0]) > float(second.split()[0])
