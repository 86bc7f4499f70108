"""Every Python block of README.md and docs/ runs, and prints the lines after its `#>` marks.

Pages name the published model and a server on port 8000. Here the demo model and the session's
server replace them. The blocks of one page run in order and share their variables. A block with
{test="skip"} needs something that no test has.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from qwen3_embeddings_demo_model import path as demo_model

from conftest import RunningServer
from qwen3_embeddings import Embedder

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python *(?P<settings>.*)\n(?P<source>(?:.*\n)*?)```$", re.MULTILINE)
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    """The demo model's folder, while its engine runs for all pages."""
    folder = str(demo_model())
    with Embedder(folder) as embedder:
        embedder.start()
        yield folder


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if BLOCK.search(text)])
def test_page_runs_and_prints_what_it_says(
    page: str,
    engine: str,
    server: RunningServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QWEN3_EMBEDDINGS_API_KEY", server.api_key)
    replacements = {
        "Qwen/Qwen3-Embedding-0.6B": engine,
        "http://localhost:8000/v1": server.base_url,
    }
    variables: dict[str, object] = {"__name__": "page"}
    for block in BLOCK.finditer(PAGES[page]):
        if 'test="skip"' in block["settings"]:
            continue
        source = block["source"]
        for published, running in replacements.items():
            source = source.replace(published, running)
        lines_above = PAGES[page].count("\n", 0, block.start("source"))
        code = compile("\n" * lines_above + source, str(ROOT / page), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, variables)
        expected = re.findall(r"^ *#> ?(.*)$", source, re.MULTILINE)
        assert printed.getvalue().splitlines() == expected, f"{page}, line {lines_above + 1}"
