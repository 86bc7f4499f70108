"""The embedder: texts and a role in, a matrix of unit vectors out."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import (
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
)
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from qwen3_embeddings import event_loop, models
from qwen3_embeddings import long_texts as policies
from qwen3_embeddings.config import check, check_count, engine_kind
from qwen3_embeddings.doctor.report import Report
from qwen3_embeddings.engines.base import Engine, Prompt, Served, check_lengths
from qwen3_embeddings.engines.registry import Lease
from qwen3_embeddings.errors import (
    ConfigurationError,
    Qwen3EmbeddingsError,
    ServerError,
    ServerRefusedError,
    ServerResponseError,
    TextEncodingError,
    TextError,
    TextRefusedError,
    TextsFailedError,
    TextTooLongError,
    TextTypeError,
)
from qwen3_embeddings.prompts import Task, find_task, instruct
from qwen3_embeddings.redaction import Secret, SupportsSecret, hide, shown
from qwen3_embeddings.request import Output, Plan, Texts, positions_of, slices
from qwen3_embeddings.stream import AsyncStream, Stream, ahead
from qwen3_embeddings.vectors import Vectors, check_dimensions

if TYPE_CHECKING:
    import ssl

Role = Literal["query", "document"]

# Engine arguments that steer speed and memory and can change no vector.
_NEUTRAL = frozenset(
    {"gpu_memory_utilization", "kv_cache_memory_bytes", "max_num_batched_tokens", "max_num_seqs"}
    | {"async_scheduling"}
    | {"enable_prefix_caching", "enforce_eager", "disable_log_stats", "scheduling_policy"}
    | {"device", "download_dir", "hf_token", "use_tqdm_on_load"}
)


class Embedder:
    """Qwen3-Embedding vectors, from vLLM in this process or from a server.

    Thread-safe, and usable from any number of event loops; embedders of one configuration share
    one engine, which starts at the first call and stops at `close` or at exit.

    Args:
        model: hub id or folder. Default: QWEN3_EMBEDDINGS_MODEL, else what the server serves,
            else Qwen/Qwen3-Embedding-0.6B.
        dimensions: Matryoshka size, 32 to native; None for native, whatever a server's default.
        task: name of a preset in `TASKS`, or a `Task`.
        query_instruction: free text in place of the task's; then documents stay bare. An empty
            string embeds queries without any instruction.
        document_instruction: free text for documents. Default: none, or the task's own when it is
            symmetric.
        base_url: root of an OpenAI-compatible server, e.g. ``http://localhost:8000/v1``.
            Default: QWEN3_EMBEDDINGS_BASE_URL; without either, vLLM runs in this process.
        api_key: the server's key. Default: QWEN3_EMBEDDINGS_API_KEY. Never shown or pickled.
        engine: "vllm", "server" or "reference"; None chooses by `base_url`.
        dtype: "auto" (the checkpoint's own), "bfloat16" or "float32", for engines in this
            process; a server has chosen its own.
        overflow: what to do with a text longer than the model's context: "error", "truncate"
            (keeps instruction and end token) or "mean" (pieces, weighted by their tokens).
        on_error: when a text cannot be embedded, "stop" at once, or "finish" all others first and
            then raise `TextsFailedError`. Either error carries what was computed. Errors of the
            engine or server always stop.
        batch_size: most texts handed to the engine at once (its own choice), or sent to a server in
            one request (64).
        max_concurrency: most requests to a server under way at once, for queries and for documents
            each (16); fewer while it answers 429 to more.
        timeout: seconds one request to a server may take.
        max_retries: further attempts after what may pass (408, 429 but to one request too many, 5xx
            but 501, broken connections).
        restart_timeout: seconds documents wait for a server that answered before and is down
            now, as while it restarts. Queries fail after `max_retries`: somebody waits for them.
        default_headers: sent with every request to a server. Values that are secret (a SecretStr,
            or under a name like Authorization, Cookie, X-Api-Key) are, like `api_key`, never
            shown or pickled.
        verify: TLS verification: True, False, a CA file, or an `ssl.SSLContext`.
        engine_kwargs: further arguments of the engine, by the engine's own names: vLLM's
            `EngineArgs`, or sentence-transformers' `SentenceTransformer`. They are part of
            fingerprints and pickles: tokens are refused here, and so is ``trust_remote_code``.

    Raises:
        ConfigurationError: an argument has a value that cannot work.
        DimensionsError: `dimensions` is out of range.
        UnknownTaskError: `task` is not a preset.
        MissingDependencyError: the engine's extra is not installed.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        dimensions: int | None = None,
        task: str | Task = "web_search",
        query_instruction: str | None = None,
        document_instruction: str | None = None,
        base_url: str | None = None,
        api_key: str | SupportsSecret | None = None,
        engine: str | None = None,
        dtype: str = "auto",
        overflow: str = "error",
        on_error: str = "stop",
        batch_size: int | None = None,
        max_concurrency: int | None = None,
        timeout: float = 60.0,
        max_retries: int = 4,
        restart_timeout: float = 180.0,
        default_headers: Mapping[str, str | SupportsSecret] | None = None,
        verify: bool | str | ssl.SSLContext = True,
        engine_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        settings = {k: v for k, v in locals().items() if k not in {"self", "api_key"}}
        check(settings)
        settings["default_headers"] = hide(default_headers or {})
        environment = os.environ.get
        if engine in {None, "server"}:
            base_url = base_url or environment("QWEN3_EMBEDDINGS_BASE_URL")
        self.engine = engine_kind(engine, base_url)
        model = model or environment("QWEN3_EMBEDDINGS_MODEL") or None
        self.model = model if self.engine == "server" else model or models.DEFAULT_MODEL
        self.base_url = base_url
        self.dtype = dtype
        self.overflow = policies.check_overflow(overflow)
        self.on_error = on_error
        known = models.MODELS.get(self.model or "")
        native = known.dimensions if known else None
        self.dimensions = None if dimensions is None else check_dimensions(dimensions, native)
        self.batch_size = batch_size
        self._choose_instructions(task, query_instruction, document_instruction)
        self._engine_kwargs = dict(engine_kwargs or {})
        # Pickled as resolved here: another process's environment must not make it another model.
        resolved = {"model": self.model, "base_url": self.base_url, "engine": self.engine}
        self._settings = settings | resolved
        key = api_key or environment("QWEN3_EMBEDDINGS_API_KEY")
        self._lease = Lease(self.engine, self._engine_arguments(key))

    def _engine_arguments(self, key: str | SupportsSecret | None) -> dict[str, Any]:
        """What the engine is made with."""
        if self.engine != "server":
            passed = {"model": self.model, "dtype": self.dtype}
            return passed | {"engine_kwargs": self._engine_kwargs}
        if self._engine_kwargs:
            raise ConfigurationError(
                "engine_kwargs are for an engine in this process. Set a server's where it starts."
            )
        mine = self._settings
        names = ("timeout", "max_retries", "restart_timeout", "default_headers", "verify")
        return {name: mine[name] for name in (*names, "model", "base_url")} | {
            "api_key": Secret.of(key),
            "max_concurrency": mine["max_concurrency"] or 16,
            "batch_size": mine["batch_size"] or 64,
        }

    # Embedding.

    def encode_query(self, texts: Iterable[str], *, show_progress: bool = False) -> Vectors:
        """Embed queries, each under the task's instruction.

        Args:
            texts: a list of strings, not a string.
            show_progress: draw a progress bar.

        Returns:
            float32 array (n, dimensions) of unit rows, in the order of `texts`; (0, dimensions)
            for no texts.

        Raises:
            TextTypeError: a text is not a string.
            TextEncodingError: a text holds a lone surrogate.
            TextTooLongError: a text is over the context and `overflow` is "error".
            TextRefusedError: the server refuses a text and takes others.
            InvalidVectorError: the engine answered NaN, infinity or zeros to a text.
            TextsFailedError: in place of these, after all other texts, with on_error="finish".
            DimensionsError: `dimensions` is over what the engine's model has.
            EngineError: the engine or server failed; the subclass says how.

        Whatever of these comes after something was computed carries it as `error.computed`.
        """
        return event_loop.run(self._encode(self._check(texts, "query"), show_progress))

    def encode_document(self, texts: Iterable[str], *, show_progress: bool = False) -> Vectors:
        """Embed documents: bare, or in a symmetric task under its instruction.

        Arguments, result and errors are those of `encode_query`.
        """
        return event_loop.run(self._encode(self._check(texts, "document"), show_progress))

    async def aencode_query(self, texts: Iterable[str], *, show_progress: bool = False) -> Vectors:
        """`encode_query` for coroutines; cancelling it drops its texts from the engine."""
        return await event_loop.wait(self._encode(self._check(texts, "query"), show_progress))

    async def aencode_document(
        self, texts: Iterable[str], *, show_progress: bool = False
    ) -> Vectors:
        """`encode_document` for coroutines; cancelling it drops its texts from the engine."""
        return await event_loop.wait(self._encode(self._check(texts, "document"), show_progress))

    def stream(self, texts: Iterable[str], *, role: Role = "document", size: int = 2048) -> Stream:
        """Embed texts of any number, in order, in bounded memory: nothing is read far ahead.

        Args:
            texts: any iterable of strings; it is read as vectors are taken.
            role: "document" or "query".
            size: texts in a batch.

        Returns:
            An iterator of float32 arrays (size, dimensions) of unit rows; the last may have fewer.
            An error of `encode_document` takes the place of the batch it concerns: positions count
            within that batch, a note names its first text, and the iterator can be asked for the
            next batch.
        """
        return Stream(self._ahead(texts, role, size))

    def astream(
        self, texts: Iterable[str], *, role: Role = "document", size: int = 2048
    ) -> AsyncStream:
        """`stream` for coroutines. Reading `texts` should not block: it is read on your loop."""
        return AsyncStream(self._ahead(texts, role, size))

    def _ahead(
        self, texts: Iterable[str], role: Role, size: int
    ) -> Generator[tuple[int, Future[Vectors]]]:
        _check_list(texts)
        check_count("size", size)
        self._instruction(role)  # a wrong role is said before anything is read

        async def encode(batch: list[str]) -> Vectors:
            return await self._encode(self._check(batch, role), show_progress=False)

        return ahead(texts, size, lambda batch: event_loop.submit(encode(batch)))

    # The engine.

    def start(self) -> Served:
        """Start the engine, or reach the server, before the first call; say what it serves."""
        return event_loop.run(self._lease.engine.start())

    async def astart(self) -> Served:
        """`start` for coroutines."""
        return await event_loop.wait(self._lease.engine.start())

    def doctor(self, *, reference: str | None = None) -> Report:
        """Check that the engine returns the vectors Qwen3-Embedding should return.

        Sends it some 150 texts; an engine that fails is reported, not raised.

        Args:
            reference: hub id or folder of the checkpoint, to compare with sentence-transformers
                running it in this process.
        """
        return event_loop.run(self._examine(reference))

    async def adoctor(self, *, reference: str | None = None) -> Report:
        """`doctor` for coroutines."""
        return await event_loop.wait(self._examine(reference))

    async def _examine(self, reference: str | None) -> Report:
        # Here: with the engines it judges it takes a fifth of the package's import time.
        from qwen3_embeddings.doctor.runner import examine

        return await examine(
            self._lease.engine,
            model=self.model,
            dimensions=self.dimensions,
            instruction=self._instruction("query"),
            reference=reference,
        )

    def with_task(
        self,
        task: str | Task = "web_search",
        *,
        query_instruction: str | None = None,
        document_instruction: str | None = None,
    ) -> Self:
        """A sibling for another task on the same engine; closing either closes both.

        Raises:
            UnknownTaskError: `task` is not a preset.
        """
        sibling = self.__copy__()
        sibling._choose_instructions(task, query_instruction, document_instruction)
        return sibling

    def close(self) -> None:
        """Release the engine; it stops when no other open embedder uses it. May be repeated."""
        if engine := self._lease.detach():
            event_loop.run(engine.close())

    async def aclose(self) -> None:
        """`close` for coroutines."""
        if engine := self._lease.detach():
            await event_loop.wait(engine.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    # Identity.

    def fingerprint(self, role: Role) -> str:
        """A stable name for the vectors of one role, fit as a cache namespace or folder name.

        It changes with anything that can change a vector (model, size, instruction, precision,
        overflow policy, engine arguments) and with nothing else: the same model gives the same
        vectors on every engine. Roles that embed alike share it. With `model` left out the
        server is asked. Of a folder its contents count, of a hub id the id alone. Not seen is
        what a server keeps to itself: another precision or quantised weights, and a context
        shorter than the model's, to which `overflow` cuts sooner.
        """
        name = self.model or self.start().model
        shape = models.known_shape(name)
        neutral = _NEUTRAL if self.overflow != "error" else _NEUTRAL | {"max_model_len"}
        kwargs = {k: v for k, v in self._engine_kwargs.items() if k not in neutral}
        dtype = "auto" if self.engine == "server" else self.dtype  # a server has chosen its own
        size = self.dimensions or (shape.dimensions if shape else "native")
        parts = {
            "model": models.weights_digest(name),
            "dimensions": size,
            "template": instruct(self._instruction(role), ""),
            "dtype": shape.precision(dtype) if shape else dtype,
            "overflow": self.overflow,
            "engine_kwargs": kwargs,
        }
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode())
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", name.rstrip("/").rsplit("/", 1)[-1])
        return f"{slug}-{size}-{digest.hexdigest()[:16]}"

    def __repr__(self) -> str:
        shown = {"model": self.model, "engine": self.engine, "dimensions": self.dimensions}
        shown |= {"task": self.task.name}
        return f"Embedder({', '.join(f'{k}={v!r}' for k, v in shown.items())})"

    def __copy__(self) -> Self:
        """Another handle on the same engine."""
        sibling = object.__new__(type(self))
        sibling.__dict__.update(self.__dict__)
        return sibling

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """The same as a copy: an engine is not copied, and a key travels within the process."""
        return self.__copy__()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as its settings, without key and secret headers.

        The other process reads the key from its environment.
        """
        others = {
            "default_headers": shown(self._settings["default_headers"]),
            "task": self.task,
            "query_instruction": self.query_instruction,
            "document_instruction": self.document_instruction,
        }
        return _rebuild, (type(self), self._settings | others)

    # How a text goes.

    def _choose_instructions(
        self, task: str | Task, query_instruction: str | None, document_instruction: str | None
    ) -> None:
        self.task = find_task(task)
        if query_instruction is not None:
            self.task = Task("custom", query_instruction)
        self.query_instruction = query_instruction
        self.document_instruction = document_instruction

    def _instruction(self, role: Role) -> str:
        if role not in {"query", "document"}:
            raise ConfigurationError(f"role={role!r} is not a role. Use 'query' or 'document'.")
        if role == "query" or (self.task.symmetric and self.document_instruction is None):
            return self.task.instruction
        return self.document_instruction or ""

    def _check(self, texts: Iterable[str], role: Role) -> Texts:
        """The prompts of a call, or a typed error before anything is computed."""
        failures: list[TextError] = []
        _check_list(texts)
        items = list(texts)
        wrong = [i for i, text in enumerate(items) if not isinstance(text, str)]
        if wrong:
            kind = type(items[wrong[0]]).__name__
            said = f"{kind} is not str: decode, convert or leave it out."
            self._keep(failures, TextTypeError(said, wrong))
            items = [text if isinstance(text, str) else "" for text in items]
        instruction = self._instruction(role)
        prompts = [instruct(instruction, text) for text in items]
        lengths = [_token_bound(prompt) for prompt in prompts]
        torn = [i for i, length in enumerate(lengths) if length < 0]
        if torn:
            said = (
                "a lone surrogate (half of a character) cannot be tokenized. Read the source with "
                "the right encoding, or text.encode('utf-8', 'replace').decode()."
            )
            self._keep(failures, TextEncodingError(said, torn))
        return Texts(prompts, lengths, instruction, role == "query", failures)

    def _keep(self, failures: list[TextError], error: TextError) -> None:
        """Raise an error about texts, or keep it for the end."""
        if self.on_error == "stop":
            raise error
        failures.append(error)

    async def _encode(self, texts: Texts, show_progress: bool) -> Vectors:
        known = models.MODELS.get(self.model or "") if self.engine != "server" else None
        if not texts.prompts and (self.dimensions or known):
            width = self.dimensions or (known.dimensions if known else 0)
            return np.empty((0, width), dtype=np.float32)
        engine = self._lease.engine
        try:
            served = await engine.start()
        except Qwen3EmbeddingsError as error:  # which every call that waits for the start gets
            raise error.carrying(None) from error.__cause__
        size = served.native
        if self.dimensions is not None:
            size = check_dimensions(self.dimensions, served.native)
        if not texts.prompts:
            return np.empty((0, size), dtype=np.float32)
        self._check_served(texts, served)
        plan = await self._plan(engine, texts, served.context)
        # Pieces are averaged at full size, so that cutting and averaging commute.
        output = Output(plan, served.native if plan.split else size, texts.failures)
        total = len(texts.prompts)
        try:
            await self._embed(engine, output, texts.urgent, show_progress)
        except Qwen3EmbeddingsError as error:
            raise error.carrying(output.texts(size, total)) from error.__cause__
        computed = output.texts(size, total)
        if output.failures:
            one = self.on_error == "stop"
            failure = output.failures[0] if one else TextsFailedError.of(output.failures)
            raise failure.carrying(computed)
        return computed.vectors

    def _check_served(self, texts: Texts, served: Served) -> None:
        """Refuse what this engine would answer with the vectors of other texts."""
        if served.context is None and self.overflow != "error":
            raise ConfigurationError(
                f"overflow={self.overflow!r} needs the context, and this server does not tell its "
                "own. Use overflow='error' and split the texts, or a vLLM or llama.cpp server."
            )
        altered = [i for i, prompt in enumerate(texts.prompts) if prompt != prompt.strip()]
        if served.strips and altered:
            said = (
                "the server takes outer white space off, and would answer with the vector of "
                "another text. Strip the text yourself, or use a server that reads it as it is."
            )
            self._keep(texts.failures, TextError(said, altered))

    async def _plan(self, engine: Engine, texts: Texts, context: int | None) -> Plan:
        """What to embed of each text, after the overflow policy.

        Only texts that could be over the context are tokenized ahead of the engine.
        """
        prompts: list[Prompt] = list(texts.prompts)
        suspects = [i for i, n in enumerate(texts.lengths) if context and n > context]
        encodings: dict[int, list[int]] = {}
        if context and suspects:
            ids = await self._tokenize(engine, texts, suspects)
            encodings = {i: tokens for i, tokens in ids.items() if len(tokens) > context}
        if context and encodings:
            if self.overflow == "mean":
                return await self._split(engine, texts, encodings, context)
            if self.overflow == "truncate":
                for i, tokens in encodings.items():
                    prompts[i] = policies.cut(tokens, context)
            else:
                try:
                    check_lengths([encodings.get(i, []) for i in range(len(prompts))], context)
                except TextTooLongError as error:
                    self._keep(texts.failures, error)
        failed = positions_of(texts.failures)
        owners = [i for i in range(len(prompts)) if i not in failed]
        return Plan([prompts[i] for i in owners], owners, [1.0] * len(owners))

    async def _split(
        self, engine: Engine, texts: Texts, encodings: dict[int, list[int]], context: int
    ) -> Plan:
        """The plan of ``overflow="mean"``: pieces of the over-long texts, each instructed."""
        template = (await engine.tokenize([instruct(texts.instruction, "")], texts.urgent))[0][:-1]
        plan = Plan([], [], [], split=True)
        failed = positions_of(texts.failures)
        for i, prompt in enumerate(texts.prompts):
            if i in failed:
                continue
            pieces: list[Prompt] = [prompt]
            head = 0
            if i in encodings:
                head = policies.shared_head(encodings[i], template)
                pieces = list(policies.split(encodings[i], context, head))
            plan.prompts.extend(pieces)
            plan.owners.extend([i] * len(pieces))
            plan.weights.extend(float(max(len(piece) - head - 1, 1)) for piece in pieces)
        return plan

    async def _tokenize(
        self, engine: Engine, texts: Texts, positions: list[int]
    ) -> dict[int, list[int]]:
        """Token ids of some of the texts, by position; without those that have none."""
        try:
            prompts = [texts.prompts[i] for i in positions]
            ids = await engine.tokenize(prompts, texts.urgent)
            return dict(zip(positions, ids, strict=True))
        except (ServerError, TextRefusedError) as error:
            if self.overflow == "error":
                return {}  # the server itself refuses what is too long
            if isinstance(error, TextRefusedError):
                refused = {positions[i] for i in error.positions}
                self._keep(texts.failures, error.at(refused))
                others = [i for i in positions if i not in refused]
                return await self._tokenize(engine, texts, others) if others else {}
            if not isinstance(error, (ServerResponseError, ServerRefusedError)):
                raise
            raise ConfigurationError(
                f"overflow={self.overflow!r} needs the server's tokenizer, and this server has no "
                f"/tokenize ({error}). Use overflow='error' and split the texts, or a vLLM server."
            ) from error

    async def _embed(
        self, engine: Engine, output: Output, urgent: bool, show_progress: bool
    ) -> None:
        """Fill `output`, chunk by chunk, several chunks in flight."""
        prompts = output.plan.prompts
        free = asyncio.Semaphore(engine.chunks_in_flight)

        async def embed_chunk(chunk: slice) -> None:
            rows = output.left(range(chunk.start, chunk.stop))
            while rows:  # again while some have neither a vector nor an error
                try:
                    async with free:
                        mine = [prompts[i] for i in rows]
                        answer = await engine.embed(mine, output.width, urgent)
                    output.put(rows, answer)
                except Qwen3EmbeddingsError as error:
                    output.fail(rows, error)
                if output.failures and self.on_error == "stop":
                    raise output.failures[0]
                left = output.left(rows)
                advance(len(rows) - len(left))
                rows = left

        chunks = list(slices(prompts, self.batch_size, engine))
        with _progress(len(prompts), show_progress) as advance:
            if len(chunks) == 1:  # most calls: a task of its own would cost as much as the rest
                return await embed_chunk(chunks[0])
            await event_loop.gather(map(embed_chunk, chunks))


@contextlib.contextmanager
def _progress(total: int, shown: bool) -> Iterator[Callable[[int], object]]:
    """What to call with a number of texts done; a hidden tqdm costs 0.1 ms to make."""
    if not shown:
        yield lambda _: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="Embedding", unit="text") as bar:
        yield bar.update


def _token_bound(text: str) -> int:
    """The most tokens a text can have, or -1 when a lone surrogate keeps it from having any.

    A byte-level tokenizer makes at most one token of a byte, and one end token. It reads the text
    in NFC, which can be longer than the text.
    """
    try:
        return 1 + len(text if text.isascii() else unicodedata.normalize("NFC", text).encode())
    except UnicodeEncodeError:
        return -1


def _check_list(texts: object) -> None:
    scalar = isinstance(texts, np.ndarray) and not texts.ndim
    if isinstance(texts, (str, bytes)) or scalar or not isinstance(texts, Iterable):
        raise TextTypeError(
            f"texts is {type(texts).__name__}, not a list of str. For one text write [text]."
        )


def _rebuild(cls: type[Embedder], settings: dict[str, Any]) -> Embedder:
    return cls(**settings)
