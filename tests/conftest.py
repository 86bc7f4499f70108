"""The engines, the texts and the interpreter for scripts that the core's tests share."""

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
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

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
    """Texts that go wrong elsewhere; two of them are equal."""
    assert len(TEXTS) >= 40
    return TEXTS


@pytest.fixture(scope="session")
def embedder(checkpoint: str) -> Iterator[Embedder]:
    """vLLM in this process, float32: the session's shared engine."""
    with Embedder(checkpoint, dtype="float32") as shared:
        yield shared


@pytest.fixture(scope="session")
def reference(checkpoint: str) -> Iterator[Embedder]:
    """sentence-transformers, float32: the yardstick."""
    with Embedder(checkpoint, dtype="float32", engine="reference") as shared:
        yield shared


@pytest.fixture(scope="session")
def remote(server: RunningServer) -> Iterator[Embedder]:
    """The real vLLM server."""
    with Embedder(base_url=server.base_url, api_key=server.api_key) as shared:
        yield shared


@pytest.fixture(scope="session")
def wrong_server(
    checkpoint: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """A real vLLM server with four faults: tokenizer, activation, Matryoshka, a borrowed name.

    It appends no end token, gives rows of any length and refuses `dimensions`, even its own size.
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
    """A script that has ended: its exit code, what it wrote, and processes it left behind."""

    returncode: int
    stdout: str
    stderr: str
    left: list[int]


RunScript = Callable[..., Ended]


@pytest.fixture(scope="session")
def run_script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunScript]:
    """Runs scripts in interpreters that have imported vLLM, which takes most of a start.

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
    """Kill a session whose leader's number is in a file; who did not end by himself in time."""
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
    """Living processes of a session, which its first process leads."""
    members = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            if int(fields[3]) == session and fields[0] != "Z":
                members.append(int(entry.name))
    return members
