"""`qwen3-embeddings embed` with the real engine, in process and through a server."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.dataset as ds
import pytest

from qwen3_embeddings import Embedder
from qwen3_embeddings.cli.main import main

if TYPE_CHECKING:
    from conftest import RunningServer

TEXTS = [f"row {i} " + "word " * (i % 9) for i in range(100)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    lines = [json.dumps({"id": i, "body": text}) for i, text in enumerate(TEXTS)]
    lines[50] = json.dumps({"id": 50, "body": "word " * 3000})  # over the context of 2,048
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    return tmp_path


def command(corpus: Path, *more: str) -> list[str]:
    columns = ["--text-column", "body", "--id-column", "id", "--shard-rows", "20"]
    return ["embed", str(corpus / "in.jsonl"), str(corpus / "out"), *columns, *more]


def check(corpus: Path, expected: np.ndarray[Any, Any]) -> None:
    rows = ds.dataset(corpus / "out").to_table().sort_by("row").to_pydict()
    good = [i for i in range(100) if i != 50]
    assert rows["id"] == [str(i) for i in good]
    np.testing.assert_allclose(np.float32(rows["embedding"]), expected[good], atol=2e-6)
    (line,) = next((corpus / "out/_embed/rejects").iterdir()).read_text().splitlines()
    reject = json.loads(line)
    assert (reject["id"], reject["error"]) == ("50", "TextTooLongError")
    assert reject["tokens"] > 2048


def test_embed_command_in_process(
    corpus: Path, checkpoint: str, embedder: Embedder, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = ("--model", checkpoint, "--model-dtype", "float32")
    assert main(command(corpus, *engine, "--estimate", "--price-per-hour", "2")) == 0
    said = capsys.readouterr().out
    assert re.search(r"about 9\d rows|about 1\d\d rows", said), said
    assert "at 2.00 per hour" in said
    assert not (corpus / "out").exists()
    assert main(command(corpus, *engine)) == 3
    said = capsys.readouterr().out
    assert "99 rows" in said
    assert "1 rejects" in said
    assert "tokens in" in said
    check(corpus, embedder.encode_document(TEXTS))
    assert main(command(corpus, *engine)) == 3
    assert capsys.readouterr().out.startswith("0 rows")


def test_embed_command_through_a_server(
    corpus: Path, server: RunningServer, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN3_EMBEDDINGS_API_KEY", server.api_key)
    assert main(command(corpus, "--base-url", server.base_url)) == 3
    check(corpus, embedder.encode_document(TEXTS))
    for path in (corpus / "out").rglob("*"):
        assert path.is_dir() or server.api_key.encode() not in path.read_bytes()


def test_embed_command_dead_server_fails_in_one_line(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = ("--base-url", "http://127.0.0.1:9/v1", "--model", "Qwen/Qwen3-Embedding-0.6B")
    assert main(command(corpus, *server)) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Run the same command again" in error


def test_embed_command_refuses_in_one_line(
    corpus: Path, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(corpus, "--model", checkpoint)
    arguments[3:5] = ["--text-column", "text"]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "has no text" in error
