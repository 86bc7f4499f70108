"""Kills a corpus job with SIGKILL again and again, and reports where each kill landed.

    python tests/support/corpus_kills.py fake|MODEL INPUTS OUTPUT KILLS

The job runs in forks of this process, which has imported what it needs. A fork kills itself at a
chosen moment of its work. The moment is inside a write, between the write and the rename, between
rejects and shard, or after the rename. It can also be at a random time after the first shard.
test_corpus_faults.py also uses the moment before the success mark. One JSON line per kill says
what it left. The last fork runs to its end.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from qwen3_embeddings.corpus import embed, shards, storage

POINTS = ("write", "rename", "rejects", "renamed", "random")
OPTIONS: dict[str, Any] = {"id_column": "id", "shard_rows": 20}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # the signal ends every thread


def arm(point: str, count: int, chance: random.Random) -> None:
    """Make this process kill itself at the `count`-th time that it comes to `point`."""
    left = [count]

    def now(where: str) -> None:
        if where == point:
            left[0] -= 1
            if not left[0]:
                die()

    replace, add, commit = os.replace, shards.ShardWriter.add, storage.Store.commit

    def counted_add(self: Any, *arguments: Any) -> None:
        add(self, *arguments)
        now("write")

    def counted_replace(source: Any, target: Any) -> None:
        rejects = "rejects" in str(target)
        if Path(target).name == "_SUCCESS":
            now("success")
        if not rejects and str(target).endswith(".parquet"):
            now("rename")
            if point == "random":
                time.sleep(0.01)  # a wider target
        replace(source, target)
        if rejects:
            now("rejects")
        elif str(target).endswith(".parquet"):
            now("renamed")

    def counted_commit(self: Any, temporary: Path, name: str) -> None:
        commit(self, temporary, name)
        if point == "random" and left[0] == count and name.endswith(".parquet"):
            left[0] = -1
            threading.Timer(chance.uniform(0.0, 0.2), die).start()

    os.replace = counted_replace
    shards.ShardWriter.add = counted_add  # type: ignore[method-assign]
    storage.Store.commit = counted_commit  # type: ignore[method-assign]


def job(model: str, inputs: str, output: str) -> None:
    if model == "fake":
        from corpus_fake import FakeEmbedder

        embed(inputs, output, embedder=FakeEmbedder(), **OPTIONS)  # type: ignore[arg-type]
        return
    from qwen3_embeddings import Embedder

    with Embedder(model, dtype="float32") as embedder:
        embed(inputs, output, embedder=embedder, **OPTIONS)


def attempt(model: str, inputs: str, output: str, point: str | None, seed: int) -> int:
    """Run the job in a fork, and return its exit code, negative for a signal."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        chance = random.Random(seed)
        if point:
            arm(point, 1 if point in {"random", "rejects"} else chance.randint(1, 3), chance)
        job(model, inputs, output)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def state(output: str) -> tuple[int, int]:
    """Return the number of shards, and of temporary files."""
    folder = Path(output)
    return len(list(folder.glob("part-*.parquet"))), len(list(folder.glob("_embed/tmp/*")))


def main(model: str, inputs: str, output: str, kills: str) -> None:
    if model != "fake":
        import vllm.v1.worker.cpu_worker  # noqa: F401  (most of an engine's start)
    seed = run = landed = 0
    while landed < int(kills):
        where = f"{output}/{run}"
        point = POINTS[seed % len(POINTS)]
        before, _ = state(where)
        code = attempt(model, inputs, where, point, seed)
        after, temporary = state(where)
        seed += 1
        if code == 0:  # it ended before it came to its moment
            run += 1
            continue
        landed += 1
        report = {"code": code, "point": point, "before": before, "after": after}
        print(json.dumps(report | {"temporary": temporary, "run": run}), flush=True)
    for i in range(run + 1):
        code = attempt(model, inputs, f"{output}/{i}", None, 0)
        print(json.dumps({"code": code, "run": i, "point": None}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
