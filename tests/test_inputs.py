"""What counts as a list of texts, and what is refused with which advice."""

from __future__ import annotations

import importlib
from collections import UserDict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qwen3_embeddings import Embedder, TextTypeError
from qwen3_embeddings.inputs import ARROW_SLICE, read, text_list

TEXTS = ["first", "second", "first"]


def made_by(module: str, path: str, *arguments: Any) -> Any:
    """Call a function or class of a library that only this test needs."""
    target: Any = importlib.import_module(module)
    for name in path.split("."):
        target = getattr(target, name)
    return target(*arguments)


LISTS: dict[str, Callable[[], Any]] = {
    "list": lambda: TEXTS,
    "tuple": lambda: tuple(TEXTS),
    "deque": lambda: deque(TEXTS),
    "iterator": lambda: iter(TEXTS),
    "generator": lambda: (text for text in TEXTS),
    "dict values": lambda: dict(enumerate(TEXTS)).values(),
    "numpy str": lambda: np.array(TEXTS),
    "numpy object": lambda: np.array(TEXTS, dtype=object),
    "pandas Series": lambda: made_by("pandas", "Series", TEXTS),
    "pandas Series with another index": lambda: made_by("pandas", "Series", TEXTS, [7, 8, 9]),
    "pandas Index": lambda: made_by("pandas", "Index", TEXTS),
    "pandas categorical": lambda: made_by("pandas", "Categorical", TEXTS),
    "pandas string array": lambda: made_by("pandas", "array", TEXTS),
    "pyarrow Array": lambda: made_by("pyarrow", "array", TEXTS),
    "pyarrow ChunkedArray": lambda: made_by("pyarrow", "chunked_array", [TEXTS[:1], TEXTS[1:]]),
    "polars Series": lambda: made_by("polars", "Series", TEXTS),
}


@pytest.mark.parametrize("kind", LISTS)
def test_text_list_of_a_list_of_texts_returns_its_texts(kind: str) -> None:
    items = text_list(LISTS[kind]())
    assert items == TEXTS
    assert all(isinstance(item, str) for item in items)


class Document:
    """As LangChain's: iterating it returns pairs of field and value."""

    page_content = "text"

    def __iter__(self) -> Any:
        return iter([("page_content", "text")])


