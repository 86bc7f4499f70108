"""Optional OpenTelemetry spans and metrics, in the semantic conventions for generative AI.

Nothing is recorded unless the application has imported OpenTelemetry, which this package does not
import by itself. Spans and metrics go to the providers that the application configures; without one
they are no-ops. Texts are never recorded.

Names: https://opentelemetry.io/docs/specs/semconv/gen-ai/ (embeddings).
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from qwen3_embeddings.engines.base import Usage

if TYPE_CHECKING:
    from opentelemetry.metrics import Counter, Histogram
    from opentelemetry.trace import Span, Tracer

SCOPE = "qwen3_embeddings"
"""Name of the instrumentation scope, and prefix of what the conventions do not name."""
DURATION_BUCKETS = [0.01 * 2**power for power in range(14)]
"""Seconds: the boundaries that the conventions prescribe for gen_ai.client.operation.duration."""
TOKEN_BUCKETS = [4**power for power in range(14)]
"""Tokens: the boundaries that they prescribe for gen_ai.client.token.usage."""


@dataclass(frozen=True)
class Call:
    """What is known of a call before it runs.

    Attributes:
        engine: "vllm", "server" or another engine's name.
        model: name of the model, if it is known.
        base_url: root of the server's API; None in process.
        dimensions: size asked for; None for native.
        role: "query" or "document".
    """

    engine: str
    model: str | None
    base_url: str | None
    dimensions: int | None
    role: str

    def attributes(self) -> dict[str, Any]:
        """Return the attributes that spans and metrics share."""
        url = urlsplit(self.base_url or "")
        found = {
            "gen_ai.operation.name": "embeddings",
            # The conventions name the API's provider where the server behind it is not known.
            "gen_ai.provider.name": "openai" if self.engine == "server" else self.engine,
            "gen_ai.request.model": self.model,
            "server.address": url.hostname,
            "server.port": url.port or {"http": 80, "https": 443}.get(url.scheme),
            f"{SCOPE}.role": self.role,
        }
        return {name: value for name, value in found.items() if value is not None}


class _Instruments(NamedTuple):
    tracer: Tracer
    duration: Histogram
    tokens: Histogram
    texts: Counter
    retries: Counter
    wait: Histogram


@contextlib.contextmanager
def recorded(call: Call, usage: Usage) -> Iterator[None]:
    """Record a block as one call, in a span whose parent is the caller's current span.

    The span is the current one within the block. So a request that serves this call alone is
    traced as its child; a request that several calls share belongs to none of them.

    Args:
        call: what is known of the call.
        usage: the call's counter, read at the end of the block.
    """
    if not _is_used():
        yield
        return
    from opentelemetry import trace

    attributes = call.attributes()
    span = _instruments().tracer.start_span(
        f"embeddings {call.model}" if call.model else "embeddings",
        kind=trace.SpanKind.CLIENT if call.base_url else trace.SpanKind.INTERNAL,
        attributes=attributes,
    )
    if call.dimensions is not None:
        span.set_attribute("gen_ai.embeddings.dimension.count", call.dimensions)
    began = time.perf_counter()
    try:
        with trace.use_span(span, record_exception=False, set_status_on_exception=False):
            yield
    except BaseException as error:
        # Not the message: it may quote a text.
        attributes["error.type"] = type(error).__qualname__
        span.set_attribute("error.type", attributes["error.type"])
        span.set_status(trace.StatusCode.ERROR)
        raise
    finally:
        _finish(span, attributes, usage, time.perf_counter() - began)


def _finish(span: Span, attributes: dict[str, Any], usage: Usage, seconds: float) -> None:
    instruments = _instruments()
    span.set_attribute(f"{SCOPE}.texts", usage.texts)
    instruments.texts.add(usage.texts, attributes)
    if usage.texts and not usage.uncounted:
        span.set_attribute("gen_ai.usage.input_tokens", usage.tokens)
        instruments.tokens.record(usage.tokens, attributes | {"gen_ai.token.type": "input"})
    instruments.duration.record(seconds, attributes)
    span.end()


def retried(reason: str) -> None:
    """Count a retry, and note it on the current span. A shared request has none.

    Args:
        reason: HTTP status, or kind of failure.
    """
    if _is_used():
        from opentelemetry import trace

        _instruments().retries.add(1, {"error.type": reason})
        trace.get_current_span().add_event(f"{SCOPE}.retry", {"error.type": reason})


def waited(seconds: float, texts: int) -> None:
    """Record how long texts of the current span's call waited for their request to be sent."""
    if _is_used():
        from opentelemetry import trace

        _instruments().wait.record(seconds)
        attributes = {f"{SCOPE}.wait": seconds, f"{SCOPE}.texts": texts}
        trace.get_current_span().add_event(f"{SCOPE}.sent", attributes)


def _is_used() -> bool:
    """Whether anything has imported OpenTelemetry: a provider cannot be configured without."""
    return "opentelemetry.trace" in sys.modules or "opentelemetry.metrics" in sys.modules


@functools.cache
def _instruments() -> _Instruments:
    """Return what records: proxies, which follow a provider that is configured later."""
    from opentelemetry import metrics, trace

    meter = metrics.get_meter(SCOPE)
    return _Instruments(
        trace.get_tracer(SCOPE),
        meter.create_histogram(
            "gen_ai.client.operation.duration",
            "s",
            "Duration of a call.",
            explicit_bucket_boundaries_advisory=DURATION_BUCKETS,
        ),
        meter.create_histogram(
            "gen_ai.client.token.usage",
            "{token}",
            "Tokens of a call.",
            explicit_bucket_boundaries_advisory=TOKEN_BUCKETS,
        ),
        meter.create_counter(f"{SCOPE}.client.texts", "{text}", "Texts embedded."),
        meter.create_counter(f"{SCOPE}.client.retries", "{retry}", "Requests sent again."),
        meter.create_histogram(
            f"{SCOPE}.client.wait",
            "s",
            "Time that texts waited for their request to be sent.",
            explicit_bucket_boundaries_advisory=DURATION_BUCKETS,
        ),
    )
