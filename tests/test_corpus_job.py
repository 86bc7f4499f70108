"""Corpus jobs on one machine: formats, exactly once, refusals and rejects."""

from __future__ import annotations

import bz2
import contextlib
import csv
import functools
import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from corpus_fake import FakeEmbedder, vector

from qwen3_embeddings import ServerConnectionError
from qwen3_embeddings.corpus import (
    Counts,
    Job,
    JobRefusedError,
    Options,
    Progress,
    Summary,
    embed,
    part_of,
)
from qwen3_embeddings.corpus.estimate import estimate
from qwen3_embeddings.corpus.splits import Shard
from qwen3_embeddings.corpus.storage import Store

TEXTS = [f"row {i} " + "word " * (i % 7) for i in range(137)]
ODD = [
    "",
    " ",
    "a\nb",
    'quo"te',
    "中文 🙂",
    "comma, tab\t",
    "x" * 200_000,
    "end\r\nof line",
    "null",
]


IDLE = functools.partial(FakeEmbedder, may_start=False)
FORGIVING = functools.partial(FakeEmbedder, forgiving=True)


def run(inputs: Path | str | list[str], out: Path, **options: Any) -> Summary:
    """One job with the fake engine."""
    inputs = inputs if isinstance(inputs, list) else [str(inputs)]
    options.setdefault("embedder", FakeEmbedder())
    options.setdefault("id_column", "id")
    options.setdefault("shard_rows", 20)
    return embed(inputs, str(out), **options)


def table(out: Path) -> pa.Table:
    """All rows of an output, as any reader of the folder sees them."""
    return (
        ds.dataset(out, format="parquet")
        .to_table()
        .sort_by([("file", "ascending"), ("row", "ascending")])
    )


def check(out: Path, expected: dict[str, list[str]]) -> pa.Table:
    """Every text of every file once, with its own vector; ids count the rows of a file."""
    rows = table(out)
    for file, texts in expected.items():
        mine = rows.filter(pa.compute.equal(rows["file"], file))
        assert [int(i) for i in mine["id"].to_pylist()] == list(range(len(texts))), file
        vectors = np.array(mine["embedding"].to_pylist(), dtype=np.float32)
        np.testing.assert_array_equal(vectors, [vector(text) for text in texts])
    assert len(rows) == sum(map(len, expected.values()))
    return rows


def shards(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("part-*.parquet"))


def write_parquet(path: Path, texts: list[str | None], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table({"id": range(len(texts)), "text": pa.array(texts, pa.string())}), path, **options
    )
    return path


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts)).encode()


def csv_bytes(texts: list[str]) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["id", "text"])
    writer.writerows(enumerate(texts))
    return out.getvalue().encode()


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


WRITERS: dict[str, Callable[[list[str]], bytes]] = {
    "a.jsonl": jsonl,
    "a.ndjson": jsonl,
    "a.jsonl.gz": lambda texts: gzip.compress(jsonl(texts)),
    "a.jsonl.zst": lambda texts: zstd(jsonl(texts)),
    "a.jsonl.bz2": lambda texts: bz2.compress(jsonl(texts)),
    "a.csv": csv_bytes,
    "a.csv.gz": lambda texts: gzip.compress(csv_bytes(texts)),
}


# Formats.


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("shard_rows", [1, 20, 137, 1000])
def test_embed_each_format_writes_every_row_once(
    tmp_path: Path, name: str, shard_rows: int
) -> None:
    texts = TEXTS + ODD if shard_rows > 1 else ODD
    (tmp_path / name).write_bytes(WRITERS[name](texts))
    summary = run(tmp_path / name, tmp_path / "out", shard_rows=shard_rows)
    assert (summary.exit_code, summary.counts.rows) == (0, len(texts))
    check(tmp_path / "out", {name: texts})


