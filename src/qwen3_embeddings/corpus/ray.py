"""Many machines: Ray runs the job's own code, one small task per open split.

Vectors never enter Ray's object store: an actor reads its split, embeds it and writes the shard.
Ray restarts actors, retries tasks and balances them; `ray.util.ActorPool` is the queue.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from qwen3_embeddings.corpus.errors import JobFailedError
from qwen3_embeddings.corpus.job import Job, Plan
from qwen3_embeddings.corpus.pipeline import Pipeline, Work
from qwen3_embeddings.corpus.progress import Counts, Progress
from qwen3_embeddings.errors import MissingDependencyError

IN_FLIGHT = 2
"""Splits per actor: while one is committed the engine embeds the other."""

RETRIES = 2
"""Further attempts at a split whose actor died."""

GIVE_UP = 10
"""Failed splits in a row after which the job stops: the fault is not in the splits."""


class Worker:
    """Embeds splits in a process that Ray started.

    Args:
        job: what to embed with.
        plan: what the job's driver planned.
    """

    def __init__(self, job: Job, plan: Plan) -> None:
        self._job, self._plan = job, plan
        self._pipeline: Pipeline | None = None
        self._lock = threading.Lock()
        self._tokens = 0

    def run(self, work: Work) -> tuple[Counts, list[str]]:
        """Embed one split, and return what was done and what could not be read."""
        with self._lock:
            if self._pipeline is None:
                self._pipeline = self._job.pipeline(self._plan)
        progress = Progress(0, 0)
        failed = self._pipeline.run([work], progress)
        with self._lock:  # splits in flight share one count: each reports what is new
            tokens = self._job.embedder.usage.tokens
            progress.counts.tokens, self._tokens = tokens - self._tokens, tokens
        return progress.counts, failed


def run(
    job: Job, plan: Plan, progress: Progress, *, address: str | None, actors: int | None
) -> list[str]:
    """Embed what is open on a Ray cluster.

    Args:
        job: the job.
        plan: its plan, with the output's lock held.
        progress: counts what the actors report.
        address: of the cluster; None for a cluster of this machine alone.
        actors: engines. Default: one per GPU, else one per node.

    Returns:
        One message per split that failed; the others are done.

    Raises:
        JobFailedError: splits fail one after the other.
        MissingDependencyError: Ray is not installed.
    """
    ray = _ray()
    ray.init(address=address, log_to_driver=False, ignore_reinit_error=True)
    failed: list[str] = []
    row = 0
    for outcome in _outcomes(ray, job, plan, actors):
        if isinstance(outcome, Exception):
            failed.append(" ".join(str(outcome).split())[:500])
            row += 1
            if row == GIVE_UP:
                raise JobFailedError(
                    f"{GIVE_UP} splits failed one after the other, the last with: {failed[-1]}"
                )
            continue
        counts, unread = outcome
        row = 0
        failed += unread
        progress.add(counts)
    return failed


def _outcomes(ray: Any, job: Job, plan: Plan, actors: int | None) -> Iterator[Any]:
    """Yield what each split's task returned or raised, in the order they end."""
    from ray.util import ActorPool

    works = [
        Work(work.file, (split,), work.only, work.generations)
        for work in plan.works
        for split in work.splits
    ]
    small = replace(plan, files=[], splits=[], mine=[], works=[])  # what an actor does not need
    workers = _workers(ray, job, small, min(actors or _engines(ray), len(works)))
    pool = ActorPool([worker for worker in workers for _ in range(IN_FLIGHT)])
    for work in works:
        pool.submit(lambda worker, work: worker.run.remote(work), work)
    try:
        while pool.has_next():
            try:
                yield pool.get_next_unordered()
            except ray.exceptions.RayError as error:
                yield error
    finally:
        for worker in workers:
            ray.kill(worker)


def _workers(ray: Any, job: Job, plan: Plan, count: int) -> list[Any]:
    """Start the actors: one GPU each, or an equal share of the processors."""
    resources = ray.cluster_resources()
    needs = {"num_cpus": max(1, int(resources.get("CPU", 1)) // count)}
    if resources.get("GPU") and job.embedder.engine != "server":
        needs = {"num_cpus": 1, "num_gpus": 1}
    actor = ray.remote(Worker).options(
        max_restarts=-1, max_task_retries=RETRIES, max_concurrency=IN_FLIGHT, **needs
    )
    return [actor.remote(job, plan) for _ in range(count)]


def _engines(ray: Any) -> int:
    """Return how many engines the cluster has resources for."""
    gpus = int(ray.cluster_resources().get("GPU", 0))
    return gpus or sum(bool(node["Alive"]) for node in ray.nodes())


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError(
            "--ray needs Ray. Install it on every node: pip install 'qwen3-embeddings[embed,ray]'"
        ) from error
    return ray
