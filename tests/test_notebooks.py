"""All notebooks run from start to end on the demo model, and find what their text says."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from load import load

ROOT = Path(__file__).parents[1]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CLAIMS = {
    "quickstart_langchain": [
        r"^\d\.\d\d  Photosynthesis turns light into sugar\.",
        r"^\d\.\d\d  月球的引力引起潮汐。\n\d\.\d\d  The Moon's gravity causes the tides\.",
        r"^text\.upper\(\)$",
    ],
    "quickstart_llamaindex": [
        r"^\d\.\d\d  Photosynthesis turns light into sugar\.",
        r"^\d\.\d\d  月球的引力引起潮汐。\n\d\.\d\d  The Moon's gravity causes the tides\.",
        r"^64 dimensions$",
    ],
    "output_size": [r"^  384 dimensions: recall 0\.\d+, agreement 1\.000$", r"times less storage"],
    "instructions": [
        rf"^{preset}: \+\d\.\d\d over the best wrong one, \+\d\.\d\d over none$"
        for preset in ("web_search", "code", "duplicate_question", "chinese_web_search")
    ],
    "chunk_sizes": [
        r"^3 pages$",
        r"^ 2048: \d+ chunks, the longest has 1\d{3} tokens$",
        r"Most answers",
    ],
    "rag": [r"^\d\.\d\d \[p001\]", r"^Wild yeast .* \[p001\]$", r"caramel -> Heating .* \[p002\]"],
}
PLOTS = {"output_size", "instructions", "chunk_sizes"}


def printed(notebook: dict[str, Any]) -> str:
    """What all cells print, and nothing on the error stream."""
    outputs = [o for cell in notebook["cells"] for o in cell.get("outputs", [])]
    streams = [output for output in outputs if output["output_type"] == "stream"]
    assert not [output for output in streams if output["name"] != "stdout"]
    return "".join("".join(output["text"]) for output in streams)


def check_outputs(name: str, notebook: dict[str, Any]) -> None:
    text = printed(notebook)
    for claim in CLAIMS[name]:
        assert re.search(claim, text, re.MULTILINE), claim
    outputs = [o for cell in notebook["cells"] for o in cell.get("outputs", [])]
    assert any("image/png" in o.get("data", {}) for o in outputs) == (name in PLOTS)


def test_notebooks_all_have_claims() -> None:
    assert {path.stem for path in PATHS} == set(CLAIMS)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebook_committed_outputs_are_clean(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    notebook = json.loads(source)
    check_outputs(path.stem, notebook)
    assert len(source) < 300_000
    assert not re.search(r"/(work|home|root|usr|tmp)/|site-packages|\\r|Warning", source)
    title, model = notebook["cells"][:2]
    assert title["cell_type"] == "markdown"
    assert title["source"][0].startswith("# ")
    assert model["cell_type"] == "code"
    assert "Qwen/Qwen3-Embedding-0.6B" in "".join(model["source"])


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebook_runs_and_finds_what_it_says(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    execute = load(ROOT / "tools/notebooks/execute.py")
    # The kernel is another process: pytest's filter of warnings does not reach it.
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    check_outputs(path.stem, execute.execute(path))
