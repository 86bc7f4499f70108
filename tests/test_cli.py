"""The command line: exit codes, one line per error, and no engine imported without need."""

from __future__ import annotations

import json
import re
import socket
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
    """Return the last line of stderr, which holds the error."""
    lines = capsys.readouterr().err.splitlines()
    assert not any("Traceback" in line for line in lines)
    assert lines[-1].startswith("qwen3-embeddings: ")
    return lines[-1]


def test_main_version_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"qwen3-embeddings {qwen3_embeddings.__version__}\n"


def test_module_run_prints_version() -> None:
    command = [sys.executable, "-m", "qwen3_embeddings", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == qwen3_embeddings.__version__


def test_main_import_loads_no_engine() -> None:
    code = "import json, sys, qwen3_embeddings.cli.main; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(HEAVY) & set(json.loads(done.stdout))


@pytest.mark.parametrize(
    "arguments",
    [[], ["dem"], ["demo", "--dimensions", "many"], ["demo", "--engine", "x"]],
)
def test_main_wrong_usage_exits_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: qwen3-embeddings" in capsys.readouterr().err


def test_demo_api_key_option_is_refused() -> None:
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--api-key", "secret"])
    assert stop.value.code == 2


@pytest.mark.engine
def test_demo_unknown_model_names_it(capsys: pytest.CaptureFixture[str]) -> None:
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
def test_demo_impossible_setting_names_it(
    option: str, value: str, named: str, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--model", checkpoint, option, value]) == 1
    assert named in error_line(capsys)


@pytest.mark.parametrize("package", ["langchain_qwen3_embeddings", "llama_index.embeddings.qwen3"])
def test_demo_integration_missing_names_the_extra(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["demo"]) == 1
    assert "pip install 'qwen3-embeddings[demo]'" in error_line(capsys)


def test_demo_engine_missing_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(model, "find_spec", lambda name: None)
    assert main(["demo"]) == 1
    assert "pip install 'qwen3-embeddings[vllm]'" in error_line(capsys)


def test_main_interrupt_returns_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", interrupt)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == ""


def test_main_closed_pipe_exits_quietly() -> None:
    command = [sys.executable, "-m", "qwen3_embeddings", "demo"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_bench_short_run_writes_results(
    embedder: Embedder, checkpoint: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Runs on the session's engine, because all settings are equal."""
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
def test_bench_impossible_option_exits_with_2(
    wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", *wrong])
    assert stop.value.code == 2
    assert "or more" in capsys.readouterr().err


def test_bench_unwritable_file_fails_before_measuring(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The model does not exist either, and is never looked up."""
    assert main(["bench", "--model", "nobody/nothing", "--json", str(tmp_path)]) == 1
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.usefixtures("short_backoff")
def test_bench_timeout_names_options_of_bench(capsys: pytest.CaptureFixture[str]) -> None:
    """A server that never answers: every parameter in the message is an option of `bench`."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        command = ["bench", "--base-url", url, "--model", "any", "--timeout", "0.05"]
        assert main(command) == 1
    line = error_line(capsys)
    assert "did not answer within 0.05 s" in line
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    options = capsys.readouterr().out
    for parameter in re.findall(r"(?:[Rr]aise|lower) (\w+)", line):
        assert "--" + parameter.replace("_", "-") in options
