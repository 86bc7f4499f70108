"""Rows of the input files, in batches that never cross a split's border."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qwen3_embeddings.corpus.inputs import File
from qwen3_embeddings.corpus.options import Options
from qwen3_embeddings.corpus.splits import Done, Split

BATCH = 2048
"""Rows in a batch. It becomes a row group of 8 MB at 1,024 dimensions."""

BLOCK = 1 << 20

csv.field_size_limit(2**31 - 1)  # Python's own limit is 128 KiB, shorter than many documents


@dataclass(frozen=True)
class Problem:
    """Why a row cannot be embedded.

    Attributes:
        error: class of the error.
        message: what happened.
    """

    error: str
    message: str


@dataclass
class Rows:
    """Consecutive rows of one split.

    Attributes:
        split: the split.
        rows: index of each row in its file; in JSONL and text files its first byte.
        texts: the text of each row, or why it has none.
        columns: id and kept columns, by their names in the output.
        weight: bytes of the split that these rows stand for.
        spans: with chunks, number, start and end of each chunk in its row's text.
    """

    split: Split
    rows: list[int]
    texts: list[str | Problem]
    columns: dict[str, pa.Array]
    weight: int
    spans: list[tuple[int, int, int]] = field(default_factory=list)

    def pick(self, indices: Sequence[int]) -> Rows:
        """Return some of these rows, in order and without weight."""
        if len(indices) == len(self.rows):
            return replace(self, weight=0)
        places = pa.array(indices, pa.int64())
        return replace(
            self,
            rows=[self.rows[i] for i in indices],
            texts=[self.texts[i] for i in indices],
            columns={name: column.take(places) for name, column in self.columns.items()},
            spans=[self.spans[i] for i in indices] if self.spans else [],
            weight=0,
        )


Record = tuple[int, Any]
"""A row's position, and its line, or in CSV its values by column."""

Parser = Callable[[Any], dict[str, Any] | Problem]


def read(file: File, splits: Sequence[Split], options: Options, done: Done) -> Iterator[Rows]:
    """Yield the rows of some splits of one file.

    A file that is read from its start is cut into splits here, and those in `done` are passed
    over. The first batch of the next split, or the end, says that a split is complete.

    Raises:
        InputError: the file cannot be read.
    """
    with file.errors():
        if file.format == "parquet":
            yield from _read_parquet(file, splits, options)
        elif file.sequential:
            yield from _read_sequential(file, splits, options, done)
        else:
            yield from _read_ranges(file, splits, options)


# Parquet.


def _read_parquet(file: File, splits: Sequence[Split], options: Options) -> Iterator[Rows]:
    """Decode each row group once, however many splits it holds."""
    # Without a buffer size a whole column of a row group is read into memory.
    with pq.ParquetFile(file.open(), buffer_size=8 * BLOCK, pre_buffer=False) as source:
        first = 0
        for group in range(source.num_row_groups):
            stop = first + source.metadata.row_group(group).num_rows
            inside = [s for s in splits if s.start < stop and s.stop and s.stop > first]
            place, last = first, max((s.stop or 0 for s in inside), default=first)
            batches = source.iter_batches(BATCH, row_groups=[group], columns=options.columns)
            for batch in batches if inside else ():
                yield from _cut(batch, place, inside, options)
                place += len(batch)
                if place >= last:  # the rest of the group is not wanted
                    break
            first = stop


def _cut(
    batch: pa.RecordBatch, place: int, splits: Sequence[Split], options: Options
) -> Iterator[Rows]:
    for split in splits:
        assert split.stop is not None
        start, stop = max(split.start, place), min(split.stop, place + len(batch))
        if start >= stop:
            continue
        part = batch.slice(start - place, stop - start)
        yield Rows(
            split,
            list(range(start, stop)),
            _texts(part.column(options.text_column)),
            {out: part.column(name) for out, name in options.columns_out()},
            split.weight * (stop - start) // (split.stop - split.start),
        )


def _texts(column: pa.Array) -> list[str | Problem]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:  # Parquet does not check that strings are UTF-8
        values = column.cast(pa.large_binary()).to_pylist()
    return [_text(value) for value in values]


def _text(value: Any) -> str | Problem:
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            return Problem("UnicodeDecodeError", f"the text is not UTF-8: {error.reason}")
    kind = "null" if value is None else type(value).__name__
    return Problem("TextTypeError", f"the text is {kind}, not a string")


# Lines of JSONL and text files, from any byte.


def _read_ranges(file: File, splits: Sequence[Split], options: Options) -> Iterator[Rows]:
    parse = _parser(file, options)
    with file.open() as source:
        for split in splits:
            assert split.stop is not None
            reached = split.start
            for batch in _batches(_clean(_lines(source, split.start, split.stop))):
                end = min(batch[-1][0] + len(batch[-1][1]) + 1, split.stop)
                yield _rows(split, batch, parse, options, end - reached)
                reached = end
            yield _rows(split, [], parse, options, split.stop - reached)


