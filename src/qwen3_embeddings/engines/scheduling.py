"""Decide which texts go into an engine's next step.

Nothing here touches an engine: `Schedule` knows how many tokens each text has and how many the
engine has not answered yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from qwen3_embeddings.engines.base import MIXED_SECONDS
from qwen3_embeddings.models import LARGE_MODEL

Call = TypeVar("Call")

MIXED_TOKENS = 4096
"""Most tokens of documents in a step soon after a query. On an H100 with the 0.6B model a query
had a latency of 29 ms during documents. Full steps embedded 7 % more documents, with a latency of
134 ms. 8,192 tokens almost doubled the latency and embedded 5 % more documents. 2,048 tokens
embedded a third fewer (benchmarks/notes/in-process.md)."""
LARGE_MODEL_MIXED_TOKENS = 2048
"""The same for a large model. On an H100 with the 4B model the latency was 53 ms instead of 102,
with 6 % fewer documents (benchmarks/notes/torch-engine.md)."""


@dataclass(frozen=True)
class Limits:
    """What an engine computes at once.

    Attributes:
        tokens: most tokens in one step.
        texts: most texts in one step.
        steps: number of steps in progress at the same time.
        queries: most tokens of queries in one step.
        mixed: most tokens of documents in one step soon after a query.

    A text is never split, so the last one of a step may exceed a limit of tokens.
    """

    tokens: int
    texts: int
    steps: int
    queries: int
    mixed: int = MIXED_TOKENS


def mixed_tokens(parameters: int) -> int:
    """Return `Limits.mixed` for a model with this number of parameters."""
    return MIXED_TOKENS if parameters < LARGE_MODEL else LARGE_MODEL_MIXED_TOKENS


@dataclass
class _Waiting(Generic[Call]):
    """The texts of one call that the engine has not been given; `next` is the first of them."""

    call: Call
    lengths: Sequence[int]
    next: int = 0


@dataclass
class Schedule(Generic[Call]):
    """The texts that wait for the engine, and the tokens that it has not answered.

    Queries have priority over documents. Documents never starve.

    Args:
        limits: what the engine computes at once.
    """

    limits: Limits
    held: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})
    _waiting: dict[bool, deque[_Waiting[Call]]] = field(
        default_factory=lambda: {True: deque(), False: deque()}
    )
    _last_query: float = float("-inf")
    _starved: bool = False  # documents wait, and the engine holds none

    def add(self, call: Call, lengths: Sequence[int], urgent: bool, now: float) -> None:
        """Add the texts of a call.

        Args:
            call: what `fill` returns for its texts.
            lengths: number of tokens of each text.
            urgent: True for queries, False for documents.
            now: seconds on a monotonic clock.
        """
        if urgent:
            self._last_query = now
        self._waiting[urgent].append(_Waiting(call, lengths))

    def drop(self, call: Call) -> None:
        """Forget the texts of a call that wait. Report those given out with `answered`."""
        for urgent, waiting in self._waiting.items():
            self._waiting[urgent] = deque(w for w in waiting if w.call is not call)

    def answered(self, urgent: bool, tokens: int) -> None:
        """Report that the engine has answered a text, or no longer computes it."""
        self.held[urgent] -= tokens

    def fill(self, now: float) -> list[tuple[Call, int]]:
        """Return the texts that the engine should be given before its next step.

        At most one step's worth is given: of two small steps vLLM's scheduler would make one large
        step, and the GPU would wait for the host meanwhile. Tokens that the engine already holds
        count against the budget of their role. A role of which it holds none always gets one text.
        If queries used the whole budget while documents waited, the next step keeps a place for
        one document. While more queries wait, documents get an eighth of the limit of queries.

        Args:
            now: seconds on a monotonic clock.

        Returns:
            Pairs of a call and the index of one of its texts, queries first.
        """
        limits = self.limits
        kept = 1 if self._starved and not self.held[False] else 0
        queries, used = self._take(True, min(limits.queries, limits.tokens), limits.texts - kept)
        budget = limits.tokens - used
        if self.expects_query(now):
            budget = min(budget, limits.mixed)
        if self._waiting[True]:  # more queries than one step may have
            budget = min(budget, limits.queries // 8)
        documents, _ = self._take(False, budget, limits.texts - len(queries))
        self._starved = bool(self._waiting[False]) and not self.held[False]
        return queries + documents

    def expects_query(self, now: float) -> bool:
        """Whether a query came so recently that the next one should not wait long.

        Args:
            now: seconds on a monotonic clock.
        """
        return now < self._last_query + MIXED_SECONDS

    def _take(self, urgent: bool, budget: int, texts: int) -> tuple[list[tuple[Call, int]], int]:
        """Take texts of one role from the queue; return them and their number of tokens."""
        taken: list[tuple[Call, int]] = []
        used = 0
        queue = self._waiting[urgent]
        while queue and len(taken) < texts:
            first = queue[0]
            length = first.lengths[first.next]
            held = self.held[urgent]
            # A text of which half fits is taken, so that steps are full on average. The first query
            # is taken even if it is longer than the limit of queries.
            over = length >= 2 * (budget - used) and not (urgent and not taken)
            if held and (over or held + length > self.limits.tokens * self.limits.steps):
                break
            taken.append((first.call, first.next))
            self.held[urgent] += length
            used += length
            first.next += 1
            if first.next == len(first.lengths):
                queue.popleft()
        return taken, used
