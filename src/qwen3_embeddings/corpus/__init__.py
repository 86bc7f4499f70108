"""Embed a corpus of any size: every row exactly once, on one machine or many.

A job is a list of deterministic splits of the input files. One split becomes one immutable Parquet
shard, whose name says which rows of which file version it holds. A split is done when its shard
is there, so the same call continues a job that was stopped in any manner.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from qwen3_embeddings.errors import MissingDependencyError

try:
    import pyarrow  # noqa: F401
except ImportError as error:
    raise MissingDependencyError(
        "embedding a corpus needs pyarrow. Install it: pip install 'qwen3-embeddings[embed]'"
    ) from error

from qwen3_embeddings.corpus.errors import InputError, JobFailedError, JobRefusedError
from qwen3_embeddings.corpus.job import Job, Summary
from qwen3_embeddings.corpus.options import Options, part_of
from qwen3_embeddings.corpus.progress import Counts, Progress, printer

if TYPE_CHECKING:
    from qwen3_embeddings.embedder import Embedder

__all__ = [
    "Counts",
    "InputError",
    "Job",
    "JobFailedError",
    "JobRefusedError",
    "Options",
    "Progress",
    "Summary",
    "embed",
    "part_of",
]


def embed(
    inputs: str | Iterable[str],
    output: str,
    *,
    embedder: Embedder,
    tokenizer: str | None = None,
    shards: str | None = None,
    retry_rejects: bool = False,
    replace_changed: bool = False,
    ray: str | bool = False,
    actors: int | None = None,
    show_progress: bool = False,
    **options: Any,
) -> Summary:
    """Embed files into Parquet shards, and continue where an earlier call stopped.

    Args:
        inputs: files, folders and glob patterns, local or as URLs such as ``s3://bucket/folder``.
        output: folder for the shards, local or as a URL.
        embedder: embeds the texts. Its engine starts only if there is work.
        tokenizer: folder or hub id of the tokenizer for chunks. Default: the embedder's model.
        shards: "I/N" to do part I of N, counted from 0, without Ray.
        retry_rejects: embed rows again that were rejected.
        replace_changed: replace shards of inputs that changed or are gone, instead of refusing.
        ray: address of a Ray cluster, or True for one on this machine.
        actors: engines on the cluster. Default: one per GPU, else one per node.
        show_progress: print progress to stderr.
        **options: of `Options`: text_column, id_column, keep, role, dtype, chunk, overlap,
            shard_rows.

    Returns:
        What was done. Rows that cannot be embedded are in ``output/_embed/rejects``.

    Raises:
        JobRefusedError: inputs, output and options do not fit together; nothing was changed.
        InputError: an input cannot be read.
        JobFailedError: the output cannot be written. The same call continues.
        EngineError: the engine or server failed. The same call continues.

    Example:
        >>> from qwen3_embeddings import Embedder
        >>> from qwen3_embeddings.corpus import embed
        >>> summary = embed("corpus/*.parquet", "vectors", embedder=Embedder(), id_column="id")
        >>> summary.rejects
        0
    """
    keep = options.get("keep", ())
    options["keep"] = (keep,) if isinstance(keep, str) else tuple(keep)
    job = Job(
        [inputs] if isinstance(inputs, str) else list(inputs),
        output,
        Options(**options),
        embedder,
        tokenizer=tokenizer,
        part=part_of(shards),
    )
    with contextlib.closing(job), job.locked() as alone:
        plan = job.plan(retry_rejects=retry_rejects, replace_changed=replace_changed)
        progress = Progress(0, 0)
        failed: list[str] = []
        job.begin(plan, alone=alone)
        if plan.works:
            out = printer(show_progress)
            if ray:
                from qwen3_embeddings.corpus import ray as cluster

                progress = Progress(plan.total, plan.total - plan.open_weight, out=out)
                address = ray if isinstance(ray, str) else None
                with progress.shown():
                    failed = cluster.run(job, plan, progress, address=address, actors=actors)
            else:
                progress, failed = job.run(plan, out)
        return job.finish(plan, progress.counts, progress.seconds(), failed)
