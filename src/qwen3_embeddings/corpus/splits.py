"""Deterministic splits of the input files, and the shards that hold them.

A split is a range of one version of one file. Its shard's name says which one, so a split is done
when its shard is there, and nothing else has to be recorded.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from qwen3_embeddings.corpus.errors import JobRefusedError
from qwen3_embeddings.corpus.inputs import SAMPLE, File
from qwen3_embeddings.corpus.options import Options

_NAME = re.compile(
    r"part-(?P<slug>.*)-(?P<key>[0-9a-f]{8})-(?P<start>\d{12})-(?P<stop>\d{12})(?P<last>z?)"
    r"-(?P<version>[0-9a-f]{12})(?:-r(?P<generation>\d+))?\.parquet"
)


@dataclass(frozen=True)
class Split:
    """A range of one file.

    Attributes:
        file: the input file.
        start: first row; in JSONL and text files, first byte.
        stop: end of the range, exclusive; None for a whole file that is read from its start.
        weight: bytes of text in it, for progress.
        last: whether it is the end of a file that is read from its start.
    """

    file: File
    start: int
    stop: int | None
    weight: int
    last: bool = False

    @property
    def place(self) -> tuple[str, str, int]:
        """What identifies the split: file, version and start."""
        return self.file.key, self.file.version, self.start


@dataclass(frozen=True)
class Shard:
    """What the name of a shard says.

    Attributes:
        slug: readable part of the input file's name.
        key: hash of the input file's name.
        version: hash of the input file's contents.
        start: first row or byte.
        stop: end of the range, exclusive.
        last: whether it is the end of a file that is read from its start.
        generation: 0, or the count of retries of its rejects.
    """

    slug: str
    key: str
    version: str
    start: int
    stop: int
    last: bool = False
    generation: int = 0

    @classmethod
    def of(cls, split: Split, generation: int = 0) -> Shard:
        """Return the shard of a split whose end is known."""
        assert split.stop is not None
        slug = re.sub(r"[^A-Za-z0-9._]+", "-", split.file.name)[-40:].strip("-")
        place = (split.file.key, split.file.version, split.start, split.stop)
        return cls(slug, *place, split.last, generation)

    @classmethod
    def parse(cls, name: str) -> Shard | None:
        """Return what a file name says, or None if it is not a shard's."""
        if not (match := _NAME.fullmatch(name)):
            return None
        start, stop, last = int(match["start"]), int(match["stop"]), bool(match["last"])
        generation = int(match["generation"] or 0)
        return cls(match["slug"], match["key"], match["version"], start, stop, last, generation)

    @property
    def stem(self) -> str:
        """The name without its ending."""
        end = "z" if self.last else ""
        retry = f"-r{self.generation}" if self.generation else ""
        place = f"{self.key}-{self.start:012d}-{self.stop:012d}{end}-{self.version}"
        return f"part-{self.slug}-{place}{retry}"

    @property
    def name(self) -> str:
        """The file name."""
        return f"{self.stem}.parquet"

    @property
    def place(self) -> tuple[str, str, int]:
        """What identifies its split: file, version and start."""
        return self.key, self.version, self.start


class Done:
    """The shards that are in the output.

    Args:
        names: file names in the output folder.
    """

    def __init__(self, names: Iterable[str]) -> None:
        shards = [shard for name in names if (shard := Shard.parse(name))]
        self.main = {shard.place: shard for shard in shards if not shard.generation}
        self.all: dict[tuple[str, str, int], list[Shard]] = defaultdict(list)
        for shard in shards:
            self.all[shard.place].append(shard)

    def has(self, split: Split) -> bool:
        """Whether all rows of a split are in the output or among the rejects."""
        if split.stop is not None:
            return split.place in self.main
        key, version, start = split.place
        while shard := self.main.get((key, version, start)):
            if shard.last:
                return True
            start = shard.stop
        return False

    def has_all(self, splits: Iterable[Split]) -> bool:
        """Whether the output has every one of these splits."""
        return all(map(self.has, splits))

    def newest(self, shard: Shard) -> Shard:
        """Return the last generation of a shard; its rejects are the ones that count."""
        return max(self.all[shard.place], key=lambda other: other.generation)

    def foreign(self, files: Iterable[File]) -> tuple[list[Shard], list[Shard]]:
        """Return the shards of changed inputs, and those of inputs that are gone."""
        versions = {file.key: file.version for file in files}
        every = [shard for shards in self.all.values() for shard in shards]
        changed = [s for s in every if s.key in versions and versions[s.key] != s.version]
        return changed, [s for s in every if s.key not in versions]


def plan(files: Sequence[File], options: Options) -> list[Split]:
    """Return the splits of all files, in order.

    Raises:
        InputError: a file cannot be read.
        JobRefusedError: a Parquet file lacks a column.
    """
    with ThreadPoolExecutor(16) as pool:  # requests to an object store wait, they do not work
        return [
            split for splits in pool.map(lambda f: _split(f, options), files) for split in splits
        ]


def _split(file: File, options: Options) -> list[Split]:
    _ = file.version  # read here, in parallel
    if file.format == "parquet":
        return _row_ranges(file, options)
    if file.sequential:
        return [Split(file, 0, None, file.size)] if file.size else []
    return _byte_ranges(file, options)


def _row_ranges(file: File, options: Options) -> list[Split]:
    with file.open() as opened, file.errors():
        metadata = pq.read_metadata(opened)
    names = metadata.schema.to_arrow_schema().names
    if missing := [name for name in options.columns if name not in names]:
        raise JobRefusedError(
            f"{file.name} has no column {', '.join(missing)}; it has {', '.join(names[:20])}. "
            "Check --text-column, --id-column and --keep."
        )
    kind = metadata.schema.to_arrow_schema().field(options.text_column).type
    if not _is_text(kind):
        raise JobRefusedError(
            f"column {options.text_column} of {file.name} is {kind}, not text. Check --text-column."
        )
    weight = _text_bytes(metadata, options.text_column)
    total = metadata.num_rows
    starts = range(0, total, options.shard_rows)
    stops = [min(start + options.shard_rows, total) for start in starts]
    return [
        Split(file, start, stop, weight * (stop - start) // total)
        for start, stop in zip(starts, stops, strict=True)
    ]


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    checks = [pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view]
    checks += [pa.types.is_binary, pa.types.is_large_binary, pa.types.is_null]
    return any(check(kind) for check in checks)


def _text_bytes(metadata: pq.FileMetaData, column: str) -> int:
    """Return the bytes of a column's values before compression."""
    paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    index = paths.index(column) if column in paths else 0
    groups = range(metadata.num_row_groups)
    return sum(metadata.row_group(i).column(index).total_uncompressed_size for i in groups)


def _byte_ranges(file: File, options: Options) -> list[Split]:
    """Cut a file of lines where `shard_rows` lines of the average length in its head end."""
    if not file.size:
        return []
    with file.open() as opened, file.errors():
        head = opened.read_at(SAMPLE, 0)
    span = options.shard_rows * max(1, len(head) // max(1, head.count(b"\n")))
    starts = range(0, file.size, span)
    stops = [min(start + span, file.size) for start in starts]
    return [Split(file, a, b, b - a) for a, b in zip(starts, stops, strict=True)]
