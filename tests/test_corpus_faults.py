"""Corpus jobs that are killed, interrupted or out of disk: every row once, the same vectors."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from corpus_fake import FakeEmbedder, vector
from corpus_kills import OPTIONS

from qwen3_embeddings.corpus import JobFailedError, JobRefusedError, embed

SUPPORT = Path(__file__).parent / "support"
KILLS = int(os.environ.get("QWEN3_CORPUS_KILLS", "60"))
ENGINE_KILLS = int(os.environ.get("QWEN3_CORPUS_ENGINE_KILLS", "20"))


def write_corpus(folder: Path, rows: int) -> dict[str, list[str]]:
    """Three files of different formats; every 50th row has no text."""
    folder.mkdir()
    texts = [f"row {i} " + "word " * (i % 5) for i in range(rows)]
    values: list[str | None] = [None if i % 50 == 49 else text for i, text in enumerate(texts)]
    columns = {"id": [str(i) for i in range(rows)], "text": pa.array(values, pa.string())}
    pq.write_table(pa.table(columns), folder / "a.parquet", row_group_size=33)
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(values)]
    (folder / "b.jsonl").write_text("\n".join(lines))
    with pa.CompressedOutputStream(str(folder / "c.jsonl.gz"), "gzip") as stream:
        stream.write("\n".join(lines).encode())
    good = [text for text in values if text]
    return {"a.parquet": good, "b.jsonl": good, "c.jsonl.gz": good}


def read(output: Path) -> pa.Table:
    order = [("file", "ascending"), ("row", "ascending")]
    return ds.dataset(output, format="parquet").to_table().sort_by(order)


def matrix(table: pa.Table) -> np.ndarray[Any, Any]:
    return np.array(table["embedding"].to_pylist(), dtype=np.float32)


def kill(model: str, corpus: Path, output: Path, kills: int) -> list[dict[str, Any]]:
    """Run tests/support/corpus_kills.py, and return where each kill landed."""
    command = [sys.executable, "-W", "ignore", str(SUPPORT / "corpus_kills.py")]
    done = subprocess.run(
        [*command, model, str(corpus), str(output), str(kills)],
        capture_output=True, text=True, timeout=900,
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_kills(reports: list[dict[str, Any]], kills: int) -> None:
    """Every kill was a SIGKILL in the work; the last attempt at each output went to its end."""
    killed = [report for report in reports if report["point"]]
    assert [report["code"] for report in reports if not report["point"]] == [0] * (
        1 + killed[-1]["run"]
    )
    assert len(killed) == kills
    assert {report["code"] for report in killed} == {-signal.SIGKILL}
    landed = [r for r in killed if r["temporary"] or r["after"] > r["before"]]
    assert landed == killed
    inside = [r for r in killed if r["point"] in {"write", "rename", "rejects"}]
    assert all(report["temporary"] for report in inside)
    assert len(inside) >= kills // 2
    between = [r for r in killed if r["point"] == "renamed"]
    assert all(report["after"] > report["before"] for report in between)
    assert len(between) >= kills // 6


def test_embed_killed_many_times_writes_every_row_once(tmp_path: Path) -> None:
    expected = write_corpus(tmp_path / "in", 400)
    reports = kill("fake", tmp_path / "in", tmp_path / "out", KILLS)
    check_kills(reports, KILLS)
    for output in (tmp_path / "out").iterdir():
        rows = read(output)
        assert len(rows) == sum(map(len, expected.values()))
        for file, texts in expected.items():
            mine = rows.filter(pa.compute.equal(rows["file"], file))
            np.testing.assert_array_equal(matrix(mine), [vector(text) for text in texts])
        assert not list((output / "_embed/tmp").iterdir())
        lines = (output / "_embed/rejects").glob("*.jsonl")
        assert sum(len(path.read_text().splitlines()) for path in lines) == 3 * 400 // 50


def test_embed_killed_with_the_real_engine_gives_the_vectors_of_one_run(
    tmp_path: Path, checkpoint: str
) -> None:
    write_corpus(tmp_path / "in", 200)
    reports = kill(checkpoint, tmp_path / "in", tmp_path / "out", ENGINE_KILLS)
    check_kills(reports, ENGINE_KILLS)
    kill(checkpoint, tmp_path / "in", tmp_path / "whole", 0)
    whole = read(tmp_path / "whole/0")
    assert len(whole) == 3 * (200 - 200 // 50)
    for output in (tmp_path / "out").iterdir():
        rows = read(output)
        assert rows.drop(["embedding"]).equals(whole.drop(["embedding"]))
        np.testing.assert_allclose(matrix(rows), matrix(whole), atol=1e-6)


KILLED_AT_THE_END = """
    import random, sys
    sys.path.insert(0, sys.argv[1])
    from corpus_kills import arm, job
    arm("success", 1, random.Random(0))
    job("fake", sys.argv[2], sys.argv[3])
