"""The demo: an honest corpus, both frameworks on one engine, and which model it falls back to."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import threading
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub
import pytest

from qwen3_embeddings import TASKS, MissingDependencyError
from qwen3_embeddings.cli.demo import model, report
from qwen3_embeddings.cli.demo.corpus import Query, load_passages, load_queries
from qwen3_embeddings.cli.main import main
from qwen3_embeddings.models import DEFAULT_MODEL

if TYPE_CHECKING:
    from conftest import RunningServer

CHINESE = re.compile("[\u4e00-\u9fff]")
ROW = re.compile(r" +(-?[\d.]+) +(-?[\d.]+) ([* ]) ([a-z-]+): ")


@dataclass(frozen=True)
class Row:
    """One hit as printed: a score of each framework, the mark, the passage."""

    langchain: float
    llama_index: float
    marked: bool
    passage: str


def run_demo(*arguments: str) -> str:
    """What the demo prints."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert main(["demo", *arguments]) == 0
    return output.getvalue()


def rows_of(output: str, query: Query) -> list[Row]:
    """The hits printed below a query. A row that lacks a score is not matched."""
    block = re.split(r"\n\n", output.split(f"  {query.text}", 1)[1], maxsplit=1)[0]
    matches = [ROW.match(line) for line in block.splitlines()[1:]]
    assert all(matches)
    return [Row(float(m[1]), float(m[2]), m[3] == "*", m[4]) for m in matches if m]


@pytest.fixture(scope="module", params=["vllm", "reference"])
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def output(engine: str, checkpoint: str) -> str:
    return run_demo("--model", checkpoint, "--engine", engine)


# The corpus.


def test_corpus() -> None:
    passages = load_passages()
    assert len(passages) >= 60
    assert len({passage.id for passage in passages}) == len(passages)
    assert len({passage.text for passage in passages}) == len(passages)
    assert len({passage.subject for passage in passages}) >= 12
    languages = [passage.language for passage in passages]
    assert languages.count("en") >= 40
    assert languages.count("zh") >= 15
    assert {"python", "sql", "javascript", "shell"} <= set(languages)
    for passage in passages:
        assert (passage.subject == "code") == (passage.language not in {"en", "zh"})
        assert bool(CHINESE.search(passage.text)) == (passage.language == "zh")
        assert passage.text == passage.text.strip()


def test_queries() -> None:
    passages = {passage.id: passage for passage in load_passages()}
    queries = load_queries()
    assert 10 <= len(queries) <= 12
    assert len({query.text for query in queries}) == len(queries)
    assert len({query.answer for query in queries}) == len(queries)
    for query in queries:
        assert query.task in TASKS
        assert (query.task == "code") == (passages[query.answer].subject == "code")
    pairs = [(CHINESE.search(q.text), CHINESE.search(passages[q.answer].text)) for q in queries]
    assert sum(bool(question) for question, _ in pairs) >= 3
    assert sum(bool(question) != bool(answer) for question, answer in pairs) >= 3


def test_queries_without_a_common_word() -> None:
    passages = {passage.id: passage.text for passage in load_passages()}

    def words(text: str) -> set[str]:
        return set(re.findall("[a-z]+", text.lower()))

    english = [query for query in load_queries() if query.text.isascii()]
    assert sum(not words(query.text) & words(passages[query.answer]) for query in english) >= 3


# The run.


def test_says_what_runs(output: str, engine: str, checkpoint: str) -> None:
    assert {"vllm": "vLLM", "reference": "sentence-transformers"}[engine] in output
    assert f"model       {checkpoint} ({engine}), ready in " in output
    assert "one for LangChain and LlamaIndex" in " ".join(output.split())
    assert "128 dimensions" in output
    count = len(load_passages())
    for name in ("LangChain", "LlamaIndex"):
        line = rf"^{name} +embedded {count} passages in [\d.]+ s, \d+ passages/s$"
        assert re.search(line, output, re.MULTILINE)


def test_both_frameworks_answer_alike(output: str) -> None:
    for query in load_queries():
        rows = rows_of(output, query)
        assert len(rows) == 3
        for row in rows:
            assert row.langchain == pytest.approx(row.llama_index, abs=0.0011)
            assert row.marked == (row.passage == query.answer)
        scores = [row.llama_index for row in rows]
        assert scores == sorted(scores, reverse=True)


def test_counts_honestly(output: str) -> None:
    queries = load_queries()
    right = sum(rows_of(output, query)[0].marked for query in queries)
    for name in ("LangChain", "LlamaIndex"):
        assert re.search(
            rf"^{name} +right passage first for {right} of {len(queries)} queries$",
            output,
            re.MULTILINE,
        )


def test_shows_a_smaller_size(output: str) -> None:
    assert "the same in LangChain with dimensions=32" in output
    assert re.search(r"same first passage as with 128 dimensions for \d+ of 12", output)
    assert "4 times less" in " ".join(output.split())


def test_fits_the_terminal(output: str) -> None:
    assert max(map(report.columns, output.splitlines())) <= report.WIDTH


def test_smallest_size_has_no_smaller(checkpoint: str) -> None:
    output = run_demo("--model", checkpoint, "--engine", "reference", "--dimensions", "32")
    assert "32 dimensions" in output
    assert "Matryoshka" not in output


