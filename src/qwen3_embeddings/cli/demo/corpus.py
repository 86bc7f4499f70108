"""The demo corpus: passages in English, Chinese and code on several subjects, and queries."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class Passage:
    """A document.

    Attributes:
        id: Subject and topic, e.g. ``astronomy-tides``.
        language: "en", "zh", or a programming language.
        text: The text to embed.
    """

    id: str
    language: str
    text: str

    @property
    def subject(self) -> str:
        """Return the first word of the id."""
        return self.id.split("-", 1)[0]


@dataclass(frozen=True)
class Query:
    """A query.

    Attributes:
        text: The text to embed, under the instruction of the task.
        task: Name of a preset.
        answer: Id of the one passage that answers the query.
    """

    text: str
    task: str
    answer: str


def load_passages() -> list[Passage]:
    """Return all passages in file order."""
    return [Passage(**row) for row in _rows("passages.jsonl")]


def load_queries() -> list[Query]:
    """Return all queries in file order."""
    return [Query(**row) for row in _rows("queries.jsonl")]


def _rows(name: str) -> list[dict[str, Any]]:
    text = files("qwen3_embeddings.cli.demo").joinpath(name).read_text(encoding="utf-8")
    # Not splitlines(): a text may contain other line separators.
    return [json.loads(line) for line in text.split("\n") if line]
