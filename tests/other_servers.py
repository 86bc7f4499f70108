"""The client against other servers: `make test-servers`, which installs them first.

Not a test_*.py file, since installing needs too long for every change. What each may do is in
docs/compatibility.md: the same vectors, or a refusal.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import RunningServer, free_port, wait_until_healthy
from qwen3_embeddings import (
    ConfigurationError,
    Embedder,
    Report,
    ServerTimeoutError,
    TextError,
    event_loop,
    truncate,
)
from qwen3_embeddings.testing import write_checkpoint
from qwen3_embeddings.vectors import Vectors

SERVERS = Path(os.environ.get("SERVERS", ".servers")).resolve()
ROOT = Path(__file__).parents[1]
KEY = "sesame-street-123"
MATRYOSHKA = '{"is_matryoshka": true}'
LAST = ["--embeddings", "--pooling", "last"]
LONG = ["short", "many words " * 600, "数据库" * 1500, "exact"]


@contextmanager
def started(command: list[str], port: int, folder: Path, key: str = KEY) -> Iterator[RunningServer]:
    """A server process until the end of the block; its health is at /health."""
    log = folder / f"{port}.log"
    quiet = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | quiet
        )
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}", process, log)
        yield RunningServer(f"http://127.0.0.1:{port}/v1", key, "tiny")
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("servers")


@contextmanager
def vllm_server(checkpoint: str, folder: Path, *flags: str) -> Iterator[RunningServer]:
    port = free_port()
    python = str(SERVERS / "vllm-oldest/bin/python")
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", checkpoint]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny"]
    command += ["--runner", "pooling", "--convert", "embed", "--dtype", "float32"]
    command += ["--enforce-eager", "--no-enable-prefix-caching", "--api-key", KEY, *flags]
    with started(command, port, folder) as running:
        yield running


@pytest.fixture(scope="module")
def vllm_oldest(checkpoint: str, folder: Path) -> Iterator[RunningServer]:
    """In steps shorter than the context: a long text needs several."""
    flags = ["--max-num-batched-tokens", "512", "--hf-overrides", MATRYOSHKA]
    with vllm_server(checkpoint, folder, *flags) as running:
        yield running


@pytest.fixture(scope="module")
def router(server: RunningServer, folder: Path) -> Iterator[RunningServer]:
    """vllm-router before the session's server."""
    port = free_port()
    command = [str(SERVERS / "router/bin/vllm-router"), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--worker-urls", server.base_url.removesuffix("/v1")]
    command += ["--prometheus-port", str(free_port())]
    with started(command, port, folder, server.api_key) as running:
        yield running


@pytest.fixture(scope="module")
def infinity(checkpoint: str, folder: Path) -> Iterator[RunningServer]:
    port = free_port()
    command = [str(SERVERS / "infinity/bin/infinity_emb"), "v2", "--model-id", checkpoint]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny"]
    command += ["--engine", "torch", "--device", "cpu", "--dtype", "float32"]
    command += ["--no-bettertransformer", "--url-prefix", "/v1", "--api-key", KEY]
    with started(command, port, folder) as running:
        yield running


@pytest.fixture(scope="module")
def gguf(checkpoint: str, folder: Path) -> Path:
    """The checkpoint in llama.cpp's format, float32."""
    path = folder / "tiny-f32.gguf"
    convert = [sys.executable, str(ROOT / "tools/servers/to_gguf.py"), str(SERVERS / "llama.cpp")]
    convert += [checkpoint, "--outtype", "f32", "--outfile", str(path)]
    subprocess.run(convert, check=True, capture_output=True)
    return path


@contextmanager
def llama_server(model: Path, folder: Path, *flags: str) -> Iterator[RunningServer]:
    port = free_port()
    command = [str(SERVERS / "llama.cpp/build/bin/llama-server"), "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--alias", "tiny", "--api-key", KEY]
    command += ["--ctx-size", "2048", "--batch-size", "2048", "--parallel", "1", *flags]
    with started(command, port, folder) as running:
        yield running


@pytest.fixture(scope="module")
def llama(gguf: Path, folder: Path) -> Iterator[RunningServer]:
    with llama_server(gguf, folder, *LAST) as running:
        yield running


def connect(server: RunningServer, **arguments: Any) -> Embedder:
    return Embedder(base_url=server.base_url, api_key=server.api_key, **arguments)


def worst_cosine(one: Vectors, other: Vectors) -> float:
    return float(np.abs((one.astype(np.float64) * other).sum(axis=1) - 1).max())


def named(report: Report, status: str) -> set[str]:
    return {finding.check for finding in report.findings if finding.status == status}


def examine(server: RunningServer, checkpoint: str) -> Report:
    """The doctor's report; what it finds wrong has an effect and a remedy."""
    with connect(server, timeout=20) as remote:
        report = remote.doctor(reference=checkpoint)
    for found in report.findings:
        assert bool(found.effect and found.remedy) == (found.status in {"failure", "warning"})
    print(report)
    return report


@pytest.fixture(scope="module")
def yardstick(folder: Path) -> Callable[[Embedder], str]:
    """The checkpoint's path, its context that of a server."""

    def of(remote: Embedder) -> str:
        context = remote.start().context
        assert context is not None
        return str(write_checkpoint(folder / f"context-{context}", context=context))

    return of


WHOLE = ["vllm_oldest", "router", "llama"]
"""Servers that do everything."""


@pytest.mark.parametrize("name", [*WHOLE, "infinity"])
def test_the_same_vectors(
    name: str, request: pytest.FixtureRequest, texts: list[str], reference: Embedder
) -> None:
    server = request.getfixturevalue(name)
    if name == "infinity":
        texts = [text for text in texts if text == text.strip()]
    if name == "llama":
        texts = [text for text in texts if text]  # refused there
    with connect(server) as remote:
        queries, documents = remote.encode_query(texts), remote.encode_document(texts)
    expected = reference.encode_query(texts)
    bound = 1e-5 if name == "llama" else 1e-6
    assert worst_cosine(queries, expected) <= bound
    assert worst_cosine(documents, reference.encode_document(texts)) <= bound
    for size in (32, 64, 100):
        with connect(server, dimensions=size) as smaller:
            assert worst_cosine(smaller.encode_query(texts), truncate(expected, size)) <= bound


@pytest.mark.parametrize("overflow", ["truncate", "mean"])
@pytest.mark.parametrize("name", WHOLE)
def test_over_long_texts(
    name: str,
    overflow: str,
    request: pytest.FixtureRequest,
    yardstick: Callable[[Embedder], str],
) -> None:
    with connect(request.getfixturevalue(name), overflow=overflow) as remote:
        vectors = remote.encode_document(LONG)
        same = yardstick(remote)
    with Embedder(same, dtype="float32", overflow=overflow, engine="reference") as reference:
        assert worst_cosine(vectors, reference.encode_document(LONG)) <= 1e-5


@pytest.mark.parametrize(
    ("name", "context"), [("vllm_oldest", 2047), ("router", 2048), ("llama", 2047)]
)
def test_the_context_is_used_up(
    name: str, context: int, request: pytest.FixtureRequest, reference: Embedder
) -> None:
    with connect(request.getfixturevalue(name)) as remote:
        assert remote.start().context == context
        longest = "1" * (context - 1)  # a digit is a token, and the end token is one
        vectors = remote.encode_document([longest])
        assert worst_cosine(vectors, reference.encode_document([longest])) <= 1e-5
        with pytest.raises(TextError) as caught:
            remote.encode_document(["short", longest + "1", *LONG])
    assert caught.value.positions == (1, 3, 4)


def test_why_a_token_of_the_context_is_left_out(vllm_oldest: RunningServer) -> None:
    """Before 0.32 vLLM itself never answers (vllm-project/vllm#48039)."""
    with connect(vllm_oldest, timeout=10, max_retries=0) as remote:
        engine = remote._lease.engine
        assert event_loop.run(engine.embed([[17] * 2047], None, False)).shape == (1, 128)
        with pytest.raises(ServerTimeoutError):
            event_loop.run(engine.embed([[17] * 2048], None, False))
        assert remote.encode_document(["the server lives"]).shape == (1, 128)


@pytest.mark.parametrize(
    ("name", "failures", "warnings", "skipped"),
    [
        ("vllm_oldest", set(), {"authentication"}, set()),
        ("router", set(), {"authentication"}, set()),
        ("llama", set(), {"matryoshka"}, set()),
        (
            "infinity",
            {"unaltered", "context", "reference"},
            {"authentication"},
            {"pooling", "token ids"},
        ),
    ],
)
def test_what_the_doctor_finds(
    name: str,
    failures: set[str],
    warnings: set[str],
    skipped: set[str],
    checkpoint: str,
    request: pytest.FixtureRequest,
) -> None:
    report = examine(request.getfixturevalue(name), checkpoint)
    assert named(report, "failure") == failures, report
    assert named(report, "warning") == warnings, report
    assert named(report, "skipped") == {"similarities"} | skipped, report


def test_what_infinity_gets_wrong_is_refused(infinity: RunningServer) -> None:
    with connect(infinity) as remote, pytest.raises(TextError, match="whitespace") as caught:
        remote.encode_document(["fine", " not so\n"])
    assert caught.value.positions == (1,)
    with (
        connect(infinity, overflow="mean") as remote,
        pytest.raises(ConfigurationError, match="context"),
    ):
        remote.encode_document(LONG)


@pytest.mark.parametrize(
    ("kind", "status"),
    [("Q8_0", "ok"), ("Q4_K_M", "warning"), ("Q4_0", "failure")],
)
def test_quantised(kind: str, status: str, gguf: Path, folder: Path, checkpoint: str) -> None:
    """In four bits 128 numbers lose more than a published model's 1024 would."""
    model = folder / f"tiny-{kind}.gguf"
    quantise = [str(SERVERS / "llama.cpp/build/bin/llama-quantize"), str(gguf), str(model), kind]
    subprocess.run(quantise, check=True, capture_output=True)
    with llama_server(model, folder, *LAST) as server:
        report = examine(server, checkpoint)
    found = {finding.check: finding.status for finding in report.findings}
    assert found.pop("reference") == status, report
    assert {check for check, status in found.items() if status == "failure"} == set(), report


NO_END = ["--override-kv", "tokenizer.ggml.add_eos_token=bool:false"]
"""As older converters wrote it."""


@pytest.mark.parametrize(
    ("flags", "failures", "warnings"),
    [
        ([*LAST, *NO_END], {"end token", "token ids", "reference"}, set()),
        (["--embeddings", "--pooling", "mean"], {"pooling", "reference"}, set()),
        (["--embeddings", "--pooling", "cls"], {"end token", "pooling", "reference"}, set()),
        (["--embeddings", "--pooling", "none"], {"reachable"}, set()),
        ([*LAST, "--embd-normalize", "-1"], set(), {"unit length"}),
        ([], {"reachable"}, set()),
    ],
    ids=["no-end-token", "mean", "first-token", "no-pooling", "no-norm", "no-embeddings"],
)
def test_llama_cpp_started_wrongly(
    flags: list[str],
    failures: set[str],
    warnings: set[str],
    gguf: Path,
    folder: Path,
    checkpoint: str,
) -> None:
    with llama_server(gguf, folder, *flags) as server:
        report = examine(server, checkpoint)
    assert named(report, "failure") == failures, report
    assert named(report, "warning") - {"matryoshka"} == warnings, report


@pytest.mark.parametrize(
    ("pooler", "failures", "warnings"),
    [
        ('{"pooling_type": "CLS"}', {"end token", "pooling", "reference"}, set()),
        ('{"pooling_type": "MEAN"}', {"pooling", "reference"}, set()),
        ('{"use_activation": false}', set(), {"unit length"}),
    ],
    ids=["first-token", "mean", "no-norm"],
)
def test_vllm_started_wrongly(
    pooler: str, failures: set[str], warnings: set[str], folder: Path, checkpoint: str
) -> None:
    """Without is_matryoshka too."""
    with vllm_server(checkpoint, folder, "--pooler-config", pooler) as server:
        report = examine(server, checkpoint)
    assert named(report, "failure") == failures, report
    assert named(report, "warning") == {"authentication", "matryoshka"} | warnings, report


def test_the_oldest_vllm_in_process(
    texts: list[str], reference: Embedder, folder: Path, checkpoint: str
) -> None:
    """In an environment of its own, with this source; the last text needs several steps."""
    code = (
        "import sys, json, numpy as np\n"
        "from qwen3_embeddings import Embedder\n"
        "texts = json.load(sys.stdin)\n"
        "steps = {'max_num_batched_tokens': 512, 'max_num_seqs': 16}\n"
        "with Embedder(sys.argv[1], dtype='float32', engine_kwargs=steps) as embedder:\n"
        "    np.save(sys.argv[2], embedder.encode_document(texts))\n"
        "with Embedder(sys.argv[1], dtype='float32', dimensions=64) as embedder:\n"
        "    assert embedder.encode_query(['x']).shape == (1, 64)\n"
        "    report = embedder.doctor()\n"
        "    assert report.ok, report\n"
    )
    texts = [*texts, "1" * 2047]
    out = folder / "oldest.npy"
    command = [str(SERVERS / "vllm-oldest/bin/python"), "-W", "ignore", "-c", code]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [*command, checkpoint, str(out)],
        input=json.dumps(texts),
        env=environment,
        text=True,
        check=True,
        timeout=600,
    )
    assert worst_cosine(np.load(out), reference.encode_document(texts)) <= 1e-6
