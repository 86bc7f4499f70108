"""OpenTelemetry spans and metrics of the client, by the SDK's in-memory exporters."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import httpx
import pytest
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from conftest import RunningServer
from qwen3_embeddings import DimensionsError, Embedder, telemetry


@dataclass
class Recorded:
    """What an application with both providers would export."""

    exporter: InMemorySpanExporter
    reader: InMemoryMetricReader
    tracer: trace.Tracer

    @property
    def calls(self) -> list[ReadableSpan]:
        spans = self.exporter.get_finished_spans()
        return [span for span in spans if span.name.startswith("embeddings")]

    def points(self, name: str) -> list[Any]:
        """The data points of a metric."""
        data = self.reader.get_metrics_data()
        return [
            point
            for resource in (data.resource_metrics if data else [])
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        ]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorded]:
    """Providers of this test alone: the global ones can be set once per process."""
    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracers, meters = TracerProvider(), MeterProvider([reader])
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", tracers.get_tracer)
    monkeypatch.setattr(metrics, "get_meter", meters.get_meter)
    telemetry._instruments.cache_clear()
    yield Recorded(exporter, reader, tracers.get_tracer("application"))
    telemetry._instruments.cache_clear()
    tracers.shutdown()
    meters.shutdown()


def test_call_is_recorded_with_the_names_of_the_conventions(
    recorded: Recorded, server: RunningServer
) -> None:
    with Embedder(
        server.model, base_url=server.base_url, api_key=server.api_key, dimensions=64
    ) as e:
        e.encode_query(["a", "b", "c"])
    (span,) = recorded.calls
    assert span.attributes is not None
    url = httpx.URL(server.base_url)
    expected = {
        "gen_ai.operation.name": "embeddings",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "tiny",
        "gen_ai.embeddings.dimension.count": 64,
        "server.address": url.host,
        "server.port": url.port,
        "qwen3_embeddings.role": "query",
        "qwen3_embeddings.texts": 3,
    }
    assert {name: span.attributes.get(name) for name in expected} == expected
    assert (span.name, span.kind) == ("embeddings tiny", trace.SpanKind.CLIENT)
    (sent,) = [event for event in span.events if event.name == "qwen3_embeddings.sent"]
    assert sent.attributes is not None
    assert sent.attributes["qwen3_embeddings.texts"] == 3
    (duration,) = recorded.points("gen_ai.client.operation.duration")
    assert duration.count == 1
    assert duration.explicit_bounds[:2] == (0.01, 0.02)
    (texts,) = recorded.points("qwen3_embeddings.client.texts")
    assert texts.value == 3
    assert texts.attributes["qwen3_embeddings.role"] == "query"
    (wait,) = recorded.points("qwen3_embeddings.client.wait")
    assert wait.count == 1
    assert server.api_key not in span.to_json()


def test_call_in_process_records_its_tokens(recorded: Recorded, embedder: Embedder) -> None:
    before = embedder.usage.tokens
    embedder.encode_document(["one text", "and another"])
    tokens = embedder.usage.tokens - before
    (span,) = recorded.calls
    assert span.attributes is not None
    assert span.kind == trace.SpanKind.INTERNAL
    assert span.attributes["gen_ai.provider.name"] == "vllm"
    assert span.attributes["gen_ai.usage.input_tokens"] == tokens > 0
    (usage,) = recorded.points("gen_ai.client.token.usage")
    assert (usage.sum, usage.attributes["gen_ai.token.type"]) == (tokens, "input")


def test_span_belongs_to_the_caller_whoever_shares_the_request(
    recorded: Recorded, server: RunningServer
) -> None:
    """Twenty threads and twenty coroutines, whose queries share requests."""

    def parent(name: str) -> Any:
        return recorded.tracer.start_as_current_span(name)

    with Embedder(base_url=server.base_url, api_key=server.api_key) as remote:
        remote.start()

        def call(number: int) -> None:
            with parent(f"thread {number}"):
                remote.encode_query([f"query {number}"])

        async def acall(number: int) -> None:
            with parent(f"coroutine {number}"):
                await remote.aencode_query([f"query {number}"])

        async def all_calls() -> None:
            await asyncio.gather(*map(acall, range(20)))

        with ThreadPoolExecutor(20) as pool:
            list(pool.map(call, range(20)))
        asyncio.run(all_calls())
    spans = recorded.exporter.get_finished_spans()
    parents = {s.context.span_id: s for s in spans if not s.name.startswith("embeddings")}
    assert len(recorded.calls) == len(parents) == 40
    for span in recorded.calls:
        assert span.parent is not None
        own = parents.pop(span.parent.span_id)  # each parent has one
        assert span.context.trace_id == own.context.trace_id


def test_failed_call_records_its_error_without_the_text(
    recorded: Recorded, server: RunningServer
) -> None:
    with (
        Embedder(base_url=server.base_url, api_key=server.api_key, dimensions=9999) as remote,
        pytest.raises(DimensionsError),
    ):
        remote.encode_document(["a secret text"])
    (span,) = recorded.calls
    assert span.attributes is not None
    assert span.attributes["error.type"] == "DimensionsError"
    assert span.status.status_code == trace.StatusCode.ERROR
    assert "secret text" not in span.to_json()
    (duration,) = recorded.points("gen_ai.client.operation.duration")
    assert duration.attributes["error.type"] == "DimensionsError"


class _Restarting(BaseHTTPRequestHandler):
    """Answers 503 once, then a vector of two dimensions per text."""

    refusals = 1

    def do_POST(self) -> None:
        texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["input"]
        rows = [{"index": i, "embedding": [1.0, 0.0]} for i, _ in enumerate(texts)]
        status, body = 200, json.dumps({"data": rows}).encode()
        if type(self).refusals:
            type(self).refusals -= 1
            status, body = 503, b"{}"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        body = b'{"data": [{"id": "m"}]}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def test_retry_is_counted(recorded: Recorded) -> None:
    fake = ThreadingHTTPServer(("127.0.0.1", 0), _Restarting)
    thread = Thread(target=fake.serve_forever, args=(0.01,))
    thread.start()
    try:
        with Embedder("m", base_url=f"http://127.0.0.1:{fake.server_port}/v1") as remote:
            remote.encode_query(["a"])
    finally:
        fake.shutdown()
        fake.server_close()
        thread.join()
    (retries,) = recorded.points("qwen3_embeddings.client.retries")
    assert (retries.value, retries.attributes) == (1, {"error.type": "503"})


def test_opentelemetry_is_not_imported_for_an_application_without_it(
    server: RunningServer,
) -> None:
    code = (
        "import sys\n"
        "from qwen3_embeddings import Embedder\n"
        "with Embedder(base_url=sys.argv[1], api_key=sys.argv[2]) as remote:\n"
        "    assert len(remote.encode_query(['a'])) == 1\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]\n"
    )
    command = [sys.executable, "-c", code, server.base_url, server.api_key]
    subprocess.run(command, check=True)
