"""The texts of a call, checked before anything is computed."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable

import numpy as np

from qwen3_embeddings.errors import TextEncodingError, TextError, TextTypeError
from qwen3_embeddings.prompts import instruct
from qwen3_embeddings.request import Texts


def check_list(texts: object) -> None:
    """Refuse what is not a list of texts.

    Raises:
        TextTypeError: it is a string, bytes, or not iterable.
    """
    scalar = isinstance(texts, np.ndarray) and not texts.ndim
    if isinstance(texts, (str, bytes)) or scalar or not isinstance(texts, Iterable):
        raise TextTypeError(
            f"texts is {type(texts).__name__}, not a list of str. For one text write [text]."
        )


def check_texts(
    texts: Iterable[str],
    instruction: str,
    urgent: bool,
    keep: Callable[[list[TextError], TextError], None],
) -> Texts:
    """Return the prompts of a call.

    Args:
        texts: what the caller passed.
        instruction: instruction of the role; empty for none.
        urgent: whether the texts are queries.
        keep: raises an error about texts, or adds it to a list.

    Raises:
        TextTypeError: `texts` is not a list, or a text is not a `str`.
        TextEncodingError: a text holds a lone surrogate.
    """
    failures: list[TextError] = []
    check_list(texts)
    items = list(texts)
    wrong = [i for i, text in enumerate(items) if not isinstance(text, str)]
    if wrong:
        kind = type(items[wrong[0]]).__name__
        said = f"{kind} is not str: decode, convert or leave it out."
        keep(failures, TextTypeError(said, wrong))
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
