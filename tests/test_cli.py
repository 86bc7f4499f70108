"""The command line: exit codes, one line for an error, and nothing heavy imported for nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import qwen3_embeddings
from qwen3_embeddings import Embedder
from qwen3_embeddings.cli.demo import command, model
from qwen3_embeddings.cli.main import main

HEAVY = ["vllm", "torch", "openai", "langchain_core", "llama_index", "transformers"]


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What an error left on stderr, which ends with it."""
    lines = capsys.readouterr().err.splitlines()
    assert not any("Traceback" in line for line in lines)
    assert lines[-1].startswith("qwen3-embeddings: ")
    return lines[-1]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"qwen3-embeddings {qwen3_embeddings.__version__}\n"


def test_runs_as_module() -> None:
    command = [sys.executable, "-m", "qwen3_embeddings", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == qwen3_embeddings.__version__


def test_imports_nothing_heavy() -> None:
    code = "import json, sys, qwen3_embeddings.cli.main; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(HEAVY) & set(json.loads(done.stdout))


@pytest.mark.parametrize(
    "arguments",
    [[], ["dem"], ["demo", "--dimensions", "many"], ["demo", "--engine", "x"]],
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: qwen3-embeddings" in capsys.readouterr().err


def test_takes_no_key() -> None:
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--api-key", "secret"])
    assert stop.value.code == 2


def test_unknown_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--model", "nobody/nothing"]) == 1
    line = error_line(capsys)
    assert "'nobody/nothing'" in line
    assert "Qwen/Qwen3-Embedding-0.6B" in line


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--dimensions", "7", "32"),
        ("--dtype", "int3", "bfloat16"),
        ("--engine", "server", "base_url"),
    ],
)
def test_setting_that_cannot_work(
    option: str, value: str, named: str, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--model", checkpoint, option, value]) == 1
    assert named in error_line(capsys)


@pytest.mark.parametrize("package", ["langchain_qwen3_embeddings", "llama_index.embeddings.qwen3"])
def test_integration_not_installed(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["demo"]) == 1
    assert "pip install 'qwen3-embeddings[demo]'" in error_line(capsys)


def test_no_engine_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(model, "find_spec", lambda name: None)
    assert main(["demo"]) == 1
    assert "pip install 'qwen3-embeddings[vllm]'" in error_line(capsys)


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", interrupt)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == ""


def test_reader_that_has_seen_enough() -> None:
    command = [sys.executable, "-m", "qwen3_embeddings", "demo"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_bench_measures_and_writes(
    embedder: Embedder, checkpoint: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """On the session's engine, kept by the fixture: `dtype` and all else are the same."""
    file = tmp_path / "figures.json"
    short = ["--words", "5", "--texts", "70", "--clients", "1", "3", "--seconds", "0.2"]
    command = ["bench", "--model", checkpoint, "--dtype", "float32", *short, "--json", str(file)]
    assert main(command) == 0
    figures = json.loads(file.read_text(encoding="utf-8"))
    assert figures["served"]["dimensions"] == 128
    assert list(figures["documents"]) == ["5"]
    assert figures["documents"]["5"] > 0
    for loop in (figures["queries"]["1"], figures["queries"]["3"]):
        assert 0 < loop["p50_ms"] <= loop["p99_ms"]
    lines = capsys.readouterr().out.splitlines()
    assert sum("texts/s" in line for line in lines) == 3


@pytest.mark.parametrize(
    "wrong",
    [
        ["--clients", "0"],
        ["--seconds", "0"],
        ["--seconds", "nan"],
        ["--texts", "-3"],
        ["--words", "5", "0"],
        ["--texts", "many"],
    ],
)
def test_bench_refuses_what_cannot_be_measured(
    wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", *wrong])
    assert stop.value.code == 2
    assert "or more" in capsys.readouterr().err


def test_bench_finds_out_first_that_it_cannot_write(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """There is no model to measure either."""
    assert main(["bench", "--model", "nobody/nothing", "--json", str(tmp_path)]) == 1
    assert "cannot be written" in capsys.readouterr().err
