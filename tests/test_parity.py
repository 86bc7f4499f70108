"""The same vectors from every engine."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from qwen3_embeddings import Embedder, truncate
from qwen3_embeddings.vectors import Vectors

ENGINES = ["embedder", "torch_embedder", "remote", "torch_remote"]
ROLES = ["query", "document"]


def encode(embedder: Embedder, texts: list[str], role: str) -> Vectors:
    return (embedder.encode_query if role == "query" else embedder.encode_document)(texts)


def worst_cosine(one: Vectors, other: Vectors) -> float:
    return float(np.abs((one.astype(np.float64) * other).sum(axis=1) - 1).max())


def resized(request: pytest.FixtureRequest, engine: str, dimensions: int) -> Embedder:
    """The session's engine under another size; equal arguments share it."""
    if engine.endswith("remote"):
        server = request.getfixturevalue(engine.replace("remote", "server"))
        return Embedder(base_url=server.base_url, api_key=server.api_key, dimensions=dimensions)
    checkpoint = request.getfixturevalue("checkpoint")
    kind = "torch" if engine == "torch_embedder" else "vllm"
    return Embedder(checkpoint, dtype="float32", dimensions=dimensions, engine=kind)


@pytest.fixture(scope="module")
def wanted(texts: list[str], reference: Embedder) -> dict[str, Vectors]:
    """The reference's vectors, by role."""
    return {role: encode(reference, texts, role) for role in ROLES}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("engine", ENGINES)
def test_encode_equals_the_reference(
    engine: str,
    role: str,
    texts: list[str],
    wanted: dict[str, Vectors],
    request: pytest.FixtureRequest,
) -> None:
    vectors = encode(request.getfixturevalue(engine), texts, role)
    expected = wanted[role]
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(texts), 128)
    assert worst_cosine(vectors, expected) <= 1e-6
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() <= 1e-5
    first, second = (i for i, text in enumerate(texts) if text == "same text")
    np.testing.assert_allclose(vectors[first], vectors[second], atol=1e-6)


@pytest.mark.parametrize("dimensions", [32, 64, 100])
@pytest.mark.parametrize("engine", ENGINES)
def test_dimensions_equal_the_truncated_reference(
    engine: str,
    dimensions: int,
    texts: list[str],
    wanted: dict[str, Vectors],
    request: pytest.FixtureRequest,
) -> None:
    embedder = resized(request, engine, dimensions)
    for role in ROLES:
        vectors = encode(embedder, texts, role)
        expected = truncate(wanted[role], dimensions)
        assert vectors.shape == (len(texts), dimensions)
        assert worst_cosine(vectors, expected) <= 1e-6
        assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() <= 1e-5


def test_reference_vectors_of_different_texts_differ(texts: list[str], reference: Embedder) -> None:
    """Parity means nothing when the checkpoint returns the same vector for every text."""
    vectors = reference.encode_document(texts[3:30])
    similarities = vectors @ vectors.T - np.eye(len(vectors))
    assert np.percentile(similarities, 90) < 0.9
    queries = reference.encode_query(texts[3:30])
    assert np.median((queries * vectors).sum(axis=1)) < 0.9


@pytest.mark.parametrize("engine", ["embedder", "torch_embedder"])
def test_encode_keeps_the_order(
    engine: str, texts: list[str], request: pytest.FixtureRequest
) -> None:
    embedder = request.getfixturevalue(engine)
    forward = embedder.encode_document(texts)
    backward = embedder.encode_document(texts[::-1])
    np.testing.assert_allclose(backward[::-1], forward, atol=1e-6)


@pytest.mark.parametrize("engine", ["vllm", "torch"])
def test_bfloat16_equals_the_reference(
    engine: Literal["vllm", "torch"], checkpoint: str, texts: list[str]
) -> None:
    with Embedder(checkpoint, dtype="bfloat16", engine=engine) as fast:
        vectors = fast.encode_document(texts)
    with Embedder(checkpoint, dtype="bfloat16", engine="reference") as plain:
        expected = plain.encode_document(texts)
    assert worst_cosine(vectors, expected) <= 1e-3


@pytest.mark.parametrize("overflow", ["truncate", "mean"])
@pytest.mark.parametrize("dimensions", [None, 64])
def test_overflow_equals_the_reference(
    overflow: str, dimensions: int | None, checkpoint: str, request: pytest.FixtureRequest
) -> None:
    servers = [request.getfixturevalue(name) for name in ("server", "torch_server")]
    texts = ["short", "many words " * 600, "数据库" * 1500, "exact"]
    engines = [
        *(
            Embedder(
                checkpoint,
                dtype="float32",
                overflow=overflow,
                dimensions=dimensions,
                engine=kind,
            )
            for kind in ("vllm", "torch")
        ),
        *(
            Embedder(
                base_url=server.base_url,
                api_key=server.api_key,
                overflow=overflow,
                dimensions=dimensions,
            )
            for server in servers
        ),
    ]
    yardstick = Embedder(checkpoint, dtype="float32", overflow=overflow, engine="reference")
    for role in ROLES:
        expected = encode(yardstick, texts, role)
        for embedder in engines:
            vectors = encode(embedder, texts, role)
            assert worst_cosine(vectors, truncate(expected, dimensions or 128)) <= 1e-6