"""


def test_embed_killed_before_the_success_mark_leaves_no_temporary_file(tmp_path: Path) -> None:
    corpus, output = tmp_path / "in", tmp_path / "out"
    write_corpus(corpus, 40)
    script = [sys.executable, "-c", textwrap.dedent(KILLED_AT_THE_END), str(SUPPORT)]
    done = subprocess.run([*script, str(corpus), str(output)], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert list((output / "_embed/tmp").iterdir())
    assert not (output / "_SUCCESS").exists()

    summary = embed(str(corpus), str(output), embedder=FakeEmbedder(), **OPTIONS)

    assert summary.complete
    assert summary.counts.rows == 0
    assert (output / "_SUCCESS").exists()
    assert not list((output / "_embed/tmp").iterdir())


# A full disk.

FULL = """
    import json, signal, sys
    sys.path.insert(0, sys.argv[1])
    from corpus_fake import FakeEmbedder
    from corpus_kills import OPTIONS
    from qwen3_embeddings.corpus import JobFailedError, embed
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        embed(sys.argv[2], sys.argv[3], embedder=FakeEmbedder(size=1024), **OPTIONS)
    except JobFailedError as error:
        print(error)
"""


def run_full(arguments: list[str], before: list[str]) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(FULL), *arguments]
    return subprocess.run([*before, *script], capture_output=True, text=True, timeout=120)


def test_embed_on_a_full_disk_says_so_and_continues(tmp_path: Path) -> None:
    """A tmpfs of 1 MB: mounted, or in a name space of its own without privileges.

    Where neither is allowed a limit on the size of files stands in for it, and a warning says so.
    """
    expected = write_corpus(tmp_path / "in", 200)
    disk, saved = tmp_path / "disk", tmp_path / "saved"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=1m none {disk}"
    job = f'code=0; "$@" || code=$?; cp -r {disk} {saved}; exit $code'
    arguments = [str(SUPPORT), str(tmp_path / "in"), str(disk / "out")]
    for unshare in (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]):
        if subprocess.run([*unshare, "sh", "-c", mount], capture_output=True).returncode == 0:
            done = run_full(arguments, [*unshare, "sh", "-c", f"{mount}; {job}", "sh"])
            reason = os.strerror(errno.ENOSPC)
            break
    else:
        warnings.warn("no tmpfs can be mounted here: a limit of file sizes is tested", stacklevel=1)
        arguments[2] = str(saved / "out")
        limit = (60_000, resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        try:
            done = run_full(arguments, [])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        reason = os.strerror(errno.EFBIG)
    assert done.returncode == 0, done.stderr
    assert f"cannot write to {arguments[2]} ({reason})" in done.stdout
    assert "Run the same command again" in done.stdout
    output = saved / "out"
    there = sorted(output.glob("part-*.parquet"))
    assert all(pq.read_metadata(path).num_rows for path in there)  # whole, or not there
    assert not list((output / "_embed/tmp").iterdir())
    whole = embed(str(tmp_path / "in"), str(output), embedder=FakeEmbedder(size=1024), **OPTIONS)
    assert whole.counts.shards == whole.shards - len(there)
    rows = read(output)
    for file, texts in expected.items():
        mine = rows.filter(pa.compute.equal(rows["file"], file))
        np.testing.assert_array_equal(matrix(mine), [vector(text, 1024) for text in texts])


def test_embed_output_that_cannot_be_written_is_refused_in_one_sentence(tmp_path: Path) -> None:
    write_corpus(tmp_path / "in", 20)
    (tmp_path / "file").write_text("")
    with pytest.raises(JobFailedError, match="cannot write to"):
        embed(str(tmp_path / "in"), str(tmp_path / "file"), embedder=FakeEmbedder(), **OPTIONS)


# Two processes, Ctrl-C.

ONE = """
    import sys
    sys.path.insert(0, sys.argv[1])
    from corpus_fake import FakeEmbedder
    from corpus_kills import OPTIONS
    from qwen3_embeddings.corpus import embed
    print("ready", flush=True)
    sys.stdin.readline()
    embed(sys.argv[2], sys.argv[3], embedder=FakeEmbedder(delay=0.001), **OPTIONS)
"""


def start(tmp_path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(ONE), str(SUPPORT),
         str(tmp_path / "in"), str(tmp_path / "out")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_embed_two_processes_at_once_write_every_row_once(tmp_path: Path) -> None:
    expected = write_corpus(tmp_path / "in", 400)
    processes = [start(tmp_path) for _ in range(2)]
    for process in processes:
        go(process)
    errors = [process.communicate(timeout=60)[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert sorted(codes) == [0, 1], errors
    assert "another process is writing to" in errors[codes.index(1)]
    assert JobRefusedError.__name__ in errors[codes.index(1)]
    assert len(read(tmp_path / "out")) == sum(map(len, expected.values()))


def test_embed_interrupted_leaves_no_temporary_file_and_continues(tmp_path: Path) -> None:
    expected = write_corpus(tmp_path / "in", 4000)
    process = start(tmp_path)
    go(process)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob("part-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in error
    there = len(list((tmp_path / "out").glob("part-*")))
    assert not list((tmp_path / "out/_embed/tmp").iterdir())
    summary = embed(str(tmp_path / "in"), str(tmp_path / "out"), embedder=FakeEmbedder(), **OPTIONS)
    assert summary.counts.shards == summary.shards - there
    assert len(read(tmp_path / "out")) == sum(map(len, expected.values()))
