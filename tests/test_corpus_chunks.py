"""Chunks of long texts: exact slices of the text, cut between characters, nothing lost."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pytest
from corpus_fake import FakeEmbedder, vector

from qwen3_embeddings import UnknownModelError
from qwen3_embeddings.corpus import JobRefusedError, embed
from qwen3_embeddings.corpus.chunks import Chunker
from qwen3_embeddings.tokenizer import load_tokenizer

ENGLISH = "The first sentence is here. Another one follows it! Does a third? Yes.\n" * 40
TEXTS = {
    "english": ENGLISH,
    "paragraphs": "\n\n".join([ENGLISH[:300]] * 12),
    "chinese": "中国的首都是北京。北京是一个很大的城市，有很多人。" * 60,
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪🇫🇷 ok " * 60,
    "accents": unicodedata.normalize("NFD", "déjà vu à la crème brûlée ") * 60,
    "code": "def f(x):\n    return {'a': [x, 1]}\n\n" * 60,
    "no spaces": "x" * 3000,
    "windows": "line one\r\nline two\r\n" * 90,
    "spaces": " " * 3000,
    "arabic": "السلام عليكم ورحمة الله وبركاته، كيف حالك اليوم؟ " * 40,
}


@pytest.fixture(scope="module")
def tokenizer(checkpoint: str) -> Any:
    return load_tokenizer(checkpoint)


def windows(tokenizer: Any, text: str, size: int, overlap: int) -> list[tuple[int, int]]:
    offsets = tokenizer.encode(text, add_special_tokens=False).offsets
    return Chunker(tokenizer, size, overlap).windows(text, offsets)


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize(("size", "overlap"), [(16, 0), (64, 0), (64, 16), (100, 50)])
def test_windows_cover_the_text_in_order(
    tokenizer: Any, name: str, size: int, overlap: int
) -> None:
    text = TEXTS[name]
    found = windows(tokenizer, text, size, overlap)
    reached = 0
    for start, end in found:
        assert not text[reached:start].strip(), "text between chunks is lost"
        assert reached < end <= len(text)
        assert overlap or start >= reached, "chunks share characters without an overlap"
        reached = end
    assert not text[reached:].strip()
    assert [start for start, _ in found] == sorted({start for start, _ in found})


@pytest.mark.parametrize("name", TEXTS)
def test_windows_have_about_the_tokens_asked_for(tokenizer: Any, name: str) -> None:
    text = TEXTS[name]
    for start, end in windows(tokenizer, text, 64, 16):
        count = len(tokenizer.encode(text[start:end], add_special_tokens=False).ids)
        assert count <= (64 + 4 if name != "spaces" else 3000)


@pytest.mark.parametrize("name", ["emoji", "accents", "windows", "chinese"])
@pytest.mark.parametrize("overlap", [0, 8])
def test_windows_cut_between_characters(tokenizer: Any, name: str, overlap: int) -> None:
    text = TEXTS[name]
    for start, end in windows(tokenizer, text, 24, overlap):
        for place in (start, end):
            if not 0 < place < len(text):
                continue
            assert not unicodedata.combining(text[place])
            assert text[place] not in "\u200d\ufe0f"
            assert text[place - 1] != "\u200d"
            assert not "\U0001f3fb" <= text[place] <= "\U0001f3ff"
            assert (text[place - 1], text[place]) != ("\r", "\n")


def test_windows_prefer_sentence_and_line_ends(tokenizer: Any) -> None:
    for name, ends in (("english", ".!?\n"), ("chinese", "。")):
        text = TEXTS[name]
        found = windows(tokenizer, text, 256, 0)
        good = sum(text[end - 1] in ends for _, end in found)
        assert good >= 0.9 * len(found), name


def test_windows_of_a_short_text_are_the_text(tokenizer: Any) -> None:
    assert windows(tokenizer, " short ", 64, 0) == [(0, 7)]
    assert windows(tokenizer, "", 64, 0) == [(0, 0)]


def test_embed_chunks_writes_one_row_per_chunk(tmp_path: Path, checkpoint: str) -> None:
    texts = [*TEXTS.values(), "short", "", "bad \ud800", None]
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    options: dict[str, Any] = {"chunk": 64, "overlap": 16, "keep": ["text"], "shard_rows": 4}
    options |= {"id_column": "id", "tokenizer": checkpoint}
    summary = embed(f"{tmp_path}/a.jsonl", f"{tmp_path}/out", embedder=FakeEmbedder(), **options)
    assert summary.rejects == 2
    rows = ds.dataset(tmp_path / "out").to_table().to_pylist()
    assert {row["id"] for row in rows} == {str(i) for i in range(len(texts) - 2)}
    assert len({(row["id"], row["chunk"]) for row in rows}) == len(rows) > 100
    for row in rows:
        whole = texts[int(row["id"])]
        assert isinstance(whole, str)
        assert row["text"] == whole[row["start"] : row["end"]]
        np.testing.assert_array_equal(np.float32(row["embedding"]), vector(row["text"]))
    again = embed(f"{tmp_path}/a.jsonl", f"{tmp_path}/out",
                  embedder=FakeEmbedder(may_start=False), **options)  # fmt: skip
    assert again.counts.rows == 0
    with pytest.raises(JobRefusedError, match=r"chunk=64.*chunk=32"):
        embed(f"{tmp_path}/a.jsonl", f"{tmp_path}/out", embedder=FakeEmbedder(),
              **options | {"chunk": 32})  # fmt: skip


def test_retry_rejects_embeds_only_the_chunks_that_failed(tmp_path: Path, checkpoint: str) -> None:
    text = ENGLISH + "NAN here. " + ENGLISH
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    options: dict[str, Any] = {"chunk": 64, "tokenizer": checkpoint}
    first = embed(f"{tmp_path}/a.jsonl", f"{tmp_path}/out", embedder=FakeEmbedder(), **options)
    assert first.rejects == 1
    embedder = FakeEmbedder(forgiving=True)
    again = embed(f"{tmp_path}/a.jsonl", f"{tmp_path}/out", embedder=embedder,
                  retry_rejects=True, **options)  # fmt: skip
    assert (again.counts.rows, again.rejects, embedder.texts) == (1, 0, 1)
    numbers = ds.dataset(tmp_path / "out").to_table()["chunk"].to_pylist()
    assert sorted(numbers) == list(range(len(numbers)))


def test_embed_chunks_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    paths = f"{tmp_path}/a.jsonl", f"{tmp_path}/out"
    embedder: Any = FakeEmbedder()
    embedder.model = None
    with pytest.raises(JobRefusedError, match="no model is named"):
        embed(*paths, embedder=embedder, chunk=64)
    with pytest.raises(UnknownModelError):
        embed(*paths, embedder=embedder, chunk=64, tokenizer=str(tmp_path))
