"""The corpus: passages of several subjects in English, Chinese and code, and queries on them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class Passage:
    """Something to find.

    Attributes:
        id: subject and a word for it, e.g. ``astronomy-tides``.
        language: "en", "zh", or a programming language.
        text: what is embedded.
    """

    id: str
    language: str
    text: str

    @property
    def subject(self) -> str:
        """The first word of the id."""
        return self.id.split("-", 1)[0]


@dataclass(frozen=True)
class Query:
    """Something to look for.

    Attributes:
        text: what is embedded, under the task's instruction.
        task: name of a preset.
        answer: id of the one passage that answers it.
    """

    text: str
    task: str
    answer: str


def load_passages() -> list[Passage]:
    """All passages, in their order."""
    return [Passage(**row) for row in _rows("passages.jsonl")]


def load_queries() -> list[Query]:
    """All queries, in their order."""
    return [Query(**row) for row in _rows("queries.jsonl")]


def _rows(name: str) -> list[dict[str, Any]]:
    text = files("qwen3_embeddings.cli.demo").joinpath(name).read_text(encoding="utf-8")
    # Not splitlines(): a text may hold other line separators.
    return [json.loads(line) for line in text.split("\n") if line]
