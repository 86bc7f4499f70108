"""Start the server, and stop it on a signal."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterable
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from qwen3_embeddings.engines.base import Engine, Served
from qwen3_embeddings.errors import ConfigurationError
from qwen3_embeddings.server.app import Server

STOP_SECONDS = 20
"""How long requests in progress may last after the first signal."""
WRITE_SECONDS = 2
"""How long the connections may then take to send what was written. aiohttp waits that long twice:
before and after it ends what a request may still read."""
CLOSE_SECONDS = 10
"""How long the engine may then take to close: it waits for the step in progress."""
BACKLOG = 2048
"""Connections that may wait to be accepted, as with uvicorn. When 256 callers connect at once, each
one over aiohttp's default of 128 tries again after a second."""
OPEN_FILES = 65535
"""Most open files, of which each connection is one, if the system allows them (as in vLLM). Many
systems start a process with 1,024. Over the limit asyncio accepts nobody, and logs without end."""


class _NotMalformed(logging.Filter):
    """Drops aiohttp's reports of malformed requests, which quote headers and so even a key."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record may be logged."""
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, HttpProcessingError | web.RequestPayloadError)


_http_logger = logging.getLogger(__name__)
_http_logger.addFilter(_NotMalformed())


def run(engine: Engine, make: Callable[[Served], Server], host: str, port: int) -> int:
    """Serve until SIGTERM, SIGINT or SIGHUP; return the exit code.

    The first signal ends the listening, lets requests in progress finish, and closes the engine. A
    second one ends the process at once.

    Args:
        engine: the engine, which is started before the server listens.
        make: returns the server over the started engine.
        host: address to listen on.
        port: TCP port.

    Raises:
        ConfigurationError: the address cannot be used.
        Qwen3EmbeddingsError: the engine does not start.
    """
    _allow_open_files()
    asyncio.run(_serve(engine, make, host, port))
    return 0


async def _serve(engine: Engine, make: Callable[[Served], Server], host: str, port: int) -> None:
    _cancel_on_signal()
    async with contextlib.AsyncExitStack() as endings:
        endings.push_async_callback(engine.close)
        sockets = bind(host, port)  # so that a port in use is reported before the long start
        for bound in sockets:
            endings.callback(bound.close)
        with contextlib.suppress(asyncio.CancelledError):
            server = make(await engine.start())
            runner = await listen(server, sockets)
            endings.push_async_callback(stop, runner, server)
            gc.freeze()  # a full collection of PyTorch's objects would stop all requests
            shown = f"[{host}]" if ":" in host else host
            print(f"qwen3-embeddings: listening on http://{shown}:{port}", file=sys.stderr)
            await asyncio.Event().wait()


async def listen(server: Server, sockets: Iterable[socket.socket]) -> web.AppRunner:
    """Answer requests on bound sockets until `cleanup` of the returned runner."""
    runner = web.AppRunner(
        server.app(),
        access_log=None,
        auto_decompress=False,  # it would decompress before the key is checked, on the event loop
        logger=_http_logger,
        handler_cancellation=True,  # a client that has gone wants no vectors
        shutdown_timeout=WRITE_SECONDS,
    )
    await runner.setup()
    for bound in sockets:
        await web.SockSite(runner, bound, backlog=BACKLOG).start()
    return runner


async def stop(runner: web.AppRunner, server: Server) -> None:
    """End the listening, let the requests in progress finish, and close all connections.

    aiohttp's `cleanup` alone would read nothing more, and lose requests whose body is still coming.
    """
    for site in list(runner.sites):
        await site.stop()
    await server.finish(STOP_SECONDS)
    await runner.cleanup()


def bind(host: str, port: int) -> list[socket.socket]:
    """Return one socket for each address of a host, not listening yet.

    Raises:
        ConfigurationError: the host has no address here, or the port is in use.
    """
    sockets = []
    failed: OSError | None = None
    try:
        for family, *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            try:
                sockets.append(_bound(family, address))
            except OSError as error:
                if error.errno not in _ABSENT:
                    raise
                failed = error
        if failed and not sockets:
            raise failed
    except (OSError, UnicodeError) as error:  # the latter for a name with a part of 64 characters
        said = getattr(error, "strerror", None) or error
        raise ConfigurationError(
            f"cannot listen on {host}:{port} ({said}). Choose another --host or --port, or end the "
            "program that listens there."
        ) from error
    return sockets


_ABSENT = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}
"""Errors of an address of localhost in a container without IPv6."""


def _bound(family: int, address: Any) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # IPv4 has a socket of its own
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


def _allow_open_files() -> None:
    """Raise this process's own limit of open files."""
    own, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if most == resource.RLIM_INFINITY else min(OPEN_FILES, most)
    if own < wanted and own != resource.RLIM_INFINITY:
        with contextlib.suppress(OSError, ValueError):  # macOS has a lower limit of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _cancel_on_signal() -> None:
    """Cancel the current task at the first signal, and end the process at the second.

    SIGALRM ends the process when a stop lasts too long, for example behind a long step.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    received: list[int] = []

    def stop(number: int) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
        signal.setitimer(signal.ITIMER_REAL, STOP_SECONDS + 2 * WRITE_SECONDS + CLOSE_SECONDS)
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # under nohup it is ignored
            loop.add_signal_handler(number, stop, number)
