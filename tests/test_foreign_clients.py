"""HTTP clients of the caller's: the openai package's and httpx's."""

from __future__ import annotations

import asyncio
import contextvars
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import httpx
import httpx2
import numpy as np
import openai
import pytest

from qwen3_embeddings import (
    AuthenticationError,
    ConfigurationError,
    ServerBusyError,
    ServerConnectionError,
    ServerTimeoutError,
    TextRefusedError,
    event_loop,
)
from qwen3_embeddings.engines.base import Usage
from qwen3_embeddings.engines.openai.client import ServerEngine

if TYPE_CHECKING:
    from tests.conftest import FaultyServer, Request

KEY = "sk-of-the-clients-owner"


def openai_client(kind: str, faulty: FaultyServer, **arguments: Any) -> Any:
    """A client of the openai package, with a header of its own."""
    usual = {"api_key": KEY, "default_headers": {"X-Team": "search"}, "max_retries": 7}
    if "azure" in kind:
        azure = openai.AsyncAzureOpenAI if "async" in kind else openai.AzureOpenAI
        root = faulty.base_url.removesuffix("/v1")
        return azure(azure_endpoint=root, api_version="2024-10-21", **usual | arguments)
    plain = openai.AsyncOpenAI if "async" in kind else openai.OpenAI
    return plain(base_url=faulty.base_url, **usual | arguments)


CLIENTS: dict[str, Callable[[FaultyServer], dict[str, Any]]] = {
    **{
        kind: lambda faulty, kind=kind: {"client": openai_client(kind, faulty)}  # type: ignore[misc]
        for kind in ("openai", "async openai")
    },
    "httpx": lambda faulty: {"http_client": httpx.Client(), "base_url": faulty.base_url},
    "async httpx": lambda faulty: {
        "http_client": httpx.AsyncClient(),
        "base_url": faulty.base_url,
    },
    "httpx2": lambda faulty: {"http_client": httpx2.Client(base_url=faulty.base_url)},
}


@pytest.fixture
async def make() -> AsyncIterator[Callable[..., ServerEngine]]:
    """Make engines. Close them, and the clients that they leave open."""
    made: list[ServerEngine] = []
    clients: list[Any] = []

    def engine(**arguments: Any) -> ServerEngine:
        clients.extend(arguments[n] for n in ("client", "http_client") if n in arguments)
        made.append(ServerEngine(**{"max_retries": 1, "model": "faulty"} | arguments))
        return made[-1]

    yield engine
    for one in made:
        await one.close()
    for client in clients:
        await shut(client)


async def shut(client: Any) -> None:
    """Close a client of any kind."""
    closing = client.aclose() if hasattr(client, "aclose") else client.close()
    if closing is not None:
        await closing


@pytest.mark.parametrize("kind", CLIENTS)
async def test_embed_through_a_client_of_the_caller_returns_the_same_vectors(
    faulty: FaultyServer, make: Callable[..., ServerEngine], kind: str
) -> None:
    engine = make(**CLIENTS[kind](faulty), default_headers={"X-Mine": "1"})
    usage = Usage()
    rows = await engine.embed(["a", "b\n"], None, False, usage)
    np.testing.assert_allclose(rows, [faulty.vector("a"), faulty.vector("b\n")], atol=1e-6)
    assert (usage.texts, usage.tokens, usage.uncounted) == (2, 5, 0)
    request = faulty.requests[-1]
    assert request.headers["x-mine"] == "1"
    assert request.body["encoding_format"] in {"bytes_only", "float"}
    if "openai" in kind:
        assert request.headers["authorization"] == f"Bearer {KEY}"
        assert request.headers["x-team"] == "search"


@pytest.mark.parametrize("kind", ["azure", "async azure"])
async def test_embed_azure_client_sends_deployment_version_and_key(
    faulty: FaultyServer, make: Callable[..., ServerEngine], kind: str
) -> None:
    faulty.respond = lambda request: (200, faulty.embed(request.body))
    engine = make(client=openai_client(kind, faulty), model="my-deployment")
    faulty.respond = lambda r: (200, faulty.embed(r.body)) if r.body else (404, {})
    await engine.embed(["a"], None, False)
    request = faulty.requests[-1]
    assert request.path == "/openai/deployments/my-deployment/embeddings?api-version=2024-10-21"
    assert request.headers["api-key"] == KEY


@pytest.mark.parametrize("kind", CLIENTS)
async def test_embed_through_a_client_of_the_caller_retries_in_one_layer(
    faulty: FaultyServer, make: Callable[..., ServerEngine], kind: str
) -> None:
    engine = make(**CLIENTS[kind](faulty))
    await engine.start()
    faulty.requests.clear()
    faulty.respond = lambda _: (503, {"error": {"message": "loading"}})
    with pytest.raises(ServerBusyError, match="loading"):
        await engine.embed(["a"], None, True)
    assert len(faulty.requests) == 3, "two attempts and a harmless text"


