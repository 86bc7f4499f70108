"""From input files to shards: one stream of texts across all splits, so that no engine waits."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from qwen3_embeddings.corpus import readers, rejects
from qwen3_embeddings.corpus.chunks import Chunker
from qwen3_embeddings.corpus.errors import InputError, output_errors
from qwen3_embeddings.corpus.inputs import File
from qwen3_embeddings.corpus.options import Options
from qwen3_embeddings.corpus.progress import Counts, Progress
from qwen3_embeddings.corpus.readers import BATCH, Problem, Rows
from qwen3_embeddings.corpus.rejects import Reject
from qwen3_embeddings.corpus.shards import ShardWriter
from qwen3_embeddings.corpus.splits import Done, Split
from qwen3_embeddings.corpus.storage import Store
from qwen3_embeddings.embedder import Embedder
from qwen3_embeddings.errors import Qwen3EmbeddingsError, TextsFailedError, TextTooLongError
from qwen3_embeddings.vectors import Vectors

COMMITS_AHEAD = 2
"""Shards that may wait for the disk or the object store while the engine works on."""


Only = Mapping[int, frozenset[tuple[int, int | None]]]
"""Rows, and with chunks their numbers, by the start of their split."""


@dataclass(frozen=True)
class Work:
    """Open splits of one file.

    Attributes:
        file: the file.
        splits: the splits, in order.
        only: to retry rejects, the rows to embed.
        generations: to retry rejects, the generation to write, by the start of the split.
    """

    file: File
    splits: tuple[Split, ...]
    only: Only | None = None
    generations: Mapping[int, int] = field(default_factory=dict)


@dataclass
class _Piece:
    """A split on its path from the reader to its shard."""

    split: Split
    generation: int
    rejects: list[Reject] = field(default_factory=list)
    writer: ShardWriter | None = None
    failed: bool = False


class _Results:
    """Vectors in the order of the texts, taken in other portions than they come."""

    def __init__(self) -> None:
        self.count = 0
        self._parts: deque[tuple[Vectors, dict[int, Problem]]] = deque()

    def add(self, vectors: Vectors, problems: dict[int, Problem]) -> None:
        self._parts.append((vectors, problems))
        self.count += len(vectors)

    def take(self, count: int) -> tuple[Vectors, dict[int, Problem]]:
        """Return the next vectors, and what is wrong with some of them."""
        taken: list[Vectors] = []
        problems: dict[int, Problem] = {}
        self.count -= count
        while count:
            vectors, wrong = self._parts.popleft()
            used = min(count, len(vectors))
            place = sum(map(len, taken))
            problems |= {place + i: problem for i, problem in wrong.items() if i < used}
            taken.append(vectors[:used])
            if used < len(vectors):
                rest = {i - used: problem for i, problem in wrong.items() if i >= used}
                self._parts.appendleft((vectors[used:], rest))
            count -= used
        return taken[0] if len(taken) == 1 else np.concatenate(taken), problems


@dataclass(frozen=True)
class Pipeline:
    """Embeds the splits it is given.

    Args:
        store: the output.
        options: what the output holds.
        embedder: embeds the texts, with ``on_error="finish"``.
        schema: of all shards.
        metadata: key-value metadata of all shards.
        done: shards that are there.
        chunker: splits long texts, or None.
    """

    store: Store
    options: Options
    embedder: Embedder
    schema: pa.Schema
    metadata: Mapping[str, str]
    done: Done
    chunker: Chunker | None = None

    def run(self, works: Sequence[Work], progress: Progress) -> list[str]:
        """Embed all splits of `works`.

        Returns:
            What went wrong with each file that could not be read; the others are done.

        Raises:
            JobFailedError: the output cannot be written.
            EngineError: the engine or server failed.
        """
        return _Run(self, progress).run(works)


class _Run:
    """One call of `Pipeline.run`."""

    def __init__(self, job: Pipeline, progress: Progress) -> None:
        self.job, self.progress = job, progress
        self.failed: list[str] = []
        self.results = _Results()
        self.queue: deque[tuple[_Piece, Rows | None]] = deque()
        self.commits: deque[Future[None]] = deque()

    def run(self, works: Sequence[Work]) -> list[str]:
        texts = self._texts(works)
        stream = self.job.embedder.stream(texts, role=self.job.options.role, size=BATCH)
        try:
            with ThreadPoolExecutor(1) as pool, contextlib.closing(stream):
                while (batch := _next(stream)) is not None:
                    self.results.add(*batch)
                    self._drain(pool)
                self._drain(pool)
                self._settle(0)
        finally:
            for piece, _ in self.queue:
                if piece.writer:
                    piece.writer.abandon()
        return self.failed

    # Reading. The embedder calls this as it needs texts.

    def _texts(self, works: Sequence[Work]) -> Iterator[str]:
        for work in works:
            piece: _Piece | None = None
            try:
                for rows in readers.read(work.file, work.splits, self.job.options, self.job.done):
                    if piece is None or piece.split.place != rows.split.place:
                        if piece:
                            self.queue.append((piece, None))
                        piece = _Piece(rows.split, work.generations.get(rows.split.start, 0))
                    piece.split = rows.split
                    for part in self._parts(rows, work.only):
                        ready = self._ready(piece, part)
                        self.queue.append((piece, ready))
                        yield from ready.texts  # type: ignore[misc]  # no problems are left
            except InputError as error:
                self.failed.append(str(error))
                if piece:
                    piece.failed = True
            if piece:
                self.queue.append((piece, None))

    def _parts(self, rows: Rows, only: Only | None) -> Iterator[Rows]:
        """Yield what to embed: chunks, or all rows; when rejects are retried, these alone."""
        if only is None:
            yield from self.job.chunker.split(rows) if self.job.chunker else (rows,)
            return
        wanted = only[rows.split.start]
        numbers = {row for row, _ in wanted}
        mine = rows.pick([i for i, row in enumerate(rows.rows) if row in numbers])
        for part in self.job.chunker.split(mine) if self.job.chunker else (mine,):
            chunks = [s[0] for s in part.spans] or itertools.repeat(None)
            keys = zip(part.rows, chunks, strict=False)
            yield part.pick([i for i, key in enumerate(keys) if key in wanted])
        yield replace(rows.pick([]), weight=rows.weight)

    def _ready(self, piece: _Piece, rows: Rows) -> Rows:
        """Return the rows that have a text; the others become rejects."""
        good = []
        for i, text in enumerate(rows.texts):
            if isinstance(text, Problem):
                piece.rejects.append(Reject.of(rows, i, text))
            else:
                good.append(i)
        if len(good) == len(rows.texts):
            return rows
        return replace(rows.pick(good), weight=rows.weight)

    # Writing.

    def _drain(self, pool: ThreadPoolExecutor) -> None:
        """Write all rows whose vectors are there."""
        while self.queue:
            piece, rows = self.queue[0]
            if rows is not None and len(rows.texts) > self.results.count:
                return
            if rows is None:
                self._close(piece, pool)
            else:
                with output_errors(self.job.store.url):
                    self._write(piece, rows)
            self.queue.popleft()

    def _write(self, piece: _Piece, rows: Rows) -> None:
        if piece.writer is None:
            piece.writer = self._writer(piece)
        good = list(range(len(rows.texts)))
        if good:
            vectors, problems = self.results.take(len(good))
            for i, problem in problems.items():
                piece.rejects.append(Reject.of(rows, i, problem, self._tokens(rows, i, problem)))
            good = [i for i in good if i not in problems]
            if problems:
                rows, vectors = replace(rows.pick(good), weight=rows.weight), vectors[good]
            piece.writer.add(self._kept(rows), vectors)
        self.progress.add(Counts(rows=len(good), weight=rows.weight))

    def _kept(self, rows: Rows) -> Rows:
        """Return rows whose kept text column holds the chunks, if there are chunks."""
        name = self.job.options.text_column
        if not rows.spans or name not in rows.columns:
            return rows
        return replace(rows, columns=rows.columns | {name: pa.array(rows.texts, pa.string())})

    def _tokens(self, rows: Rows, index: int, problem: Problem) -> int | None:
        """Return the length of a text that was too long, where it can be counted."""
        text = rows.texts[index]
        if problem.error == TextTooLongError.__name__ and isinstance(text, str):
            with contextlib.suppress(Qwen3EmbeddingsError):  # a server may have no /tokenize
                return self.job.embedder.count_tokens(text, role=self.job.options.role)
        return None

    def _writer(self, piece: _Piece) -> ShardWriter:
        job = self.job
        return ShardWriter(job.store, job.schema, job.options.dtype, job.metadata, piece.generation)

    def _close(self, piece: _Piece, pool: ThreadPoolExecutor) -> None:
        """Commit a shard in the background, or drop a split that could not be read."""
        writer = piece.writer
        if writer is None:  # it could not be read from its start
            return
        if piece.failed or (piece.generation and not writer.rows):
            writer.abandon()
            return
        writer.rejects = piece.rejects
        self._settle(COMMITS_AHEAD - 1)
        self.commits.append(pool.submit(self._commit, writer, piece.split))

    def _commit(self, writer: ShardWriter, split: Split) -> None:
        with output_errors(self.job.store.url):
            writer.commit(split)
        self.progress.add(Counts(shards=1, rejects=len(writer.rejects)))

    def _settle(self, most: int) -> None:
        """Wait until at most so many commits are left, and raise what one of them raised."""
        while len(self.commits) > most:
            self.commits.popleft().result()


def _next(stream: Iterator[Vectors]) -> tuple[Vectors, dict[int, Problem]] | None:
    """Return the next vectors and what is wrong with some of them, or None at the end."""
    try:
        return next(stream), {}
    except StopIteration:
        return None
    except TextsFailedError as error:
        problems = rejects.problems(error)
        if error.computed is None:
            return np.zeros((len(problems), 1), np.float32), problems
        size = error.computed.vectors.shape[1]
        vectors = np.zeros((error.computed.total, size), np.float32)
        vectors[error.computed.positions] = error.computed.vectors
        return vectors, problems
