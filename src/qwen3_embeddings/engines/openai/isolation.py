"""Finding the texts that make a request fail, so that they cost no other text its vector."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from qwen3_embeddings.engines.openai.failures import DOWN
from qwen3_embeddings.engines.openai.limiter import Slot
from qwen3_embeddings.engines.openai.retry import backoff
from qwen3_embeddings.engines.openai.wire import Embeddings
from qwen3_embeddings.errors import (
    AuthenticationError,
    Computed,
    ModelNotFoundError,
    Qwen3EmbeddingsError,
    ServerBusyError,
    ServerConnectionError,
    ServerError,
    ServerRefusedError,
    ServerResponseError,
    ServerTimeoutError,
    TextError,
    TextRefusedError,
    TextTooLongError,
)
from qwen3_embeddings.vectors import Vectors

logger = logging.getLogger(__name__)

_ABOUT_A_TEXT = frozenset({400, 413, 422})  # statuses of a refusal that one text can cause


@dataclass
class Outcome:
    """What became of a request's prompts once the failing ones were isolated.

    Attributes:
        pieces: vectors that were computed, each with the range of prompts it belongs to.
        blamed: errors of single prompts, by position.
        stopped: the error of the server that ended the search, if one did.
    """

    pieces: list[tuple[range, Vectors]] = field(default_factory=list)
    blamed: dict[int, Qwen3EmbeddingsError] = field(default_factory=dict)
    stopped: Qwen3EmbeddingsError | None = None

    def of(self, part: range) -> tuple[Vectors | None, Qwen3EmbeddingsError | None]:
        """Return all vectors of a part of the prompts, or the error that replaces them.

        The error counts positions within `part` and carries what was computed of it. Texts that
        it does not name and that have no vector can be sent again.
        """
        pieces = [
            ([i - part.start], rows[i - where.start][None])
            for where, rows in self.pieces
            for i in where
            if i in part
        ]
        computed = Computed.of(pieces, len(part))
        if computed is not None and len(computed.positions) == len(part):
            return computed.vectors, None
        error = self._error(part)
        return None, error.carrying(computed)

    def _error(self, part: range) -> Qwen3EmbeddingsError:
        blamed = {i: error for i, error in self.blamed.items() if i in part}
        first = next(iter(blamed.values()), None)
        if isinstance(first, TextError):
            return first.at(i - part.start for i, e in blamed.items() if type(e) is type(first))
        error = first or self.stopped
        assert error is not None
        return error


@dataclass
class Isolation:
    """The search for the texts to blame for one failed request.

    The request is bisected until the failing texts stand alone. A text that the server refuses is
    blamed only if the server embeds another: a text of the same request, or a probe. A text on
    which the server fails is blamed only if a probe passed both before and after its last attempt.
    A failure that is not retried, such as an answer that cannot be read, must occur twice.
    So a server that fails everything ends the search at once, and a restart blames no text.

    Args:
        send: embeds a part of the request, with a number of retries (None: the usual one).
        probe: embeds a harmless text, once.
        slot: the place of the request among those in flight.
        patience: seconds to wait for a server that is down.
    """

    send: Callable[[range, int | None], Awaitable[Embeddings]]
    probe: Callable[[], Awaitable[object]]
    slot: Slot
    patience: float
    _checked: bool = False  # whether a probe passed after a failure

    async def search(self, total: int, error: Qwen3EmbeddingsError) -> Outcome:
        """Embed as many as possible of `total` prompts whose request failed with `error`."""
        outcome = Outcome()
        todo: list[tuple[range, Qwen3EmbeddingsError | None]] = [(range(total), error)]
        again: set[int] = set()
        try:
            while todo:
                part, failure = todo.pop()
                if failure is None:
                    retries = 0 if len(part) > 1 or part.start in again else None
                    failure = await self._try(part, retries, outcome)
                if failure is None:
                    continue
                checked, was_down = self._checked, await self._check_server(failure, part, outcome)
                if len(part) > 1:
                    middle = part.start + len(part) // 2
                    todo.append((range(middle, part.stop), None))
                    todo.append((range(part.start, middle), None))
                elif (
                    (was_down or not checked or was_not_retried(failure))
                    and part.start not in again
                    and self._checked
                ):
                    again.add(part.start)  # the server may just have come back
                    todo.append((part, None))
                else:
                    outcome.blamed[part.start] = _blame(failure)
        except Qwen3EmbeddingsError as stopped:
            outcome.stopped = stopped
        return outcome

    async def _try(
        self, part: range, retries: int | None, outcome: Outcome
    ) -> Qwen3EmbeddingsError | None:
        """Embed a part. Return the error if it failed."""
        try:
            answer = await self.send(part, retries)
        except (TextTooLongError, ServerError) as error:
            return error
        outcome.pieces.append((part, answer.vectors))
        return None

    async def _check_server(
        self, failure: Qwen3EmbeddingsError, part: range, outcome: Outcome
    ) -> bool:
        """Return if a text may be why a request failed, else raise the failure.

        Returns:
            Whether the server was down meanwhile.
        """
        if not may_be_a_text(failure):
            raise failure
        if isinstance(failure, TextTooLongError):
            return False
        others_pass = bool(outcome.pieces or outcome.blamed)
        if isinstance(failure, ServerRefusedError) and (len(part) > 1 or others_pass):
            return False
        was_down = await outlast(failure, self.probe, self.slot, self.patience)
        self._checked |= not isinstance(failure, ServerRefusedError)
        return was_down


async def outlast(
    failure: Qwen3EmbeddingsError,
    probe: Callable[[], Awaitable[object]],
    slot: Slot,
    patience: float,
) -> bool:
    """Wait until the server embeds a probe. Raise the failure, or the probe's, if it does not.

    Args:
        failure: why a request failed.
        probe: sends a harmless text, once.
        slot: the place of the request; queries may use it during a wait.
        patience: seconds to wait if the server is down.

    Returns:
        Whether the server was down meanwhile.
    """
    deadline = time.monotonic() + patience
    attempt = 0
    while True:
        try:
            await probe()
            return attempt > 0
        except (TextTooLongError, ServerError) as error:
            if not is_down(error):  # what a server says that is back counts more than its absence
                raise (error if is_down(failure) else failure) from None
            if time.monotonic() >= deadline:
                raise failure from None
        delay = backoff(attempt)
        level = logging.INFO if attempt else logging.WARNING
        logger.log(level, "the server is down, asked again in %.1f s: %s", delay, failure)
        slot.rest()
        await asyncio.sleep(delay)
        attempt += 1


def may_be_a_text(error: Qwen3EmbeddingsError) -> bool:
    """Whether a single text can be why a request failed, on a server that embedded others.

    Filters in front of a server refuse a text with 403, 404 or 501, or answer a page of their own.
    """
    if isinstance(error, AuthenticationError):
        return error.status == 403
    if isinstance(error, ServerRefusedError):
        return error.status in _ABOUT_A_TEXT
    if isinstance(error, ServerBusyError):
        return error.status != 429
    kinds = (TextTooLongError, ServerResponseError, ServerConnectionError, ServerTimeoutError)
    return isinstance(error, (*kinds, ModelNotFoundError))


def was_not_retried(error: Qwen3EmbeddingsError) -> bool:
    """Whether a request that failed with `error` was sent only once."""
    return isinstance(error, ServerResponseError | AuthenticationError | ModelNotFoundError)


def is_down(error: Qwen3EmbeddingsError) -> bool:
    """Whether an error means that the server, or what is behind its proxy, is away."""
    if isinstance(error, ServerBusyError):
        return error.status in DOWN
    return isinstance(error, ServerConnectionError) and error.down


def _blame(error: Qwen3EmbeddingsError) -> Qwen3EmbeddingsError:
    """Return the error of one text that the server does not embed although it embeds others.

    The advice of `error` is about the whole server, so it is left out. Vectors of another size are
    no text's fault: another model may answer some of the requests.
    """
    of_the_server = isinstance(error, ServerResponseError) and not error.answered
    if isinstance(error, TextTooLongError) or of_the_server:
        return error
    verb = "refuses" if isinstance(error, ServerRefusedError) else "fails on"
    return TextRefusedError(
        f"the server {verb} this text and embeds others ({what_it_did(error)}). Leave it out, or "
        "change it."
    )


def what_it_did(error: Qwen3EmbeddingsError) -> str:
    """Return what the server did, without the error's advice where it is known."""
    return (isinstance(error, ServerError) and error.answered) or str(error)
