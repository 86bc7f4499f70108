"""Which texts go into an engine's next step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3_embeddings import models
from qwen3_embeddings.engines.base import MIXED_SECONDS
from qwen3_embeddings.engines.scheduling import Limits, Schedule, mixed_tokens

QUERY, DOCUMENT = True, False
LATER = MIXED_SECONDS + 1


def schedule(tokens: int = 100, texts: int = 10, steps: int = 1) -> Schedule[str]:
    return Schedule(Limits(tokens, texts, steps, tokens))


def filled(what: Schedule[str], now: float = 0) -> dict[str, int]:
    """Number of texts of each call that the next step is given."""
    counts: dict[str, int] = {}
    for call, _ in what.fill(now):
        counts[call] = counts.get(call, 0) + 1
    return counts


def test_fill_with_queries_and_documents_gives_queries_first() -> None:
    what = schedule(texts=5)
    what.add("documents", [10] * 4, DOCUMENT, 0)
    what.add("queries", [10] * 3, QUERY, 0)
    assert what.fill(0) == [
        *(("queries", index) for index in range(3)),
        *(("documents", index) for index in range(2)),
    ]


def test_fill_gives_one_step_and_no_more_than_the_steps_in_progress() -> None:
    what = schedule(tokens=100, texts=1000, steps=2)
    what.add("documents", [9] * 100, DOCUMENT, 0)
    for _ in range(2):
        assert 95 <= 9 * len(what.fill(0)) <= 104
    assert not what.fill(0), "two steps are in progress"
    for _ in range(11):
        what.answered(DOCUMENT, 9)
    assert 95 <= 9 * len(what.fill(0)) <= 104


def test_fill_takes_a_text_of_which_half_fits_and_leaves_a_longer_one() -> None:
    for length, count in ((39, 2), (40, 1)):
        what = schedule(tokens=100, steps=2)
        what.add("documents", [80, length], DOCUMENT, 0)
        assert filled(what) == {"documents": count}, length


def test_fill_gives_a_text_longer_than_a_step_alone() -> None:
    what = schedule(tokens=100)
    what.add("documents", [1000, 1000], DOCUMENT, 0)
    assert filled(what) == {"documents": 1}
    what.add("queries", [10], QUERY, 0)
    assert filled(what) == {"queries": 1}, "it need not wait for the second document"


def test_fill_gives_a_step_no_more_queries_than_its_limit() -> None:
    what: Schedule[str] = Schedule(Limits(tokens=100, texts=100, steps=2, queries=30))
    what.add("queries", [10] * 5, QUERY, 0)
    what.add("documents", [10] * 20, DOCUMENT, 0)
    assert filled(what) == {"queries": 3, "documents": 1}, "queries are left, and go first"
    assert filled(what) == {"queries": 2, "documents": 8}


def test_fill_while_queries_are_left_gives_documents_an_eighth() -> None:
    what: Schedule[str] = Schedule(Limits(tokens=1000, texts=1000, steps=2, queries=400))
    what.add("queries", [10] * 200, QUERY, 0)
    what.add("documents", [5] * 200, DOCUMENT, 0)
    for _ in range(2):
        assert filled(what) == {"queries": 40, "documents": 10}


def test_fill_gives_queries_over_their_limit_to_all_steps_in_progress() -> None:
    what: Schedule[str] = Schedule(Limits(tokens=1000, texts=10, steps=2, queries=100))
    what.add("queries", [900] * 3, QUERY, 0)
    assert [filled(what) for _ in range(3)] == [{"queries": 1}, {"queries": 1}, {}]


@pytest.mark.parametrize(("model", "most"), [("0.6B", 4096), ("4B", 2048), ("8B", 2048)])
def test_fill_soon_after_a_query_gives_few_documents(model: str, most: int) -> None:
    mixed = mixed_tokens(models.describe(f"Qwen/Qwen3-Embedding-{model}").parameters)
    what: Schedule[str] = Schedule(Limits(10 * most, 10**6, 2, 10 * most, mixed))
    what.add("queries", [10], QUERY, 0)
    assert filled(what) == {"queries": 1}
    what.answered(QUERY, 10)
    what.add("documents", [64] * 10**4, DOCUMENT, 0)
    few = what.fill(1)
    assert most <= 64 * len(few) < most + 64
    for _ in few:
        what.answered(DOCUMENT, 64)
    assert len(what.fill(LATER)) >= 10 * len(few) - 10


def test_fill_with_queries_without_end_gives_documents_their_turn() -> None:
    for texts in (1, 2, 10):
        what = schedule(tokens=100, texts=texts)
        what.add("documents", [20] * 5, DOCUMENT, 0)
        done = steps = 0
        while done < 5:
            steps += 1
            assert steps < 30, f"documents starve with {texts} texts per step"
            what.add("queries", [20] * 20, QUERY, 0)
            for call, _ in what.fill(0):
                what.answered(call == "queries", 20)
                done += call == "documents"


def test_drop_forgets_what_waits_and_keeps_other_calls() -> None:
    what = schedule(tokens=100, texts=2)
    what.add("dropped", [10] * 5, DOCUMENT, 0)
    what.add("kept", [10] * 5, DOCUMENT, 0)
    assert filled(what) == {"dropped": 2}
    what.drop("dropped")
    assert what.held[DOCUMENT] == 20, "the engine still holds them"
    for _ in range(2):
        what.answered(DOCUMENT, 10)
    assert filled(what) == {"kept": 2}


@given(
    calls=st.lists(
        st.tuples(st.booleans(), st.lists(st.integers(1, 300), min_size=1, max_size=20)),
        min_size=1,
        max_size=10,
    ),
    tokens=st.integers(10, 200),
    texts=st.integers(1, 8),
    steps=st.integers(1, 2),
    queries=st.integers(10, 200),
)
def test_fill_until_nothing_waits_gives_every_text_once_and_within_the_limits(
    calls: list[tuple[bool, list[int]]], tokens: int, texts: int, steps: int, queries: int
) -> None:
    what: Schedule[int] = Schedule(Limits(tokens, texts, steps, queries))
    for call, (urgent, lengths) in enumerate(calls):
        what.add(call, lengths, urgent, 0)
    given_out: list[tuple[int, int]] = []
    in_progress: list[list[tuple[int, int]]] = []
    for _ in range(1000):
        idle = not any(what.held.values())
        batch = what.fill(LATER)
        given_out += batch
        in_progress.append(batch)
        assert len(batch) <= texts
        if len(in_progress) == steps:
            for call, index in in_progress.pop(0):
                what.answered(calls[call][0], calls[call][1][index])
        if idle and not batch:
            break
    wanted = [(call, i) for call, (_, lengths) in enumerate(calls) for i in range(len(lengths))]
    assert sorted(given_out) == wanted
    for call in range(len(calls)):
        indices = [index for owner, index in given_out if owner == call]
        assert indices == sorted(indices)
    assert what.held == {True: 0, False: 0}
