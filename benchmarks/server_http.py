"""Measure the server of ``serve --engine torch`` without a model: HTTP, tokenizer and scheduling.

    python benchmarks/server_http.py [--tokenizer MODEL] [--engines null stepping] [--size 1024]

"null" answers fixed vectors on the event loop. "stepping" tokenizes, and lets the engine's thread
collect fixed vectors, so everything but the model is measured. The client sends prepared requests.
Seconds of the server's CPU count, in its main thread (the event loop) and in all threads: they
depend less on other load than rates do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from qwen3_embeddings.engines.base import Prompt, Served, Usage
from qwen3_embeddings.engines.scheduling import Limits
from qwen3_embeddings.engines.stepping import SteppingEngine
from qwen3_embeddings.testing import write_checkpoint
from qwen3_embeddings.tokenizer import load_tokenizer
from qwen3_embeddings.vectors import Vectors

CASES = [(64, 1), (256, 1), (4, 64), (4, 256)]  # callers, texts per request
FORMS = ["float", "base64", "bytes_only"]
WORDS = ("rivers", "carry", "sand", "and", "water", "from", "high", "mountains", "to", "the", "sea")
TICKS = os.sysconf("SC_CLK_TCK")


class NullEngine:
    """Answers the same vectors at once."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._rows = vectors(2048, served.native)

    async def start(self) -> Served:
        """Return what it serves."""
        return self._served

    async def embed(
        self, prompts: list[Prompt], dimensions: int | None, urgent: bool, usage: Usage
    ) -> Vectors:
        """Return fixed vectors."""
        usage.add(len(prompts), len(prompts))
        return self._rows[: len(prompts), :dimensions]

    async def close(self) -> None:
        """Do nothing."""


class NullCore:
    """A core that answers each text with the same vector."""

    limits = Limits(8192, 256, 1, 8192)
    context = 32768

    def __init__(self, size: int) -> None:
        self._rows = vectors(self.limits.texts, size)
        self._waiting: list[str] = []

    def add(self, request_id: str, ids: list[int]) -> None:
        """Add a text."""
        self._waiting.append(request_id)

    def abort(self, request_ids: list[str]) -> None:
        """Do nothing."""

    def wait(self) -> None:
        """Do nothing."""

    def step(self) -> tuple[list[str], Vectors]:
        """Answer all texts."""
        waiting, self._waiting = self._waiting, []
        return waiting, self._rows[: len(waiting)]

    def prepare(self) -> bool:
        """Do nothing."""
        return False

    def shut_down(self) -> None:
        """Do nothing."""


def engine(kind: str, tokenizer: str, size: int) -> Any:
    """Return an engine without a model."""
    served = Served("torch", "null", size, size, 32768)
    if kind == "null":
        return NullEngine(served)

    class Backend:
        NAME = "null"

        @staticmethod
        def load() -> None:
            """Do nothing."""

        @staticmethod
        def start(*_: Any) -> Any:
            return NullCore(size), load_tokenizer(tokenizer), served

    class Engine(SteppingEngine):
        backend = Backend  # type: ignore[assignment]

    return Engine("null", "float32", None)


def vectors(count: int, size: int) -> Vectors:
    """Return unit rows (count, size)."""
    rows = np.random.default_rng(0).standard_normal((count, size)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def request(texts: int, form: str, words: int) -> bytes:
    """Return a complete HTTP request."""
    inputs = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(words)) for i in range(texts)]
    body = json.dumps({"model": "null", "input": inputs, "encoding_format": form}).encode()
    head = "POST /v1/embeddings HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


async def caller(port: int, sent: bytes, until: float) -> int:
    """Send one request after the other; return their number."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    count = 0
    while time.monotonic() < until:
        writer.write(sent)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if not head.startswith(b"http/1.1 200"):
            raise RuntimeError(head)
        await reader.readexactly(int(head.partition(b"content-length: ")[2].split(b"\r")[0]))
        count += 1
    writer.close()
    return count


def cpu(pid: int) -> tuple[float, float]:
    """Return the CPU seconds of a process' main thread, and of all its threads."""
    spent = []
    for path in (f"/proc/{pid}/task/{pid}/stat", f"/proc/{pid}/stat"):
        with open(path) as file:
            fields = file.read().rpartition(")")[2].split()
        spent.append((int(fields[11]) + int(fields[12])) / TICKS)
    return spent[0], spent[1]


async def measure(pid: int, port: int, callers: int, sent: bytes, seconds: float) -> list[float]:
    """Return requests per second, and the CPU seconds of the server per request."""
    await caller(port, sent, time.monotonic() + 0.3)
    before, started = cpu(pid), time.monotonic()
    counts = await asyncio.gather(*(caller(port, sent, started + seconds) for _ in range(callers)))
    passed, after, total = time.monotonic() - started, cpu(pid), sum(counts)
    return [total / passed, *((b - a) / total for a, b in zip(before, after, strict=True))]


def serve(kind: str, tokenizer: str, size: int, port: int) -> None:
    """Run the server."""
    from qwen3_embeddings.server.app import Server
    from qwen3_embeddings.server.run import run

    chosen = engine(kind, tokenizer, size)
    run(chosen, lambda served: Server(chosen, served, ["null"]), "127.0.0.1", port)


def main(arguments: Sequence[str]) -> None:
    """Measure each engine, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    option = parser.add_argument
    option("--tokenizer", help="hub id or folder (a tiny one)")
    option("--engines", nargs="+", choices=["null", "stepping"], default=["null", "stepping"])
    option("--size", type=int, default=1024, help="dimensions of a vector (1024)")
    option("--words", type=int, default=80, help="words of a text (80)")
    option("--seconds", type=float, default=3.0, help="seconds per case (3)")
    option("--port", type=int, default=8191)
    option("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(options.serve, options.tokenizer, options.size, options.port)
        return
    print("engine    callers  texts  format      texts/s   µs/text: loop   all threads")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = options.tokenizer or str(write_checkpoint(folder))
        for kind in options.engines:
            command = [sys.executable, __file__, "--serve", kind, "--tokenizer", tokenizer]
            command += ["--size", str(options.size), "--port", str(options.port)]
            with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
                assert process.stderr is not None
                if "listening" not in (said := process.stderr.readline()):
                    raise RuntimeError(said + process.stderr.read())
                for callers, texts in CASES:
                    for form in FORMS:
                        sent = request(texts, form, options.words)
                        rate, loop, all_threads = asyncio.run(
                            measure(process.pid, options.port, callers, sent, options.seconds)
                        )
                        print(
                            f"{kind:8} {callers:8} {texts:6}  {form:10} {rate * texts:8,.0f}   "
                            f"{1e6 * loop / texts:13,.0f}   {1e6 * all_threads / texts:11,.0f}",
                            flush=True,
                        )
                process.terminate()


if __name__ == "__main__":
    main(sys.argv[1:])
