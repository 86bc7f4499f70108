"""What a corpus job is asked to do, and the part of it that its output depends on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from qwen3_embeddings.corpus.errors import JobRefusedError

Item = TypeVar("Item")

NumberType = Literal["float32", "float16", "int8", "binary"]
NUMBER_TYPES: tuple[NumberType, ...] = ("float32", "float16", "int8", "binary")

SHARD_ROWS = 20_000
"""80 MB of float32 vectors of 1,024 dimensions; the most a kill can cost."""

OWN_COLUMNS = ("file", "row", "id", "chunk", "start", "end", "embedding", "scale")


@dataclass(frozen=True)
class Options:
    """Options that decide what the output holds.

    Args:
        text_column: column or JSON key with the texts. Ignored for text files.
        id_column: column that becomes `id` in the output.
        keep: further columns to copy into the output.
        role: "document" or "query".
        dtype: number type of the stored vectors.
        chunk: split longer texts into chunks of about so many tokens.
        overlap: tokens that neighbouring chunks share.
        shard_rows: input rows per shard; for JSONL and text files it is approximate.

    Raises:
        JobRefusedError: a value cannot work.
    """

    text_column: str = "text"
    id_column: str | None = None
    keep: tuple[str, ...] = ()
    role: Literal["document", "query"] = "document"
    dtype: NumberType = "float32"
    chunk: int | None = None
    overlap: int = 0
    shard_rows: int = SHARD_ROWS

    def __post_init__(self) -> None:
        if self.dtype not in NUMBER_TYPES:
            raise JobRefusedError(f"dtype={self.dtype!r} is not one of {', '.join(NUMBER_TYPES)}.")
        if self.role not in {"document", "query"}:
            raise JobRefusedError(f"role={self.role!r} is not 'document' or 'query'.")
        if self.shard_rows < 1:
            raise JobRefusedError(f"shard_rows={self.shard_rows} is not a positive number.")
        if self.chunk is not None and self.chunk < 8:
            raise JobRefusedError(f"chunk={self.chunk} is too small. Use 8 tokens or more.")
        if self.overlap < 0 or (self.overlap and self.overlap > (self.chunk or 0) // 2):
            raise JobRefusedError(
                f"overlap={self.overlap} does not fit chunk={self.chunk}. Use at most half of it."
            )
        names = [*self.keep]
        clash = sorted({name for name in names if name in OWN_COLUMNS or names.count(name) > 1})
        if clash:
            raise JobRefusedError(
                f"cannot keep {', '.join(clash)}: the output has a column of that name. Rename the "
                "input's column."
            )

    @property
    def columns(self) -> list[str]:
        """Input columns to read, each once."""
        wanted = [self.text_column, *([self.id_column] if self.id_column else []), *self.keep]
        return list(dict.fromkeys(wanted))

    def columns_out(self) -> list[tuple[str, str]]:
        """Output columns copied from the input, as pairs of output and input name."""
        ids = [("id", self.id_column)] if self.id_column else []
        return [*ids, *((name, name) for name in self.keep)]


def part_of(shards: str | None) -> tuple[int, int] | None:
    """Parse ``I/N``, part I of N parts, counted from 0.

    Raises:
        JobRefusedError: it is not of that form.
    """
    if shards is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", shards)
    if not match or not int(match[1]) < int(match[2]):
        raise JobRefusedError(
            f"shards={shards!r} is not I/N with I from 0 to N-1. Use 0/8 to 7/8 for eight jobs."
        )
    return int(match[1]), int(match[2])


def slice_of(items: Sequence[Item], part: tuple[int, int] | None) -> list[Item]:
    """Return the consecutive share of `items` that belongs to a part; all without one."""
    if part is None:
        return list(items)
    index, count = part
    return list(items[len(items) * index // count : len(items) * (index + 1) // count])
