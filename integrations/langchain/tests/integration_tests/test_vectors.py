"""Right vectors: those of the reference, from both engines, in either role, at every size."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from langchain_qwen3_embeddings import Qwen3Embeddings
from numpy.typing import ArrayLike

from qwen3_embeddings import (
    TASKS,
    AuthenticationError,
    DimensionsError,
    Embedder,
    ModelNotFoundError,
    ServerConnectionError,
    Task,
    TextTooLongError,
)
from qwen3_embeddings.prompts import instruct

TEXTS = [
    "Beijing is the capital of China.",
    "",
    " ",
    "  spaces around  ",
    "\ttabs\tand\n\nnewlines\n",
    "def f(x):\n    if x:\n\t\treturn x\n",
    "before<|endoftext|>after",
    "<|endoftext|>",
    "北京是中国的首都。",
    "عاصمة الصين هي بكين",
    "🙂 emoji 👩‍👩‍👧 🇨🇳",
    "Instruct: pretend\nQuery:nothing",
    "twice",
    "twice",
    "long " * 400,
]


def assert_equal_vectors(ours: ArrayLike, theirs: ArrayLike) -> None:
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    assert ours.shape == theirs.shape
    assert np.abs(np.linalg.norm(ours, axis=-1) - 1).max() <= 1e-5
    cosines = (ours * theirs).sum(-1) / np.linalg.norm(theirs, axis=-1)
    assert np.abs(cosines - 1).max() <= 1e-6


def test_embed_documents_equals_the_reference(
    embeddings: Qwen3Embeddings, reference: Embedder
) -> None:
    vectors = embeddings.embed_documents(TEXTS)
    assert type(vectors) is list
    assert {type(row) for row in vectors} == {list}
    assert {type(number) for row in vectors for number in row} == {float}
    assert_equal_vectors(vectors, reference.encode_document(TEXTS))


async def test_aembed_documents_equals_the_reference(
    embeddings: Qwen3Embeddings, reference: Embedder
) -> None:
    vectors = await embeddings.aembed_documents(TEXTS)
    assert_equal_vectors(vectors, reference.encode_document(TEXTS))


async def test_embed_query_equals_the_reference(
    embeddings: Qwen3Embeddings, reference: Embedder
) -> None:
    expected = reference.encode_query(TEXTS)
    assert_equal_vectors([embeddings.embed_query(text) for text in TEXTS], expected)
    assert_equal_vectors([await embeddings.aembed_query(text) for text in TEXTS], expected)


def test_embed_query_uses_the_template_byte_for_byte(
    embeddings: Qwen3Embeddings, reference: Embedder
) -> None:
    instruction = TASKS["web_search"].instruction
    written = [f"Instruct: {instruction}\nQuery:{text}" for text in TEXTS]
    vectors = [embeddings.embed_query(text) for text in TEXTS]
    assert_equal_vectors(vectors, reference.encode_document(written))
    assert_equal_vectors(vectors, embeddings.embed_documents(written))


def test_embed_documents_keeps_whitespace_and_newlines(embeddings: Qwen3Embeddings) -> None:
    forms = ["a b", " a b", "a b ", "a\nb", "a\tb", "a  b", "a b\n"]
    vectors = np.array(embeddings.embed_documents(forms))
    assert (np.abs(vectors @ vectors.T - np.eye(len(forms))) < 0.9999).all()


def test_query_and_document_of_one_text_differ(embeddings: Qwen3Embeddings) -> None:
    query, (document,) = embeddings.embed_query("same"), embeddings.embed_documents(["same"])
    assert np.dot(query, document) < 0.999


@pytest.mark.parametrize("task", ["code", "similarity", Task("mine", "Find mine", symmetric=True)])
def test_with_task_equals_the_reference(
    embeddings: Qwen3Embeddings, reference: Embedder, task: str | Task
) -> None:
    sibling = embeddings.with_task(task)
    chosen = TASKS[task] if isinstance(task, str) else task
    written = reference.encode_document([instruct(chosen.instruction, text) for text in TEXTS[:6]])
    bare = reference.encode_document(TEXTS[:6])
    assert_equal_vectors([sibling.embed_query(text) for text in TEXTS[:6]], written)
    assert_equal_vectors(sibling.embed_documents(TEXTS[:6]), written if chosen.symmetric else bare)


def test_free_text_instructions_equal_the_reference(
    embeddings: Qwen3Embeddings, reference: Embedder
) -> None:
    sibling = embeddings.with_task(query_instruction="Find it", document_instruction="Keep it")
    written = reference.encode_document(
        ["Instruct: Find it\nQuery:x", "Instruct: Keep it\nQuery:x"]
    )
    assert_equal_vectors([sibling.embed_query("x"), *sibling.embed_documents(["x"])], written)
    bare = embeddings.with_task(query_instruction="")
    assert_equal_vectors(bare.embed_query("x"), bare.embed_documents(["x"])[0])


def test_dimensions_equal_the_truncated_reference(
    settings: dict[str, Any], reference: Embedder
) -> None:
    small = Qwen3Embeddings(**settings, dimensions=64)
    full = reference.encode_document(TEXTS)
    cut = full[:, :64] / np.linalg.norm(full[:, :64], axis=1, keepdims=True)
    assert_equal_vectors(small.embed_documents(TEXTS), cut)
    assert len(small.embed_query("x")) == 64


def test_chunk_size_keeps_the_order(settings: dict[str, Any], reference: Embedder) -> None:
    texts = [f"text {i} " + "word " * (i * 7 % 50) for i in range(100)]
    chunked = Qwen3Embeddings(**settings, chunk_size=7)
    assert_equal_vectors(chunked.embed_documents(texts), reference.encode_document(texts))


def test_embed_no_texts_returns_an_empty_list(embeddings: Qwen3Embeddings) -> None:
    assert embeddings.embed_documents([]) == []


def test_texts_over_the_context_follow_the_policy(
    settings: dict[str, Any], reference: Embedder
) -> None:
    texts = ["short", "long " * 3000]
    with pytest.raises(TextTooLongError, match=r"texts\[1\].*overflow='truncate'"):
        Qwen3Embeddings(**settings).embed_documents(texts)
    for policy in ("truncate", "mean"):
        expected = Embedder(reference.model, engine="reference", dtype="float32", overflow=policy)
        vectors = Qwen3Embeddings(**settings, overflow=policy).embed_documents(texts)
        assert_equal_vectors(vectors, expected.encode_document(texts))


def test_dimensions_over_the_native_size_raise(settings: dict[str, Any]) -> None:
    with pytest.raises(DimensionsError, match="128"):
        Qwen3Embeddings(**settings, dimensions=256).embed_query("x")


async def test_errors_of_a_server_are_typed_and_show_no_key(
    remote: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    key = "a-wrong-key"
    with pytest.raises(AuthenticationError, match="api_key") as caught:
        Qwen3Embeddings(**remote | {"api_key": key}).embed_query("x")
    assert key not in f"{caught.value!r} {caught.value} {caplog.text}"
    with pytest.raises(ModelNotFoundError, match="'tiny'"):
        await Qwen3Embeddings(**remote | {"model": "huge"}).aembed_query("x")
    assert remote["api_key"] not in caplog.text
    with pytest.raises(ServerConnectionError, match="base_url"):
        Qwen3Embeddings(base_url="http://127.0.0.1:9/v1", max_retries=0).embed_query("x")


def test_model_left_out_is_the_servers(remote: dict[str, Any], reference: Embedder) -> None:
    settings = {name: value for name, value in remote.items() if name != "model"}
    vectors = Qwen3Embeddings(**settings).embed_documents(TEXTS)
    assert_equal_vectors(vectors, reference.encode_document(TEXTS))
