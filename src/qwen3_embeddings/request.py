"""State of one call: validated texts, the prompts to embed, and partial results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qwen3_embeddings import long_texts
from qwen3_embeddings.engines.base import Engine, Prompt
from qwen3_embeddings.errors import (
    Computed,
    InvalidVectorError,
    Qwen3EmbeddingsError,
    ServerResponseError,
    TextError,
)
from qwen3_embeddings.vectors import Vectors, normalize


@dataclass(frozen=True)
class Texts:
    """Validated input of a call.

    Attributes:
        prompts: what the engine reads of each text.
        lengths: upper bound of the tokens of each prompt.
        instruction: instruction of the role; empty for none.
        urgent: whether the texts are queries.
        failures: errors about texts that ``on_error="finish"`` reports at the end. These texts are
            not embedded.
    """

    prompts: list[str]
    lengths: list[int]
    instruction: str
    urgent: bool
    failures: list[TextError]


@dataclass(frozen=True)
class Plan:
    """What to embed: one prompt per text, or under ``overflow="mean"`` pieces of some texts.

    Attributes:
        prompts: texts or token ids to embed.
        owners: for each prompt the position of its text.
        weights: for each prompt its weight in the mean of its text.
        split: whether some texts have several prompts.
    """

    prompts: list[Prompt]
    owners: list[int]
    weights: list[float]
    split: bool = False


@dataclass
class Output:
    """The vectors of a plan's prompts as far as they are computed, and the texts that failed.

    Attributes:
        plan: what to embed.
        width: dimensions of the vectors that the engine returns.
        failures: errors about texts so far.
        vectors: float32 (prompts, width); rows are valid where `done`.
        done: for each prompt whether its row is computed.
        failed: positions of the texts that failed.
    """

    plan: Plan
    width: int
    failures: list[TextError]
    vectors: Vectors = field(init=False)
    done: NDArray[np.bool_] = field(init=False)
    failed: set[int] = field(init=False)

    def __post_init__(self) -> None:
        count = len(self.plan.prompts)
        self.vectors = np.empty((count, self.width), dtype=np.float32)
        self.done = np.zeros(count, dtype=bool)
        self.failed = positions_of(self.failures)

    def left(self, rows: Iterable[int]) -> list[int]:
        """Return which of these prompts have no vector although their text has not failed."""
        return [i for i in rows if not self.done[i] and self.plan.owners[i] not in self.failed]

    def put(self, rows: Sequence[int], vectors: Vectors) -> None:
        """Store an engine's vectors for the prompts `rows`."""
        if vectors.shape != (len(rows), self.width):
            raise ServerResponseError(
                f"the engine answered shape {vectors.shape} for {(len(rows), self.width)}. Check "
                "that every replica behind base_url serves the same model."
            )
        try:
            self.vectors[rows] = normalize(vectors)
            self.done[rows] = True
        except InvalidVectorError as error:
            good = [i for i in range(len(rows)) if i not in error.positions]
            self.put([rows[i] for i in good], vectors[good])
            self.fail(rows, error)

    def fail(self, rows: Sequence[int], error: Qwen3EmbeddingsError) -> None:
        """Store what an error about the prompts `rows` carries, and which texts it names."""
        if error.computed is not None:
            self.put([rows[i] for i in error.computed.positions], error.computed.vectors)
        if not isinstance(error, TextError) or not error.positions:
            raise error
        self.failures.append(error.at(self.plan.owners[rows[i]] for i in error.positions))
        self.failed.update(self.failures[-1].positions)

    def texts(self, size: int, total: int) -> Computed:
        """Return the texts whose prompts are all done. Call it once: it moves rows."""
        owners = np.asarray(self.plan.owners, dtype=np.intp)
        whole = np.arange(len(owners))
        if not self.done.all():
            whole = np.flatnonzero(~np.isin(owners, owners[~self.done]))
        owners = owners[whole]
        if not self.plan.split:
            return Computed(owners, _moved_up(self.vectors, whole), total)
        positions = np.unique(owners)
        pieces = self.vectors if self.done.all() else self.vectors[whole]
        try:
            merged = long_texts.merge(pieces, owners, np.asarray(self.plan.weights)[whole])
            vectors = merged if self.width == size else normalize(merged[:, :size])
        except InvalidVectorError as error:  # pieces that cancel each other out
            self.failures.append(error.at(positions[list(error.positions)].tolist()))
            self.done[np.isin(self.plan.owners, self.failures[-1].positions)] = False
            return self.texts(size, total)
        return Computed(positions, vectors, total)


def slices(prompts: list[Prompt], batch_size: int | None, engine: Engine) -> Iterator[slice]:
    """Yield consecutive slices within the engine's limits of texts and of estimated tokens."""
    most = batch_size or engine.chunk_texts
    start = 0
    tokens = 0
    for i, prompt in enumerate(prompts):
        # About three characters per token in English and code; token ids are counted.
        cost = len(prompt) // 3 + 1 if isinstance(prompt, str) else len(prompt)
        if i > start and (i - start == most or tokens + cost > engine.chunk_tokens):
            yield slice(start, i)
            start, tokens = i, 0
        tokens += cost
    if prompts:
        yield slice(start, len(prompts))


def positions_of(failures: Iterable[TextError]) -> set[int]:
    """Return all positions that the errors name."""
    return {position for failure in failures for position in failure.positions}


def _moved_up(vectors: Vectors, rows: NDArray[np.intp]) -> Vectors:
    """Move the rows of `vectors` at rising `rows` to its beginning, without a copy of it."""
    if len(rows) < len(vectors):
        for start in range(0, len(rows), 4096):
            taken = rows[start : start + 4096]
            vectors[start : start + len(taken)] = vectors[taken]
    return vectors[: len(rows)]