@pytest.mark.parametrize("group", [1, 13, 1000])
@pytest.mark.parametrize("shard_rows", [7, 20, 1000])
def test_embed_parquet_cuts_shards_across_row_groups(
    tmp_path: Path, group: int, shard_rows: int
) -> None:
    path = write_parquet(tmp_path / "a.parquet", TEXTS + ODD, row_group_size=group)
    run(path, tmp_path / "out", shard_rows=shard_rows)
    rows = check(tmp_path / "out", {"a.parquet": TEXTS + ODD})
    assert len(shards(tmp_path / "out")) == -(-len(rows) // shard_rows)


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.binary(),
    ],
)
def test_embed_parquet_reads_each_text_type(tmp_path: Path, kind: pa.DataType) -> None:
    texts = ["a", "b", "a", "中文"]
    plain = pa.array(texts)
    column = plain.dictionary_encode() if pa.types.is_dictionary(kind) else plain.cast(kind)
    pq.write_table(pa.table({"id": range(4), "text": column}), tmp_path / "a.parquet")
    run(tmp_path / "a.parquet", tmp_path / "out")
    check(tmp_path / "out", {"a.parquet": texts})


@pytest.mark.parametrize("shard_rows", [1, 2, 3, 50])
def test_embed_text_lines_found_at_any_byte(tmp_path: Path, shard_rows: int) -> None:
    """Line ends of both kinds, blank lines, a byte order mark, a long line, no end at the end."""
    lines = ["first", "", "b" * 5000, "中文", "  ", "last but one", "last"]
    data = b"\xef\xbb\xbf" + "\r\n".join(lines[:3]).encode() + b"\n" + "\n".join(lines[3:]).encode()
    (tmp_path / "a.txt").write_bytes(data)
    run(tmp_path / "a.txt", tmp_path / "out", shard_rows=shard_rows, id_column=None)
    expected = [line for line in lines if line.strip()]
    rows = table(tmp_path / "out")
    vectors = np.array(rows["embedding"].to_pylist(), dtype=np.float32)
    np.testing.assert_array_equal(vectors, [vector(line) for line in expected])
    for place, line in zip(rows["row"].to_pylist(), expected, strict=True):
        assert data[place:].removeprefix(b"\xef\xbb\xbf").startswith(line.encode())


def test_embed_gzip_of_several_members_reads_all(tmp_path: Path) -> None:
    data = jsonl(TEXTS)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data[:1000]) + gzip.compress(data[1000:]))
    run(tmp_path / "a.jsonl.gz", tmp_path / "out")
    check(tmp_path / "out", {"a.jsonl.gz": TEXTS})


def test_embed_folders_and_patterns_name_files_relative_to_the_argument(tmp_path: Path) -> None:
    for name in (
        "en/a.parquet",
        "en/b.parquet",
        "de/a.parquet",
        "_skip/c.parquet",
        "en/.d.parquet",
    ):
        write_parquet(tmp_path / "in" / name, TEXTS[:3])
    (tmp_path / "in" / "notes.md").write_text("not read")
    run(tmp_path / "in", tmp_path / "out")
    every = ["de/a.parquet", "en/a.parquet", "en/b.parquet"]
    check(tmp_path / "out", dict.fromkeys(every, TEXTS[:3]))
    run(f"{tmp_path}/in/**/a.parquet", tmp_path / "two")
    check(tmp_path / "two", {name: TEXTS[:3] for name in every if "a.p" in name})
    run(f"{tmp_path}/in/en/?.parquet", tmp_path / "three")
    check(tmp_path / "three", {"a.parquet": TEXTS[:3], "b.parquet": TEXTS[:3]})


