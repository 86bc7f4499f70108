"""Chunks of long texts: windows of the model's own tokens, cut between characters."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qwen3_embeddings.corpus.readers import BATCH, Problem, Rows

# Ends of a text's units, the best first: paragraph, line, sentence, word.
_ENDS = tuple(
    re.compile(pattern)
    for pattern in (r"\n[ \t\r]*\n", r"\n", r"[.!?…。！？](?=\s)|[。！？]", r"\s")
)

MOST_CHARACTERS = 4_000_000

LAST_PART = 0.8
"""A window may end this early, as a share of its tokens, to end with a sentence."""


@dataclass(frozen=True)
class Chunker:
    """Splits texts into chunks.

    A window of `size` tokens of the whole text can have a few more tokens when its text is
    tokenized alone (4 at most in the languages tried, docs/corpora.md).

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        size: tokens in a chunk.
        overlap: tokens that neighbouring chunks share.
    """

    tokenizer: Any
    size: int
    overlap: int

    @property
    def digest(self) -> str:
        """A name for the tokenizer."""
        return hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()[:16]

    def split(self, rows: Rows) -> Iterator[Rows]:
        """Yield the chunks of some rows in batches; a row without a text stays as it is."""
        weight = rows.weight
        for part in _bounded(rows):
            chunks = self._split(part)
            for first in range(0, max(1, len(chunks.rows)), BATCH):
                piece = chunks.pick(range(first, min(first + BATCH, len(chunks.rows))))
                yield replace(piece, weight=weight)
                weight = 0

    def _split(self, rows: Rows) -> Rows:
        texts = [_encodable(text) for text in rows.texts]
        known = [i for i, text in enumerate(texts) if isinstance(text, str)]
        encodings = self.tokenizer.encode_batch([texts[i] for i in known], add_special_tokens=False)
        offsets = {i: encoding.offsets for i, encoding in zip(known, encodings, strict=True)}
        owners: list[int] = []
        chunks: list[str | Problem] = []
        spans: list[tuple[int, int, int]] = []
        for i, text in enumerate(texts):
            windows = [(0, 0)] if isinstance(text, Problem) else self.windows(text, offsets[i])
            for number, (start, end) in enumerate(windows):
                owners.append(i)
                chunks.append(text if isinstance(text, Problem) else text[start:end])
                spans.append((number, start, end))
        return replace(rows.pick(owners), texts=chunks, spans=spans)

    def windows(self, text: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return start and end of each chunk in characters of `text`.

        White space between chunks belongs to none. A text that fits one chunk stays whole.

        Args:
            text: the text.
            offsets: start and end of each of its tokens.
        """
        count = len(offsets)
        if count <= self.size:
            return [(0, len(text))]
        windows = []
        first = end = 0
        while True:
            stop = min(first + self.size, count)
            # A window can end inside a token, whose rest then belongs to the next one.
            start = min(end, _between_characters(text, offsets[first][0], forward=True))
            end = len(text) if stop == count else self._end(text, offsets, first, stop)
            while start < end and text[start].isspace():
                start += 1
            trimmed = start + len(text[start:end].rstrip())
            if trimmed > start:
                windows.append((start, trimmed))
            if stop == count:
                return windows or [(0, len(text))]  # white space alone
            first = self._next(offsets, first, end)

    def _end(self, text: str, offsets: Sequence[tuple[int, int]], first: int, stop: int) -> int:
        """Return where a window ends: at the best place in its last part."""
        latest = offsets[stop][0]
        earliest = offsets[first + int(LAST_PART * (stop - first))][0]
        for pattern in _ENDS:
            ends = [match.end() for match in pattern.finditer(text, earliest, latest)]
            if ends:
                return ends[-1]
        end = _between_characters(text, latest)
        return end if end > offsets[first][0] else _between_characters(text, latest, forward=True)

    def _next(self, offsets: Sequence[tuple[int, int]], first: int, end: int) -> int:
        """Return the first token of the next window: `overlap` tokens before this one's end."""
        after = first + 1
        while after < len(offsets) and offsets[after][0] < end:
            after += 1
        return max(first + 1, after - self.overlap)


def _bounded(rows: Rows) -> Iterator[Rows]:
    """Yield the rows in parts of a few million characters: tokens need more memory than text."""
    first = characters = 0
    for i, text in enumerate(rows.texts):
        characters += len(text) if isinstance(text, str) else 0
        if characters > MOST_CHARACTERS or i == len(rows.texts) - 1:
            yield rows.pick(range(first, i + 1))
            first, characters = i + 1, 0
    if not rows.texts:
        yield rows


def _encodable(text: str | Problem) -> str | Problem:
    if isinstance(text, Problem) or text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return Problem("TextEncodingError", "the text holds a lone surrogate; it was not UTF-8")
    return text


def _between_characters(text: str, place: int, *, forward: bool = False) -> int:
    """Return the nearest place that separates no accent, emoji part or line end from its base."""
    step = 1 if forward else -1
    while 0 < place < len(text) and _joined(text[place - 1], text[place]):
        place += step
    return place


def _joined(before: str, after: str) -> bool:
    """Whether two code points belong to one character, as Unicode's UAX 29 has it, nearly."""
    if unicodedata.category(after) in {"Mn", "Me", "Mc"} or "\u200d" in (before, after):
        return True  # accents, vowel signs, variation selectors, joined emoji
    if "\U0001f3fb" <= after <= "\U0001f3ff":
        return True  # skin tones
    flags = "\U0001f1e6" <= before <= "\U0001f1ff" and "\U0001f1e6" <= after <= "\U0001f1ff"
    return flags or (before == "\r" and after == "\n")
