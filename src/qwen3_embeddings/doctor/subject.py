"""What is checked, and the texts that are sent to it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qwen3_embeddings.doctor.compare import distance
from qwen3_embeddings.engines.base import Engine, Prompt, Served
from qwen3_embeddings.errors import ServerRefusedError, TextRefusedError, TextTooLongError
from qwen3_embeddings.vectors import Vectors

REFUSALS = (TextTooLongError, TextRefusedError, ServerRefusedError)
"""What a server says that does not take a prompt."""

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
"""What goes wrong elsewhere: "import" is NaN in float16, white space is stripped."""


class CannotTellError(Exception):
    """A check cannot tell; the message says why."""


@dataclass(frozen=True)
class Subject:
    """What is checked, and what the checks need of it.

    Attributes:
        engine: the engine.
        served: what it serves.
        model: the model's name as the user gave it.
        dimensions: a size the user wants, or None.
        instruction: the query instruction in use.
        reference: hub id or folder to compare with, or None.
    """

    engine: Engine
    served: Served
    model: str | None
    dimensions: int | None
    instruction: str
    reference: str | None

    async def rows(self, *prompts: Prompt, dimensions: int | None = None) -> Vectors:
        """Raw rows of one call; nothing is normalised here."""
        return await self.engine.embed(list(prompts), dimensions, False)

    async def distance(self, one: Prompt, other: Prompt) -> float:
        """1 - cosine of two prompts, each sent alone."""
        return distance(await self.rows(one), await self.rows(other))

    @property
    def published(self) -> str | None:
        """Size of the published model that is served by its name: "0.6b", "4b", "8b" or None."""
        names = f"{self.model} {self.served.model}"
        match = re.search(r"qwen3-embedding-(0\.6b|4b|8b)", names, re.IGNORECASE)
        return match[1].lower() if match else None

    @property
    def context(self) -> int:
        """The longest input in tokens, where nothing is said the family's."""
        return self.served.context or 32768
