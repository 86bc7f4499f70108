"""What the demo prints: plain text, at most 100 columns, Chinese counted at its double width."""

from __future__ import annotations

import textwrap
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from qwen3_embeddings import Served, __version__
from qwen3_embeddings.cli.demo.corpus import Passage, Query
from qwen3_embeddings.cli.demo.frameworks import Hit
from qwen3_embeddings.cli.demo.model import Choice

WIDTH = 100
LABEL = 12
ENGINES = {
    "vllm": "vLLM in this process",
    "server": "the server at {base_url}",
    "reference": "sentence-transformers in this process (reference)",
}


@dataclass(frozen=True)
class Search:
    """What one framework found.

    Attributes:
        name: the framework's.
        found: the hits of each query, best first.
    """

    name: str
    found: list[list[Hit]]

    def right(self, queries: Sequence[Query]) -> int:
        """How many queries have the passage that answers them in first place."""
        pairs = zip(queries, self.found, strict=True)
        return sum(query.answer == hits[0].id for query, hits in pairs)


def heading() -> None:
    """Say hello, since choosing a model may take a few seconds."""
    _line("demo", f"qwen3-embeddings {__version__}, looking for a model")


def starting(choice: Choice) -> None:
    """Say what is about to start."""
    if choice.note:
        _line("note", choice.note)
    engine = ENGINES[choice.engine].format(base_url=choice.base_url)
    _line("engine", f"{engine}; one for LangChain and LlamaIndex. Starting …")


def started(choice: Choice, served: Served, seconds: float) -> None:
    """Say what runs."""
    _line("model", f"{choice.title or served.model} ({served.engine}), ready in {seconds:.1f} s")


def corpus(passages: Sequence[Passage], queries: Sequence[Query], size: int) -> None:
    """Say what is searched, and how."""
    _line("size", f"{size} dimensions")
    languages = Counter(passage.language for passage in passages)
    code = len(passages) - languages["en"] - languages["zh"]
    subjects = len({passage.subject for passage in passages})
    _line(
        "corpus",
        f"{len(passages)} passages on {subjects} subjects ({languages['en']} English, "
        f"{languages['zh']} Chinese, {code} code), {len(queries)} queries",
    )


def indexed(name: str, count: int, seconds: float) -> None:
    """Say how long a framework took to embed the corpus."""
    _line(name, f"embedded {count} passages in {seconds:.2f} s, {count / seconds:.0f} passages/s")


def answers(
    passages: Sequence[Passage], queries: Sequence[Query], searches: Sequence[Search]
) -> None:
    """Print the nearest passages of every query, with the score of each framework."""
    texts = {passage.id: passage.text for passage in passages}
    print("\nThe nearest passages and their scores (cosine). * answers the query.\n")
    print("".join(f"{search.name:>{LABEL - 1}}" for search in searches))
    for number, query in enumerate(queries):
        task = f"  [{query.task}]" if query.task != queries[0].task else ""
        print(f"\n{number + 1:>2}  {query.text}{task}")
        scores = [{hit.id: hit.score for hit in search.found[number]} for search in searches]
        for found in dict.fromkeys(name for hits in scores for name in hits):
            cells = "".join(_score(hits.get(found)) for hits in scores)
            mark = "*" if found == query.answer else " "
            print(clip(f"{cells} {mark} {found}: {' '.join(texts[found].split())}", WIDTH))
    print(flush=True)


def shrinking(name: str, size: int) -> None:
    """Say that the same comes again, smaller."""
    _line("Matryoshka", f"the same in {name} with dimensions={size}")


def shrunk(
    queries: Sequence[Query], count: int, whole: tuple[int, Search], small: tuple[int, Search]
) -> None:
    """Say what a smaller size saves and what it costs, given both sizes and what they found."""
    pairs = zip(whole[1].found, small[1].found, strict=True)
    same = sum(one[0].id == other[0].id for one, other in pairs)
    before, after = (size * 4 * count / 1024 for size, _ in (whole, small))
    _line(
        "Matryoshka",
        f"same first passage as with {whole[0]} dimensions for {same} of {len(queries)} queries, "
        f"the right one for {small[1].right(queries)}; the index needs {after:.0f} KiB instead of "
        f"{before:.0f}, {before / after:.3g} times less",
    )
    print()


def summary(queries: Sequence[Query], searches: Sequence[Search]) -> None:
    """One line a framework."""
    for search in searches:
        right = search.right(queries)
        _line(search.name, f"right passage first for {right} of {len(queries)} queries")


def clip(text: str, width: int) -> str:
    """`text` cut to `width` columns of a terminal, the last an ellipsis when something went."""
    used = 0
    for end, character in enumerate(text):
        used += columns(character)
        if used > width:
            while columns(text[:end]) > width - 1:
                end -= 1
            return text[:end] + "…"
    return text


def columns(text: str) -> int:
    """Return the number of columns that `text` needs in a terminal."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _score(score: float | None) -> str:
    return f"{'-' if score is None else format(score, '.3f'):>{LABEL - 1}}"


def _line(label: str, text: str) -> None:
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
