"""Throughput through a server that answers 429 to requests it does not accept.

    python benchmarks/limits.py [SECONDS]

The server runs in a process of its own. It sleeps 20 ms per request and 0.5 ms per text, so the
figures depend little on the machine. Each scenario prints documents and queries per second. It also
prints the 99th percentile of a query's time, the share of refused requests, and failed calls.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import sys
import time
from typing import Any

import numpy as np
from loopback import Loopback, answer, loads, response

from qwen3_embeddings import Embedder, Qwen3EmbeddingsError

PORT = 8731
REFUSAL = response(b'{"error": {"message": "too many requests"}}', "application/json").replace(
    b"200 OK", b"429 Too Many Requests"
)


class Limited(Loopback):
    """A connection of a server with a limit of requests in flight, at random, or per second."""

    in_flight = accepted = refused = 0
    limit, chance, rate = 1000, 0.0, 0.0
    tokens, moment = 0.0, 0.0

    @classmethod
    def accepts(cls) -> bool:
        """Whether the next request is accepted."""
        if cls.rate:
            now = time.monotonic()
            cls.tokens = min(cls.rate / 10, cls.tokens + (now - cls.moment) * cls.rate)
            cls.moment = now
            if cls.tokens < 1:
                return False
            cls.tokens -= 1
        return cls.in_flight < cls.limit and random.random() >= cls.chance

    def reply(self, head: bytes, body: bytes) -> bytes:
        """Answer later, or refuse at once."""
        if head.startswith(b"GET /set"):
            kind, value = head.split()[1].decode().split("/")[2:]
            Limited.limit, Limited.chance, Limited.rate = 1000, 0.0, 0.0
            setattr(Limited, kind, float(value))
            counts = f'{{"accepted": {Limited.accepted}, "refused": {Limited.refused}}}'
            Limited.accepted = Limited.refused = 0
            return response(counts.encode(), "application/json")
        if head.startswith(b"GET"):
            return super().reply(head, body)
        if not Limited.accepts():
            Limited.refused += 1
            return REFUSAL
        Limited.accepted += 1
        Limited.in_flight += 1
        asked = loads(body)
        count = len(asked["input"])
        form = asked.get("encoding_format", "float")
        asyncio.get_running_loop().call_later(0.02 + 0.0005 * count, self.finish, count, form)
        return b""

    def finish(self, count: int, form: str) -> None:
        """Send an accepted request's answer."""
        Limited.in_flight -= 1
        self.transport.write(answer(count, self.size, form))


def serve() -> None:
    """Serve until the process is ended."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Limited, "127.0.0.1", PORT)
        await server.serve_forever()

    asyncio.run(main())


async def documents(embedder: Embedder, until: float, done: dict[str, Any]) -> None:
    """Embed documents until a moment, 512 a call."""
    while time.monotonic() < until:
        try:
            done["documents"] += len(await embedder.aencode_document(["text"] * 512))
        except Qwen3EmbeddingsError as error:
            done["failed"] += 1
            done["documents"] += len(error.computed.positions) if error.computed else 0


async def queries(embedder: Embedder, until: float, done: dict[str, Any]) -> None:
    """Embed one query after the other until a moment."""
    while time.monotonic() < until:
        begun = time.monotonic()
        try:
            await embedder.aencode_query(["text"])
            done["times"].append(time.monotonic() - begun)
        except Qwen3EmbeddingsError:
            done["failed"] += 1


async def scenario(kind: str, value: float, size: int, callers: tuple[int, int], s: float) -> str:
    """Run one scenario with so many callers of documents and queries."""
    import httpx

    def switch() -> dict[str, int]:
        return httpx.get(f"http://127.0.0.1:{PORT}/set/{kind}/{value}").json()

    with Embedder(base_url=f"http://127.0.0.1:{PORT}/v1", batch_size=size) as embedder:
        await embedder.astart()
        switch()
        done: dict[str, Any] = {"documents": 0, "failed": 0, "times": []}
        until = time.monotonic() + s
        begun = time.monotonic()
        work = [documents(embedder, until, done) for _ in range(callers[0])]
        work += [queries(embedder, until, done) for _ in range(callers[1])]
        await asyncio.gather(*work)
        took = time.monotonic() - begun
        counts = switch()
    sent = counts["accepted"] + counts["refused"]
    late = 1000 * np.percentile(done["times"], 99) if done["times"] else 0
    return (
        f"{kind} {value:g}, {callers[0]} + {callers[1]} callers: "
        f"{done['documents'] / took:.0f} documents/s, {len(done['times']) / took:.0f} queries/s, "
        f"p99 {late:.0f} ms, refused {100 * counts['refused'] / max(sent, 1):.0f} %, "
        f"failed {done['failed']}"
    )


async def main(seconds: float) -> None:
    """Run all scenarios."""
    for value in (1000, 8, 4, 2, 1):
        print(await scenario("limit", value, 8, (1, 0), seconds), flush=True)
    for chance in (0.01, 0.05, 0.2):
        print(await scenario("chance", chance, 8, (1, 0), seconds), flush=True)
    print(await scenario("rate", 50, 8, (1, 0), seconds), flush=True)
    for value in (8, 2):
        print(await scenario("limit", value, 8, (0, 64), seconds), flush=True)
    for value in (8, 4, 2, 1):
        print(await scenario("limit", value, 8, (1, 4), seconds), flush=True)


if __name__ == "__main__":
    process = multiprocessing.Process(target=serve, daemon=True)
    process.start()
    time.sleep(1)
    asyncio.run(main(float(sys.argv[1]) if len(sys.argv) > 1 else 5))
    process.kill()
