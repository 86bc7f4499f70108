"""One corpus job: plan, refuse what does not fit, embed what is open, say what happened."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from qwen3_embeddings.corpus import inputs, rejects, splits
from qwen3_embeddings.corpus.chunks import Chunker
from qwen3_embeddings.corpus.errors import JobRefusedError, output_errors
from qwen3_embeddings.corpus.inputs import File
from qwen3_embeddings.corpus.options import Options, slice_of
from qwen3_embeddings.corpus.pipeline import Pipeline, Work
from qwen3_embeddings.corpus.progress import Counts, Progress, duration
from qwen3_embeddings.corpus.readers import missing_columns
from qwen3_embeddings.corpus.shards import schema_of
from qwen3_embeddings.corpus.splits import Done, Shard, Split
from qwen3_embeddings.corpus.storage import PRIVATE, Store
from qwen3_embeddings.embedder import Embedder
from qwen3_embeddings.tokenizer import load_tokenizer

JOB = f"{PRIVATE}/job.json"
SUCCESS = "_SUCCESS"
FORMAT = 1
"""Version of the output's layout."""


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
        counts: of this run.
        seconds: duration of this run.
        shards: shards in the output that belong to this job, or to this part of it.
        rejects: rows without a vector, of this and earlier runs.
        failed: one message per file that could not be read or split that failed.
        complete: whether all shards of the whole job are there.
    """

    counts: Counts
    seconds: float
    shards: int
    rejects: int
    failed: tuple[str, ...] = ()
    complete: bool = True

    @property
    def exit_code(self) -> int:
        """0 when everything is embedded, 3 when some rows were rejected, 1 when work is left."""
        return 1 if self.failed else 3 if self.rejects else 0

    def __str__(self) -> str:
        counts = self.counts
        rate = f"{counts.rows / max(self.seconds, 1e-9):,.0f} rows/s"
        tokens = f", {counts.tokens:,} tokens" if counts.tokens else ""
        done = f"{counts.rows:,} rows{tokens} in {duration(self.seconds)} ({rate}), "
        return (
            f"{done}{counts.shards:,} new shards, {self.shards:,} in all, {self.rejects:,} rejects"
        )


@dataclass
class Plan:
    """What a job has to do.

    Attributes:
        files: input files.
        splits: all splits of the job.
        mine: splits of this part of it.
        done: shards that are there.
        works: what is open.
        obsolete: shards of inputs that changed or are gone.
        kept: id and kept columns with their types.
        identity: what the output depends on, as job.json holds it.
    """

    files: list[File]
    splits: list[Split]
    mine: list[Split]
    done: Done
    works: list[Work] = field(default_factory=list)
    obsolete: list[Shard] = field(default_factory=list)
    kept: list[pa.Field] = field(default_factory=list)
    identity: dict[str, Any] = field(default_factory=dict)

    def owns(self, shard: Shard) -> bool:
        """Whether a shard belongs to this part of the job."""
        return shard.place in self._places or (*shard.place[:2], None) in self._places

    def __post_init__(self) -> None:
        self._places = {
            split.place if split.stop is not None else (*split.place[:2], None)
            for split in self.mine
        }

    @property
    def total(self) -> int:
        """Bytes of input in this part of the job."""
        return sum(split.weight for split in self.mine)

    @property
    def open_weight(self) -> int:
        """Bytes of input that are not done."""
        return sum(split.weight for work in self.works for split in work.splits)


class Job:
    """A corpus, an output and an embedder. Close it after use.

    Args:
        inputs: files, folders and glob patterns, local or as URLs.
        output: folder, local or as a URL.
        options: what the output holds.
        embedder: embeds the texts; nothing is started before there is work.
        tokenizer: folder or hub id of the tokenizer that chunks are measured with. Default: the
            embedder's model.
        part: index and count of this part of the job, as in ``--shards 0/8``.
    """

    def __init__(
        self,
        inputs: Sequence[str],
        output: str,
        options: Options,
        embedder: Embedder,
        *,
        tokenizer: str | None = None,
        part: tuple[int, int] | None = None,
    ) -> None:
        self.inputs, self.options, self.part = inputs, options, part
        self.store = Store.at(output)
        self.chunker = None
        if options.chunk:
            model = tokenizer or embedder.model
            if model is None:
                raise JobRefusedError(
                    "chunks need the model's tokenizer, and no model is named. Pass --tokenizer "
                    "with the checkpoint's folder or hub id."
                )
            self.chunker = Chunker(load_tokenizer(model), options.chunk, options.overlap)
        # One that stops at a rejected text would lose the rest of its batch.
        self.embedder = embedder._finishing()

    def close(self) -> None:
        """Release the engine; it stops when no other open embedder uses it."""
        self.embedder.close()

    @contextlib.contextmanager
    def locked(self) -> Iterator[bool]:
        """Hold the output's lock; yield whether no other process can be writing."""
        part = self.part and "-of-".join(map(str, self.part))
        with contextlib.ExitStack() as stack:
            with output_errors(self.store.url):
                certain = stack.enter_context(self.store.lock(part))
            yield certain and not part

    # Planning.

    def plan(self, *, retry_rejects: bool = False, replace_changed: bool = False) -> Plan:
        """Return what is open, before an engine starts.

        Raises:
            JobRefusedError: inputs, output and options do not fit together.
            InputError: an input cannot be read.
        """
        files = inputs.find(self.inputs, self.store)
        every = splits.plan(files, self.options)
        done = self._done()
        plan = Plan(files, every, slice_of(every, self.part), done)
        stored = json.loads(self.store.read(JOB) or b"{}")
        plan.kept = _kept(stored, files, self.options)
        plan.identity = self._identity(plan.kept)
        self._check_identity(stored, plan.identity, done)
        self._check_columns(files)
        size = self.embedder.embedding_dimension if self.options.dtype == "binary" else 0
        if size % 8:
            raise JobRefusedError(
                f"dtype='binary' packs eight dimensions in a byte, and {size} is not a multiple "
                "of 8. Use another dimensions."
            )
        plan.obsolete = self._check_inputs(files, done, replace_changed=replace_changed)
        plan.works = [
            Work(file, tuple(mine))
            for file in files
            if (mine := [s for s in plan.mine if s.file is file and not done.has(s)])
        ]
        if retry_rejects:
            plan.works += self._retries(plan)
        return plan

    def _done(self) -> Done:
        names = self.store.names()
        strange = [n for n in names if not n.startswith((".", "_")) and Shard.parse(n) is None]
        if strange:
            raise JobRefusedError(
                f"{self.store.url} holds files of something else ({', '.join(strange[:3])}). Use "
                "an empty folder as output."
            )
        return Done(names)

    def _identity(self, kept: Sequence[pa.Field]) -> dict[str, Any]:
        embedder, options = self.embedder, self.options
        role = options.role
        columns = base64.b64encode(pa.schema(kept).serialize().to_pybytes()).decode()
        return asdict(options) | {
            "format": FORMAT,
            "fingerprint": embedder.fingerprint(role),
            "model": embedder.model,
            "instruction": embedder._instruction(role),
            "dimensions": embedder.dimensions,
            "tokenizer": self.chunker.digest if self.chunker else None,
            "columns": columns,
            "keep": list(options.keep),
        }

    def _check_identity(
        self, stored: Mapping[str, Any], mine: Mapping[str, Any], done: Done
    ) -> None:
        """Refuse to mix vectors or columns of two kinds in one output."""
        if not stored and done.all:
            raise JobRefusedError(
                f"{self.store.url} has shards and no {JOB}. Restore that file, or use another "
                "output."
            )
        within = {"model", "dimensions", "instruction"}  # the fingerprint covers them
        differing = sorted(name for name in mine if stored and stored.get(name) != mine[name])
        if set(differing) <= within:
            return
        named = [name for name in differing if name != "fingerprint"] or differing
        was = ", ".join(f"{name}={stored.get(name)!r}" for name in named)
        now = ", ".join(f"{name}={mine[name]!r}" for name in named)
        raise JobRefusedError(
            f"{self.store.url} was written with {was}, and this command has {now}. Use the same "
            "options, or another output."
        )

    def _check_columns(self, files: Sequence[File]) -> None:
        for file in files[:1]:
            if missing := missing_columns(file, self.options):
                raise JobRefusedError(
                    f"the first row of {file.name} has no {', '.join(missing)}. Check "
                    "--text-column, --id-column and --keep."
                )

    def _check_inputs(
        self, files: Sequence[File], done: Done, *, replace_changed: bool
    ) -> list[Shard]:
        changed, gone = done.foreign(files)
        for shards, what in ((changed, "changed"), (gone, "not among the inputs any more")):
            if shards and not replace_changed:
                names = ", ".join(sorted({self._input_of(shard) for shard in shards[:3]}))
                raise JobRefusedError(
                    f"{len(shards)} shards in {self.store.url} come from inputs that are {what} "
                    f"({names}). Restore the inputs, or pass --replace-changed to delete these "
                    "shards once the new ones are there."
                )
        return changed + gone

    def _input_of(self, shard: Shard) -> str:
        """Return the input file that a shard names in its footer."""
        with self.store.system.open_input_file(f"{self.store.path}/{shard.name}") as file:
            metadata = pq.read_metadata(file).metadata or {}
        name: bytes = metadata.get(b"qwen3_embeddings.file", shard.slug.encode())
        return name.decode()

    def _retries(self, plan: Plan) -> list[Work]:
        """Return the work of embedding all rejects again."""
        files = {file.key: file for file in plan.files}
        works: dict[str, Work] = {}
        for shard, lines in rejects.current(self.store, plan.done):
            if not plan.owns(shard):
                continue
            work = works.setdefault(shard.key, Work(files[shard.key], (), {}, {}))
            split = Split(work.file, shard.start, shard.stop, 0, shard.last)
            only = {shard.start: frozenset((line["row"], line["chunk"]) for line in lines)}
            generation = {shard.start: plan.done.newest(shard).generation + 1}
            works[shard.key] = replace(
                work,
                splits=(*work.splits, split),
                only={**(work.only or {}), **only},
                generations={**work.generations, **generation},
            )
        return list(works.values())

    # Running.

    def pipeline(self, plan: Plan) -> Pipeline:
        """Start the engine and return what embeds splits."""
        served = self.embedder.start()
        size = self.embedder.dimensions or served.dimensions
        chunks = self.chunker is not None
        schema = schema_of(plan.kept, size, self.options.dtype, chunks=chunks)
        facts = ("fingerprint", "instruction", "role", "dtype", "chunk", "overlap")
        metadata = {name: str(plan.identity[name]) for name in facts}
        metadata |= {"model": served.model, "dimensions": str(size)}
        return Pipeline(
            self.store, self.options, self.embedder, schema, metadata, plan.done, self.chunker
        )

    def begin(self, plan: Plan, *, alone: bool) -> None:
        """Prepare the output for this run.

        Delete temporary files of killed attempts, if no other process can be writing. Delete the
        success mark if this run changes the output, or if the output is not complete. Write
        job.json before the first shard.
        """
        with output_errors(self.store.url):
            if alone:
                self.store.clean()
            if plan.works or plan.obsolete or not plan.done.has_all(plan.splits):
                self.store.delete(SUCCESS)
            if plan.works and self.store.read(JOB) is None:
                self.store.write(JOB, json.dumps(plan.identity, indent=1).encode())

    def run(self, plan: Plan, out: TextIO | None = None) -> tuple[Progress, list[str]]:
        """Embed what is open, in this process."""
        progress = Progress(
            plan.total or plan.open_weight,
            plan.total - plan.open_weight,
            lambda: self.embedder.usage.tokens,
            out,
        )
        with progress.shown():
            failed = self.pipeline(plan).run(plan.works, progress)
        progress.counts.tokens = self.embedder.usage.tokens
        return progress, failed

    def finish(self, plan: Plan, counts: Counts, seconds: float, failed: list[str]) -> Summary:
        """Mark the output as complete if it is, and return what happened."""
        with output_errors(self.store.url):
            done = self._done()
            complete = not failed and done.has_all(plan.splits)
            if complete:
                self._delete(plan.obsolete)
                if self.store.read(SUCCESS) is None:
                    self.store.write(SUCCESS, b"")
            current = rejects.current(self.store, done)
            rejected = sum(len(lines) for shard, lines in current if plan.owns(shard))
            shards = sum(plan.owns(shard) for shard in done.main.values())
        return Summary(replace(counts), seconds, shards, rejected, tuple(failed), complete)

    def _delete(self, shards: Sequence[Shard]) -> None:
        """Delete shards and their rejects in an order that a kill can interrupt anywhere.

        The last generation goes first. If its input comes back later, the first generation is
        embedded again or still there, and no row is in two shards. A shard goes before its
        rejects, or these rows would count as embedded.
        """
        for shard in sorted(shards, key=lambda shard: -shard.generation):
            self.store.delete(shard.name)
            self.store.delete(f"{rejects.FOLDER}/{shard.stem}.jsonl")


def _kept(stored: Mapping[str, Any], files: Sequence[File], options: Options) -> list[pa.Field]:
    """Return the fields of id and kept columns: of the first run, else of the first Parquet file.

    Columns of other formats are text, so that they have one type in all shards.
    """
    if stored:
        schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(stored["columns"])))
        return list(schema)
    known: dict[str, pa.DataType] = {}
    first = next((file for file in files if file.format == "parquet"), None)
    if first is not None:
        with first.open() as opened, first.errors():
            schema = pq.read_schema(opened)
        known = {name: schema.field(name).type for name in options.columns}
    return [pa.field(out, known.get(name, pa.string())) for out, name in options.columns_out()]
