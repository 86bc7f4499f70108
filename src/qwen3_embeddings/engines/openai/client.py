"""Any OpenAI-compatible embeddings server: vLLM first, others as far as they speak.

What the server can do (wire format, `dimensions`) is learned once and said in the log. Chunks of
all callers that arrive within a millisecond share requests, queries apart from documents.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import ssl
import unicodedata
from collections import defaultdict
from collections.abc import Awaitable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from qwen3_embeddings import event_loop, models
from qwen3_embeddings.engines.base import Prompt, Served, Usage, closed_error
from qwen3_embeddings.engines.openai import wire
from qwen3_embeddings.engines.openai.limiter import Slot, Slots
from qwen3_embeddings.engines.openai.transport import SIZE_REFUSED, Connection
from qwen3_embeddings.errors import (
    Computed,
    DimensionsError,
    ModelNotFoundError,
    Qwen3EmbeddingsError,
    ServerBusyError,
    ServerError,
    ServerRefusedError,
    ServerResponseError,
    TextError,
    TextRefusedError,
    TextTooLongError,
)
from qwen3_embeddings.redaction import Secret
from qwen3_embeddings.vectors import Vectors

logger = logging.getLogger(__name__)
T = TypeVar("T")

_ABOUT_A_TEXT = frozenset({400, 413, 422})  # statuses of a refusal that one text can cause
GATHER_SECONDS = 0.001
"""How long a chunk waits for others to share its request."""
QUERIES_A_REQUEST = 4
"""Queries of several callers in one request; more when more wait than all requests under way hold.
Its HTTP process takes vLLM one to three milliseconds a text, less the more share a request, and
several processes share several requests; of 1, 2, 4, 8 and 16 this was the fastest for 64 callers
on an H100 (docs/performance.md)."""
FULL_CONTEXT = (0, 32)
"""First version of vLLM that always finishes an input as long as its context: an earlier one never
does when the input takes several steps (vllm-project/vllm#48039)."""


@dataclass(eq=False)
class _Waiting:
    """One caller's prompts, waiting for a request to share."""

    prompts: list[Prompt]
    answer: asyncio.Future[Vectors]


class ServerEngine:
    """Client of one server.

    Args:
        base_url: root of the OpenAI-compatible API, e.g. ``http://localhost:8000/v1``.
        model: name the server knows the model by; None asks ``/v1/models``.
        api_key: the server's key.
        timeout: seconds a request may take.
        max_retries: further attempts after what may pass.
        restart_timeout: seconds documents wait for a server that answered before and is down.
        default_headers: sent with every request.
        verify: TLS verification.
        max_concurrency: most requests under way at once, for queries and for documents each; fewer
            while it answers 429 to more.
        batch_size: most texts a request holds.

    Attributes:
        connection: to look at the server itself.
        cuts_itself: whether the server gives smaller sizes, as far as it was asked.
    """

    chunk_tokens = 32768

    def __init__(
        self,
        base_url: str,
        *,
        model: str | None = None,
        api_key: Secret | None = None,
        timeout: float = 60.0,
        max_retries: int = 4,
        restart_timeout: float = 180.0,
        default_headers: Mapping[str, str | Secret] | None = None,
        verify: bool | str | ssl.SSLContext = True,
        max_concurrency: int = 16,
        batch_size: int = 64,
    ) -> None:
        self.connection = Connection(
            base_url,
            api_key=api_key,
            timeout=timeout,
            max_retries=max_retries,
            restart_timeout=restart_timeout,
            default_headers=default_headers or {},
            verify=verify,
        )
        self.base_url = self.connection.base_url
        self.model = model
        self.chunk_texts = batch_size
        self.chunks_in_flight = max_concurrency
        self._served: Served | None = None
        self._learning: asyncio.Task[Served] | None = None
        self._form = 0
        self.cuts_itself = True
        self._ranks = True
        self._waiting: dict[Any, list[_Waiting]] = defaultdict(list)
        self._gathering: set[Any] = set()
        self._slots = Slots(max_concurrency)
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> Served:
        """Reach the server once and learn what it serves and speaks."""
        if self.connection.closed:
            raise closed_error()
        if self._served is None:
            if self._learning is None or self._learning.done():
                self._learning = self._spawn(self._learn())
            # One attempt for all that wait, which outlives the first of them.
            return await self._until_closed(asyncio.shield(self._learning))
        return self._served

    async def tokenize(self, texts: list[str], urgent: bool = False) -> list[list[int]]:
        """Token ids from ``/tokenize``, which stands beside the API root.

        vLLM and llama.cpp have such a route, with other names for the same two fields; each
        ignores the other's.
        """
        served = await self.start()
        url = self.base_url.removesuffix("/v1") + "/tokenize"
        refused: dict[int, Qwen3EmbeddingsError] = {}

        async def ids_of(text: str) -> list[int]:
            body = {"model": served.model, "prompt": text, "add_special_tokens": True}
            body |= {"content": _composed(text), "add_special": True}
            async with self._slots.one(urgent) as slot:
                answer = await self.connection.post(url, body, patient=not urgent, slot=slot)
                return wire.read_tokens(answer.content)

        async def one(position: int, text: str) -> list[int]:
            try:
                return await ids_of(text)
            except (ServerRefusedError, TextTooLongError) as error:
                refused[position] = error
                return []

        async def every() -> list[list[int]]:
            ids = await event_loop.gather(itertools.starmap(one, enumerate(texts)))
            if refused:
                await ids_of("probe")  # or has the server no such route?
                raise _not_tokenized(refused)
            return ids

        return await self._until_closed(self._spawn(every()))

    async def embed(
        self,
        prompts: list[Prompt],
        dimensions: int | None,
        urgent: bool,
        usage: Usage | None = None,
    ) -> Vectors:
        """One vector a prompt, in order."""
        served = await self.start()
        if dimensions == served.dimensions:
            dimensions = None  # servers without is_matryoshka refuse even their own size
        prompts = [_composed(prompt) for prompt in prompts]
        texts = [i for i, prompt in enumerate(prompts) if isinstance(prompt, str)]
        others = [i for i, prompt in enumerate(prompts) if not isinstance(prompt, str)]

        if not (texts and others):
            return await self._gather(prompts, dimensions, bool(texts), urgent)
        pieces: list[tuple[list[int], Vectors]] = []
        errors: list[Qwen3EmbeddingsError] = []

        async def part(group: list[int]) -> None:
            """The rows of one kind of prompts: a request holds one kind."""
            mine = [prompts[i] for i in group]
            try:
                pieces.append((group, await self._gather(mine, dimensions, group is texts, urgent)))
            except Qwen3EmbeddingsError as error:
                if error.computed is not None:
                    there = [group[i] for i in error.computed.positions]
                    pieces.append((there, error.computed.vectors))
                if isinstance(error, TextError):
                    error = error.at(group[i] for i in error.positions)
                errors.append(error)

        await asyncio.gather(part(texts), part(others))
        computed = Computed.of(pieces, len(prompts))
        if errors:
            raise errors[0].carrying(computed)
        assert computed is not None
        return computed.vectors

    async def close(self) -> None:
        """Fail what waits, and close the connections."""
        await self.connection.close()
        for line in self._waiting.values():
            _fail(line, closed_error())
            line.clear()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _until_closed(self, work: Awaitable[T]) -> T:
        """What `work` gives, or the error of a closed embedder when `close` cancelled it."""
        try:
            return await work
        except asyncio.CancelledError:
            if self.connection.closed:
                raise closed_error() from None
            raise

    def _spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """A task that `close` cancels, and whose error somebody has always seen."""
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    # Gathering: chunks wait in a line for each kind of request. Before a line that is not empty
    # stands one sender: it takes the line's head when a slot is free, and calls the next.

    async def _gather(self, prompts: list[Prompt], *kind: Any) -> Vectors:
        waiting = _Waiting(prompts, asyncio.get_running_loop().create_future())
        self._waiting[kind].append(waiting)
        self._call_sender(kind, GATHER_SECONDS)
        return await waiting.answer

    def _call_sender(self, kind: Any, delay: float) -> None:
        if self._waiting[kind] and kind not in self._gathering:
            self._gathering.add(kind)
            self._spawn(self._send_next(delay, *kind))

    async def _send_next(
        self, delay: float, dimensions: int | None, texts: bool, urgent: bool
    ) -> None:
        """Send what waits in one line, as much as a request holds, and hand the rows out."""
        kind = (dimensions, texts, urgent)
        await asyncio.sleep(delay)
        async with self._slots.one(urgent) as slot:
            line = self._waiting[kind]
            most = self.chunk_texts
            if urgent:
                texts_waiting = sum(len(waiting.prompts) for waiting in line)
                share = math.ceil(texts_waiting / min(self._slots.count, self._slots.most))
                most = min(most, max(QUERIES_A_REQUEST, share))
            group = _take(line, most)
            self._gathering.discard(kind)
            self._call_sender(kind, 0.0)  # what is left has waited
            if not group:
                return
            request = asyncio.create_task(self._deliver(group, dimensions, urgent, slot))
            for waiting in group:  # a caller that gives up lets the others go on
                waiting.answer.add_done_callback(
                    lambda _: all(other.answer.cancelled() for other in group) and request.cancel()
                )
            try:
                await request
            except asyncio.CancelledError:
                request.cancel()
                _fail(group, closed_error())
            except Exception as error:
                _fail(group, error)

    async def _deliver(
        self, group: list[_Waiting], dimensions: int | None, urgent: bool, slot: Slot
    ) -> None:
        prompts = [prompt for waiting in group for prompt in waiting.prompts]
        if len(group) == 1:
            _hand_out(group, await self._request_halving(prompts, dimensions, urgent, slot))
            return
        try:
            _hand_out(group, await self._request(self._name, prompts, dimensions, urgent, slot))
        except (TextTooLongError, ServerError) as error:
            if not _may_be_one_callers(error):
                raise
            slot.leave()
            await asyncio.gather(*(self._deliver_alone(one, dimensions, urgent) for one in group))

    async def _deliver_alone(self, one: _Waiting, dimensions: int | None, urgent: bool) -> None:
        """Send one caller's prompts again, so that the one who failed takes nobody along."""
        try:
            async with self._slots.one(urgent) as slot:
                await self._deliver([one], dimensions, urgent, slot)
        except Qwen3EmbeddingsError as error:
            _fail([one], error)

    async def _request_halving(
        self, prompts: list[Prompt], dimensions: int | None, urgent: bool, slot: Slot
    ) -> Vectors:
        """A request's rows; a refused one is halved, until the texts to blame stand alone."""
        pieces: list[tuple[range, Vectors]] = []
        blamed: dict[int, TextError] = {}
        todo = [range(len(prompts))]
        try:
            while todo:
                part = todo.pop()
                mine = [prompts[i] for i in part]
                try:
                    rows = await self._request(self._name, mine, dimensions, urgent, slot)
                    pieces.append((part, rows))
                except (ServerRefusedError, TextTooLongError) as error:
                    blame = _blame_of_a_text(error)
                    middle = len(part) // 2
                    if middle:
                        todo += [part[middle:], part[:middle]]
                    else:
                        if isinstance(blame, TextRefusedError) and not (pieces or blamed):
                            # Or is it the server?
                            await self._request(self._name, ["probe"], dimensions, urgent, slot)
                        blamed[part[0]] = blame
        except Qwen3EmbeddingsError as error:
            raise error.carrying(Computed.of(pieces, len(prompts))) from error.__cause__
        if blamed:
            first = next(iter(blamed.values()))  # others are sent again by the embedder
            alike = [i for i, error in blamed.items() if type(error) is type(first)]
            raise first.at(alike).carrying(Computed.of(pieces, len(prompts)))
        if len(pieces) == 1:
            return pieces[0][1]
        self.chunk_texts = min(self.chunk_texts, max(len(part) for part, _ in pieces))
        logger.info("%s takes no %d texts at once", self.base_url, len(prompts))
        return np.concatenate([rows for _, rows in pieces])

    # Requests.

    @property
    def _name(self) -> str:
        assert self._served is not None
        return self._served.model

    async def _learn(self) -> Served:
        """Ask the server what it serves and how it likes to be asked."""
        name, root, context, served_names = await self._find_model()
        try:
            # Nobody has asked a query yet for which documents need make room.
            async with self._slots.one(urgent=False) as slot:
                probe = await self._request(name, ["probe", "\n probe\n"], None, True, slot)
        except ModelNotFoundError:
            raise _not_served(self.base_url, served_names, self.model) from None
        known = models.MODELS.get(name) or models.MODELS.get(root)
        if known:
            context = context or known.context
        size = probe.shape[1]
        native = max(known.dimensions if known else 0, size)
        strips = bool(np.isclose(probe[0], probe[1], rtol=1e-5, atol=0).all())
        self._served = Served("server", name, size, native, context, strips)
        logger.info("%s speaks %s: %s", self.base_url, wire.FORMATS[self._form], self._served)
        return self._served

    async def _find_model(self) -> tuple[str, str, int | None, list[str]]:
        """The model's name, what it was loaded from, its context if told, and all names."""
        answer = await self.connection.send("GET", self.base_url + "/models")
        if answer.status_code in {404, 405, 501} and self.model:
            return self.model, self.model, None, []
        self.connection.check(answer)
        rows = wire.read_models(answer.content)
        names = [row["id"] for row in rows]
        if self.model is None:
            matches = rows if len({row.get("root", row["id"]) for row in rows}) == 1 else []
        else:
            matches = [row for row in rows if row["id"] == self.model]
            matches = matches or [row for row in rows if row.get("root") == self.model]
        if not matches and self.model:  # some lists leave names out: the probe decides
            return self.model, self.model, None, names
        if not matches:
            raise _not_served(self.base_url, names, None)
        name, context = matches[0]["id"], _context(matches[0])
        if context and matches[0].get("owned_by") == "vllm":
            version = await self._version()
            if version < FULL_CONTEXT:
                logger.info("vLLM %s may hang on %d tokens: one less here", version, context)
                context -= 1
        return name, matches[0].get("root") or name, context, names

    async def _version(self) -> tuple[int, int]:
        """The server's version; (0, 0) where it is not told, as behind a gateway."""
        told = await self.connection.look(self.base_url.removesuffix("/v1") + "/version")
        return wire.read_version(told or b"")

    async def _request(
        self, name: str, prompts: list[Prompt], dimensions: int | None, urgent: bool, slot: Slot
    ) -> Vectors:
        """One request's vectors; falls back where the server turns out not to speak a feature."""
        form = self._form
        body: dict[str, Any] = {"model": name, "input": prompts} | wire.ask(wire.FORMATS[form])
        ask_size = dimensions is not None and self.cuts_itself
        if ask_size:
            body["dimensions"] = dimensions
        # Only vLLM speaks the first format and knows priorities, of which the lowest goes first.
        rank = self._ranks and form == 0
        if rank:
            body["priority"] = 0 if urgent else 1
        try:
            url = self.base_url + "/embeddings"
            patient = not urgent and self._served is not None  # a start says soon what is wrong
            answer = await self.connection.post(url, body, patient, slot)
        except ServerRefusedError as error:
            if ask_size and SIZE_REFUSED.search(str(error)):
                self._cut_here(str(error))
            elif rank and "priorit" in str(error).lower():
                self._ranks = False
            elif self._served is None and form + 1 < len(wire.FORMATS):
                self._form = form + 1
            else:
                raise
            return await self._request(name, prompts, dimensions, urgent, slot)
        content_type = answer.headers.get("content-type", "")
        spoken, vectors = wire.read(answer.content, content_type, len(prompts))
        self._form = max(self._form, wire.FORMATS.index(spoken))
        return vectors if self._served is None else self._fit(vectors, dimensions, ask_size)

    def _fit(self, vectors: Vectors, dimensions: int | None, asked: bool) -> Vectors:
        """Vectors of the size asked for, cut here when the server did not."""
        assert self._served is not None
        size, own = vectors.shape[1], self._served.dimensions
        if size != own and not (asked and size == dimensions):
            raise ServerResponseError(
                f"the server answered {size} numbers a text, and {own} when it was first asked: "
                "another model stands behind base_url now. Close this embedder and make another, "
                "and embed everything again."
            )
        if dimensions is None or size == dimensions:
            return vectors
        if size < dimensions:
            raise DimensionsError(
                f"the server gives {size} numbers a text and cannot give {dimensions}. Ask for at "
                f"most dimensions={size}, or start the server without a smaller default size."
            )
        self._cut_here(f"it answered {size} numbers to dimensions={dimensions}")
        return vectors[:, :dimensions]  # the embedder brings every row to unit length

    def _cut_here(self, why: str) -> None:
        if self.cuts_itself:
            logger.info("%s does not cut vectors itself, done here: %s", self.base_url, why)
        self.cuts_itself = False


def _composed(prompt: Prompt) -> Prompt:
    """A text in NFC, the published tokenizer's own first step, which llama.cpp leaves out."""
    return unicodedata.normalize("NFC", prompt) if isinstance(prompt, str) else prompt


def _context(row: Mapping[str, Any]) -> int | None:
    """The longest input in tokens a row of ``/models`` tells of, vLLM's or llama.cpp's."""
    meta = row.get("meta")
    slot = meta.get("n_ctx") if isinstance(meta, dict) else None
    # llama.cpp refuses an input that fills its slot to the last token.
    context = slot - 1 if type(slot) is int else row.get("max_model_len")
    return context if type(context) is int and context > 0 else None


def _not_served(base_url: str, names: list[str], model: str | None) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"the server at {base_url} serves {', '.join(map(repr, names)) or 'no model it names'}"
        + (f", not {model!r}" if model else "")
        + ". Pass one of its names as model."
    )


