"""The server of ``serve --engine torch``: OpenAI's API, its errors, its key, and how it stops."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import importlib.util
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
from anyio.from_thread import start_blocking_portal
from langchain_qwen3_embeddings import Qwen3Embeddings
from llama_index.embeddings.qwen3 import Qwen3Embedding
from load import load
from prometheus_client.parser import text_string_to_metric_families
from safetensors.numpy import load_file, save_file

from conftest import RunningServer, free_port, wait_until_healthy
from qwen3_embeddings import Embedder, TextRefusedError, truncate
from qwen3_embeddings.cli import serve
from qwen3_embeddings.cli.main import main
from qwen3_embeddings.engines.base import Engine, Served
from qwen3_embeddings.engines.openai import wire as client_wire
from qwen3_embeddings.engines.torch import lifecycle
from qwen3_embeddings.engines.torch.engine import TorchEngine
from qwen3_embeddings.redaction import Secret
from qwen3_embeddings.server import run as running
from qwen3_embeddings.server import wire
from qwen3_embeddings.server.app import MOST_BYTES, Server
from qwen3_embeddings.server.wire import FORMATS, MOST_TEXTS
from qwen3_embeddings.testing import write_checkpoint
from qwen3_embeddings.vectors import normalize

KEY = "sesame-street-789"
ROOT = Path(__file__).parents[1]
ROUTES = ["/v1/embeddings", "/v1/models", "/tokenize", "/health", "/version", "/metrics"]


@contextlib.asynccontextmanager
async def listening(engine: Engine, *names: str, **arguments: Any) -> AsyncIterator[str]:
    """The URL of a server over an engine, in this process and on this event loop."""
    port = free_port()
    server = Server(engine, await engine.start(), names, **arguments)
    runner = await running.listen(server, running.bind("127.0.0.1", port))
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()
        await engine.close()


@pytest.fixture(scope="module")
def client(checkpoint: str) -> Iterator[httpx.Client]:
    """An HTTP client with the key of a server in another thread of this process."""
    server = listening(TorchEngine(checkpoint, dtype="float32"), "tiny", key=Secret(KEY))
    headers = {"Authorization": f"Bearer {KEY}"}
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(server) as url,
        httpx.Client(base_url=url, headers=headers, timeout=60) as made,
    ):
        yield made


def embed(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post("/v1/embeddings", json=fields)


def metrics(text: str) -> dict[str, dict[tuple[str, ...], float]]:
    """Samples by name, and by label values in the order of the labels' names."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values = tuple(value for _, value in sorted(sample.labels.items()))
            found.setdefault(sample.name, {})[values] = sample.value
    return found


def texts_in_progress(text: str) -> float:
    return metrics(text)["qwen3_embeddings_texts_in_progress"][()]


# Clients.


def test_openai_package_gets_the_vectors_of_the_engine(
    torch_server: RunningServer, torch_embedder: Embedder, texts: list[str]
) -> None:
    texts = [text for text in texts if len(text) < 1000]
    settings = {"base_url": torch_server.base_url, "api_key": torch_server.api_key}
    expected = torch_embedder.encode_document(texts)

    async def awaited(**arguments: Any) -> Any:
        async with openai.AsyncOpenAI(**settings) as client:
            return await client.embeddings.create(model="tiny", input=texts, **arguments)

    with openai.OpenAI(**settings) as client:
        for arguments in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
            answers = [client.embeddings.create(model="tiny", input=texts, **arguments)]  # type: ignore[call-overload]
            answers.append(asyncio.run(awaited(**arguments)))
            for answer in answers:
                rows = [row.embedding for row in answer.data]
                if arguments.get("encoding_format") == "base64":  # the package leaves it encoded
                    rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
                np.testing.assert_allclose(rows, expected, atol=1e-6)
                assert [row.index for row in answer.data] == list(range(len(texts)))
                assert answer.model == "tiny"
                assert answer.usage.total_tokens == sum(torch_embedder.count_tokens(texts))
        small = client.embeddings.create(model="tiny", input="one text", dimensions=32, user="me")
        (row,) = torch_embedder.encode_document(["one text"])
        np.testing.assert_allclose(small.data[0].embedding, truncate(row, 32), atol=1e-6)
        assert [model.id for model in client.models.list()] == ["tiny"]


