"""The client against other servers: `make test-servers`, which installs them first.

Not a test_*.py file, since installing takes too long for every change. What each may do is in
docs/servers.md: the same vectors, or a refusal.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import RunningServer, free_port, wait_until_healthy
from qwen3_embeddings import ConfigurationError, Embedder, Report, TextError, truncate
from qwen3_embeddings.matryoshka import Vectors

SERVERS = Path(os.environ.get("SERVERS", ".servers")).resolve()
ROOT = Path(__file__).parents[1]
KEY = "sesame-street-123"
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


@pytest.fixture(scope="module")
def vllm_oldest(checkpoint: str, folder: Path) -> Iterator[RunningServer]:
    port = free_port()
    python = str(SERVERS / "vllm-oldest/bin/python")
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", checkpoint]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny"]
    command += ["--runner", "pooling", "--convert", "embed", "--dtype", "float32"]
    command += ["--enforce-eager", "--api-key", KEY, "--hf-overrides", '{"is_matryoshka": true}']
    with started(command, port, folder) as running:
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
    command += ["--embeddings", "--pooling", "last", "--ctx-size", "2049", "--parallel", "1"]
    command += ["--batch-size", "2048", *flags]
    with started(command, port, folder) as running:
        yield running


@pytest.fixture(scope="module")
def llama(gguf: Path, folder: Path) -> Iterator[RunningServer]:
    with llama_server(gguf, folder) as running:
        yield running


def connect(server: RunningServer, **arguments: Any) -> Embedder:
    return Embedder(base_url=server.base_url, api_key=server.api_key, **arguments)


def worst_cosine(one: Vectors, other: Vectors) -> float:
    return float(np.abs((one.astype(np.float64) * other).sum(axis=1) - 1).max())


def named(report: Report, status: str) -> set[str]:
    return {finding.check for finding in report.findings if finding.status == status}


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
    name: str, overflow: str, checkpoint: str, request: pytest.FixtureRequest
) -> None:
    with connect(request.getfixturevalue(name), overflow=overflow) as remote:
        vectors = remote.encode_document(LONG)
    yardstick = Embedder(checkpoint, dtype="float32", overflow=overflow, engine="reference")
    assert worst_cosine(vectors, yardstick.encode_document(LONG)) <= 1e-5


@pytest.mark.parametrize("name", WHOLE)
def test_an_over_long_text_is_refused(name: str, request: pytest.FixtureRequest) -> None:
    with (
        connect(request.getfixturevalue(name)) as remote,
        pytest.raises(TextError) as caught,
    ):
        remote.encode_document(LONG)
    assert caught.value.positions == (1, 2)


@pytest.mark.parametrize("name", WHOLE)
def test_the_doctor_finds_nothing_wrong(name: str, request: pytest.FixtureRequest) -> None:
    with connect(request.getfixturevalue(name)) as remote:
        report = remote.doctor()
    assert report.ok, report


def test_what_infinity_gets_wrong_is_refused(infinity: RunningServer) -> None:
    with connect(infinity) as remote:
        with pytest.raises(TextError, match="white space") as caught:
            remote.encode_document(["fine", " not so\n"])
        assert caught.value.positions == (1,)
        assert named(remote.doctor(), "failure") == {"unaltered", "context"}
    with (
        connect(infinity, overflow="mean") as remote,
        pytest.raises(ConfigurationError, match="context"),
    ):
        remote.encode_document(LONG)


def test_quantised(gguf: Path, folder: Path, checkpoint: str) -> None:
    model = folder / "tiny-Q8_0.gguf"
    quantise = [str(SERVERS / "llama.cpp/build/bin/llama-quantize"), str(gguf), str(model), "Q8_0"]
    subprocess.run(quantise, check=True, capture_output=True)
    with llama_server(model, folder) as server, connect(server) as remote:
        report = remote.doctor(reference=checkpoint)
    assert report.ok, report


def test_a_gguf_without_the_end_token(gguf: Path, folder: Path) -> None:
    """As older converters wrote it."""
    flag = "tokenizer.ggml.add_eos_token=bool:false"
    with llama_server(gguf, folder, "--override-kv", flag) as server, connect(server) as remote:
        assert {"end token", "token ids"} <= named(remote.doctor(), "failure")


def test_the_oldest_vllm_in_process(
    texts: list[str], reference: Embedder, folder: Path, checkpoint: str
) -> None:
    """In an environment of its own, with this source."""
    code = (
        "import sys, json, numpy as np\n"
        "from qwen3_embeddings import Embedder\n"
        "texts = json.load(sys.stdin)\n"
        "with Embedder(sys.argv[1], dtype='float32') as embedder:\n"
        "    np.save(sys.argv[2], embedder.encode_query(texts))\n"
        "with Embedder(sys.argv[1], dtype='float32', dimensions=64) as embedder:\n"
        "    assert embedder.encode_query(['x']).shape == (1, 64)\n"
        "    report = embedder.doctor()\n"
        "    assert report.ok, report\n"
    )
    out = folder / "oldest.npy"
    command = [str(SERVERS / "vllm-oldest/bin/python"), "-W", "ignore", "-c", code]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [*command, checkpoint, str(out)],
        input=json.dumps(texts),
        env=environment,
        text=True,
        check=True,
    )
    assert worst_cosine(np.load(out), reference.encode_query(texts)) <= 1e-6
