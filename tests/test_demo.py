"""The demo: an honest corpus, both frameworks on one engine, and which model it falls back to."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub
import pytest

from qwen3_embeddings import TASKS, MissingDependencyError
from qwen3_embeddings.cli.demo import model, page, report
from qwen3_embeddings.cli.demo.corpus import Passage, Query, load_passages, load_queries
from qwen3_embeddings.cli.demo.frameworks import Hit
from qwen3_embeddings.cli.main import main
from qwen3_embeddings.models import DEFAULT_MODEL

if TYPE_CHECKING:
    from conftest import RunningServer

CHINESE = re.compile("[\u4e00-\u9fff]")
PROGRAM = [sys.executable, "-m", "qwen3_embeddings"]
ABSENT = "right passage not among them"
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
    lines = [line for line in block.splitlines()[1:] if line.strip() != ABSENT]
    matches = [ROW.match(line) for line in lines]
    assert all(matches)
    return [Row(float(m[1]), float(m[2]), m[3] == "*", m[4]) for m in matches if m]


def unwrapped(output: str) -> str:
    """Return the output with continued lines joined."""
    return output.replace("\n" + " " * report.LABEL, " ")


@pytest.fixture(scope="module", params=["vllm", "reference"])
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def output(engine: str, checkpoint: str) -> str:
    return run_demo("--model", checkpoint, "--engine", engine)


# The corpus.


def test_load_passages_corpus_has_all_languages_and_subjects() -> None:
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


def test_load_queries_each_has_one_answer() -> None:
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


def test_load_queries_three_share_no_word_with_answer() -> None:
    passages = {passage.id: passage.text for passage in load_passages()}

    def words(text: str) -> set[str]:
        return set(re.findall("[a-z]+", text.lower()))

    english = [query for query in load_queries() if query.text.isascii()]
    assert sum(not words(query.text) & words(passages[query.answer]) for query in english) >= 3


# The run.


def test_demo_prints_engine_model_and_speed(output: str, engine: str, checkpoint: str) -> None:
    assert {"vllm": "vLLM", "reference": "sentence-transformers"}[engine] in output
    model_line = (
        rf"^model +{re.escape(checkpoint)} \({engine}\), ready in ([\d.]+) s, first vector after"
    )
    assert re.search(model_line + r" ([\d.]+) s$", unwrapped(output), re.MULTILINE)
    assert "one for LangChain and LlamaIndex" in " ".join(output.split())
    assert "128 dimensions" in output
    count = len(load_passages())
    for name in ("LangChain", "LlamaIndex"):
        line = rf"^{name} +embedded {count} passages in [\d.]+ s: \d+ texts per second on \d+ CPU"
        assert re.search(line, output, re.MULTILINE)


def test_demo_frameworks_have_equal_scores(output: str) -> None:
    for query in load_queries():
        rows = rows_of(output, query)
        assert len(rows) == 3
        for row in rows:
            assert row.langchain == pytest.approx(row.llama_index, abs=0.0011)
            assert row.marked == (row.passage == query.answer)
        scores = [row.llama_index for row in rows]
        assert scores == sorted(scores, reverse=True)


def test_demo_summary_counts_right_passages(output: str) -> None:
    queries = load_queries()
    right = sum(rows_of(output, query)[0].marked for query in queries)
    near = sum(any(row.marked for row in rows_of(output, query)) for query in queries)
    for name in ("LangChain", "LlamaIndex"):
        assert re.search(
            rf"^{name} +right passage first for {right} of {len(queries)} queries, "
            rf"in the first 3 for {near}$",
            output,
            re.MULTILINE,
        )


def test_demo_repeats_with_smaller_size(output: str) -> None:
    assert "the same in LangChain with dimensions=32" in output
    assert re.search(r"same first passage as with 128 dimensions for \d+ of 12", output)
    assert "4 times less" in " ".join(output.split())


def test_demo_lines_fit_terminal(output: str) -> None:
    assert max(map(report.columns, output.splitlines())) <= report.WIDTH


def test_demo_absent_answer_is_said(output: str) -> None:
    queries = load_queries()
    absent = [q for q in queries if not any(row.marked for row in rows_of(output, q))]
    assert output.count(ABSENT) == len(absent)
    assert sum(f"  [{query.task}]" in output for query in queries) == len(queries)


def test_demo_piped_writes_no_progress_bar(checkpoint: str) -> None:
    found = subprocess.run(
        [*PROGRAM, "demo", "--model", checkpoint, "--engine", "reference"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "\r" not in found.stdout + found.stderr
    assert "Embedding" not in found.stderr
    assert "right passage first" in found.stdout


def test_published_names_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    report.published()
    assert f"demo --model {DEFAULT_MODEL}" in capsys.readouterr().out


def test_demo_smallest_size_is_not_repeated(checkpoint: str) -> None:
    output = run_demo("--model", checkpoint, "--engine", "reference", "--dimensions", "32")
    assert "32 dimensions" in output
    assert "Matryoshka" not in output


def test_demo_server_hides_key(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN3_EMBEDDINGS_API_KEY", server.api_key)
    output = run_demo("--base-url", server.base_url)
    assert f"the server at {server.base_url}" in output
    assert f"model       {server.model} (server)" in output
    assert all(len(rows_of(output, query)) == 3 for query in load_queries())
    assert server.api_key not in output


def test_demo_too_large_size_fails_before_embedding(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
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
def test_clip_wide_characters_count_twice(text: str, clipped: str) -> None:
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


def test_choose_given_model_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_choose_fallbacks_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = chosen()
    assert choice.model is not None
    assert "random: scores below mean nothing" in choice.note
    assert "qwen3_embeddings_demo_model is not installed" in choice.note

    monkeypatch.setattr(model, "installed_demo_model", lambda: "/demo")
    choice = chosen()
    assert choice.model == "/demo"
    assert "Falling back to the package qwen3_embeddings_demo_model" in choice.note
    assert f"{DEFAULT_MODEL} is not available" in choice.note
    assert choice.fallback

    monkeypatch.setattr(model, "hub_answers", lambda: True)
    choice = chosen()
    assert choice.model == DEFAULT_MODEL
    assert "downloads" in choice.note

    monkeypatch.setattr(model, "hub_copy", lambda: "/cache/snapshot")
    choice = chosen()
    assert choice.model == "/cache/snapshot"
    assert DEFAULT_MODEL in (choice.title or "")
    assert choice.note == ""
    assert not choice.fallback


@pytest.mark.usefixtures("nothing_there")
def test_choose_random_checkpoint_is_deleted() -> None:
    with model.choose(None, None, None) as choice:
        folder = Path(choice.model or "")
        assert (folder / "model.safetensors").is_file()
    assert not folder.exists()


def test_installed_engine_prefers_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    def only(*names: str) -> Callable[[str], object]:
        return lambda name: name in names or None

    monkeypatch.setattr(model, "find_spec", only("vllm", "sentence_transformers"))
    assert model.installed_engine() == "vllm"
    monkeypatch.setattr(model, "find_spec", only("sentence_transformers"))
    assert model.installed_engine() == "reference"
    monkeypatch.setattr(model, "find_spec", only())
    with pytest.raises(MissingDependencyError, match="--base-url"):
        model.installed_engine()


def test_installed_demo_model_returns_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("qwen3_embeddings_demo_model")
    vars(package)["path"] = lambda: Path("/some/folder")
    monkeypatch.setitem(sys.modules, package.__name__, package)
    assert model.installed_demo_model() == "/some/folder"
    monkeypatch.setitem(sys.modules, package.__name__, None)
    assert model.installed_demo_model() is None


def test_hub_copy_needs_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_hub_answers_needs_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    found = types.SimpleNamespace(commit_hash="abc")
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: found)
    assert model.hub_answers()
    found.commit_hash = None  # something between here and the hub answered in its stead
    assert not model.hub_answers()


def test_hub_answers_offline_returns_false() -> None:
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert not model.hub_answers()


def test_hub_answers_silent_hub_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    silence = threading.Event()
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: silence.wait())
    monkeypatch.setattr(model, "PATIENCE", 0.1)
    start = time.monotonic()
    assert not model.hub_answers()
    assert time.monotonic() - start < 2
    silence.set()


# The page.


class Page(HTMLParser):
    """The items, labelled lines and resources of the page; checks that tags are balanced."""

    VOID = frozenset({"meta"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data


@pytest.fixture(scope="module")
def written(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """What one run prints, and the page that it writes."""
    path = tmp_path_factory.mktemp("page") / "demo.html"
    output = run_demo("--model", checkpoint, "--engine", "reference", "--html", str(path))
    return output, path.read_text(encoding="utf-8")


def test_page_has_the_results_of_the_terminal(written: tuple[str, str]) -> None:
    output, source = written
    parsed = Page(source)
    rows = [row for query in load_queries() for row in rows_of(output, query)]
    assert len(parsed.texts["li"]) == len(rows)
    for item, row in zip(parsed.texts["li"], rows, strict=True):
        assert item.strip().startswith(row.passage)
        assert ("right passage" in item) == row.marked
        assert f"LangChain{row.langchain:.3f}" in item
        assert f"LlamaIndex{row.llama_index:.3f}" in item
    classes = [attributes.get("class") for tag, attributes in parsed.tags if tag == "li"]
    assert [kind == "right" for kind in classes] == [row.marked for row in rows]
    for heading, query in zip(parsed.texts["h2"], load_queries(), strict=True):
        assert heading.endswith(query.text)
        assert TASKS[query.task].instruction in source
    printed = unwrapped(output)
    for label, text in zip(parsed.texts["dt"], parsed.texts["dd"], strict=True):
        assert re.search(rf"^{re.escape(label)} +{re.escape(text)}$", printed, re.MULTILINE)
    assert {"model", "size", "corpus", "LangChain", "LlamaIndex", "Matryoshka"} <= {
        *parsed.texts["dt"]
    }


def test_page_loads_nothing(written: tuple[str, str]) -> None:
    parsed = Page(written[1])
    assert not {"script", "link", "img", "iframe"} & set(parsed.texts)
    assert not any({"src", "href"} & attributes.keys() for _, attributes in parsed.tags)
    assert "url(" not in written[1]
    assert "@import" not in written[1]


def test_page_escapes_every_text() -> None:
    evil = "<script>alert('&')</script>\""
    passages = [Passage(evil, evil, evil)]
    queries = [Query(evil, "code", evil)]
    searches = [report.Search(evil, [[Hit(evil, 1.5)]])]
    source = page.page([(evil, evil)], passages, queries, searches)
    parsed = Page(source)
    assert "script" not in parsed.texts
    assert parsed.texts["dt"] == parsed.texts["dd"] == [evil]
    assert parsed.texts["h2"] == [f"1. {evil}"]
    assert {"class": "bar", "style": "width: 100.0%"} in [a for _, a in parsed.tags]


def test_page_absent_answer_is_said() -> None:
    passages = [Passage("a", "en", "text")]
    searches = [report.Search("LangChain", [[Hit("a", -0.5)]])]
    source = page.page([], passages, [Query("q", "code", "other")], searches)
    assert "The right passage is not among them." in source
    assert "width: 0.0%" in source


def test_demo_page_in_missing_folder_fails_before_the_engine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, message in [
        (tmp_path / "no" / "x.html", "no folder"),
        (tmp_path, "is a folder"),
        (tmp_path / ("x" * 300), "cannot be written"),
    ]:
        assert main(["demo", "--model", "absent", "--html", str(path)]) == 1
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.out == ""
