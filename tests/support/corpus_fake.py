"""An embedder for tests of corpus jobs in which the engine is not on trial.

Its vectors are a function of the text alone, so a row that was mixed up shows.
"""

from __future__ import annotations

import copy
import hashlib
import os
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from qwen3_embeddings import (
    Computed,
    InvalidVectorError,
    Served,
    ServerConnectionError,
    TextEncodingError,
    TextError,
    TextsFailedError,
    TextTooLongError,
)
from qwen3_embeddings.engines.base import Usage
from qwen3_embeddings.stream import Stream, ahead

Vectors = NDArray[np.float32]
SIZE = 32

_ERRORS: dict[str, TextError] = {
    "TOO LONG": TextTooLongError("99 tokens, over the context of 9."),
    "NAN": InvalidVectorError("the engine returned NaN."),
}


def vector(text: str, size: int = SIZE) -> Vectors:
    """The unit vector of a text."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    values = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    unit: Vectors = values / np.linalg.norm(values)
    return unit


class FakeEmbedder:
    """What a corpus job uses of `Embedder`.

    Texts with "TOO LONG" or "NAN" are rejected, unless `forgiving`; one with "DEAD" ends the
    engine, and one with "KILL" the process.
    """

    engine = "vllm"
    on_error = "stop"

    def __init__(
        self,
        *,
        size: int = SIZE,
        model: str = "fake",
        delay: float = 0.0,
        forgiving: bool = False,
        may_start: bool = True,
    ) -> None:
        self.size, self.model, self.delay = size, model, delay
        self.dimensions = None
        self.forgiving, self.may_start = forgiving, may_start
        self._count = [0]  # shared with copies

    @property
    def texts(self) -> int:
        """Texts that were embedded or rejected."""
        return self._count[0]

    def fingerprint(self, role: str) -> str:
        return f"{self.model}-{self.size}-{role}"

    def _instruction(self, role: str) -> str:
        return "find it" if role == "query" else ""

    def start(self) -> Served:
        assert self.may_start, "the engine must not start"
        return Served("fake", self.model, self.size, self.size, None)

    @property
    def embedding_dimension(self) -> int:
        return self.size

    @property
    def usage(self) -> Usage:
        return Usage(self.texts, 3 * self.texts)

    def count_tokens(self, texts: str | list[str], *, role: str) -> int | list[int]:
        return len(texts.split()) if isinstance(texts, str) else [len(t.split()) for t in texts]

    def _finishing(self) -> FakeEmbedder:
        twin = copy.copy(self)
        twin.on_error = "finish"
        return twin

    def close(self) -> None:
        return None

    def stream(self, texts: Iterable[str], *, role: str, size: int) -> Stream:
        pool = ThreadPoolExecutor(1)

        def begin(batch: list[str]) -> Future[Vectors]:
            return pool.submit(self._encode, batch)

        return Stream(ahead(texts, size, begin))

    def _encode(self, texts: list[str]) -> Vectors:
        assert self.on_error == "finish"
        time.sleep(self.delay * len(texts))
        failures: list[TextError] = []
        for i, text in enumerate(texts):
            if "DEAD" in text:
                raise ServerConnectionError("no server answers.")
            if "KILL" in text:
                os._exit(9)
            if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
                failures.append(TextEncodingError("a lone surrogate.", [i]))
            for word, error in _ERRORS.items():
                if word in text and not self.forgiving:
                    failures.append(error.at([i]))
        bad = {i for failure in failures for i in failure.positions}
        good = [i for i in range(len(texts)) if i not in bad]
        vectors = np.zeros((len(good), self.size), np.float32)
        for row, i in enumerate(good):
            vectors[row] = vector(texts[i], self.size)
        self._count[0] += len(texts)
        if failures:
            computed = Computed(np.array(good, dtype=np.intp), vectors, len(texts))
            raise TextsFailedError.of(failures).carrying(computed)
        return vectors
