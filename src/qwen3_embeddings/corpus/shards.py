"""The output format, and the writer of one shard."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qwen3_embeddings.corpus import rejects
from qwen3_embeddings.corpus.errors import JobFailedError
from qwen3_embeddings.corpus.options import NumberType
from qwen3_embeddings.corpus.readers import Rows
from qwen3_embeddings.corpus.rejects import Reject
from qwen3_embeddings.corpus.splits import Shard, Split
from qwen3_embeddings.corpus.storage import Store
from qwen3_embeddings.vectors import Vectors

PREFIX = "qwen3_embeddings."

_STORED = {
    "float32": pa.float32(),
    "float16": pa.float16(),
    "int8": pa.int8(),
    "binary": pa.uint8(),
}


def schema_of(
    kept: Sequence[pa.Field], dimensions: int, dtype: NumberType, *, chunks: bool
) -> pa.Schema:
    """Return the schema of all shards.

    Lists and their elements are not nullable: readers then save a third of their time
    (50,000 vectors of 1,024 dimensions: 0.25 s instead of 0.37).

    Args:
        kept: id and kept columns.
        dimensions: size of a vector.
        dtype: number type of the stored vectors; "binary" packs eight dimensions in a byte.
        chunks: whether rows are chunks of texts.
    """
    width = dimensions // 8 if dtype == "binary" else dimensions
    item = pa.field("element", _STORED[dtype], nullable=False)
    fields = [pa.field("file", pa.string(), nullable=False)]
    fields.append(pa.field("row", pa.int64(), nullable=False))
    spans = ("chunk", "start", "end") if chunks else ()
    fields += [pa.field(name, pa.int32(), nullable=False) for name in spans]
    fields += kept
    fields.append(pa.field("embedding", pa.list_(item, width), nullable=False))
    if dtype == "int8":
        fields.append(pa.field("scale", pa.float32(), nullable=False))
    return pa.schema(fields)


def encode(vectors: Vectors, dtype: NumberType) -> tuple[np.ndarray[Any, Any], Any]:
    """Return vectors in the stored number type, and for int8 the scale of each row.

    ``q * scale`` is the vector again. 127 is the largest int8; a scale per row keeps 1 - cos
    under 1e-4 at 1,024 dimensions, a fixed one does not. "binary" keeps the sign of each dimension,
    the first one in the highest bit, as sentence-transformers' "ubinary" does.
    """
    if dtype == "int8":
        scale = np.abs(vectors).max(axis=1, keepdims=True, initial=1e-12) / 127
        return np.rint(vectors / scale).astype(np.int8), scale[:, 0].astype(np.float32)
    if dtype == "binary":
        return np.packbits(vectors > 0, axis=1), None
    return vectors.astype(dtype, copy=False), None


class ShardWriter:
    """Writes one shard: row groups to a temporary file, then rejects and shard under their names.

    Args:
        store: the output.
        schema: of all shards.
        dtype: number type of the stored vectors.
        metadata: key-value metadata for the footer.
        generation: 0, or the count of retries of the rejects.
    """

    def __init__(
        self,
        store: Store,
        schema: pa.Schema,
        dtype: NumberType,
        metadata: Mapping[str, str],
        generation: int = 0,
    ) -> None:
        self.rejects: list[Reject] = []
        self.rows = 0
        self._store, self._schema, self._dtype = store, schema, dtype
        self._metadata, self._generation = dict(metadata), generation
        self._stack = contextlib.ExitStack()
        self._path = self._stack.enter_context(store.temporary())
        try:
            self._file = self._stack.enter_context(_open(self._path, schema, dtype))
        except BaseException:
            self._stack.close()
            raise

    def add(self, rows: Rows, vectors: Vectors) -> None:
        """Write one row group."""
        if not rows.rows:
            return
        stored, scale = encode(vectors, self._dtype)
        columns: dict[str, Any] = dict(rows.columns)
        columns["file"] = pa.repeat(rows.split.file.name, len(rows.rows))
        columns["row"] = rows.rows
        if rows.spans:
            columns |= zip(("chunk", "start", "end"), zip(*rows.spans, strict=True), strict=True)
        kind = self._schema.field("embedding").type
        flat = pa.array(np.ascontiguousarray(stored).reshape(-1), kind.value_type)
        columns["embedding"] = pa.FixedSizeListArray.from_arrays(flat, type=kind)
        columns["scale"] = scale
        arrays = [_cast(columns[field.name], field, rows) for field in self._schema]
        self._file.write_batch(pa.record_batch(arrays, schema=self._schema))
        self.rows += len(rows.rows)

    def commit(self, split: Split) -> Shard:
        """Make rejects and shard visible, in this order, each in one step.

        Args:
            split: the split, with its end.
        """
        shard = Shard.of(split, self._generation)
        facts = self._metadata | {
            "file": split.file.name,
            "version": split.file.version,
            "start": str(split.start),
            "stop": str(split.stop),
            "rejects": str(len(self.rejects)),
        }
        with self._stack:
            self._file.add_key_value_metadata({PREFIX + key: facts[key] for key in facts})
            self._file.close()
            rejects.write(self._store, shard, self.rejects)
            self._store.commit(self._path, shard.name)
        return shard

    def abandon(self) -> None:
        """Delete the temporary file."""
        with contextlib.suppress(OSError), self._stack:  # closing writes to a disk that may be full
            pass


def _open(path: Any, schema: pa.Schema, dtype: NumberType) -> pq.ParquetWriter:
    """Open a Parquet writer that compresses everything except the vectors.

    zstd saves 8 to 16 % of float vectors and doubles the time to read them. Parquet stores int8
    as four bytes unless a dictionary is used: 411 MB instead of 104 for 100,000 × 1,024.
    """
    names = [name for name in schema.names if name != "embedding"]
    vectors = "embedding.list.element"
    return pq.ParquetWriter(
        path,
        schema,
        compression=dict.fromkeys(names, "zstd") | {vectors: "none"},
        use_dictionary=[*names, *([vectors] if dtype in {"int8", "binary"} else [])],
        write_statistics=[name for name in names if name in {"file", "row", "id"}],
    )


def _cast(values: Any, field: pa.Field, rows: Rows) -> pa.Array:
    array = values if isinstance(values, pa.Array) else pa.array(values, field.type)
    if array.type == field.type:
        return array
    try:
        return array.cast(field.type)
    except pa.ArrowException as error:
        raise JobFailedError(
            f"column {field.name} of {rows.split.file.name} is {array.type} and does not fit the "
            f"output's {field.type} ({error}). Convert the column, or do not keep it."
        ) from error