FRAME = {"text": TEXTS, "source": TEXTS}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "str": (lambda: "one text", r"write \[text\]"),
    "bytes": (lambda: b"one text", "Decode it"),
    "bytearray": (lambda: bytearray(b"one text"), "Decode it"),
    "number": (lambda: 7, r"write \[text\]"),
    "None": (lambda: None, r"write \[text\]"),
    "numpy scalar": (lambda: np.array("one text"), r"write \[text\]"),
    "numpy matrix": (lambda: np.array([TEXTS, TEXTS]), "one column"),
    "dict": (lambda: dict.fromkeys(TEXTS, 1), r"\.values\(\)"),
    "UserDict": (lambda: UserDict(a=1), r"\.values\(\)"),
    "set": (lambda: set(TEXTS), "no order"),
    "frozenset": (lambda: frozenset(TEXTS), "no order"),
    "pandas DataFrame": (lambda: made_by("pandas", "DataFrame", FRAME), r"texts\['text'\]"),
    "polars DataFrame": (lambda: made_by("polars", "DataFrame", FRAME), r"texts\['text'\]"),
    "pyarrow Table": (lambda: made_by("pyarrow", "table", FRAME), r"texts\['text'\]"),
    "pyarrow RecordBatch": (
        lambda: made_by("pyarrow", "RecordBatch.from_pydict", FRAME),
        r"texts\['text'\]",
    ),
    "document": (lambda: Document(), r"\[text\.page_content\]"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_text_list_of_anything_else_is_refused_with_advice(kind: str) -> None:
    make, advice = REFUSED[kind]
    with pytest.raises(TextTypeError, match=f"not a list of str.*{advice}"):
        text_list(make())


@pytest.mark.parametrize("kind", sorted(set(REFUSED) - {"str"}))
async def test_every_method_refuses_what_is_not_a_list(kind: str) -> None:
    """Nothing starts: no engine is installed for this model."""
    embedder, (make, advice) = Embedder("Qwen/Qwen3-Embedding-0.6B"), REFUSED[kind]
    synchronous: list[Callable[[Any], Any]] = [
        *(embedder.encode_query, embedder.encode_document, embedder.count_tokens),
        lambda texts: next(embedder.stream(texts)),
    ]
    asynchronous: list[Callable[[Any], Any]] = [
        *(embedder.aencode_query, embedder.aencode_document, embedder.acount_tokens),
        lambda texts: anext(embedder.astream(texts)),
    ]
    for method in synchronous:
        with pytest.raises(TextTypeError, match=advice):
            method(make())
    for method in asynchronous:
        with pytest.raises(TextTypeError, match=advice):
            await method(make())


ITEMS: dict[str, tuple[Callable[[], Any], str]] = {
    "None": (lambda: None, "NoneType is a missing value"),
    "NaN": (lambda: float("nan"), "float is a missing value"),
    "pandas NA": (lambda: importlib.import_module("pandas").NA, "NAType is a missing value"),
    "number": (lambda: 2.5, "float is not str: convert"),
    "bytes": (lambda: b"text", r"\.decode"),
    "dict": (lambda: {"text": "a"}, r"item\['text'\]"),
    "list": (lambda: ["a"], "flat list"),
    "document": (lambda: Document(), r"\.page_content"),
    "node": (lambda: SimpleNamespace(get_content=str), r"\.get_content\(\)"),
    "query": (lambda: SimpleNamespace(query_str="a"), r"\.query_str"),
    "pyarrow scalar": (lambda: made_by("pyarrow", "scalar", "a"), r"\.as_py\(\)"),
}


@pytest.mark.parametrize("kind", ITEMS)
def test_encode_with_an_item_that_is_not_str_names_position_and_alternative(kind: str) -> None:
    make, advice = ITEMS[kind]
    embedder = Embedder("Qwen/Qwen3-Embedding-0.6B")
    with pytest.raises(TextTypeError, match=rf"texts\[1\]: .*{advice}") as caught:
        embedder.encode_document(["fine", make()])
    assert caught.value.positions == (1,)


def test_encode_with_items_of_two_wrong_kinds_gives_advice_on_both() -> None:
    embedder = Embedder("Qwen/Qwen3-Embedding-0.6B")
    with pytest.raises(TextTypeError, match=r"texts\[0, 2\].*page_content.*\.decode"):
        embedder.encode_document([Document(), "fine", b"text"])  # type: ignore[list-item]


def test_encode_of_a_pandas_column_with_gaps_names_their_positions() -> None:
    import pandas

    embedder = Embedder("Qwen/Qwen3-Embedding-0.6B")
    for gap in (None, float("nan"), pandas.NA):
        column = pandas.Series(["a", gap, "b", gap], index=[9, 8, 7, 6])
        with pytest.raises(TextTypeError, match=r"texts\[1, 3\].*missing value.*fillna"):
            embedder.encode_document(column)


def test_read_of_a_pyarrow_column_converts_no_more_than_a_slice_ahead() -> None:
    import pyarrow

    converted = []

    class Column:
        def __init__(self, array: Any) -> None:
            self.array = array

        def __len__(self) -> int:
            return len(self.array)

        def __iter__(self) -> Any:
            return iter(self.array)

        def __getitem__(self, part: slice) -> Column:
            return Column(self.array[part])

        def to_pylist(self) -> list[str]:
            converted.append(len(self.array))
            texts: list[str] = self.array.to_pylist()
            return texts

    column = Column(pyarrow.array([f"text {i}" for i in range(2 * ARROW_SLICE + 1)]))
    items = iter(read(column))
    assert next(items) == "text 0"
    assert converted == [ARROW_SLICE]
    assert len(list(items)) == 2 * ARROW_SLICE
    assert converted == [ARROW_SLICE, ARROW_SLICE, 1]