def _lines(source: Any, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that begin in a range of bytes, with the place of each."""
    place = max(0, start - 1)  # a line begins at `start` if the byte before ends one
    source.seek(place)
    rest = b""
    skip = start > 0
    while place < stop:
        block = source.read(BLOCK)
        *lines, rest = (rest + block).split(b"\n")
        if not block and rest:
            lines, rest = [rest], b""
        for line in lines:
            if place >= stop:
                return
            if not skip:
                yield place, line
            skip = False
            place += len(line) + 1
        if not block or (skip and len(rest) > stop - place):  # no line begins in the range
            return


def _clean(lines: Iterable[tuple[int, bytes]]) -> Iterator[Record]:
    """Drop blank lines, which are no rows, line ends, and a byte order mark."""
    for place, line in lines:
        if place == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")
        line = line.rstrip(b"\r\n")
        if line.strip():
            yield place, line


def _parser(file: File, options: Options) -> Parser:
    if file.format == "csv":
        return lambda record: record
    if file.format == "text":
        return lambda line: {options.text_column: line}
    return _parse_json


def _parse_json(line: bytes) -> dict[str, Any] | Problem:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Problem(type(error).__name__, f"the line is not JSON: {error}")
    if not isinstance(record, dict):
        return Problem("TextTypeError", f"the line is {type(record).__name__}, not an object")
    return record


# CSV and compressed files, from their start.


def _read_sequential(
    file: File, splits: Sequence[Split], options: Options, done: Done
) -> Iterator[Rows]:
    """Cut a file into splits of `shard_rows` rows; parse only what is wanted of them."""
    whole, size, parse = splits[0], options.shard_rows, _parser(file, options)
    wanted = {split.start for split in splits if split.stop is not None}
    raw, records = _records(file)
    ahead = next(records, None)
    reached = 0
    for start in itertools.count(0, size):
        if (ahead is None and start) or (wanted and start > max(wanted)):
            return
        split = replace(whole, start=start, stop=None, weight=0)
        skip = start not in wanted if wanted else split.place in done.main
        count = 0
        while ahead is not None and count < size:
            batch = [ahead, *itertools.islice(records, min(BATCH, size - count) - 1)]
            ahead = next(records, None)
            count += len(batch)
            if not skip:
                now = file.size if raw.closed else raw.tell()  # it closes itself at its end
                yield _rows(split, batch, parse, options, now - reached)
                reached = now
        if not skip:
            split = replace(split, stop=start + count, last=ahead is None)
            yield _rows(split, [], parse, options, 0)


def _records(file: File) -> tuple[Any, Iterator[Record]]:
    """Return the opened file, whose position is the progress, and its numbered rows."""
    stream = raw = file.open()
    if file.compressed:
        endings = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
        compression = endings["." + file.path.lower().rsplit(".", 1)[1]]
        stream = pa.CompressedInputStream(raw, compression)
    if file.format == "csv":
        return raw, enumerate(_csv_records(stream))
    lines = _clean(enumerate(io.BufferedReader(stream, BLOCK)))
    return raw, enumerate(line for _, line in lines)


def _csv_records(stream: Any) -> Iterator[dict[str, Any]]:
    # Bytes that are not UTF-8 become lone surrogates, which are refused row by row.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    try:
        yield from csv.DictReader(text)
    except csv.Error as error:
        raise OSError(f"not CSV: {error}") from error


# Common to all formats but Parquet.


def _batches(records: Iterator[Record]) -> Iterator[list[Record]]:
    while batch := list(itertools.islice(records, BATCH)):
        yield batch


def _rows(
    split: Split, batch: Sequence[Record], parse: Parser, options: Options, weight: int
) -> Rows:
    parsed = [parse(raw) for _, raw in batch]
    name = options.text_column
    texts = [
        record
        if isinstance(record, Problem)
        else _text(record[name])
        if name in record
        else Problem("TextTypeError", f"the row has no {name!r}")
        for record in parsed
    ]
    records = [{} if isinstance(record, Problem) else record for record in parsed]
    columns = {
        out: pa.array([_as_text(record.get(name)) for record in records], pa.string())
        for out, name in options.columns_out()
    }
    return Rows(split, [place for place, _ in batch], texts, columns, weight)


def _as_text(value: Any) -> str | None:
    """Return a value as text, others than strings as JSON: a column has one type in all shards."""
    if value is None:
        return None
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode(errors="replace").decode()


def missing_columns(file: File, options: Options) -> list[str]:
    """Return the wanted columns that the first row of a CSV or JSONL file lacks.

    Raises:
        InputError: the file cannot be read.
    """
    if file.format in {"parquet", "text"} or not file.size:
        return []
    with file.errors():
        _, records = _records(file)
        record = next((_parser(file, options)(raw) for _, raw in records), None)
    if not isinstance(record, dict):
        return []
    return [name for name in options.columns if name not in record]