def test_token_ids_have_the_vectors_of_their_texts(client: httpx.Client, texts: list[str]) -> None:
    some = texts[3:9]
    ids = [client.post("/tokenize", json={"prompt": t}).json()["tokens"] for t in some]
    expected, rows, row = (
        [row["embedding"] for row in embed(client, input=value).json()["data"]]
        for value in (some, ids, ids[0])
    )
    np.testing.assert_allclose(rows, expected, atol=1e-6)
    np.testing.assert_allclose(row, expected[:1], atol=1e-6)


@pytest.mark.parametrize("dimensions", [None, 64])
def test_adapters_get_the_vectors_of_the_engine(
    dimensions: int | None, torch_server: RunningServer, checkpoint: str
) -> None:
    some = ["The capital of China is Beijing.", "Explain gravity"]
    settings: dict[str, Any] = {"api_key": torch_server.api_key, "dimensions": dimensions}
    chain = Qwen3Embeddings(base_url=torch_server.base_url, **settings)
    index = Qwen3Embedding(api_base=torch_server.base_url, **settings)
    with Embedder(checkpoint, dtype="float32", engine="torch", dimensions=dimensions) as in_process:
        documents, query = in_process.encode_document(some), in_process.encode_query("capital")
    np.testing.assert_allclose(chain.embed_documents(some), documents, atol=1e-6)
    np.testing.assert_allclose(chain.embed_query("capital"), query, atol=1e-6)
    np.testing.assert_allclose(index.get_text_embedding_batch(some), documents, atol=1e-6)
    np.testing.assert_allclose(index.get_query_embedding("capital"), query, atol=1e-6)


def test_requests_of_open_webui_are_answered(
    client: httpx.Client, torch_embedder: Embedder
) -> None:
    """Their exact bodies, as `make test-open-webui` recorded them."""
    record = (ROOT / "integrations/open-webui/record.md").read_text(encoding="utf-8")
    bodies = re.findall(r'^`(\{"input".*\})` → 200$', record, re.MULTILINE)
    assert len(bodies) >= 5
    for body in bodies:
        headers = {"Content-Type": "application/json"}
        answer = client.post("/v1/embeddings", content=body.encode(), headers=headers)
        rows = [row["embedding"] for row in answer.json()["data"]]
        expected = torch_embedder.encode_document(json.loads(body)["input"])
        np.testing.assert_allclose(rows, expected, atol=1e-6)


def test_doctor_finds_nothing_wrong(
    torch_server: RunningServer,
    checkpoint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("QWEN3_EMBEDDINGS_API_KEY", torch_server.api_key)
    command = ["doctor", "--base-url", torch_server.base_url, "--reference", checkpoint, "--json"]
    assert main(command) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    status = {finding["check"]: finding["status"] for finding in findings}
    assert status.pop("similarities") == "skipped"
    assert set(status.values()) == {"ok"}, findings


def test_models_and_version_say_what_is_served(client: httpx.Client, checkpoint: str) -> None:
    (row,) = client.get("/v1/models").json()["data"]
    assert (row["id"], row["root"], row["max_model_len"]) == ("tiny", checkpoint, 2048)
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", client.get("/version").json()["version"])
    answer = client.post("/tokenize", json={"prompt": "a"}).json()
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 2048)


@pytest.mark.parametrize("name", ["tiny", "", None, "the path"])
def test_model_is_found_by_its_names(
    name: str | None, client: httpx.Client, checkpoint: str
) -> None:
    answer = embed(client, input="a", model=checkpoint if name == "the path" else name)
    assert answer.status_code == 200
    assert answer.json()["model"] == "tiny"


# Errors.


