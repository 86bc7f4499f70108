"""Engines, texts, a faulty server and an interpreter for scripts, shared by the core's tests."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from conftest import running_server
from qwen3_embeddings import Embedder

if TYPE_CHECKING:
    from conftest import RunningServer

CODE = 'def f(x):\n    if x:\n\t\treturn {"a": [1, 2]}\n    # done\n'
TEXTS = [
    *("", " ", "\n", "a", "A", "hello", "Hello, world!", "  both sides  ", "\tindented\n\n"),
    *("What is the capital of China?", "Explain gravity", "The capital of China is Beijing."),
    *("word " * 300, "long, long line; " * 100, "x" * 1500, "line\n" * 200, "Query:", "Instruct: "),
    *("中国的首都是哪里？", "北京是中华人民共和国的首都。", "你好，世界！", "数据库索引" * 60),
    *(
        "ما هي عاصمة الصين؟",
        "السلام عليكم ورحمة الله",
        "Привет, мир",
        "日本語のテキスト",
        "한국어 문장",
    ),
    *(
        "🙂",
        "👩‍👩‍👧‍👦 family 🏳️‍🌈",
        "mixed 中文 and English 🙂 text",
        "e\u0301 and \u00e9",
        "\u0958\u0001\u007f",
    ),
    *(CODE, "SELECT *\n  FROM t\n WHERE a <> 'b';", "for (;;) { /* */ }", "\r\nwindows\r\n"),
    *("<|endoftext|>", "before <|endoftext|> after", "<|im_start|>user\nhi<|im_end|>"),
    *(
        "https://example.org/a?b=c&d=%20",
        "1234567890",
        "3.14159e-10",
        "ＦＵＬＬ width",
        "ﬁ ligature",
    ),
    *("same text", "same text", "a" * 3 + " " * 50 + "b"),
]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Return texts that other libraries get wrong; two of them are equal."""
    assert len(TEXTS) >= 40
    return TEXTS


@pytest.fixture(scope="session")
def embedder(checkpoint: str) -> Iterator[Embedder]:
    """vLLM in this process, float32: the session's shared engine."""
    with Embedder(checkpoint, dtype="float32") as shared:
        yield shared


@pytest.fixture(scope="session")
def torch_embedder(checkpoint: str) -> Iterator[Embedder]:
    """PyTorch in this process, float32: the session's shared engine."""
    with Embedder(checkpoint, dtype="float32", engine="torch") as shared:
        yield shared


@pytest.fixture(scope="session")
def reference(checkpoint: str) -> Iterator[Embedder]:
    """sentence-transformers, float32: the yardstick."""
    with Embedder(checkpoint, dtype="float32", engine="reference") as shared:
        yield shared


@pytest.fixture(scope="session")
def remote(server: RunningServer) -> Iterator[Embedder]:
    """Return an embedder of the real vLLM server."""
    with Embedder(base_url=server.base_url, api_key=server.api_key) as shared:
        yield shared


@pytest.fixture(scope="session")
def torch_remote(torch_server: RunningServer) -> Iterator[Embedder]:
    """Return an embedder of the real server over the PyTorch engine."""
    with Embedder(base_url=torch_server.base_url, api_key=torch_server.api_key) as shared:
        yield shared


@pytest.fixture(scope="session")
def any_remote(any_server: RunningServer) -> Iterator[Embedder]:
    """Return an embedder of each kind of server in turn."""
    with Embedder(base_url=any_server.base_url, api_key=any_server.api_key) as shared:
        yield shared