def test_server(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN3_EMBEDDINGS_API_KEY", server.api_key)
    output = run_demo("--base-url", server.base_url)
    assert f"the server at {server.base_url}" in output
    assert f"model       {server.model} (server)" in output
    assert all(len(rows_of(output, query)) == 3 for query in load_queries())
    assert server.api_key not in output


def test_too_large_a_size(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["demo", "--model", checkpoint, "--engine", "reference", "--dimensions", "4096"]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert "from 32 to 128" in captured.err
    assert "embedded" not in captured.out


@pytest.mark.parametrize(
    ("text", "clipped"),
    [
        *(("short", "short"), ("12345678", "12345678"), ("123456789", "1234567…"), ("", "")),
        *(("中文中文", "中文中文"), ("中文中文字", "中文中…"), ("a中文中文", "a中文中…")),
    ],
)
def test_clip(text: str, clipped: str) -> None:
    assert report.clip(text, 8) == clipped


# The model.


@pytest.fixture
def nothing_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy, no hub, no demo model; each test restores one of them."""
    for name in ("hub_copy", "hub_answers", "installed_demo_model"):
        monkeypatch.setattr(model, name, lambda: None)


def chosen(
    name: str | None = None, base_url: str | None = None, engine: str | None = None
) -> model.Choice:
    with model.choose(name, base_url, engine) as choice:
        return choice


def test_given_model_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "hub_copy", lambda: pytest.fail("looked elsewhere"))
    assert chosen("a/b") == model.Choice("a/b", "vllm")
    monkeypatch.setenv("QWEN3_EMBEDDINGS_MODEL", "c/d")
    assert chosen() == model.Choice("c/d", "vllm")
    assert chosen("a/b", engine="reference") == model.Choice("a/b", "reference")
    assert chosen(None, "http://x/v1") == model.Choice("c/d", "server", "http://x/v1")
    monkeypatch.delenv("QWEN3_EMBEDDINGS_MODEL")
    monkeypatch.setenv("QWEN3_EMBEDDINGS_BASE_URL", "http://y/v1")
    assert chosen() == model.Choice(None, "server", "http://y/v1")


@pytest.mark.usefixtures("nothing_there")
def test_order_of_fallbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = chosen()
    assert choice.model is not None
    assert "random: scores below mean nothing" in choice.note
    assert "qwen3_embeddings_demo_model is not installed" in choice.note

    monkeypatch.setattr(model, "installed_demo_model", lambda: "/demo")
    choice = chosen()
    assert choice.model == "/demo"
    assert "Falling back to the package qwen3_embeddings_demo_model" in choice.note
    assert f"{DEFAULT_MODEL} is not here" in choice.note

    monkeypatch.setattr(model, "hub_answers", lambda: True)
    choice = chosen()
    assert choice.model == DEFAULT_MODEL
    assert "downloads" in choice.note

    monkeypatch.setattr(model, "hub_copy", lambda: "/cache/snapshot")
    choice = chosen()
    assert choice.model == "/cache/snapshot"
    assert DEFAULT_MODEL in (choice.title or "")
    assert choice.note == ""


@pytest.mark.usefixtures("nothing_there")
def test_random_checkpoint_goes() -> None:
    with model.choose(None, None, None) as choice:
        folder = Path(choice.model or "")
        assert (folder / "model.safetensors").is_file()
    assert not folder.exists()


def test_order_of_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    def only(*names: str) -> Callable[[str], object]:
        return lambda name: name in names or None

    monkeypatch.setattr(model, "find_spec", only("vllm", "sentence_transformers"))
    assert model.installed_engine() == "vllm"
    monkeypatch.setattr(model, "find_spec", only("sentence_transformers"))
    assert model.installed_engine() == "reference"
    monkeypatch.setattr(model, "find_spec", only())
    with pytest.raises(MissingDependencyError, match="--base-url"):
        model.installed_engine()


def test_demo_model(monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("qwen3_embeddings_demo_model")
    vars(package)["path"] = lambda: Path("/some/folder")
    monkeypatch.setitem(sys.modules, package.__name__, package)
    assert model.installed_demo_model() == "/some/folder"
    monkeypatch.setitem(sys.modules, package.__name__, None)
    assert model.installed_demo_model() is None


def test_copy_in_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert model.hub_copy() is None
    repository = tmp_path / "models--Qwen--Qwen3-Embedding-0.6B"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    snapshot = repository / "snapshots" / "abc"
    for name in model.FILES:
        assert model.hub_copy() is None  # not while a file is missing
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).touch()
    assert model.hub_copy() == str(snapshot)


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    found = types.SimpleNamespace(commit_hash="abc")
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: found)
    assert model.hub_answers()
    found.commit_hash = None  # something between here and the hub answered in its stead
    assert not model.hub_answers()


def test_offline_mode_is_respected() -> None:
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert not model.hub_answers()


def test_silent_hub_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    silence = threading.Event()
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: silence.wait())
    monkeypatch.setattr(model, "PATIENCE", 0.1)
    start = time.monotonic()
    assert not model.hub_answers()
    assert time.monotonic() - start < 2
    silence.set()