def test_embed_output_inside_the_input_is_not_read(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", TEXTS[:3])
    for _ in range(2):
        assert run(tmp_path, tmp_path / "out").shards == 1


def test_embed_keeps_columns_with_their_types(tmp_path: Path) -> None:
    pq.write_table(
        pa.table(
            {
                "id": ["x", "y"],
                "text": ["a", "b"],
                "tags": [["p"], []],
                "year": pa.array([1, None], pa.int16()),
            }
        ),
        tmp_path / "a.parquet",
    )
    run(tmp_path / "a.parquet", tmp_path / "out", keep=["tags", "year", "text"])
    rows = table(tmp_path / "out")
    assert rows.select(["id", "tags", "year", "text"]).to_pydict() == {
        "id": ["x", "y"], "tags": [["p"], []], "year": [1, None], "text": ["a", "b"],
    }  # fmt: skip
    assert rows.schema.field("year").type == pa.int16()


def test_embed_jsonl_keeps_other_values_as_json(tmp_path: Path) -> None:
    lines = [
        {"id": 1, "text": "a", "k": {"x": [1]}},
        {"id": "b", "text": "b", "k": None},
        {"text": "c"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run(tmp_path / "a.jsonl", tmp_path / "out", keep=["k"])
    rows = table(tmp_path / "out")
    assert rows["id"].to_pylist() == ["1", "b", None]
    assert rows["k"].to_pylist() == ['{"x": [1]}', None, None]


def test_embed_writes_metadata_and_types(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", TEXTS[:5])
    run(tmp_path / "a.parquet", tmp_path / "out", role="query")
    path = tmp_path / "out" / shards(tmp_path / "out")[0]
    metadata = pq.read_metadata(path)
    facts = {k.decode(): v.decode() for k, v in metadata.metadata.items()}
    expected = {
        **{"fingerprint": "fake-32-query", "model": "fake", "role": "query"},
        **{"instruction": "find it", "dimensions": "32", "file": "a.parquet"},
        **{"start": "0", "stop": "5", "rejects": "0"},
    }
    for name, value in expected.items():
        assert facts[f"qwen3_embeddings.{name}"] == value
    item = pa.field("element", pa.float32(), nullable=False)
    field = pq.read_schema(path).field("embedding")
    assert (field.type, field.nullable) == (pa.list_(item, 32), False)
    assert metadata.row_group(0).column(metadata.num_columns - 1).compression == "UNCOMPRESSED"


# Exactly once.


def test_embed_again_starts_no_engine(tmp_path: Path) -> None:
    for name in WRITERS:
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / f"{len(name)}-{name}").write_bytes(WRITERS[name](TEXTS))
    run(tmp_path / "in", tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("part-*")}
    again = run(tmp_path / "in", tmp_path / "out", embedder=IDLE())
    assert (again.exit_code, again.counts.rows, again.complete) == (0, 0, True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("part-*")} == before
    assert (tmp_path / "out" / "_SUCCESS").exists()


@pytest.mark.parametrize("name", ["a.parquet", *WRITERS])
def test_embed_missing_shards_are_the_only_ones_computed(tmp_path: Path, name: str) -> None:
    if name == "a.parquet":
        write_parquet(tmp_path / name, TEXTS)
    else:
        (tmp_path / name).write_bytes(WRITERS[name](TEXTS))
    run(tmp_path / name, tmp_path / "out")
    names = shards(tmp_path / "out")
    lost = 0
    for victim in (names[0], names[2], names[-1]):
        lost += pq.read_metadata(tmp_path / "out" / victim).num_rows
        (tmp_path / "out" / victim).unlink()
    embedder = FakeEmbedder()
    assert run(tmp_path / name, tmp_path / "out", embedder=embedder).counts.rows == lost
    assert embedder.texts == lost
    assert shards(tmp_path / "out") == names
    check(tmp_path / "out", {name: TEXTS})


def test_embed_added_input_is_the_only_one_computed(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in/b.parquet", TEXTS)
    run(tmp_path / "in", tmp_path / "out")
    write_parquet(tmp_path / "in/a.parquet", TEXTS[:30])
    assert run(tmp_path / "in", tmp_path / "out").counts.rows == 30
    check(tmp_path / "out", {"a.parquet": TEXTS[:30], "b.parquet": TEXTS})


def test_embed_touched_or_copied_input_is_the_same(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "in/a.parquet", TEXTS)
    run(tmp_path / "in", tmp_path / "out")
    os.utime(path, (1, 1))
    (tmp_path / "in").rename(tmp_path / "moved")
    assert run(tmp_path / "moved", tmp_path / "out").counts.rows == 0


@pytest.mark.parametrize("change", ["changed", "removed"])
def test_embed_changed_or_removed_input_is_refused_then_replaced(
    tmp_path: Path, change: str
) -> None:
    write_parquet(tmp_path / "in/a.parquet", TEXTS)
    write_parquet(tmp_path / "in/b.parquet", TEXTS)
    run(tmp_path / "in", tmp_path / "out")
    before = shards(tmp_path / "out")
    if change == "changed":
        write_parquet(tmp_path / "in/a.parquet", TEXTS[:50])
    else:
        (tmp_path / "in/a.parquet").unlink()
    with pytest.raises(
        JobRefusedError, match=r"7 shards .* \(a\.parquet\).*--replace-changed"
    ) as refused:
        run(tmp_path / "in", tmp_path / "out", embedder=IDLE())
    assert "\n" not in str(refused.value)
    assert shards(tmp_path / "out") == before
    run(tmp_path / "in", tmp_path / "out", replace_changed=True)
    left = {"b.parquet": TEXTS} | ({"a.parquet": TEXTS[:50]} if change == "changed" else {})
    check(tmp_path / "out", left)


def test_embed_line_changed_in_place_is_seen(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    run(tmp_path / "a.jsonl", tmp_path / "out")
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS).replace(b"row 50", b"row 99"))
    with pytest.raises(JobRefusedError, match="changed"):
        run(tmp_path / "a.jsonl", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"embedder": FakeEmbedder(model="other")}, "model='fake'.*model='other'"),
        ({"embedder": FakeEmbedder(size=64)}, "fingerprint='fake-32-document'"),
        ({"role": "query"}, "role='document'"),
        ({"dtype": "float16"}, "dtype='float32'.*dtype='float16'"),
        ({"shard_rows": 21}, "shard_rows=20.*shard_rows=21"),
        ({"keep": ["text"]}, r"keep=\[\].*keep=\['text'\]"),
        ({"id_column": None}, "id_column='id'"),
    ],
)
def test_embed_other_options_are_refused_before_an_engine_starts(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    write_parquet(tmp_path / "a.parquet", TEXTS)
    run(tmp_path / "a.parquet", tmp_path / "out")
    (tmp_path / "out" / shards(tmp_path / "out")[0]).unlink()
    options.setdefault("embedder", FakeEmbedder())
    options["embedder"].may_start = False
    with pytest.raises(JobRefusedError, match=said):
        run(tmp_path / "a.parquet", tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"text_column": "body"}, "has no column body; it has id, text"),
        ({"text_column": "id"}, "is int64, not text"),
        ({"keep": ["x"]}, "has no column x"),
        ({"keep": ["row"]}, "the output has a column of that name"),
        ({"dtype": "int4"}, "not one of float32"),
        ({"shard_rows": 0}, "not a positive number"),
        ({"chunk": 4}, "too small"),
        ({"chunk": 16, "overlap": 9}, "at most half"),
        ({"overlap": 9}, "does not fit"),
        ({"shards": "8/8"}, "not I/N"),
        ({"role": "passage"}, "role='passage'"),
    ],
)
def test_embed_wrong_options_are_refused(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    write_parquet(tmp_path / "a.parquet", TEXTS)
    with pytest.raises(JobRefusedError, match=said):
        run(
            tmp_path / "a.parquet",
            tmp_path / "out",
            embedder=IDLE(),
            **options,
        )


def test_embed_inputs_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        write_parquet(tmp_path / folder / "a.parquet", TEXTS[:2])
    (tmp_path / "a.md").write_text("")
    (tmp_path / "b.jsonl").write_text('{"body": "x"}\n')
    for inputs, said in (
        ([f"{tmp_path}/x", f"{tmp_path}/y"], "Pass the folder above both"),
        ([f"{tmp_path}/nothing"], "no input at"),
        ([f"{tmp_path}/*.md"], "no input at"),
        ([f"{tmp_path}/a.md"], "none of the endings"),
        ([f"{tmp_path}/b.jsonl"], "first row of b.jsonl has no text"),
        (["gopher://x/y"], "not a location"),
    ):
        with pytest.raises(JobRefusedError, match=said):
            run(inputs, tmp_path / "out", id_column=None)
    with pytest.raises(JobRefusedError, match="files of something else"):
        run(tmp_path / "x", tmp_path / "y")


def test_embed_shards_without_their_job_file_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", TEXTS)
    run(tmp_path / "a.parquet", tmp_path / "out")
    (tmp_path / "out/_embed/job.json").unlink()
    with pytest.raises(JobRefusedError, match="has shards and no"):
        run(tmp_path / "a.parquet", tmp_path / "out")


def test_embed_second_job_on_the_same_output_is_refused(tmp_path: Path) -> None:
    from qwen3_embeddings.corpus.storage import Store

    write_parquet(tmp_path / "a.parquet", TEXTS)
    with Store.at(str(tmp_path / "out")).lock() as certain:
        assert certain
        for shards in (None, "0/2"):
            with pytest.raises(JobRefusedError, match="another process is writing"):
                run(tmp_path / "a.parquet", tmp_path / "out", shards=shards)
    with Store.at(str(tmp_path / "out")).lock("0-of-2"):
        with pytest.raises(JobRefusedError, match="another process is writing"):
            run(tmp_path / "a.parquet", tmp_path / "out", shards="0/2")
        run(tmp_path / "a.parquet", tmp_path / "out", shards="1/2")
    run(tmp_path / "a.parquet", tmp_path / "out")
    check(tmp_path / "out", {"a.parquet": TEXTS})


def test_embed_dead_engine_stops_and_the_same_call_continues(tmp_path: Path) -> None:
    texts = [*TEXTS[:100], "DEAD", *TEXTS[100:]]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    with pytest.raises(ServerConnectionError):
        run(tmp_path / "a.jsonl", tmp_path / "out", embedder=FakeEmbedder())
    assert not list((tmp_path / "out/_embed/tmp").iterdir())
    there = len(shards(tmp_path / "out"))

    class Repaired(FakeEmbedder):
        def _encode(self, batch: list[str]) -> Any:
            return super()._encode([text.replace("DEAD", "dead") for text in batch])

    summary = run(tmp_path / "a.jsonl", tmp_path / "out", embedder=Repaired())
    assert summary.counts.shards == summary.shards - there
    check(tmp_path / "out", {"a.jsonl": [text.replace("DEAD", "dead") for text in texts]})


def test_embed_parts_share_the_work_and_the_last_one_marks_success(tmp_path: Path) -> None:
    for name in "abc":
        write_parquet(tmp_path / f"in/{name}.parquet", TEXTS)
    (tmp_path / "in/d.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS)))
    embedders = [FakeEmbedder() for _ in range(4)]
    for i in (2, 0, 3, 1):
        assert not (tmp_path / "out/_SUCCESS").exists()
        run(tmp_path / "in", tmp_path / "out", shards=f"{i}/4", embedder=embedders[i])
    assert (tmp_path / "out/_SUCCESS").exists()
    assert all(embedder.texts for embedder in embedders)
    assert sum(embedder.texts for embedder in embedders) == 4 * len(TEXTS)
    names = [f"{name}.parquet" for name in "abc"] + ["d.jsonl.gz"]
    check(tmp_path / "out", dict.fromkeys(names, TEXTS))


def test_embed_unreadable_file_fails_alone(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in/a.parquet", TEXTS)
    data = gzip.compress(jsonl(TEXTS * 100))
    (tmp_path / "in/b.jsonl.gz").write_bytes(data[: len(data) // 2])
    write_parquet(tmp_path / "in/c.parquet", TEXTS)
    for _ in range(2):
        summary = run(tmp_path / "in", tmp_path / "out", shard_rows=500)
        assert (summary.exit_code, summary.complete) == (1, False)
        assert "cannot read b.jsonl.gz" in summary.failed[0]
    assert not (tmp_path / "out/_SUCCESS").exists()
    (tmp_path / "in/b.jsonl.gz").unlink()
    assert run(tmp_path / "in", tmp_path / "out", shard_rows=500, replace_changed=True).complete
    check(tmp_path / "out", {"a.parquet": TEXTS, "c.parquet": TEXTS})


def test_embed_many_batches_in_one_shard_keep_their_order(tmp_path: Path) -> None:
    texts = [f"{i}" for i in range(7001)]
    write_parquet(tmp_path / "a.parquet", texts)
    run(tmp_path / "a.parquet", tmp_path / "out", shard_rows=3000)
    check(tmp_path / "out", {"a.parquet": texts})


# Rejects.


def bad_jsonl() -> bytes:
    lines = [json.dumps({"id": i, "text": text}).encode() for i, text in enumerate(TEXTS[:60])]
    lines[3] = b'{"id": 3, "text": null}'
    lines[7] = b'{"id": 7}'
    lines[9] = b"{broken"
    lines[11] = b'{"id": 11, "text": "\xff"}'
    lines[13] = b'{"id": 13, "text": 5}'
    lines[25] = b'{"id": 25, "text": "this is TOO LONG"}'
    lines[26] = b'{"id": 26, "text": "NAN"}'
    lines[27] = rb'{"id": 27, "text": "\ud800"}'
    lines[28] = b"[1]"
    return b"\n".join(lines)


BAD = [3, 7, 9, 11, 13, 25, 26, 27, 28]


def rejects(out: Path) -> list[dict[str, Any]]:
    files = sorted((out / "_embed/rejects").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_embed_rows_without_a_vector_are_listed(tmp_path: Path) -> None:
    data = bad_jsonl()
    (tmp_path / "a.jsonl").write_bytes(data)
    summary = run(tmp_path / "a.jsonl", tmp_path / "out")
    assert (summary.exit_code, summary.rejects, summary.counts.rejects) == (3, len(BAD), len(BAD))
    rows = table(tmp_path / "out")
    assert [int(i) for i in rows["id"].to_pylist()] == [i for i in range(60) if i not in BAD]
    listed = sorted(rejects(tmp_path / "out"), key=lambda line: line["row"])
    starts = [0, *(i + 1 for i, byte in enumerate(data) if byte == 10)]
    assert [line["row"] for line in listed] == [starts[i] for i in BAD]
    assert [line["error"] for line in listed] == [
        "TextTypeError", "TextTypeError", "JSONDecodeError", "UnicodeDecodeError", "TextTypeError",
        "TextTooLongError", "InvalidVectorError", "TextEncodingError", "TextTypeError",
    ]  # fmt: skip
    assert listed[5]["id"] == "25"
    assert {line["file"] for line in listed} == {"a.jsonl"}


def test_embed_parquet_rejects_nulls_and_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    values = pa.array([b"a", None, b"\xff\xfe", b"b"], pa.binary())
    text = pa.StringArray.from_buffers(
        4, values.buffers()[1], values.buffers()[2], values.buffers()[0]
    )
    pq.write_table(pa.table({"id": range(4), "text": text}), tmp_path / "a.parquet")
    assert run(tmp_path / "a.parquet", tmp_path / "out").rejects == 2
    assert table(tmp_path / "out")["id"].to_pylist() == [0, 3]
    assert [line["id"] for line in rejects(tmp_path / "out")] == [1, 2]


def test_embed_csv_rejects_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"id,text\n0,ok\n1,\xff\n2\n3,fine\n")
    assert run(tmp_path / "a.csv", tmp_path / "out").rejects == 2
    assert [line["error"] for line in rejects(tmp_path / "out")] == [
        "TextTypeError",
        "TextEncodingError",
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_retry_rejects_embeds_only_these_and_keeps_the_shards(tmp_path: Path, name: str) -> None:
    data = bad_jsonl()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    run(tmp_path / name, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("part-*")}
    embedder = FORGIVING()
    summary = run(tmp_path / name, tmp_path / "out", retry_rejects=True, embedder=embedder)
    assert (summary.exit_code, summary.counts.rows, summary.rejects) == (3, 2, len(BAD) - 2)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    ids = sorted(int(i) for i in table(tmp_path / "out")["id"].to_pylist())
    assert ids == [i for i in range(60) if i not in set(BAD) - {25, 26}]
    again = run(tmp_path / name, tmp_path / "out", retry_rejects=True)
    assert (again.counts.rows, again.rejects) == (0, len(BAD) - 2)
    assert len(table(tmp_path / "out")) == len(ids)


def test_retry_rejects_killed_before_its_shard_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_bytes(bad_jsonl())
    run(tmp_path / "a.jsonl", tmp_path / "out")
    rename = os.replace

    def retry() -> Summary:
        paths = tmp_path / "a.jsonl", tmp_path / "out"
        return run(*paths, retry_rejects=True, embedder=FORGIVING())

    def stop(source: Any, target: Any) -> None:
        if str(target).endswith("-r1.parquet"):
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            run(
                tmp_path / "a.jsonl",
                tmp_path / "out",
                retry_rejects=True,
                embedder=FORGIVING(),
            )
    assert run(tmp_path / "a.jsonl", tmp_path / "out").rejects == len(BAD)
    summary = run(
        tmp_path / "a.jsonl",
        tmp_path / "out",
        retry_rejects=True,
        embedder=FORGIVING(),
    )
    assert (summary.counts.rows, summary.rejects) == (2, len(BAD) - 2)


def test_rejects_of_a_killed_attempt_are_replaced(tmp_path: Path) -> None:
    """A reject that has passed (a server's moment) must not stay when its shard is made again."""
    (tmp_path / "a.jsonl").write_bytes(jsonl([*TEXTS[:5], "NAN"]))
    run(tmp_path / "a.jsonl", tmp_path / "out")
    (tmp_path / "out" / shards(tmp_path / "out")[0]).unlink()
    summary = run(tmp_path / "a.jsonl", tmp_path / "out", embedder=FORGIVING())
    assert (summary.exit_code, summary.rejects) == (0, 0)


def test_rejects_whose_shard_another_process_writes_now_are_kept(tmp_path: Path) -> None:
    """A worker of a killed Ray job can write its shard after the next job has listed the shards."""
    (tmp_path / "a.jsonl").write_bytes(jsonl([*TEXTS[:5], "NAN"]))
    run(tmp_path / "a.jsonl", tmp_path / "out")
    inputs, out = [str(tmp_path / "a.jsonl")], str(tmp_path / "out")
    options = Options(id_column="id", shard_rows=20)
    with contextlib.closing(Job(inputs, out, options, FakeEmbedder())) as next_job:
        late = [tmp_path / "out" / shard for shard in shards(tmp_path / "out")]
        contents = [shard.read_bytes() for shard in late]
        for shard in late:
            shard.unlink()
        plan = next_job.plan()
        for shard, content in zip(late, contents, strict=True):
            shard.write_bytes(content)
        next_job.begin(plan, alone=True)
    assert run(tmp_path / "a.jsonl", tmp_path / "out").rejects == 1


@pytest.mark.parametrize("deletions", range(5))
def test_input_that_comes_back_after_a_kill_in_the_deletion_of_its_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deletions: int
) -> None:
    """Every row is in one shard or among the rejects, wherever the deletion stopped."""
    texts = [*TEXTS[:5], "NAN"]
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(jsonl(texts))
    both, out = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], tmp_path / "out"
    run(both, out)
    assert run(both, out, retry_rejects=True, embedder=FORGIVING()).counts.rows == 2
    delete, left = Store.delete, [deletions]

    def stop(store: Store, name: str) -> None:
        if "part-a.jsonl" in name:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        delete(store, name)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "delete", stop)
        if deletions < 4:  # two shards and two files of rejects
            with pytest.raises(KeyboardInterrupt):
                run(both[1:], out, replace_changed=True)
            assert not (out / "_SUCCESS").exists()
        else:
            assert run(both[1:], out, replace_changed=True).complete

    summary = run(both, out, embedder=FORGIVING())
    if summary.rejects:
        summary = run(both, out, retry_rejects=True, embedder=FORGIVING())

    assert (summary.complete, summary.rejects) == (True, 0)
    rows = table(out)
    assert rows["id"].to_pylist() == [str(i) for i in range(6)] * 2


def test_success_mark_is_deleted_by_a_part_without_work_when_another_part_has_some(
    tmp_path: Path,
) -> None:
    write_parquet(tmp_path / "in/a.parquet", TEXTS[:20])
    run(tmp_path / "in", tmp_path / "out")
    write_parquet(tmp_path / "in/b.parquet", TEXTS[:20])
    first = run(tmp_path / "in", tmp_path / "out", shards="0/2", embedder=IDLE())
    assert (first.counts.rows, first.complete) == (0, False)
    assert not (tmp_path / "out/_SUCCESS").exists()
    assert run(tmp_path / "in", tmp_path / "out", shards="1/2").complete
    assert (tmp_path / "out/_SUCCESS").exists()


def test_shard_of_rejects_only_is_done(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(["NAN"] * 30))
    assert run(tmp_path / "a.jsonl", tmp_path / "out").rejects == 30
    assert run(tmp_path / "a.jsonl", tmp_path / "out", embedder=IDLE()).rejects == 30


# Estimates and progress.


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.csv"])
def test_estimate_counts_rows_and_tokens_and_writes_nothing(tmp_path: Path, name: str) -> None:
    texts = [f"{i} " + "word " * 9 for i in range(1000)]
    if name == "a.parquet":
        write_parquet(tmp_path / name, texts)
    else:
        (tmp_path / name).write_bytes(WRITERS[name](texts))
    job = Job([f"{tmp_path}/{name}"], f"{tmp_path}/out", Options(shard_rows=100), IDLE())
    needed = estimate(job, job.plan(), tokens_per_second=100.0, price_per_hour=36.0)
    assert needed.rows == pytest.approx(1000, rel=0.1)
    assert needed.tokens == pytest.approx(10_000, rel=0.1)
    assert needed.seconds == pytest.approx(100, rel=0.1)
    assert needed.bytes == needed.rows * 32 * 4
    assert "1.00 at 36.00 per hour" in str(needed).replace("1.01", "1.00").replace("0.99", "1.00")
    assert not (tmp_path / "out").exists()


def test_progress_line_counts_share_rates_and_rejects() -> None:
    progress = Progress(1000, 500, iter((0, 4000)).__next__)
    progress.add(Counts(rows=20, weight=250, rejects=3))
    line = progress.line()
    assert line.startswith("75.0%, 20 rows")
    for part in ("rows/s", "tokens/s", "left", "3 rejects"):
        assert part in line
    assert "time left unknown" in Progress(10, 0).line()


# Names.


def test_shard_name_says_what_it_holds() -> None:
    for shard in (
        Shard("a.parquet", "0123abcd", "0123456789ab", 0, 20000),
        Shard("x-part-7", "0123abcd", "0123456789ab", 40000, 40001, True),
        Shard("中", "0123abcd", "0123456789ab", 5, 7, False, 12),
    ):
        assert Shard.parse(shard.name) == shard
    assert Shard.parse("part-1.parquet") is None


def test_part_of_reads_index_and_count() -> None:
    assert part_of("3/8") == (3, 8)
    assert part_of(None) is None
