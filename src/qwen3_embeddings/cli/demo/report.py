"""Print the demo: plain text, at most 100 columns; a Chinese character has two columns."""

from __future__ import annotations

import os
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen3_embeddings import Served, __version__
from qwen3_embeddings.cli.demo.corpus import Passage, Query
from qwen3_embeddings.cli.demo.frameworks import Hit
from qwen3_embeddings.cli.demo.model import Choice
from qwen3_embeddings.models import DEFAULT_MODEL

WIDTH = 100
LABEL = 12
Line = tuple[str, str]
"""A label and the text after it, as printed."""
ENGINES = {
    "vllm": "vLLM in this process",
    "torch": "PyTorch in this process",
    "server": "the server at {base_url}",
    "reference": "sentence-transformers in this process (reference)",
}


@dataclass(frozen=True)
class Search:
    """The results of one framework.

    Attributes:
        name: Name of the framework.
        found: The hits of each query, best first.
    """

    name: str
    found: list[list[Hit]]

    def right(self, queries: Sequence[Query]) -> int:
        """Return the number of queries whose right passage is first."""
        pairs = zip(queries, self.found, strict=True)
        return sum(query.answer == hits[0].id for query, hits in pairs)


def heading() -> None:
    """Print the first line; the choice of a model may need a few seconds."""
    _line("demo", f"qwen3-embeddings {__version__}, looking for a model")


def starting(choice: Choice) -> list[Line]:
    """Print the reason of the choice, which is returned, and the engine about to start."""
    lines = [_line("note", choice.note)] if choice.note else []
    engine = ENGINES[choice.engine].format(base_url=choice.base_url)
    _line("engine", f"{engine}; one for LangChain and LlamaIndex. Starting …")
    return lines


def started(choice: Choice, served: Served, ready: float, first: float) -> Line:
    """Print and return the model, and the times to its start and first vector in seconds."""
    return _line(
        "model",
        f"{choice.title or served.model} ({served.engine}), ready in {ready:.1f} s, first vector "
        f"after {first:.1f} s",
    )


def corpus(passages: Sequence[Passage], queries: Sequence[Query], size: int) -> list[Line]:
    """Print and return the dimensions of the vectors and the size of the corpus."""
    lines = [_line("size", f"{size} dimensions")]
    languages = Counter(passage.language for passage in passages)
    code = len(passages) - languages["en"] - languages["zh"]
    subjects = len({passage.subject for passage in passages})
    text = (
        f"{len(passages)} passages on {subjects} subjects ({languages['en']} English, "
        f"{languages['zh']} Chinese, {code} code), {len(queries)} queries"
    )
    return [*lines, _line("corpus", text)]


def indexed(name: str, count: int, seconds: float, engine: str) -> Line:
    """Print and return how fast a framework embedded the corpus, and on which hardware."""
    rate = f"{count / seconds:.0f} texts per second"
    return _line(name, f"embedded {count} passages in {seconds:.2f} s: {rate} {_hardware(engine)}")


def _hardware(engine: str) -> str:
    """Return the hardware of an engine in this process."""
    if engine == "server":
        return "through the server"
    import torch

    if torch.cuda.is_available():
        return f"on {torch.cuda.get_device_name()}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"on {cores} CPU cores"


def answers(
    passages: Sequence[Passage], queries: Sequence[Query], searches: Sequence[Search]
) -> None:
    """Print the nearest passages of every query with their score in each framework."""
    texts = {passage.id: " ".join(passage.text.split()) for passage in passages}
    print("\nEach query with its task, and its three nearest passages with their cosine.")
    print("* marks the right passage.\n")
    print("".join(f"{search.name:>{LABEL - 1}}" for search in searches))
    for number, query in enumerate(queries):
        scores = [{hit.id: hit.score for hit in search.found[number]} for search in searches]
        hits = list(dict.fromkeys(name for found in scores for name in found))
        print()
        print(clip(f"{number + 1:>2}  {query.text}  [{query.task}]", WIDTH))
        longest = max(map(len, hits))
        for name in hits:
            cells = "".join(_score(found.get(name)) for found in scores)
            mark = "*" if name == query.answer else " "
            print(clip(f"{cells} {mark} {name + ':':<{longest + 1}} {texts[name]}", WIDTH))
        if query.answer not in hits:
            print(f"{'':>{LABEL}}right passage not among them")
    print(flush=True)


def shrinking(name: str, size: int) -> Line:
    """Print and return that the search is repeated with fewer dimensions."""
    return _line("Matryoshka", f"the same in {name} with dimensions={size}")


def shrunk(
    queries: Sequence[Query], count: int, whole: tuple[int, Search], small: tuple[int, Search]
) -> Line:
    """Print and return what a smaller size saves and loses, given both sizes and results."""
    pairs = zip(whole[1].found, small[1].found, strict=True)
    same = sum(one[0].id == other[0].id for one, other in pairs)
    before, after = (size * 4 * count / 1024 for size, _ in (whole, small))
    line = _line(
        "Matryoshka",
        f"same first passage as with {whole[0]} dimensions for {same} of {len(queries)} queries, "
        f"the right one for {small[1].right(queries)}; the index needs {after:.0f} KiB instead of "
        f"{before:.0f}, {before / after:.3g} times less",
    )
    print()
    return line


def summary(queries: Sequence[Query], searches: Sequence[Search]) -> list[Line]:
    """Print and return how often each framework has the right passage first, and in its hits."""
    lines = []
    for search in searches:
        right = search.right(queries)
        pairs = zip(queries, search.found, strict=True)
        near = sum(query.answer in {hit.id for hit in hits} for query, hits in pairs)
        text = (
            f"right passage first for {right} of {len(queries)} queries, in the first "
            f"{len(search.found[0])} for {near}"
        )
        lines.append(_line(search.name, text))
    return lines


def published() -> Line:
    """Print and return how to run the demo with the published model."""
    return _line(
        "real model",
        f"qwen3-embeddings demo --model {DEFAULT_MODEL} (or the folder of a copy of it)",
    )


def written(path: Path) -> None:
    """Print where the page is."""
    _line("page", str(path))


def clip(text: str, width: int) -> str:
    """Return `text` cut to `width` columns of a terminal, with an ellipsis where it was cut."""
    used = 0
    for end, character in enumerate(text):
        used += columns(character)
        if used > width:
            while columns(text[:end]) > width - 1:
                end -= 1
            return text[:end] + "…"
    return text


def columns(text: str) -> int:
    """Return the columns of `text` in a terminal: wide characters have two, combining ones none."""
    visible = (c for c in text if not unicodedata.combining(c))
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in visible)


def _score(score: float | None) -> str:
    return f"{'-' if score is None else format(score, '.3f'):>{LABEL - 1}}"


def _line(label: str, text: str) -> Line:
    print(
        textwrap.fill(
            text,
            WIDTH,
            initial_indent=f"{label:<{LABEL}}",
            subsequent_indent=" " * LABEL,
            break_long_words=False,
            break_on_hyphens=False,
        ),
        flush=True,
    )
    return label, text
