"""An embeddings server that answers at once, to measure the client alone.

    python benchmarks/loopback.py PORT [SIZE]

It sends prepared bodies in every format of `/v1/embeddings` and computes nothing. A raw `asyncio`
protocol in its own process is faster than every client.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import json
import re
import sys

import numpy as np

try:
    import orjson

    loads = orjson.loads
except ImportError:
    loads = json.loads


@functools.cache
def vectors(count: int, size: int) -> np.ndarray:
    """Return unit rows, float32 (count, size)."""
    rows = np.random.default_rng(count).standard_normal((count, size)).astype("<f4")
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@functools.cache
def answer(count: int, size: int, form: str) -> bytes:
    """Return a complete HTTP response with `count` vectors."""
    rows = vectors(count, size)
    if form == "bytes_only":
        return response(rows.tobytes(), "application/octet-stream")
    cells = [base64.b64encode(row).decode() if form == "base64" else row.tolist() for row in rows]
    data = [{"object": "embedding", "index": i, "embedding": c} for i, c in enumerate(cells)]
    usage = {"prompt_tokens": count, "total_tokens": count}
    body = {"object": "list", "model": "loopback", "data": data, "usage": usage}
    return response(json.dumps(body).encode(), "application/json")


def response(body: bytes, kind: str) -> bytes:
    """Return an HTTP response with this body."""
    head = f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Loopback(asyncio.Protocol):
    """One connection that answers complete requests with prepared responses."""

    size = 1024

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start with an empty buffer."""
        self.transport = transport
        self.buffer = bytearray()

    def data_received(self, data: bytes) -> None:
        """Answer every request that is complete."""
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = bytes(self.buffer[:end])
            length = re.search(rb"(?i)content-length: *(\d+)", head)
            stop = end + 4 + (int(length[1]) if length else 0)
            if len(self.buffer) < stop:
                return
            body = bytes(self.buffer[end + 4 : stop])
            del self.buffer[:stop]
            self.transport.write(self.reply(head, body))

    def reply(self, head: bytes, body: bytes) -> bytes:
        """Return the response to one request."""
        if head.startswith(b"GET"):
            models = {"data": [{"id": "loopback", "root": "loopback", "max_model_len": 32768}]}
            return response(json.dumps(models).encode(), "application/json")
        asked = loads(body)
        count = 1 if isinstance(asked["input"], str) else len(asked["input"])
        return answer(count, self.size, asked.get("encoding_format", "float"))


async def main(port: int, size: int) -> None:
    """Serve until the process ends."""
    Loopback.size = size
    server = await asyncio.get_running_loop().create_server(Loopback, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1024))
