"""Corpus jobs on an object store: a real HTTP server that speaks S3, with faults in uploads."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from corpus_fake import FakeEmbedder
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

from qwen3_embeddings.corpus import JobFailedError, JobRefusedError, embed
from qwen3_embeddings.corpus.storage import Store

TEXTS = [f"row {i}" for i in range(200)]
OPTIONS: dict[str, Any] = {"id_column": "id", "shard_rows": 20}


class _Quiet(WSGIRequestHandler):
    def log(self, *_: Any) -> None:
        return None


class Faults:
    """Answers chosen requests with status 500, or ends their connection."""

    def __init__(self) -> None:
        self.app = DomainDispatcherApplication(create_backend_app)
        self.fails: Any = lambda _: False
        self.seen: list[str] = []

    def __call__(self, environ: Any, start: Any) -> Any:
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}?{environ['QUERY_STRING']}"
        self.seen.append(request)
        if self.fails(request):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start("400 Bad Request", [("Content-Length", "0")])  # the SDK retries a 500
            return [b""]
        return self.app(environ, start)


@pytest.fixture(scope="module")
def faults() -> Iterator[Faults]:
    faults = Faults()
    server = make_server("127.0.0.1", 0, faults, threaded=True, request_handler=_Quiet)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    before = dict(os.environ)
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    yield faults
    server.shutdown()
    os.environ.clear()
    os.environ |= before


@pytest.fixture
def bucket(faults: Faults) -> Iterator[Any]:
    faults.fails = lambda _: False
    s3 = boto3.resource("s3")
    bucket = s3.Bucket("corpus")
    bucket.create()
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(TEXTS)]
    bucket.put_object(Key="in/a.jsonl", Body="\n".join(lines).encode())
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": map(str, range(200)), "text": TEXTS}), sink)
    bucket.put_object(Key="in/deep/b.parquet", Body=sink.getvalue().to_pybytes())
    yield bucket
    faults.fails = lambda _: False
    bucket.objects.all().delete()


def run(**options: Any) -> Any:
    return embed(
        "s3://corpus/in", "s3://corpus/out", **{"embedder": FakeEmbedder(), **OPTIONS, **options}
    )


def check(bucket: Any) -> None:
    """Every row once, and whatever has a final name is whole."""
    keys = [item.key for item in bucket.objects.filter(Prefix="out/part-")]
    store = Store.at("s3://corpus/out")
    tables = [pq.read_table(key, filesystem=store.system) for key in (f"corpus/{k}" for k in keys)]
    rows = pa.concat_tables(tables)
    for file in ("a.jsonl", "deep/b.parquet"):
        mine = rows.filter(pa.compute.equal(rows["file"], file))
        assert sorted(map(int, mine["id"].to_pylist())) == list(range(200))
    assert len(ds.dataset("corpus/out", filesystem=store.system).to_table()) == 400


def whole(bucket: Any) -> list[str]:
    """Names of the shards that are there; all can be read."""
    names = [item.key for item in bucket.objects.filter(Prefix="out/part-")]
    for name in names:
        body = pa.BufferReader(bucket.Object(name).get()["Body"].read())
        assert pq.read_metadata(body).num_rows > 0
    return names


def test_embed_on_s3_reads_and_writes(bucket: Any) -> None:
    assert run().exit_code == 0
    check(bucket)
    again = embed("s3://corpus/in/*.jsonl", "s3://corpus/out2", embedder=FakeEmbedder(), **OPTIONS)
    assert again.counts.rows == 200
    assert run(embedder=FakeEmbedder(may_start=False)).counts.rows == 0
    keys = [item.key for item in bucket.objects.filter(Prefix="out/")]
    assert not [key for key in keys if "/tmp/" in key and not key.endswith("/")]
    assert "out/_SUCCESS" in keys


def test_embed_on_s3_sees_a_change_by_its_etag(bucket: Any) -> None:
    run()
    body = bucket.Object("in/a.jsonl").get()["Body"].read()
    bucket.put_object(Key="in/a.jsonl", Body=body)
    assert run().counts.rows == 0
    bucket.put_object(Key="in/a.jsonl", Body=body.replace(b"row 100", b"row 999"))
    with pytest.raises(JobRefusedError, match="changed"):
        run()


@pytest.mark.parametrize("request_kind", ["upload", "copy"])
def test_embed_upload_that_fails_leaves_no_part_of_a_shard(
    bucket: Any, faults: Faults, request_kind: str
) -> None:
    """The 1st, 4th, 7th … upload or copy of a shard fails, each in a run of its own."""
    for allowed in (0, 3, 6, 9):
        there = len(whole(bucket))
        left = [allowed]

        def fails(request: str, left: list[int] = left) -> bool:
            shard = "/out/part-" if request_kind == "copy" else "/out/_embed/tmp/"
            if not request.startswith("PUT") or shard not in request:
                return False
            left[0] -= 1
            return left[0] < 0

        faults.fails = fails
        with pytest.raises(JobFailedError, match="Run the same command again"):
            run()
        faults.fails = lambda _: False
        assert there <= len(whole(bucket)) <= there + allowed
    assert 0 < len(whole(bucket)) < 20
    run()
    check(bucket)


@pytest.mark.parametrize("moment", ["opened", "half written"])
def test_embed_exception_inside_an_upload_leaves_no_part_of_a_shard(
    bucket: Any, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """An exception within pyarrow's stream completes the upload of what was written so far."""
    opened = pa.memory_map
    count = [0]

    class Interrupting:
        def __init__(self, path: str) -> None:
            self.source = opened(path)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            self.source.close()
            raise KeyboardInterrupt

        def read_buffer(self) -> Any:
            if moment == "opened":
                raise KeyboardInterrupt
            buffer = self.source.read_buffer()
            return buffer.slice(0, len(buffer) // 2)

    def memory_map(path: str) -> Any:
        count[0] += 1
        return Interrupting(path) if count[0] == 5 else opened(path)

    with monkeypatch.context() as patch:
        patch.setattr(pa, "memory_map", memory_map)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert 0 < len(whole(bucket)) < 20
    left = [o for o in bucket.objects.filter(Prefix="out/_embed/tmp/") if o.key[-1] != "/"]
    assert len(left) == 1, "the stream completed the upload of a part: under a temporary name"
    run()
    check(bucket)


def test_embed_two_jobs_at_once_on_s3_repeat_work_and_no_row(bucket: Any) -> None:
    """An object store has no lock: both jobs write the same shards under the same names."""
    embedders = [FakeEmbedder(delay=0.001) for _ in range(2)]
    errors: list[BaseException] = []

    def job(embedder: FakeEmbedder) -> None:
        try:
            run(embedder=embedder)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=job, args=(embedder,)) for embedder in embedders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    check(bucket)