@pytest.fixture(scope="session")
def wrong_server(
    checkpoint: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """A real vLLM server with four faults: tokenizer, activation, Matryoshka, a borrowed name.

    It appends no end token, returns rows of any length and refuses `dimensions`, even its own size.
    """
    folder = tmp_path_factory.mktemp("wrong-server")
    model = Path(shutil.copytree(checkpoint, folder / "checkpoint"))
    tokenizer = json.loads((model / "tokenizer.json").read_text()) | {"post_processor": None}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = model / "tokenizer_config.json"  # Qwen2Tokenizer would put its own parts back
    config.write_text(config.read_text().replace("Qwen2Tokenizer", "PreTrainedTokenizerFast"))
    with running_server(
        str(model),
        folder / "log",
        *("--served-model-name", "tiny", "Qwen/Qwen3-Embedding-0.6B", "--hf-overrides", "{}"),
        *("--pooler-config", '{"use_activation": false}'),
    ) as running:
        yield running


# A server of this process over loopback, for faults that a real one does not produce on demand.


@dataclass(frozen=True)
class Request:
    """A request that a `FaultyServer` received."""

    method: str
    path: str
    headers: Message
    body: dict[str, Any]


class FaultyServer:
    """An OpenAI-compatible server on a loopback port whose answers a test replaces.

    `respond` is called with every request. It returns a status and a body (bytes, or what becomes
    JSON), or None to close the connection without an answer. `embed` is a right answer.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.respond: Callable[[Request], tuple[int, Any] | None] = self.answer
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # it delays the body of an answer by 40 ms

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                parsed = json.loads(body) if body else {}
                request = Request(self.command, self.path, self.headers, parsed)
                outer.requests.append(request)
                answer = outer.respond(request)
                if answer is None:
                    self.close_connection = True
                    return
                status, content = answer
                raw = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            do_POST = do_GET  # noqa: N815

            def log_message(self, *_: Any) -> None:
                """Write nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        self.base_url = f"http://127.0.0.1:{self.port}/v1"
        # shutdown() waits for the next poll, half a second by default
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.01,), daemon=True
        )
        self._thread.start()

    def answer(self, request: Request) -> tuple[int, Any]:
        """Answer the routes of such a server."""
        if request.path.startswith("/v1/models"):
            return 200, {"data": [{"id": "faulty", "max_model_len": 512}]}
        if request.path.startswith("/v1/embeddings"):
            return 200, self.embed(request.body)
        return 404, {"error": {"message": "no such route"}}

    @staticmethod
    def vector(text: str) -> list[float]:
        """Return the vector of a text, 32 dimensions."""
        row = np.random.default_rng(list(text.encode()) or [0]).standard_normal(32)
        return [float(x) for x in (row / np.linalg.norm(row)).astype(np.float32)]

    def embed(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to an embeddings request."""
        rows = [self.vector(str(text)) for text in body["input"]]
        tokens = sum(len(str(text)) + 1 for text in body["input"])
        return {
            "data": [{"index": i, "embedding": row} for i, row in enumerate(rows)],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    @property
    def inputs(self) -> list[list[str]]:
        """The texts of each embeddings request."""
        return [r.body["input"] for r in self.requests if r.path.startswith("/v1/embeddings")]

    def stop(self) -> None:
        """Stop listening and close all connections. May be repeated."""
        if not self._thread.is_alive():
            return
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait a tenth of the usual time before each retry."""
    from qwen3_embeddings.engines.openai import isolation, retry

    usual = retry.backoff
    for module in (isolation, retry):
        monkeypatch.setattr(module, "backoff", lambda attempt: usual(attempt) / 10)


@pytest.fixture
def faulty(short_backoff: None) -> Iterator[FaultyServer]:
    """A server whose faults the test chooses."""
    server = FaultyServer()
    yield server
    server.stop()


# What is done to a process is done to one of its own.

FORKING = """
    import json, os, signal, sys
    import vllm.v1.engine.core_client, vllm.v1.worker.cpu_worker

    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell ran us with &
    for line in sys.stdin:
        job = json.loads(line)
        if os.fork():
            continue
        os.chdir(job["folder"])
        if script := os.fork():  # here one waits for the script
            code = os.waitstatus_to_exitcode(os.waitpid(script, 0)[1])
            with open("ending", "w") as file:
                file.write(str(code))
            os.rename("ending", "ended")
            os._exit(0)
        break
    else:
        sys.exit()
    os.setsid()
    with open("session", "w") as file:
        file.write(str(os.getpid()))
    for stream, name in (0, os.devnull), (1, "stdout"), (2, "stderr"):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), stream)
    os.environ |= job["environment"]
    sys.argv[1:] = job["arguments"]
    exec(job["script"])
"""


@dataclass(frozen=True)
class Ended:
    """A script that has ended: its exit code, its output, and processes it left behind."""

    returncode: int
    stdout: str
    stderr: str
    left: list[int]


RunScript = Callable[..., Ended]


@pytest.fixture(scope="session")
def run_script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunScript]:
    """Run scripts in interpreters that have imported vLLM, which is most of a start.

    They are forks of one that did, and end as every interpreter does. A script that hangs fails,
    and what it started ends with it.
    """
    base = tmp_path_factory.mktemp("scripts")
    numbers = itertools.count()
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(FORKING)]
    with (base / "log").open("w") as log:
        forking = subprocess.Popen(
            command, stdin=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )

    orders = forking.stdin
    assert orders is not None

    def run(script: str, *arguments: str, seconds: float = 600, **environment: str) -> Ended:
        folder = base / str(next(numbers))
        folder.mkdir()
        job = {"folder": str(folder), "script": textwrap.dedent(script)}
        job |= {"arguments": arguments, "environment": environment}
        orders.write(json.dumps(job) + "\n")  # in one piece: threads call
        orders.flush()
        deadline = time.monotonic() + seconds
        try:
            while not (folder / "ended").exists() and time.monotonic() < deadline:
                assert forking.poll() is None, (base / "log").read_text()
                time.sleep(0.05)
        finally:
            left = end_session(folder / "session")
        out, err = ((folder / name).read_text() for name in ("stdout", "stderr"))
        assert (folder / "ended").exists(), f"it hangs: {out}\n{err[-3000:]}"
        return Ended(int((folder / "ended").read_text()), out, err, left)

    yield run
    orders.close()
    forking.kill()  # it would only take its modules down
    forking.wait()


def end_session(leader: Path) -> list[int]:
    """Kill a session whose leader's id is in a file. Return processes that did not end in time."""
    if not leader.exists():
        return []
    session = int(leader.read_text())
    deadline = time.monotonic() + 5
    while (left := session_members(session)) and time.monotonic() < deadline:
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)
    return left


def session_members(session: int) -> list[int]:
    """Return the living processes of a session."""
    members = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            if int(fields[3]) == session and fields[0] != "Z":
                members.append(int(entry.name))
    return members
