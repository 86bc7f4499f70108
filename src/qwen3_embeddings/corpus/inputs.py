"""Input files: which there are, and which version of each."""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyarrow import fs as pafs

from qwen3_embeddings.corpus.errors import InputError, JobRefusedError
from qwen3_embeddings.corpus.storage import Store, resolve

COMPRESSIONS = (".gz", ".zst", ".bz2")
FORMATS = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".txt": "text",
}
SAMPLE = 65_536
"""Bytes of the head and of the tail of a file that its version depends on."""


@dataclass(frozen=True)
class File:
    """One input file.

    Attributes:
        name: path relative to the input argument; the file's identity across runs.
        system: pyarrow's file system.
        path: path within `system`.
        size: bytes.
        format: "parquet", "jsonl", "csv" or "text".
        compressed: whether it can only be read from its start.
    """

    name: str
    system: pafs.FileSystem
    path: str
    size: int
    format: str
    compressed: bool

    @property
    def key(self) -> str:
        """Eight hex digits for the name."""
        return hashlib.sha256(self.name.encode()).hexdigest()[:8]

    @property
    def sequential(self) -> bool:
        """Whether a row can only be found by reading all rows before it."""
        return self.compressed or self.format == "csv"

    @functools.cached_property
    def version(self) -> str:
        """Twelve hex digits for the contents: of size and ETag, else of size and samples.

        The modification time is not part of it: a copy of a corpus is the same corpus. Samples
        are the head, the tail and sixteen blocks between. An edit elsewhere is not seen if it
        changes neither the size nor, in Parquet, the footer.
        """
        digest = hashlib.sha256(f"{self.size}".encode())
        with self.open() as file:
            tag = (file.metadata() or {}).get(b"ETag")
            if tag:
                digest.update(tag)
            else:
                for start, count in self._samples(file):
                    digest.update(file.read_at(count, start))
        return digest.hexdigest()[:12]

    def _samples(self, file: Any) -> Iterator[tuple[int, int]]:
        """Yield offset and length of the parts that tell versions apart."""
        tail = SAMPLE
        if self.format == "parquet" and self.size >= 12:
            # A footer's length is in the four bytes before the closing magic number
            # (https://parquet.apache.org/docs/file-format).
            tail = max(tail, int.from_bytes(file.read_at(4, self.size - 8), "little") + 8)
        yield 0, SAMPLE
        step = (self.size - SAMPLE - tail) // 16
        if step > 4096:
            yield from ((SAMPLE + i * step, 4096) for i in range(16))
        yield max(0, self.size - tail), tail

    def open(self) -> Any:
        """Open the file for reading at any offset.

        Raises:
            InputError: it cannot be read.
        """
        with self.errors():
            return self.system.open_input_file(self.path)

    def errors(self) -> input_errors:
        """Turn errors of reading into an `InputError` that names this file."""
        return input_errors(self.name)


class input_errors:  # noqa: N801  (a context manager, named like a function)
    """Turn errors of reading an input into an `InputError` that names it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, InputError):
            return
        if isinstance(error, (OSError, EOFError, pa.ArrowException)):
            said = " ".join(str(error).split())[:300]
            raise InputError(
                f"cannot read {self._name} ({said}). Check that the file is complete."
            ) from error


def find(inputs: Sequence[str], output: Store) -> list[File]:
    """Return the files that the input arguments name, in the order of their names.

    A folder stands for all its files of a known format, at any depth. Names that begin with "."
    or "_" are skipped, and so is the output folder.

    Args:
        inputs: files, folders and glob patterns, local or as URLs.
        output: the output folder.

    Raises:
        JobRefusedError: an argument names no file, or two files have the same relative name.
    """
    files: dict[str, File] = {}
    for given in inputs:
        found = [file for file in _matches(given) if not _inside(file, output)]
        if not found:
            raise JobRefusedError(
                f"no input at {given}: no file with one of the endings {', '.join(FORMATS)} (or "
                f"these with {', '.join(COMPRESSIONS)}). Check the path."
            )
        for file in found:
            other = files.setdefault(file.name, file)
            if other.path != file.path:
                raise JobRefusedError(
                    f"{other.path} and {file.path} would both be called {file.name} in the output. "
                    "Pass the folder above both."
                )
    return [files[name] for name in sorted(files)]


def _matches(given: str) -> Iterator[File]:
    literal = _literal_part(given)
    system, base = resolve(literal or ".")
    infos = _list(system, base)
    if literal == given and len(infos) == 1 and infos[0].path == base:
        known = _file(system, infos[0], infos[0].base_name)
        if known is None:
            raise JobRefusedError(f"{given} has none of the endings {', '.join(FORMATS)}.")
        yield known
        return
    pattern = re.compile(_translate(given[len(literal) :].lstrip("/")) if literal != given else "")
    for info in infos:
        name = info.path[len(base) :].lstrip("/")
        hidden = any(part.startswith((".", "_")) for part in name.split("/"))
        if (literal == given or pattern.fullmatch(name)) and not hidden:
            file = _file(system, info, name)
            if file is not None:
                yield file


def _literal_part(given: str) -> str:
    """Return the part of a pattern before the first component with a wildcard."""
    url = "://" in given  # whose "?" begins a query
    wild = re.search(r"[*\[]" if url else r"[*?\[]", given)
    if not wild or (not url and os.path.exists(given)):
        return given
    head = given[: wild.start()]
    return head[: head.rfind("/") + 1]


def _translate(pattern: str) -> str:
    """Return the regular expression of a glob; ``**`` matches any number of folders."""
    parts = pattern.split("/")
    out = []
    for i, part in enumerate(parts):
        if part == "**":
            out.append("(?:.*/)?" if i < len(parts) - 1 else ".*")
            continue
        body = fnmatch.translate(part)  # "(?s:…)\\Z", with "\\z" from Python 3.14 on
        body = body.removeprefix("(?s:")[:-3]
        out.append(body.replace(".*", "[^/]*") + ("/" if i < len(parts) - 1 else ""))
    return "".join(out)


def _list(system: pafs.FileSystem, base: str) -> list[pafs.FileInfo]:
    with input_errors(base):
        info = system.get_file_info(base)
        if info.is_file:
            return [info]
        selector = pafs.FileSelector(base, recursive=True, allow_not_found=True)
        return [info for info in system.get_file_info(selector) if info.is_file]


def _file(system: pafs.FileSystem, info: pafs.FileInfo, name: str) -> File | None:
    stem = name.lower()
    compression = next((ending for ending in COMPRESSIONS if stem.endswith(ending)), "")
    stem = stem.removesuffix(compression)
    kind = next((FORMATS[ending] for ending in FORMATS if stem.endswith(ending)), None)
    if kind is None or (kind == "parquet" and compression):
        return None
    return File(name, system, info.path, info.size, kind, bool(compression))


def _inside(file: File, output: Store) -> bool:
    return file.system.equals(output.system) and file.path.startswith(f"{output.path}/")
