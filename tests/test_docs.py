"""Every Python block of the READMEs and docs/ runs, and prints what its `# ->` comments say.

Pages name the published model and a server on port 8000. Here the demo model and the session's
server replace them. The blocks of one page run in order and share their variables. A block with
{test="skip"} needs something that no test has.
"""

from __future__ import annotations

import contextlib
import io
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from qwen3_embeddings_demo_model import path as demo_model

import qwen3_embeddings
from conftest import RunningServer
from qwen3_embeddings import Embedder, errors

ROOT = Path(__file__).parents[1]
MODEL = "Qwen/Qwen3-Embedding-0.6B"
SERVER = "http://localhost:8000/v1"
BLOCK = re.compile(
    r"^(?P<indent> *)```python *(?P<settings>.*)\n(?P<source>(?:.*\n)*?)(?P=indent)```$",
    re.MULTILINE,
)
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for pattern in ("README.md", "integrations/[chl]*/README.md", "docs/**/*.md")
    for path in sorted(ROOT.glob(pattern))
}
PUBLISHED = [page for page in PAGES if page.endswith("README.md")]  # what PyPI shows


def blocks(text: str) -> Iterator[re.Match[str]]:
    """The blocks of a page that are run."""
    return (b for b in BLOCK.finditer(text) if 'test="skip"' not in b["settings"])


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    """The demo model's folder, while its engine runs for all pages."""
    folder = str(demo_model())
    with Embedder(folder) as embedder:
        embedder.start()
        yield folder


@pytest.mark.engine
@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if list(blocks(text))])
def test_page_runs_and_prints_what_it_says(
    page: str,
    engine: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    replacements = {MODEL: engine}
    if SERVER in PAGES[page]:  # it needs a minute to start
        server: RunningServer = request.getfixturevalue("server")
        monkeypatch.setenv("QWEN3_EMBEDDINGS_API_KEY", server.api_key)
        replacements |= {SERVER: server.base_url, 'api_key="…"': f'api_key="{server.api_key}"'}
    variables: dict[str, object] = {"__name__": "page"}
    for block in blocks(PAGES[page]):
        source = textwrap.dedent(block["source"])
        for published, running in replacements.items():
            source = source.replace(published, running)
        lines_above = PAGES[page].count("\n", 0, block.start("source"))
        code = compile("\n" * lines_above + source, str(ROOT / page), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, variables)
        expected = re.findall(r"^ *# -> ?(.*)$", source, re.MULTILINE)
        assert printed.getvalue().splitlines() == expected, f"{page}, line {lines_above + 1}"


def test_links_to_the_repository_name_files_that_exist() -> None:
    prefix = r"qwen3-embeddings/qwen3-embeddings/(?:blob/)?main/"
    links = {m[1] for text in PAGES.values() for m in re.finditer(prefix + r"([^)#\s]+)", text)}
    assert links
    assert [link for link in sorted(links) if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("page", PUBLISHED)
def test_readme_has_no_relative_link(page: str) -> None:
    assert re.findall(r"\]\((?!https://)[^)]*\)", PAGES[page]) == []


def test_reference_covers_every_public_name() -> None:
    pages = "\n".join(text for page, text in PAGES.items() if page.startswith("docs/reference/"))
    names = [n for n in qwen3_embeddings.__all__ if not hasattr(errors, n) and n != "__version__"]
    assert [
        n for n in names if not re.search(rf"^(::: qwen3_embeddings\.|## ){n}$", pages, re.M)
    ] == []


def test_readme_has_at_most_450_words() -> None:
    assert len(PAGES["README.md"].split()) <= 450


def test_exception_tree_shows_every_class_with_its_built_in_base() -> None:
    tree = PAGES["docs/reference/errors.md"]
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, errors.Qwen3EmbeddingsError):
            built_in = [base.__name__ for base in kind.__bases__ if base.__module__ == "builtins"]
            shown = f"{name} ({built_in[0]})" if kind.__bases__[1:] else name
            assert re.search(rf"(^|[├└]── ){re.escape(shown)}( |$)", tree, re.MULTILINE), shown
