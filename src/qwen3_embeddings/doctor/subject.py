"""The engine under test, and the texts that are sent to it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qwen3_embeddings.doctor.compare import distance
from qwen3_embeddings.engines.base import Engine, Prompt, Served
from qwen3_embeddings.errors import ServerRefusedError, TextRefusedError, TextTooLongError
from qwen3_embeddings.vectors import Vectors

REFUSALS = (TextTooLongError, TextRefusedError, ServerRefusedError)
"""Errors with which an engine refuses a prompt."""

TEXTS = (
    "import numpy as np\n\nprint(np.eye(3))\n",
    "import",
    "What is the capital of China?",
    "The capital of China is Beijing.",
    "\n",
    "  indented,\tand\nbroken ",
    "中国的首都是北京。",
    "ما هي عاصمة الصين؟",
    "🙂",
    "def f(x):\n    return {'a': [x, 2]}\n",
    "1234567890",
    "word " * 40,
    "many more words than the others have, " * 8,
)
"""Texts known to fail elsewhere: "import" is NaN in float16, and some servers strip whitespace."""

_PUBLISHED = re.compile(
    r"qwen3-embedding-(0\.6b|4b|8b)(-(gguf|fp8|bf16|f16|f32|q\d\w*))*(\.gguf)?", re.IGNORECASE
)
"""A published name without its owner; quantized copies included, fine-tunes not."""


class CannotTellError(Exception):
    """A check cannot decide; the message says why and what to do."""


@dataclass(frozen=True)
class Subject:
    """The engine under test, and what the checks need to know about it.

    Attributes:
        engine: The engine.
        served: What the engine serves.
        model: The model's name as the user passed it, or None.
        dimensions: A size that the user wants, or None.
        instruction: The query instruction in use; may be empty.
        reference: Hub id or folder to compare with, or None.
    """

    engine: Engine
    served: Served
    model: str | None
    dimensions: int | None
    instruction: str
    reference: str | None

    async def rows(self, *prompts: Prompt, dimensions: int | None = None) -> Vectors:
        """Return the raw rows of one call, shape (n, dimensions), not normalized."""
        return await self.engine.embed(list(prompts), dimensions, False)

    async def distance(self, one: Prompt, other: Prompt) -> float:
        """Return 1 - cosine of two prompts, each sent alone."""
        return distance(await self.rows(one), await self.rows(other))

    @property
    def published(self) -> str | None:
        """Size of the published model that the name claims: "0.6b", "4b", "8b" or None."""
        for name in (self.model, self.served.model):
            last = (name or "").rstrip("/").rpartition("/")[2]
            if match := _PUBLISHED.fullmatch(last):
                return match[1].lower()
        return None

    @property
    def context(self) -> int:
        """Longest input in tokens; 32,768 (the whole family's) if the engine does not say."""
        return self.served.context or 32768
