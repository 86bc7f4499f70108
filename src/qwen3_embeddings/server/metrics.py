"""The server's metrics, in Prometheus' format."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    generate_latest,
)

from qwen3_embeddings import __version__
from qwen3_embeddings.engines.base import Usage

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""Upper limits of the latency buckets."""


class Metrics:
    """The metrics of one server.

    Args:
        model: name of the served model.
    """

    def __init__(self, model: str) -> None:
        self.registry = registry = CollectorRegistry()
        prefix = "qwen3_embeddings_"
        ProcessCollector(registry=registry)
        build = Info(prefix + "build", "Version and model of the server.", registry=registry)
        build.info({"version": __version__, "model": model})
        self._requests = Counter(
            prefix + "requests",
            "Requests by route and HTTP status; 499 if the client closed the connection.",
            ("route", "status"),
            registry=registry,
        )
        self._seconds = Histogram(
            prefix + "request_seconds",
            "Time from a request's headers to its response, by route.",
            ("route",),
            buckets=SECONDS,
            registry=registry,
        )
        self._texts = Counter(prefix + "texts", "Texts that were embedded.", registry=registry)
        self._tokens = Counter(prefix + "tokens", "Tokens of these texts.", registry=registry)
        self._in_progress = Gauge(
            prefix + "texts_in_progress", "Texts received and not embedded yet.", registry=registry
        )

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count a request.

        Args:
            route: path of a route of the server; "other" for all other paths and methods.
            status: HTTP status.
            seconds: how long it took.
        """
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    @contextlib.contextmanager
    def in_progress(self, texts: int) -> Iterator[None]:
        """Count texts as in progress until the block ends."""
        self._in_progress.inc(texts)
        try:
            yield
        finally:
            self._in_progress.dec(texts)

    def embedded(self, usage: Usage) -> None:
        """Count texts that were embedded."""
        self._texts.inc(usage.texts)
        self._tokens.inc(usage.tokens)

    def render(self) -> bytes:
        """Return all metrics as text."""
        return generate_latest(self.registry)
