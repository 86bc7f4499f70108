"""The texts of a call, checked before anything is computed."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, KeysView, Mapping, Set
from typing import Any

import numpy as np

from qwen3_embeddings.errors import TextEncodingError, TextError, TextTypeError
from qwen3_embeddings.prompts import instruct
from qwen3_embeddings.request import Texts

ARROW_SLICE = 1024
"""Items of a pyarrow array converted at once."""

TEXT_ATTRIBUTES = {
    "page_content": ".page_content",
    "get_content": ".get_content()",
    "query_str": ".query_str",
    "as_py": ".as_py()",
}
"""Attributes that hold the text of an object: documents of LangChain, nodes and queries of
LlamaIndex, scalars of pyarrow."""


def check_list(texts: object) -> None:
    """Raise if `texts` is not plainly a list of texts.

    Lists, tuples, iterators, pandas Series, polars Series, one-dimensional NumPy arrays and
    pyarrow arrays pass. What iterates over something else than its texts does not: the letters of
    a string, the keys of a mapping, the column names of a table.

    Raises:
        TextTypeError: `texts` is not a list of texts; the message names the alternative.
    """
    if type(texts) in {list, tuple}:
        return
    if advice := _advice_about_list(texts):
        raise TextTypeError(f"texts is {type(texts).__name__}, not a list of str. {advice}")


def text_list(texts: Iterable[Any]) -> list[Any]:
    """Return the items of a list of texts, whatever they are.

    Raises:
        TextTypeError: `texts` is not a list of texts; the message names the alternative.
    """
    check_list(texts)
    return list(read(texts))


def read(texts: Iterable[Any]) -> Iterable[Any]:
    """Return the items of a list of texts one by one, as Python objects.

    pyarrow arrays are converted in slices, so that a memory-mapped column is not loaded at once.
    """
    if not hasattr(texts, "to_pylist"):
        return texts
    array: Any = texts
    starts = range(0, len(array), ARROW_SLICE)
    return (item for i in starts for item in array[i : i + ARROW_SLICE].to_pylist())


def _advice_about_list(texts: Any) -> str | None:
    """Return what to pass instead of something that is not a list of texts, else None."""
    if isinstance(texts, str):
        return "For one text write [text]."
    if isinstance(texts, (bytes, bytearray, memoryview)):
        return "Decode it first. For one text write [text]."
    if attribute := _text_attribute(texts):
        return f"For one text write [text{attribute}]."
    if hasattr(texts, "columns") or hasattr(texts, "column_names"):
        return "Its column names would be embedded. Pass one column, for example texts['text']."
    if isinstance(texts, Mapping) or (hasattr(texts, "keys") and not hasattr(texts, "to_list")):
        return "Its keys would be embedded. Pass its values, for example list(texts.values())."
    if isinstance(texts, Set) and not isinstance(texts, KeysView):
        return "A set has no order that the vectors could follow. Pass a list, or sorted(texts)."
    if getattr(texts, "ndim", 1) > 1:
        return "Pass one column, for example texts[:, 0]."
    if not isinstance(texts, Iterable) or getattr(texts, "ndim", 1) == 0:
        return "For one text write [text]."
    return None


def _advice_about_text(item: Any) -> str:
    """Return what is wrong with an item that is not a `str`, and what to do."""
    kind = type(item).__name__
    if item is None or kind in {"NAType", "NaTType"} or (isinstance(item, float) and item != item):
        return f"{kind} is a missing value: leave it out, or fill it (fillna('') in pandas)."
    if attribute := _text_attribute(item):
        return f"{kind} is not str: use {attribute}."
    if isinstance(item, (bytes, bytearray)):
        return f"{kind} is not str: decode it, for example with .decode('utf-8')."
    if isinstance(item, Mapping):
        return f"{kind} is not str: use one of its values, for example item['text']."
    if isinstance(item, (list, tuple, np.ndarray)):
        return f"{kind} is not str: pass a flat list of texts."
    return f"{kind} is not str: convert it or leave it out."


def _text_attribute(item: object) -> str | None:
    """Return the attribute with an object's text: of a LangChain document, a LlamaIndex node."""
    if isinstance(item, type):
        return None
    return next((text for name, text in TEXT_ATTRIBUTES.items() if hasattr(item, name)), None)


def check_texts(
    texts: Iterable[str],
    instruction: str,
    urgent: bool,
    keep: Callable[[list[TextError], TextError], None],
) -> Texts:
    """Return the prompts of a call.

    Args:
        texts: what the caller passed: one text or a list of texts.
        instruction: instruction of the role; empty for none.
        urgent: whether the texts are queries.
        keep: raises an error about texts, or adds it to a list.

    Raises:
        TextTypeError: `texts` is not a list, or a text is not a `str`.
        TextEncodingError: a text holds a lone surrogate.
    """
    failures: list[TextError] = []
    items = [texts] if isinstance(texts, str) else text_list(texts)
    wrong = [i for i, text in enumerate(items) if not isinstance(text, str)]
    if wrong:
        advice = dict.fromkeys(_advice_about_text(items[i]) for i in wrong)
        keep(failures, TextTypeError(" ".join(advice), wrong))
        items = [text if isinstance(text, str) else "" for text in items]
    prompts = [instruct(instruction, text) for text in items]
    lengths = [_token_bound(prompt) for prompt in prompts]
    torn = [i for i, length in enumerate(lengths) if length < 0]
    if torn:
        said = (
            "a lone surrogate (half of a character) cannot be tokenized. Read the source with "
            "the right encoding, or text.encode('utf-8', 'replace').decode()."
        )
        keep(failures, TextEncodingError(said, torn))
    return Texts(prompts, lengths, instruction, urgent, failures)


def _token_bound(text: str) -> int:
    """Return an upper bound of a text's tokens, or -1 when a lone surrogate prevents tokenizing.

    A byte-level tokenizer makes at most one token per byte, and one end token. It reads the text
    in NFC, which can be longer than the text.
    """
    try:
        return 1 + len(text if text.isascii() else unicodedata.normalize("NFC", text).encode())
    except UnicodeEncodeError:
        return -1