@pytest.mark.parametrize("kind", CLIENTS)
async def test_embed_through_a_client_of_the_caller_isolates_and_types_errors(
    faulty: FaultyServer, make: Callable[..., ServerEngine], kind: str
) -> None:
    engine = make(**CLIENTS[kind](faulty), restart_timeout=0, max_retries=0)
    await engine.start()

    def respond(request: Request) -> Any:
        return None if "bad" in request.body["input"] else faulty.answer(request)

    faulty.respond = respond
    with pytest.raises(TextRefusedError) as caught:
        await engine.embed(["a", "bad", "c"], None, False)
    assert caught.value.positions == (1,)
    faulty.respond = lambda _: (401, {"error": {"message": f"wrong key {KEY}"}})
    with pytest.raises(AuthenticationError) as refused:
        await engine.embed(["a"], None, False)
    if "openai" in kind:
        assert KEY not in str(refused.value)
    faulty.respond = lambda _: None
    with pytest.raises(ServerConnectionError, match="broke"):
        await engine.embed(["a"], None, True)


@pytest.mark.parametrize("kind", CLIENTS)
async def test_start_through_a_client_of_the_caller_keeps_our_timeout(
    faulty: FaultyServer, make: Callable[..., ServerEngine], kind: str
) -> None:
    engine = make(**CLIENTS[kind](faulty), timeout=0.3, max_retries=0)
    over = threading.Event()
    faulty.respond = lambda _: over.wait(5) and None
    with pytest.raises(ServerTimeoutError):
        await engine.start()
    over.set()


@pytest.mark.parametrize("kind", CLIENTS)
async def test_close_leaves_the_callers_client_open(faulty: FaultyServer, kind: str) -> None:
    arguments = CLIENTS[kind](faulty)
    engine = ServerEngine(**arguments, model="faulty")
    await engine.embed(["a"], None, False)
    await engine.close()
    client = arguments.get("client") or arguments["http_client"]
    closed = client.is_closed() if "client" in arguments else client.is_closed
    assert not closed
    await shut(client)