def _may_be_one_callers(error: TextTooLongError | ServerError) -> bool:
    """Whether the prompts of one caller can have failed a request that several shared."""
    if isinstance(error, ServerBusyError):
        return error.status == 500
    if isinstance(error, ServerRefusedError):
        return error.status in _ABOUT_A_TEXT
    return isinstance(error, (TextTooLongError, ServerResponseError))


def _blame_of_a_text(error: ServerRefusedError | TextTooLongError) -> TextError:
    """A refusal as one of a single text's; raised again when no text can be the cause."""
    if isinstance(error, TextTooLongError):
        return error
    if error.status not in _ABOUT_A_TEXT:
        raise error
    return TextRefusedError(str(error))


def _not_tokenized(refused: Mapping[int, Qwen3EmbeddingsError]) -> TextRefusedError:
    error = next(iter(refused.values()))
    said = "too long" if isinstance(error, TextTooLongError) else str(error)
    return TextRefusedError(
        f"the server does not tokenize it, so it cannot be cut to the context ({said}). Split it "
        "yourself, or raise the limit of the server or of the proxy in front of it.",
        sorted(refused),
    )


def _take(line: list[_Waiting], most: int) -> list[_Waiting]:
    """Take from the head of a line what fits one request, at least one, without the given-up."""
    group: list[_Waiting] = []
    texts = 0
    while line:
        if line[0].answer.cancelled():
            line.pop(0)
            continue
        texts += len(line[0].prompts)
        if group and texts > most:
            break
        group.append(line.pop(0))
    return group


def _hand_out(group: list[_Waiting], rows: Vectors) -> None:
    start = 0
    for waiting in group:
        end = start + len(waiting.prompts)
        if not waiting.answer.done():
            waiting.answer.set_result(rows[start:end])
        start = end


def _fail(group: list[_Waiting], error: Exception) -> None:
    for waiting in group:
        if not waiting.answer.done():
            waiting.answer.set_exception(error)