@pytest.mark.parametrize(
    ("fields", "status", "said", "param"),
    [
        ({}, 400, "input is not a text", "input"),
        ({"input": []}, 400, "or it is empty", "input"),
        ({"input": 3}, 400, "input is not a text", "input"),
        ({"input": ["a", 3]}, 400, "input is not a text", "input"),
        ({"input": [True]}, 400, "input is not a text", "input"),
        ({"input": [[1], []]}, 400, "input[1] is not a list of token ids", "input"),
        ({"input": [[1], ["a"]]}, 400, "input[1] is not a list of token ids", "input"),
        ({"input": [[5, -1]]}, 400, "input[0] has a token id that is out of range", "input"),
        ({"input": [5, 10**6]}, 400, "input[0] has a token id that is out of range", "input"),
        ({"input": ["a"] * (MOST_TEXTS + 1)}, 400, "at most 2048 per request", "input"),
        (
            {"input": ["a", "long " * 3000]},
            400,
            "input[1] is longer than this model's maximum context length of 2048 tokens",
            "input",
        ),
        ({"input": [[5] * 2049]}, 400, "input[0] is longer than this model's maximum", "input"),
        ({"input": "a", "model": "other"}, 404, "does not exist here. Served: tiny", "model"),
        ({"input": "a", "model": 3}, 404, "the model does not exist", "model"),
        ({"input": "a", "model": ["tiny"]}, 404, "the model does not exist", "model"),
        ({"input": "a", "dimensions": 31}, 400, "32 to 128", "dimensions"),
        ({"input": "a", "dimensions": 129}, 400, "32 to 128", "dimensions"),
        ({"input": "a", "dimensions": "64"}, 400, "is a str", "dimensions"),
        ({"input": "a", "encoding_format": "bytes"}, 400, "float, base64", "encoding_format"),
        ({"input": "a", "encoding_format": ["float"]}, 400, "float, base64", "encoding_format"),
        ({"input": "a", "priority": "high"}, 400, "priority is not an integer", "priority"),
        ({"input": "a", "truncate_prompt_tokens": 8}, 400, "Leave", "truncate_prompt_tokens"),
        ({"input": "a", "embed_dtype": "float16"}, 400, "Leave it out", "embed_dtype"),
        ({"input": "a", "add_special_tokens": False}, 400, "Leave it out", "add_special_tokens"),
        ({"messages": [{"role": "user", "content": "a"}]}, 400, "Leave it out", "messages"),
    ],
)  # fmt: skip
def test_embeddings_with_a_wrong_field_is_refused_in_openais_form(
    fields: dict[str, Any], status: int, said: str, param: str, client: httpx.Client
) -> None:
    answer = embed(client, **fields)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert said in error["message"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert embed(client, input="still here").status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[1]", b'"text"', b"null", b"\xff\xfe", b'{"input": "\xed\xa0\x80"}'),
        *(b'{"input": "\\ud800"}', b'{"input": "a", "priority": NaN}', b"[" * 100_000),
    ],
)
def test_embeddings_with_a_body_that_is_no_json_object_is_refused(
    body: bytes, client: httpx.Client
) -> None:
    headers = {"Content-Type": "application/json"}
    answer = client.post("/v1/embeddings", content=body, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("the body is not ")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/embeddings", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/v1/chat/completions", 404),
        ("GET", "/", 404),
        ("GET", "/v1/embeddings/../../etc/passwd", 404),
    ],
)
def test_other_routes_and_methods_are_refused_in_openais_form(
    method: str, path: str, status: int, client: httpx.Client
) -> None:
    answer = client.request(method, path)
    assert (answer.status_code, answer.json()["error"]["type"]) == (status, "invalid_request_error")


def test_embeddings_with_a_body_over_the_limit_is_refused(client: httpx.Client) -> None:
    headers = {"Content-Type": "application/json"}
    answer = client.post("/v1/embeddings", content=b" " * (MOST_BYTES + 1), headers=headers)
    assert answer.status_code == 413
    assert "64 MiB" in answer.json()["error"]["message"]


def test_embeddings_with_another_content_type_is_refused(client: httpx.Client) -> None:
    """A page in a browser can send such a request to another origin without permission."""
    headers = {"Content-Type": "text/plain"}
    answer = client.post("/v1/embeddings", content=b'{"input": "a"}', headers=headers)
    assert answer.status_code == 415


def test_embeddings_with_a_broken_encoding_is_refused(client: httpx.Client) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    answer = client.post("/v1/embeddings", content=b"not gzip", headers=headers)
    assert (answer.status_code, answer.headers["connection"]) == (400, "close")
    assert "Content-Encoding" in answer.json()["error"]["message"]
    packed = gzip.compress(b'{"input": "a"}')
    assert client.post("/v1/embeddings", content=packed, headers=headers).status_code == 200


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "other"])
def test_body_is_decoded_after_the_key_is_checked(encoding: str, client: httpx.Client) -> None:
    """Otherwise 2 MiB of gzip, from anyone, would stop the event loop for seconds."""
    headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
    body = b'{"input": "a"}'
    answer = client.post("/v1/embeddings", content=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]["type"]) == (415, "invalid_request_error")
    wrong = headers | {"Authorization": "Bearer wrong"}
    answer = client.post("/v1/embeddings", content=body, headers=wrong)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


def test_compressed_body_is_whole_and_within_the_limit(client: httpx.Client) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    packed = gzip.compress(b'{"input": "a"}')
    large = gzip.compress(b" " * (MOST_BYTES + 1))
    for body, status in [(packed[:-4], 400), (packed + b"more", 400), (b"", 400), (large, 413)]:
        answer = client.post("/v1/embeddings", content=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["type"]) == (
            status,
            "invalid_request_error",
        )
    headers["Content-Encoding"] = "Deflate"
    body = zlib.compress(b'{"input": "a"}')
    assert client.post("/v1/embeddings", content=body, headers=headers).status_code == 200