async def test_embed_instrumentation_of_the_openai_package_sees_the_call(
    faulty: FaultyServer, make: Callable[..., ServerEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tracing packages wrap this method, and httpx's hooks are the client's own."""
    seen: list[str] = []
    create = openai.resources.Embeddings.create

    def traced(self: Any, **arguments: Any) -> Any:
        seen.append(f"{arguments['model']} {current.get(None)}")
        return create(self, **arguments)

    current: contextvars.ContextVar[str] = contextvars.ContextVar("current")
    monkeypatch.setattr(openai.resources.Embeddings, "create", traced)
    hooks = {"request": [lambda request: seen.append(str(request.url.path))]}
    http_client = httpx.Client(event_hooks=hooks)
    engine = make(client=openai_client("openai", faulty, http_client=http_client))
    await engine.start()
    seen.clear()
    current.set("span")
    await engine.embed(["a"], None, False)
    assert seen == ["faulty span", "/v1/embeddings"]


async def test_embed_many_calls_through_a_sync_client_run_at_once(
    faulty: FaultyServer, make: Callable[..., ServerEngine]
) -> None:
    engine = make(client=openai_client("openai", faulty), max_concurrency=8, batch_size=1)
    await engine.start()
    together = threading.Barrier(8, timeout=20)

    def respond(request: Request) -> Any:
        together.wait()
        return faulty.answer(request)

    faulty.respond = respond
    await asyncio.gather(*(engine.embed([f"{i}"], None, False) for i in range(8)))


@pytest.mark.parametrize("kind", ["async openai", "async httpx"])
def test_embed_async_client_in_use_on_another_loop_says_so(faulty: FaultyServer, kind: str) -> None:
    """The connections of an async client belong to the loop that opened them.

    An answer that is there before it is awaited would be read all the same, so this one is late.
    """

    def respond(request: Request) -> Any:
        time.sleep(0.1)
        return faulty.answer(request)

    async def own_use() -> None:
        arguments = CLIENTS[kind](faulty)
        client = arguments.get("client") or arguments["http_client"]
        await client.get(
            faulty.base_url + "/models", **({"cast_to": object} if "openai" in kind else {})
        )
        engine = ServerEngine(**arguments, model="faulty", max_retries=0, timeout=5)
        faulty.respond = respond
        try:
            with pytest.raises(ConfigurationError, match="another event loop"):
                await event_loop.wait(engine.embed(["a"], None, False))
        finally:
            await event_loop.wait(engine.close())
            await shut(client)

    asyncio.run(own_use())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"client": object()}, "openai.OpenAI"),
        ({"client": httpx.Client()}, "http_client"),
        ({"http_client": object(), "base_url": "http://h/v1"}, "httpx.Client"),
        ({"http_client": httpx.Client()}, "base_url"),
        ({}, "base_url"),
    ],
)
def test_server_engine_unusable_client_is_a_configuration_error(
    arguments: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        ServerEngine(**arguments)


def test_server_engine_client_and_another_base_url_contradict(faulty: FaultyServer) -> None:
    client = openai_client("openai", faulty)
    with pytest.raises(ConfigurationError, match="Leave base_url out"):
        ServerEngine("http://other/v1", client=client)
    with pytest.raises(ConfigurationError, match="exclude each other"):
        ServerEngine(client=client, http_client=httpx.Client())
    assert ServerEngine(faulty.base_url, client=client).base_url == faulty.base_url


FORK = """
    import os, sys
    import httpx
    from qwen3_embeddings import ConfigurationError, Embedder
    client = httpx.Client()
    engine = Embedder(base_url="http://h/v1", http_client=client)._lease
    assert engine.engine
    pid = os.fork()
    if not pid:
        try:
            engine.engine
        except ConfigurationError as error:
            os._exit(7 if "forked" in str(error) else 1)
        os._exit(2)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_forked_child_refuses_the_parents_client() -> None:
    """Both processes would read each other's answers from its connections."""
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(FORK)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.returncode) == ("7\n", 0), done.stderr


# Tracing and token counts.

span: contextvars.ContextVar[str] = contextvars.ContextVar("span", default="none")


class Noting(httpx.Client):
    """An httpx client that notes the context of each embeddings request."""

    seen: list[str]

    def request(self, method: str, url: Any, **arguments: Any) -> httpx.Response:  # type: ignore[override]
        if str(url).endswith("/embeddings"):
            self.seen.append(span.get())
        return super().request(method, url, **arguments)


async def test_embed_shared_request_runs_in_no_callers_context(
    faulty: FaultyServer, make: Callable[..., ServerEngine]
) -> None:
    client = Noting()
    client.seen = []
    engine = make(http_client=client, base_url=faulty.base_url)

    async def call(name: str) -> None:
        span.set(name)
        await engine.embed([name], None, True)

    await asyncio.create_task(call("first"))
    assert client.seen[-1] == "first", "a request of one caller is part of its trace"
    assert client.seen[0] == "none", "the start serves all callers"
    client.seen.clear()
    await asyncio.gather(*(asyncio.create_task(call(f"caller {i}")) for i in range(4)))
    assert max(map(len, faulty.inputs)) == 4, "they did not share a request"
    assert client.seen == ["none"]


async def test_embed_usage_of_shared_requests_adds_up(
    faulty: FaultyServer, make: Callable[..., ServerEngine]
) -> None:
    engine = make(base_url=faulty.base_url)
    await engine.start()
    faulty.requests.clear()
    usages = [Usage() for _ in range(4)]
    texts = ["a", "bb", "ccc" * 50, "dd"]
    calls = (engine.embed([t], None, True, u) for t, u in zip(texts, usages, strict=True))
    await asyncio.gather(*calls)
    assert len(faulty.inputs) == 1
    assert sum(usage.tokens for usage in usages) == sum(len(text) + 1 for text in texts)
    assert [usage.texts for usage in usages] == [1, 1, 1, 1]
    assert usages[2].tokens > usages[1].tokens > 0


async def test_embed_usage_without_a_count_is_uncounted(
    faulty: FaultyServer, make: Callable[..., ServerEngine]
) -> None:
    def respond(request: Request) -> Any:
        status, answer = faulty.answer(request)
        answer.pop("usage", None)
        return status, answer

    faulty.respond = respond
    engine = make(base_url=faulty.base_url)
    usage = Usage()
    await engine.embed(["a", [1, 2, 3]], None, False, usage)
    assert (usage.texts, usage.tokens, usage.uncounted) == (2, 3, 1), "ids are counted here"


async def test_embed_usage_counts_what_isolation_computed(
    faulty: FaultyServer, make: Callable[..., ServerEngine]
) -> None:
    engine = make(base_url=faulty.base_url, max_retries=0)
    await engine.start()

    def respond(request: Request) -> Any:
        bad = "bad" in request.body["input"]
        return (500, {}) if bad else faulty.answer(request)

    faulty.respond = respond
    usage = Usage()
    with pytest.raises(TextRefusedError):
        await engine.embed(["a", "bad", "c", "d"], None, False, usage)
    assert (usage.texts, usage.tokens) == (3, 6)
