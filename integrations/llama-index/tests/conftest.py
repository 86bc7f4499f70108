"""Models on both engines, and a server that records what it is asked."""

from __future__ import annotations

import json
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from llama_index.embeddings.qwen3 import Qwen3Embedding

from qwen3_embeddings import Embedder

Make = Callable[..., Qwen3Embedding]


@pytest.fixture(params=["in_process", "server"])
def make(request: pytest.FixtureRequest, checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes models of the test checkpoint, float32, in this process and on the real server."""
    if request.param == "in_process":
        return partial(Qwen3Embedding, model_name=checkpoint, dtype="float32")
    server = request.getfixturevalue("server")
    monkeypatch.setenv("QWEN3_EMBEDDINGS_API_KEY", server.api_key)
    return partial(Qwen3Embedding, model_name=server.model, api_base=server.base_url)


@pytest.fixture(scope="session")
def reference(checkpoint: str) -> Embedder:
    """The yardstick."""
    return Embedder(checkpoint, engine="reference", dtype="float32")


@dataclass
class Recorder:
    """What came in at a server that answers at once."""

    base_url: str = ""
    inputs: list[list[Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    model: str = "tiny"
    under_way: int = 0
    most_under_way: int = 0


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    """A server that returns another vector for another text and records the texts."""
    record = Recorder()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"data": [{"id": record.model, "max_model_len": 2048}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                record.under_way += 1
                record.most_under_way = max(record.most_under_way, record.under_way)
                record.inputs.append(body["input"])
                record.headers.append({name.title(): value for name, value in self.headers.items()})
            time.sleep(0.01)
            with lock:
                record.under_way -= 1
            rows = [
                {
                    "index": i,
                    "embedding": [1.0, zlib.crc32(str(text).encode()) / 2**32] + [0.0] * 126,
                }
                for i, text in enumerate(body["input"])
            ]
            self.answer({"data": rows, "model": record.model})

        def answer(self, body: dict[str, Any]) -> None:
            content = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    record.base_url = f"http://127.0.0.1:{server.server_port}/v1"
    yield record
    server.shutdown()
    server.server_close()
