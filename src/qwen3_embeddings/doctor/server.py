"""The checks of a server as such: what it speaks, and whom it answers."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from qwen3_embeddings.cli.serve import LOOPBACK
from qwen3_embeddings.doctor.compare import IDENTICAL, distance
from qwen3_embeddings.doctor.report import Finding
from qwen3_embeddings.doctor.subject import TEXTS, CannotTellError, Subject
from qwen3_embeddings.engines.openai import wire
from qwen3_embeddings.engines.openai.client import ServerEngine
from qwen3_embeddings.errors import ServerRefusedError
from qwen3_embeddings.vectors import Vectors


async def wire_formats(subject: Subject) -> Finding:
    """Every wire format the server speaks carries the same numbers."""
    engine = _server(subject)
    spoken: dict[str, Vectors] = {}
    for asked in reversed(wire.FORMATS):  # the plainest first, to compare with
        body = {"model": subject.served.model, "input": list(TEXTS[:4])} | wire.ask(asked)
        try:
            answer = await engine.connection.post(engine.base_url + "/embeddings", body)
        except ServerRefusedError:
            continue
        kind = answer.headers.get("content-type", "")
        form, rows = wire.read(answer.content, kind, 4)
        spoken.setdefault(form, rows)
        first = next(iter(spoken.values()))
        if rows.shape != first.shape or distance(rows, first) > IDENTICAL:
            return Finding(
                "wire formats",
                "failure",
                f"encoding_format={asked} and {next(iter(spoken))} carry different numbers",
                "Clients of the same server get vectors that do not fit each other.",
                "Take out what alters bodies on the way; vLLM: embed_dtype float32, endianness "
                "little.",
            )
    said = f"{', '.join(spoken)} carry the same numbers"
    if "bytes_only" not in spoken and "base64" not in spoken:
        said += "; no compact one, so answers are large and slow to read"
    return Finding("wire formats", "ok", said)


async def authentication(subject: Subject) -> Finding:
    """No route answers without the key; where none is wanted, only loopback answers."""
    engine = _server(subject)
    name = subject.served.model
    root = engine.base_url.removesuffix("/v1")
    routes: dict[str, dict[str, Any] | None] = {
        f"{engine.base_url}/embeddings": {"model": name, "input": "probe"},
        f"{root}/v2/embed": {"model": name, "texts": ["probe"]},
        f"{root}/invocations": {"model": name, "input": "probe"},
        f"{root}/pooling": {"model": name, "input": "probe"},
        f"{root}/score": {"model": name, "text_1": "probe", "text_2": "probe"},
        f"{root}/embedding": {"content": "probe"},
        f"{root}/embed": {"inputs": "probe"},
        f"{root}/tokenize": {"model": name, "prompt": "probe", "content": "probe"},
        f"{root}/metrics": None,
    }
    answering = [
        urlsplit(url).path
        for url, body in routes.items()
        if await engine.connection.answers_strangers(url, body)
    ]
    check = "authentication"
    local = urlsplit(engine.base_url).hostname in LOOPBACK
    if not answering:
        return Finding(check, "ok", f"none of {len(routes)} routes answers without the key")
    if not engine.connection.has_credentials and local:
        return Finding(check, "ok", "no key is wanted, on loopback")
    return Finding(
        check,
        "warning",
        f"answer without a key: {', '.join(answering)}",
        "Whoever reaches the port can use them: embed, fill the queue, or read what they tell.",
        "Let only the routes under /v1 (and /tokenize and /version from hosts you trust) through "
        "a reverse proxy; vLLM's --api-key guards /v1 and /v2 alone. Without a key: set "
        "QWEN3_EMBEDDINGS_API_KEY where qwen3-embeddings serve starts, or bind to 127.0.0.1.",
    )


def _server(subject: Subject) -> ServerEngine:
    if not isinstance(subject.engine, ServerEngine):
        raise CannotTellError("the engine runs in this process")
    return subject.engine