def test_tokenize_without_a_text_is_refused(client: httpx.Client) -> None:
    for fields in ({}, {"prompt": 3}, {"prompt": "a", "add_special_tokens": False}):
        assert client.post("/tokenize", json=fields).status_code == 400
    assert client.post("/tokenize", json={"prompt": "a", "model": "other"}).status_code == 404


# Key and metrics.


@pytest.mark.parametrize("path", [*ROUTES, "/v1/other", "/"])
def test_every_route_needs_the_key(path: str, client: httpx.Client) -> None:
    name = path if path in ROUTES else "other"
    method = "POST" if path in {"/v1/embeddings", "/tokenize"} else "GET"

    def refused() -> float:
        counted = metrics(client.get("/metrics").text)["qwen3_embeddings_requests_total"]
        return counted.get((name, "401"), 0)

    before = refused()
    encoded = base64.b64encode(f"me:{KEY}".encode()).decode()
    wrong = ["", "Bearer", "Bearer wrong", KEY, f"Basic {encoded}", "Bearer \xe9"]
    for header in wrong:
        headers: Any = {"Authorization": header.encode("latin-1")}
        answer = client.request(method, path, json={"input": "a"}, headers=headers)
        assert answer.status_code == 401, header
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert refused() == before + len(wrong)


def test_metrics_count_requests_texts_and_tokens(client: httpx.Client) -> None:
    def scrape() -> dict[str, dict[tuple[str, ...], float]]:
        answer = client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=")
        return metrics(answer.text)

    before = scrape()
    tokens = embed(client, input=["one", "two three"]).json()["usage"]["total_tokens"]
    embed(client, input="a", dimensions=5)
    client.get("/not/a/route/1")
    client.get("/not/a/route/2")
    after = scrape()

    def rise(name: str, *labels: str) -> float:
        return after[name][labels] - before[name].get(labels, 0)

    assert rise("qwen3_embeddings_texts_total") == 2
    assert rise("qwen3_embeddings_tokens_total") == tokens > 2
    assert rise("qwen3_embeddings_requests_total", "/v1/embeddings", "200") == 1
    assert rise("qwen3_embeddings_requests_total", "/v1/embeddings", "400") == 1
    assert rise("qwen3_embeddings_requests_total", "other", "404") == 2
    assert rise("qwen3_embeddings_request_seconds_count", "/v1/embeddings") == 2
    assert ("0.001", "/v1/embeddings") in after["qwen3_embeddings_request_seconds_bucket"]
    assert after["qwen3_embeddings_texts_in_progress"] == {(): 0}
    assert after["qwen3_embeddings_build_info"].keys() == {
        ("tiny", client.get("/version").json()["version"])
    }
    routes = {labels[0] for labels in after["qwen3_embeddings_requests_total"]}
    assert routes <= {*ROUTES, "other"}


# The engine behind it: a server in this process.


