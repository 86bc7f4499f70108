"""The query template, the tasks the model learns and the kinds of text they ask for."""

from __future__ import annotations

from typing import NamedTuple

KIND_WEIGHT = 0.45
# four numbers before the teacher's: prose, question, code, Chinese
KINDS: dict[str, tuple[float, float, float, float]] = {
    "none": (0.0, 0.0, 0.0, 0.0),
    "prose": (1.0, 0.0, 0.0, 0.0),
    "question": (0.0, 1.0, 0.0, 0.0),
    "code": (0.0, 0.0, 1.0, 0.0),
    "prose_zh": (0.8, 0.0, 0.0, 0.6),
    "question_zh": (0.0, 0.8, 0.0, 0.6),
    # a web search wants prose, rather in its own language than in the other
    "web": (0.98, 0.0, 0.0, 0.2),
    "web_from_zh": (0.95, 0.0, 0.0, 0.31),
}
FROM_CHINESE = {"web": "web_from_zh", "question": "question_zh"}
DOCUMENT_KINDS = {"term": "none"} | {name: name for name in KINDS}


class Task(NamedTuple):
    """Instructions, the kind of text they ask for, how often it is drawn, both sides or one."""

    instructions: tuple[str, ...]
    kind: str
    share: float
    symmetric: bool = False


TASKS: dict[str, Task] = {
    "web": Task(
        ("Given a web search query, retrieve relevant passages that answer the query",),
        "web",
        0.36,
    ),
    "prose": Task(
        (
            "Given a question, retrieve Wikipedia passages that answer the question",
            "Given a multi-hop question, retrieve documents that can help answer the question",
            "Given a claim, retrieve documents that support or refute the claim",
            "Given a claim, find documents that refute the claim",
            "Given a financial question, retrieve user replies that best answer the question",
            "Given a scientific paper title, retrieve paper abstracts that are cited by the "
            "given paper",
        ),
        "web",
        0.14,
    ),
    "duplicate": Task(
        (
            "Given a question, retrieve questions that are semantically equivalent to the "
            "given question",
        ),
        "question",
        0.13,
    ),
    "code": Task(
        ("Given a code comment, retrieve the code snippet corresponding to that comment.",),
        "code",
        0.13,
    ),
    "web_zh": Task(
        ("Given a Chinese search query, retrieve web passages that answer the question",),
        "prose_zh",
        0.1,
    ),
    "bitext": Task(("Retrieve parallel sentences",), "none", 0.07, True),
    "similar": Task(
        (
            "Retrieve semantically similar text",
            "Identify the topic or theme of the given news articles",
            "Given a online banking query, find the corresponding intents",
            "Classify the sentiment expressed in the given movie review text from the IMDB dataset",
        ),
        "none",
        0.07,
        True,
    ),
}


def with_instruction(instruction: str, query: str) -> str:
    """The published template; no space after `Query:`."""
    return f"Instruct: {instruction}\nQuery:{query}"
