"""Checks of the server itself: its wire formats and its authentication."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from qwen3_embeddings.cli.serve import LOOPBACK
from qwen3_embeddings.doctor.compare import distance, graded
from qwen3_embeddings.doctor.report import Finding
from qwen3_embeddings.doctor.subject import TEXTS, CannotTellError, Subject
from qwen3_embeddings.engines.openai import wire
from qwen3_embeddings.engines.openai.client import ServerEngine
from qwen3_embeddings.errors import ServerRefusedError
from qwen3_embeddings.vectors import Vectors


async def wire_formats(subject: Subject) -> Finding:
    """Check that all wire formats of the server carry the same values."""
    engine = _server(subject)
    spoken: dict[str, Vectors] = {}
    apart = 0.0
    for asked in reversed(wire.FORMATS):  # plain floats first: the others are compared with them
        body = {"model": subject.served.model, "input": list(TEXTS[:4])} | wire.ask(asked)
        try:
            answer = await engine.connection.post(engine.base_url + "/embeddings", body)
        except ServerRefusedError:
            continue
        kind = answer.headers.get("content-type", "")
        form, rows, _ = wire.read(answer.content, kind, 4)
        spoken.setdefault(form, rows)
        first = next(iter(spoken.values()))
        apart = max(apart, distance(rows, first) if rows.shape == first.shape else 2.0)
        status = graded(apart)
        if status != "ok":
            return Finding(
                "wire formats",
                status,
                f"encoding_format={asked} and {next(iter(spoken))} differ by 1-cos = {apart:.2g}",
                "Clients of the same server get vectors that do not match each other.",
                "Remove whatever alters response bodies between server and client; vLLM: "
                "embed_dtype float32, endianness little.",
                apart,
            )
    said = f"{', '.join(spoken)} carry the same values"
    if "bytes_only" not in spoken and "base64" not in spoken:
        said += "; none is compact, so responses are large and slow to parse"
    return Finding("wire formats", "ok", said, measured=apart)


async def authentication(subject: Subject) -> Finding:
    """Check that no route answers without the key, unless the server listens on loopback only."""
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
        if await engine.connection.answers_without_key(url, body)
    ]
    check = "authentication"
    local = urlsplit(engine.base_url).hostname in LOOPBACK
    if not answering:
        return Finding(check, "ok", f"none of {len(routes)} routes answers without the key")
    if not engine.connection.has_credentials and local:
        return Finding(check, "ok", "no key is required, but the server listens on loopback only")
    return Finding(
        check,
        "warning",
        f"these routes answer without a key: {', '.join(answering)}",
        "Anyone who can reach the port can embed texts, fill the queue, or read the metrics.",
        "Put a reverse proxy in front that forwards only /v1 (and, from trusted hosts, /tokenize "
        "and /version), because vLLM's --api-key protects only /v1 and /v2. If no key is set, set "
        "QWEN3_EMBEDDINGS_API_KEY for qwen3-embeddings serve, or bind to 127.0.0.1.",
    )


def _server(subject: Subject) -> ServerEngine:
    if not isinstance(subject.engine, ServerEngine):
        raise CannotTellError("the engine runs in this process, not behind a server")
    return subject.engine
