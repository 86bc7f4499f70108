"""Tokenize off the event loop, the texts of concurrent calls together."""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

from qwen3_embeddings import event_loop

SHORT = 256
"""Most characters that are tokenized on the event loop. Tokenizing a query of 12 words costs 18 µs
of CPU time, and 78 µs in another thread (published tokenizer, one CPU)."""
SHARED = 16384
"""Most characters of a call that is tokenized together with others, which then wait for all of its
texts. With a higher limit a query would wait for many documents."""

Ids = list[list[int]]
_Call = tuple[list[str], asyncio.Future[Ids | None]]


class Tokenizing:
    """Tokenizes for concurrent calls.

    Handing work to a thread costs the event loop about as much as tokenizing 40 words. So calls
    that arrive while a thread tokenizes wait for its end, and then share one thread. With 64
    callers of single texts, a text costs the server's event loop 240 µs instead of 310
    (benchmarks/server_http.py, 80 words).

    Args:
        tokenize: returns the token ids of each text. It is called from several threads.
    """

    def __init__(self, tokenize: Callable[[list[str]], Ids]) -> None:
        self._tokenize = tokenize
        self._loop: asyncio.AbstractEventLoop | None = None  # whose calls share a thread
        self._waiting: list[_Call] = []
        self._busy = False

    async def ids(self, texts: list[str]) -> Ids:
        """Return the token ids of each text.

        Raises:
            Exception: what `tokenize` raises for these texts; never an error of another call's.
        """
        size = sum(len(text) + 1 for text in texts)  # empty texts cost time too
        if size <= SHORT:
            return self._tokenize(texts) if texts else []
        loop = asyncio.get_running_loop()
        if self._loop is None or self._loop.is_closed():
            self._loop, self._waiting, self._busy = loop, [], False
        if size <= SHARED and self._loop is loop:
            future: asyncio.Future[Ids | None] = loop.create_future()
            self._waiting.append((texts, future))
            if not self._busy:
                self._share()
            ids = await future
            if ids is not None:
                return ids
        return await event_loop.in_thread(self._tokenize, texts)

    def _share(self) -> None:
        """Tokenize the texts of all calls that wait in one thread."""
        calls, self._waiting = self._waiting, []
        self._busy = bool(calls)
        if calls:
            texts = [text for theirs, _ in calls for text in theirs]
            task = asyncio.ensure_future(event_loop.in_thread(self._tokenize, texts))
            task.add_done_callback(functools.partial(self._answer, calls))

    def _answer(self, calls: Sequence[_Call], task: asyncio.Future[Ids]) -> None:
        """Answer each call with its ids, or after an error with None.

        A call that gets None tokenizes again alone, so that only the call at fault raises.
        """
        self._share()
        failed = task.cancelled() or task.exception() is not None
        ids: Iterator[list[int]] = iter(() if failed else task.result())
        for texts, future in calls:
            theirs = list(itertools.islice(ids, len(texts)))
            if not future.done():
                future.set_result(theirs or None)
