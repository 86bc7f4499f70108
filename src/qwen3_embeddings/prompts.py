"""Instructions: the exact prompt template and the published task presets.

The template and the wordings come from the QwenLM/Qwen3-Embedding repository (README.md and
evaluation/task_prompts.json) and the model cards. Write instructions in English, whatever the
language of the texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from qwen3_embeddings.errors import UnknownTaskError

TEMPLATE_VERSION = 1
"""Version of `instruct`, which fingerprints of instructed roles hash. Raise it when `instruct`
returns another prompt for some instruction and text, so that no cache serves older vectors."""


@dataclass(frozen=True)
class Task:
    """A task: what the vectors are for, in one English sentence.

    Attributes:
        name: short name, shown in reprs.
        instruction: the sentence that the model reads before a text; empty for none.
        symmetric: True if both sides carry the instruction (similarity, clustering,
            classification, bitext mining); False if only queries do (retrieval).

    Example:
        >>> recipes = Task("recipes", "Given a dish, retrieve recipes for it")
        >>> embedder = Embedder("Qwen/Qwen3-Embedding-0.6B", task=recipes)
    """

    name: str
    instruction: str
    symmetric: bool = False


def instruct(instruction: str, text: str) -> str:
    """Return `text` under `instruction`, in the form the models were trained on.

    There is no space after ``Query:``, because one would change the tokens and the vector. With an
    empty instruction the text is returned as it is.
    """
    # Concatenated, because an f-string would format a member of a str Enum as its name.
    return "Instruct: " + instruction + "\nQuery:" + text if instruction else text


_RETRIEVAL = {
    "web_search": "Given a web search query, retrieve relevant passages that answer the query",
    "question_answering": "Given a question, retrieve Wikipedia passages that answer the question",
    "multi_hop": "Given a multi-hop question, retrieve documents that can help answer the question",
    "fact_checking": "Given a claim, retrieve documents that support or refute the claim",
    "counter_argument": "Given a claim, find documents that refute the claim",
    "finance": "Given a financial question, retrieve user replies that best answer the question",
    "citation": "Given a scientific paper title, retrieve paper abstracts that are cited by the "
    "given paper",
    "duplicate_question": "Given a question, retrieve questions that are semantically equivalent "
    "to the given question",
    "code": "Given a code comment, retrieve the code snippet corresponding to that comment.",
    "chinese_web_search": "Given a Chinese search query, retrieve web passages that answer the "
    "question",
}

_SYMMETRIC = {
    "similarity": "Retrieve semantically similar text",
    "bitext": "Retrieve parallel sentences",
    "clustering": "Identify the topic or theme of the given news articles",
    "sentiment": "Classify the sentiment expressed in the given movie review text from the IMDB "
    "dataset",
    "intent": "Given a online banking query, find the corresponding intents",
}

TASKS: Mapping[str, Task] = MappingProxyType(
    {name: Task(name, text) for name, text in _RETRIEVAL.items()}
    | {name: Task(name, text, symmetric=True) for name, text in _SYMMETRIC.items()}
)
"""The presets by name, in their published wording, including its spelling."""


def find_task(task: str | Task) -> Task:
    """Return the preset with this name, or `task` itself if it is a `Task`.

    Raises:
        UnknownTaskError: there is no preset with this name.
    """
    if isinstance(task, Task):
        return task
    if isinstance(task, str) and task in TASKS:
        return TASKS[task]
    raise UnknownTaskError(
        f"no task preset {task!r}. Use one of {', '.join(TASKS)}; or Task(name, instruction); "
        "or query_instruction='…' for free text."
    )
