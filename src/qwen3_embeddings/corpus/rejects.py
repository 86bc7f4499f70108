"""Rows that cannot be embedded: one JSON line each, committed before the shard of their split."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qwen3_embeddings.corpus.readers import Problem, Rows
from qwen3_embeddings.corpus.splits import Done, Shard
from qwen3_embeddings.corpus.storage import PRIVATE, Store
from qwen3_embeddings.errors import TextError, TextsFailedError

FOLDER = f"{PRIVATE}/rejects"


@dataclass(frozen=True)
class Reject:
    """A row without a vector.

    Attributes:
        file: the input file, relative to its input argument.
        row: index of the row in the file; in JSONL and text files its first byte.
        id: value of the id column.
        error: class of the error.
        message: what happened.
        tokens: length of the text, where it was the reason.
        chunk: number of the chunk in its row.
    """

    file: str
    row: int
    id: Any
    error: str
    message: str
    tokens: int | None = None
    chunk: int | None = None

    @classmethod
    def of(cls, rows: Rows, index: int, problem: Problem, tokens: int | None = None) -> Reject:
        """Return the reject of one of some rows."""
        ids = rows.columns.get("id")
        return cls(
            rows.split.file.name,
            rows.rows[index],
            ids[index].as_py() if ids is not None else None,
            problem.error,
            problem.message,
            tokens,
            rows.spans[index][0] if rows.spans else None,
        )


def problems(error: TextsFailedError | None) -> dict[int, Problem]:
    """Return what is wrong with each text of a call, by position."""
    errors: Iterable[TextError] = (error.errors or (error,)) if error else ()
    return {
        position: Problem(type(kind).__name__, kind.message)
        for kind in errors
        for position in kind.positions
    }


def write(store: Store, shard: Shard, rejects: Iterable[Reject]) -> None:
    """Write the rejects of a shard; without any, delete what an earlier attempt left."""
    lines = [json.dumps(asdict(reject), ensure_ascii=False, default=str) for reject in rejects]
    name = f"{FOLDER}/{shard.stem}.jsonl"
    if lines:
        store.write(name, ("\n".join(lines) + "\n").encode())
    else:
        store.delete(name)


def read(store: Store, shard: Shard) -> list[Mapping[str, Any]]:
    """Return the rejects of a shard."""
    contents = store.read(f"{FOLDER}/{shard.stem}.jsonl") or b""
    return [json.loads(line) for line in contents.splitlines()]


def current(store: Store, done: Done) -> Iterator[tuple[Shard, list[Mapping[str, Any]]]]:
    """Yield the shards that have rejects now, and these.

    A retry writes a further generation of a shard and of its rejects; the last one counts. A file
    of rejects without its shard is left from an attempt that was killed.
    """
    there = set(store.names(FOLDER))
    for shard in done.main.values():
        newest = done.newest(shard)
        if f"{newest.stem}.jsonl" in there and (lines := read(store, newest)):
            yield shard, lines
