"""What a job would need: tokens, hours and bytes, from a sample of its rows."""

from __future__ import annotations

import contextlib
import itertools
import time
from dataclasses import dataclass

from qwen3_embeddings.corpus import readers
from qwen3_embeddings.corpus.job import Job, Plan
from qwen3_embeddings.corpus.progress import duration
from qwen3_embeddings.corpus.readers import Rows
from qwen3_embeddings.embedder import Embedder
from qwen3_embeddings.errors import TextsFailedError

PLACES = 20
"""Splits that the sample comes from."""

PER_PLACE = 50
"""Rows of the sample from one split."""

BATCHES = 32
"""Batches read of a file that is read from its start: its position moves in large steps."""

_BYTES = {"float32": 4.0, "float16": 2.0, "int8": 1.0, "binary": 0.125}


@dataclass(frozen=True)
class Estimate:
    """What the open part of a job needs.

    Attributes:
        rows: rows of output, chunks counted one by one.
        tokens: tokens to embed.
        tokens_per_second: measured on the sample, or as given.
        bytes: of vectors on disk.
        sample: texts that were tokenized.
        price_per_hour: as given.
    """

    rows: int
    tokens: int
    tokens_per_second: float
    bytes: int
    sample: int
    price_per_hour: float | None = None

    @property
    def seconds(self) -> float:
        """Time to embed at that rate."""
        return self.tokens / self.tokens_per_second

    def __str__(self) -> str:
        said = (
            f"about {self.rows:,} rows and {self.tokens:,} tokens (from {self.sample:,} sampled "
            f"texts), {duration(self.seconds)} at {self.tokens_per_second:,.0f} tokens/s, "
            f"{self.bytes / 1e9:,.2f} GB of vectors"
        )
        if self.price_per_hour is None:
            return said
        cost = self.seconds / 3600 * self.price_per_hour
        return f"{said}, {cost:,.2f} at {self.price_per_hour:,.2f} per hour"


def estimate(
    job: Job,
    plan: Plan,
    *,
    tokens_per_second: float | None = None,
    price_per_hour: float | None = None,
) -> Estimate:
    """Tokenize a sample of what is open, and measure the engine with it unless a rate is given.

    Args:
        job: the job.
        plan: its plan.
        tokens_per_second: rate of the machine that will embed.
        price_per_hour: of that machine, in any currency.
    """
    texts: list[str] = []
    sampled = 0
    for rows in _sample(job, plan):
        texts += [text for text in rows.texts if isinstance(text, str)]
        sampled += rows.weight
    tokens = sum(job.embedder.count_tokens(texts, role=job.options.role))
    scale = plan.open_weight / sampled if sampled else 0.0
    if tokens_per_second is None:
        tokens_per_second = _rate(job.embedder, texts, tokens)
    size = job.embedder.embedding_dimension
    count = round(len(texts) * scale)
    return Estimate(
        count,
        round(tokens * scale),
        tokens_per_second,
        round(count * size * _BYTES[job.options.dtype]),
        len(texts),
        price_per_hour,
    )


def _sample(job: Job, plan: Plan) -> list[Rows]:
    """Return a few rows, or their chunks, of splits all over the corpus."""
    every = [(work, split) for work in plan.works for split in work.splits]
    chosen = every[:: max(1, len(every) // PLACES)]
    sample = []
    for work, split in chosen:
        batches = readers.read(work.file, [split], job.options, plan.done)
        seen = list(itertools.islice(batches, BATCHES if work.file.sequential else 1))
        count = sum(len(rows.rows) for rows in seen)
        few = seen[0].pick(range(min(PER_PLACE, len(seen[0].rows))))
        weight = sum(rows.weight for rows in seen)  # also of a split inside one long line
        few.weight = round(weight * len(few.rows) / count) if count else weight
        sample += list(job.chunker.split(few)) if job.chunker else [few]
    return sample


def _rate(embedder: Embedder, texts: list[str], tokens: int) -> float:
    """Return tokens per second of the engine, without its start and its first batch."""
    embedder.start()
    for measured in (texts[:8], texts):
        start = time.perf_counter()
        with contextlib.suppress(TextsFailedError):
            embedder.encode_document(measured)
        seconds = time.perf_counter() - start
    return max(tokens, 1) / seconds