@contextlib.asynccontextmanager
async def serving(engine: Engine, **arguments: Any) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client of a server over an engine, on this event loop."""
    limits = httpx.Limits(max_connections=None)
    async with (
        listening(engine, "tiny", "other", **arguments) as url,
        httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as client,
    ):
        yield client


@pytest.fixture
async def engine(checkpoint: str) -> AsyncIterator[TorchEngine]:
    """An engine that a test may break; its steps hold few texts."""
    made = TorchEngine(checkpoint, dtype="float32", engine_kwargs={"max_num_batched_tokens": 256})
    yield made
    await made.close()


async def computing(engine: TorchEngine) -> None:
    """Wait until an engine computes texts."""
    while not (engine._thread and engine._thread._jobs):  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def test_default_size_and_names_of_a_server(engine: TorchEngine) -> None:
    async with serving(engine, dimensions=64) as client:
        for name, asked, size in [("tiny", None, 64), ("other", 32, 32), ("other", 128, 128)]:
            body = {"input": "a", "model": name, "dimensions": asked}
            (row,) = (await client.post("/v1/embeddings", json=body)).json()["data"]
            assert len(row["embedding"]) == size
            assert abs(np.linalg.norm(row["embedding"]) - 1) < 1e-5
        listed = (await client.get("/v1/models")).json()["data"]
        assert [row["id"] for row in listed] == ["tiny", "other"]


async def test_query_is_answered_before_documents_of_an_earlier_request(
    engine: TorchEngine,
) -> None:
    documents = {"input": [f"document {i} " * 20 for i in range(1000)], "priority": 1}
    async with serving(engine) as client:
        slow = asyncio.create_task(client.post("/v1/embeddings", json=documents))
        await computing(engine)
        query = await client.post("/v1/embeddings", json={"input": "query", "priority": 0})
        assert query.status_code == 200
        assert not slow.done(), "the query waited for every document"
        assert (await slow).status_code == 200


async def test_concurrent_single_texts_share_steps(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen3_embeddings.engines.torch.core import Core

    engine = TorchEngine(checkpoint, dtype="float32")
    steps: list[int] = []
    may_go = threading.Event()
    step = Core.step

    def counted(core: Core) -> Any:
        may_go.wait(30)  # the first step begins with one text; the others come meanwhile
        steps.append(len(core._waiting))
        return step(core)

    async def post(i: int) -> httpx.Response:
        return await client.post("/v1/embeddings", json={"input": f"text {i}"})

    try:
        async with serving(engine) as client:
            monkeypatch.setattr(Core, "step", counted)
            requests = [asyncio.create_task(post(i)) for i in range(256)]
            while texts_in_progress((await client.get("/metrics")).text) < len(requests):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            may_go.set()
            answers = await asyncio.gather(*requests)
    finally:
        may_go.set()
        await engine.close()
    assert {answer.status_code for answer in answers} == {200}
    assert sum(steps) == len(requests)
    assert len(steps) <= 4, steps


@pytest.mark.parametrize("form", FORMATS)
async def test_large_response_is_written_in_blocks_and_others_run_between(form: str) -> None:
    rows = np.random.default_rng(0).standard_normal((2000, 1024), dtype=np.float32)
    answer = asyncio.create_task(wire.answer(rows, form, "tiny", 7))
    turns = 0
    while not answer.done():
        await asyncio.sleep(0)
        turns += 1
    blocks, kind = await answer
    assert turns >= len(blocks) == 32
    received = client_wire.read(b"".join(blocks), kind, len(rows))
    np.testing.assert_allclose(received.vectors, rows, rtol=1e-6)


@pytest.mark.parametrize("form", FORMATS)
async def test_large_response_arrives_whole(
    form: str, engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.random.default_rng(0).standard_normal((MOST_TEXTS, 1024), dtype=np.float32)
    async with serving(engine) as client:
        monkeypatch.setattr(engine, "embed", lambda *_: asyncio.sleep(0, rows))
        body = {"input": ["a"] * MOST_TEXTS, "encoding_format": form}
        answer = await client.post("/v1/embeddings", json=body)
    received = client_wire.read(answer.content, answer.headers["content-type"], MOST_TEXTS)
    np.testing.assert_allclose(received.vectors, normalize(rows), atol=1e-6)
    assert answer.headers["content-length"] == str(len(answer.content))


def test_listen_many_connections_wait_to_be_accepted(engine: TorchEngine) -> None:
    """With too short a backlog the kernel would drop some, and clients try again a second later."""
    port = free_port()

    async def listen_and_accept_nothing() -> None:
        server = Server(engine, Served("torch", "tiny", 128, 128, 2048), ["tiny"])
        runner = await running.listen(server, running.bind("127.0.0.1", port))
        with contextlib.ExitStack() as connections:
            for _ in range(300):  # the event loop stands still meanwhile
                connected = socket.create_connection(("127.0.0.1", port), timeout=0.9)
                connections.enter_context(connected)
        await runner.cleanup()

    asyncio.run(listen_and_accept_nothing())


async def test_client_that_disconnects_drops_its_texts(engine: TorchEngine) -> None:
    documents = {"input": [f"document {i} " * 20 for i in range(1000)]}
    async with serving(engine) as client:
        request = asyncio.create_task(client.post("/v1/embeddings", json=documents))
        await computing(engine)
        request.cancel()  # httpx closes the connection
        with contextlib.suppress(asyncio.CancelledError):
            await request
        assert (await client.post("/v1/embeddings", json={"input": "next"})).status_code == 200
        assert engine._thread is not None
        assert not engine._thread._jobs, "the texts of a client that has gone are still computed"
        found = metrics((await client.get("/metrics")).text)
        assert found["qwen3_embeddings_requests_total"]["/v1/embeddings", "499"] == 1
        assert found["qwen3_embeddings_texts_in_progress"] == {(): 0}
        assert found["qwen3_embeddings_texts_total"] == {(): 1}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_engine_that_dies_is_started_again(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from qwen3_embeddings.engines.torch.core import Core

    def die(_: object) -> None:
        raise RuntimeError("CUDA error at /home/me/kernels.cu")

    async with serving(engine) as client:
        with monkeypatch.context() as patched:
            patched.setattr(Core, "step", die)
            answer = await client.post("/v1/embeddings", json={"input": "a"})
            assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")
            assert "kernels.cu" not in answer.text
            assert "kernels.cu" in caplog.text
        assert (await client.post("/v1/embeddings", json={"input": "a"})).status_code == 200
        assert (await client.get("/health")).status_code == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_engine_that_does_not_start_again_is_unhealthy(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen3_embeddings.engines.torch.core import Core

    def fail(*_: object) -> Any:
        raise RuntimeError("broken")

    async with serving(engine) as client:
        with monkeypatch.context() as patched:
            patched.setattr(Core, "step", fail)
            patched.setattr(lifecycle, "start", fail)
            for _ in range(2):
                answer = await client.post("/v1/embeddings", json={"input": "a"})
                assert answer.status_code == 503
            assert (await client.get("/health")).status_code == 503
        assert (await client.get("/health")).status_code == 200, "it is started by the probe"


async def test_health_of_a_starting_engine_is_503(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen3_embeddings.server import app

    async with serving(engine) as client:
        monkeypatch.setattr(app, "HEALTH_SECONDS", 0.01)
        monkeypatch.setattr(engine, "start", lambda: asyncio.sleep(60))
        answer = await client.get("/health")
        assert (answer.status_code, answer.json()["error"]["message"]) == (
            503,
            "the engine is starting.",
        )


async def test_unexpected_error_is_500_without_its_words(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(engine) as client:
        monkeypatch.setattr(engine, "embed", lambda *_: 1 / 0)
        answer = await client.post("/v1/embeddings", json={"input": "a secret text"})
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "ivision" not in answer.text
    assert "ZeroDivisionError" in caplog.text
    assert "secret" not in caplog.text


async def test_text_without_a_finite_vector_costs_no_other_text(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "nan")
    weights = load_file(folder / "model.safetensors")
    engine = TorchEngine(str(folder), dtype="float32")
    (bad,) = await engine.tokenize(["Z"])
    weights["embed_tokens.weight"][bad[0]] = np.nan
    save_file(weights, folder / "model.safetensors")
    await engine.close()
    engine = TorchEngine(str(folder), dtype="float32")
    try:
        async with serving(engine) as client:
            answer = await client.post("/v1/embeddings", json={"input": ["a", "Z", "b"]})
            assert answer.status_code == 422
            assert answer.json()["error"]["message"].startswith(
                "input[1]: the vector is not finite"
            )
            async with Embedder(base_url=f"{client.base_url}/v1", model="tiny") as embedder:
                with pytest.raises(TextRefusedError) as caught:
                    await embedder.aencode_document(["a", "Z", "b"])
            assert caught.value.positions == (1,)
            assert caught.value.computed is not None
            assert caught.value.computed.positions.tolist() == [0, 2]
    finally:
        await engine.close()


def test_key_is_in_no_repr(engine: TorchEngine) -> None:
    served = asyncio.run(engine.start())
    server = Server(engine, served, ["tiny"], key=Secret(KEY))
    assert KEY not in repr(server) + repr(vars(server))


async def test_requests_that_are_not_http_leave_no_key_in_the_log(
    engine: TorchEngine, caplog: pytest.LogCaptureFixture
) -> None:
    requests = [
        f"GET /health HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer \0{KEY}\r\n\r\n",
        f"GET /health HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {KEY * 1000}\r\n\r\n",
        f"GET /{KEY} HTTP/1.1\r\nHost h\r\n\r\n",
    ]
    async with serving(engine, key=Secret(KEY)) as client:
        for request in requests:
            reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
            writer.write(request.encode())
            assert b" 400 Bad Request" in await reader.readline()
            writer.close()
        headers = {"Authorization": f"Bearer {KEY}"}
        assert (await client.get("/health", headers=headers)).status_code == 200
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert KEY not in caplog.text


@pytest.mark.parametrize("kind", ["null", "stepping"])
async def test_engine_of_the_benchmark_answers(kind: str, checkpoint: str) -> None:
    engine = load(ROOT / "benchmarks/server_http.py").engine(kind, checkpoint, 64)
    async with serving(engine) as client:
        answer = await client.post("/v1/embeddings", json={"input": ["one", "two"]})
        assert [len(row["embedding"]) for row in answer.json()["data"]] == [64, 64]
    await engine.close()


# The process.


@contextlib.contextmanager
def process(
    checkpoint: str, log: Path, *flags: str, wait: bool = True, script: str = ""
) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """A server process that a test may end, and its client; a script may replace the program."""
    port = free_port()
    program = ["-c", script] if script else ["-m", "qwen3_embeddings"]
    command = [sys.executable, *program, "serve", checkpoint, "--engine", "torch"]
    command += ["--port", str(port), "--dtype", "float32", *flags]
    environment = os.environ | {"QWEN3_EMBEDDINGS_API_KEY": KEY}
    with log.open("wb") as file:
        started = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    url, headers = f"http://127.0.0.1:{port}", {"Authorization": f"Bearer {KEY}"}
    try:
        if wait:
            wait_until_healthy(url, started, log, key=KEY)
        with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
            yield started, client
    finally:
        started.kill()
        started.wait()


MANY = {"input": [f"document {i} " * 50 for i in range(150)], "dimensions": 32}


def in_progress(client: httpx.Client) -> bool:
    return texts_in_progress(client.get("/metrics").text) > 0


def listens(client: httpx.Client) -> bool:
    try:
        httpx.get(f"{client.base_url}/health")
    except httpx.ConnectError:
        return False
    return True


def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition, at most a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_sigterm_finishes_requests_and_a_second_signal_does_not(
    checkpoint: str, tmp_path: Path
) -> None:
    small_steps = ("--engine-kwargs", '{"max_num_batched_tokens": 512}')
    for signals, code in [([signal.SIGTERM], 0), ([signal.SIGINT, signal.SIGTERM], 143)]:
        log = tmp_path / "log"
        with (
            process(checkpoint, log, *small_steps) as (server, client),
            ThreadPoolExecutor(1) as pool,
        ):
            assert not psutil.Process(server.pid).children(), "nothing is left of a killed server"
            assert KEY not in " ".join(psutil.Process(server.pid).cmdline())
            answer = pool.submit(client.post, "/v1/embeddings", json=MANY)
            until(lambda: in_progress(client))
            server.send_signal(signals[0])
            until(lambda: not listens(client))
            for number in signals[1:]:
                server.send_signal(number)
            if code:
                assert isinstance(answer.exception(), httpx.HTTPError)
            else:
                assert len(answer.result().json()["data"]) == len(MANY["input"])  # type: ignore[arg-type]
            assert server.wait(30) == code
        assert "Traceback" not in log.read_text()
        assert KEY not in log.read_text()


FEW_FILES = """
import resource, sys
from qwen3_embeddings.cli.main import main
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
sys.exit(main(sys.argv[1:]))
"""


def test_more_connections_than_the_first_limit_of_open_files_are_accepted(
    checkpoint: str, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with (
        process(checkpoint, log, script=FEW_FILES) as (_, client),
        contextlib.ExitStack() as connections,
    ):
        for _ in range(100):
            connected = socket.create_connection(("127.0.0.1", client.base_url.port))
            connections.enter_context(connected)
        assert httpx.get(f"{client.base_url}/health").status_code == 401
    assert "Traceback" not in log.read_text()


def test_sigterm_while_a_body_is_received_answers_the_request(
    checkpoint: str, tmp_path: Path
) -> None:
    body = json.dumps({"input": "a"}).encode()
    head = "POST /v1/embeddings HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
    head += f"Authorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
    with process(checkpoint, tmp_path / "log") as (server, client):
        with socket.create_connection(("127.0.0.1", client.base_url.port), 60) as connection:
            connection.sendall(head.encode() + body[:5])
            client.get("/health")  # behind it in the server's event loop
            server.terminate()
            until(lambda: not listens(client))
            connection.sendall(body[5:])
            answer = connection.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert b"\r\nConnection: close\r\n" in answer
        assert server.wait(30) == 0


SHORT_STOP = """
import sys, time
from qwen3_embeddings.cli.main import main
from qwen3_embeddings.engines.torch.core import Core
from qwen3_embeddings.server import run
run.STOP_SECONDS, run.WRITE_SECONDS, run.CLOSE_SECONDS = 4, 0.5, 3
"""


@pytest.mark.parametrize("long", ["request", "step"])
def test_sigterm_during_a_request_that_does_not_end_in_time_exits_with_0(
    long: str, checkpoint: str, tmp_path: Path
) -> None:
    endless = {"input": [[5] * 2000] * MOST_TEXTS}
    slow = {
        "request": "step = Core.step\nCore.step = lambda core: time.sleep(1) or step(core)\n",
        "step": "Core.step = lambda _: time.sleep(600)\n",
    }
    script = f"{SHORT_STOP}{slow[long]}sys.exit(main(sys.argv[1:]))"
    with (
        process(checkpoint, tmp_path / "log", script=script) as (server, client),
        ThreadPoolExecutor(1) as pool,
    ):
        answer = pool.submit(client.post, "/v1/embeddings", json=endless)
        until(lambda: in_progress(client))
        server.terminate()
        assert isinstance(answer.exception(), httpx.HTTPError)
        assert server.wait(30) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_sigterm_during_the_start_ends_the_server(checkpoint: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with process(checkpoint, log, wait=False) as (server, _):
        # It binds its port when its signal handlers are set.
        until(lambda: bool(psutil.Process(server.pid).net_connections() or server.poll()))
        server.terminate()
        assert server.wait(60) == 0
    assert "Traceback" not in log.read_text()


# The command line.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--quantization", "fp8"], "--engine torch does not have --quantization. Leave it out"),
        (["--api-server-count", "2"], "does not have --api-server-count"),
        (["--data-parallel-size=2", "-tp", "2"], "does not have --data-parallel-size, -tp"),
        (["--served-model-name", "a", "--", "b"], "does not have"),
        (["--served-model-name"], "expected at least one argument"),
        (["--print"], "Leave --print out"),
        (["--api-key", KEY], "QWEN3_EMBEDDINGS_API_KEY"),
        ([f"--api-key={KEY}"], "QWEN3_EMBEDDINGS_API_KEY"),
        (["--port", "0"], "1 to 65535"),
        (["--dimensions", "129"], "32 to 128"),
        (["--engine-kwargs", "[]"], "is not a JSON object"),
        (["--engine-kwargs", '{"tensor_parallel_size": 2}'], "which engine='torch' does not know"),
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1:8000"),
        (["--host", "a" * 64], "cannot listen on aaaa"),
        (["--host", "x..y"], "cannot listen on x..y:8000"),
        (["--served-model-name", "a", "\udcff"], "--served-model-name holds a character"),
    ],
)
def test_serve_torch_with_wrong_options_says_why(
    arguments: list[str], said: str, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", checkpoint, "--engine", "torch", *arguments]) == 1
    written = capsys.readouterr()
    assert said in written.err
    assert KEY not in written.err + written.out


def test_serve_torch_on_a_port_in_use_says_so(
    torch_server: RunningServer, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    port = torch_server.base_url.split(":")[-1].removesuffix("/v1")
    assert main(["serve", checkpoint, "--engine", "torch", "--port", port]) == 1
    assert f"cannot listen on 127.0.0.1:{port} (Address already in use)" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["aiohttp", "orjson", "prometheus_client", "torch"])
def test_serve_torch_without_its_extra_names_the_command(
    module: str,
    checkpoint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == module else find(name)
    )
    assert main(["serve", checkpoint, "--engine", "torch"]) == 1
    assert "Run pip install 'qwen3-embeddings[torch" in capsys.readouterr().err


@pytest.mark.parametrize("engine", ["torch", "vllm"])
@pytest.mark.parametrize("key", [f" {KEY}", f"{KEY}\n", "  ", "schl\xfcssel", "\udcff", "a\tb"])
def test_serve_with_a_key_that_no_client_can_send_says_so(
    key: str,
    engine: str,
    checkpoint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("QWEN3_EMBEDDINGS_API_KEY", key)
    monkeypatch.setattr(running, "run", lambda *_: 0)
    monkeypatch.setattr(serve, "supervise", lambda *_: 0)
    assert main(["serve", checkpoint, "--engine", engine]) == 1
    written = capsys.readouterr()
    assert "no client could send it. Set it again." in written.err
    assert not key.strip() or key.strip() not in written.err + written.out


@pytest.mark.parametrize(("key", "warned"), [("", True), (KEY, False)])
def test_serve_torch_without_a_key_warns_unless_on_loopback(
    key: str,
    warned: bool,
    checkpoint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("QWEN3_EMBEDDINGS_API_KEY", key)
    monkeypatch.setattr(running, "run", lambda *_: 0)
    for host, others in [("127.0.0.1", False), ("0.0.0.0", True)]:
        assert main(["serve", checkpoint, "--engine", "torch", "--host", host]) == 0
        said = capsys.readouterr().err
        assert ("anyone who reaches this port" in said) == (others and warned)
