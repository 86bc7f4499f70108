"""Print the PostgreSQL statements for a pgvector table of a chosen size.

    python examples/store_pgvector.py DIMENSIONS | psql

pgvector indexes at most 2,000 dimensions of the type `vector` (4 bytes each) and 4,000 of `halfvec`
(2 bytes each). Larger vectors can be stored, and searched without an index. Qwen3-Embedding has
1,024 (0.6B), 2,560 (4B) or 4,096 (8B) dimensions, or any smaller size.
"""

from __future__ import annotations

import sys

INDEX_LIMITS = {"vector": 2000, "halfvec": 4000}
"""Most dimensions of an HNSW index (pgvector README, "HNSW")."""


def column_type(dimensions: int) -> str:
    """Return the most precise type that can be indexed at this size; `halfvec` if none can."""
    fits = (name for name, limit in INDEX_LIMITS.items() if dimensions <= limit)
    return next(fits, "halfvec")


def statements(dimensions: int, table: str = "passages", kind: str | None = None) -> str:
    """Return the statements that create a table and its index.

    Args:
        dimensions: size of the vectors; pass the same to the embedder.
        table: name of the table, a plain identifier.
        kind: "vector" or "halfvec"; None chooses by the size.

    Raises:
        ValueError: no model has the size, or `table` is not an identifier.
    """
    if not 32 <= dimensions <= 4096:
        raise ValueError(f"{dimensions} dimensions: the models have 32 to 4,096.")
    if not table.isidentifier():
        raise ValueError(f"{table!r} is not a plain identifier.")
    kind = kind or column_type(dimensions)
    lines = [
        "CREATE EXTENSION IF NOT EXISTS vector;",
        f"CREATE TABLE {table} (id text PRIMARY KEY, content text NOT NULL, "
        f"embedding {kind}({dimensions}) NOT NULL);",
    ]
    if dimensions <= INDEX_LIMITS[kind]:
        lines.append(f"CREATE INDEX ON {table} USING hnsw (embedding {kind}_cosine_ops);")
    else:
        lines.append(f"-- No index: {kind} allows {INDEX_LIMITS[kind]} dimensions.")
    lines.append("-- Search: SELECT id, 1 - (embedding <=> $1) AS cosine")
    lines.append(f"--         FROM {table} ORDER BY embedding <=> $1 LIMIT 5;")
    return "\n".join(lines)


def main(dimensions: str) -> None:
    """Print the statements."""
    print(statements(int(dimensions)))


if __name__ == "__main__":
    main(*sys.argv[1:])
