"""What holds for any texts, sizes and settings: cutting, order, batches, fingerprints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from qwen3_embeddings import Embedder, InvalidVectorError, Task, truncate
from qwen3_embeddings.config import Role
from qwen3_embeddings.long_texts import cut, merge, split
from qwen3_embeddings.vectors import Vectors, normalize

# A session's engine is no state of an example: calls leave nothing behind.
several = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
many = settings(max_examples=300, deadline=None)

TEXTS = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=40),
    st.sampled_from(["", " ", "same", "中国的首都", "🙂" * 20, "word " * 120, "<|endoftext|>"]),
)
NOISE = 5e-6  # float32 sums in another order; vectors have unit length


# Cutting.


@st.composite
def matrices(draw: st.DrawFn) -> Vectors:
    """Any finite rows: tiny, huge, sparse."""
    shape = (draw(st.integers(1, 4)), draw(st.integers(32, 96)))
    exponents = draw(arrays.arrays(np.int32, shape, elements=st.integers(-44, 38)))
    digits = st.floats(-3, 3, width=32)
    rows = draw(arrays.arrays(np.float32, shape, elements=digits)) * 10.0**exponents
    return rows.astype(np.float32)


@many
@given(rows=matrices(), sizes=st.lists(st.integers(32, 96), min_size=1, max_size=4))
def test_truncate_in_steps_equals_truncate_at_once(rows: Vectors, sizes: list[int]) -> None:
    """Idempotent, in any number of steps; rows that are no direction are refused, no others."""
    sizes = sorted((min(size, rows.shape[1]) for size in sizes), reverse=True)
    part = rows[:, : sizes[-1]].astype(np.float64)
    lengths = np.linalg.norm(part, axis=1)
    if not lengths.all():
        with pytest.raises(InvalidVectorError) as caught:
            truncate(rows, sizes[-1])
        assert caught.value.positions == tuple(np.flatnonzero(lengths == 0))
        return
    once = truncate(rows, sizes[-1])
    np.testing.assert_allclose(np.linalg.norm(once, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(once, part / lengths[:, None], atol=1e-6)
    np.testing.assert_allclose(truncate(once, sizes[-1]), once, atol=1e-6)
    kept = np.linalg.norm(truncate(rows, sizes[0])[:, : sizes[-1]].astype(np.float64), axis=1)
    if kept.min() > 1e-20:  # below, float32 has no numbers left to keep
        steps = rows
        for size in sizes:
            steps = truncate(steps, size)
        np.testing.assert_allclose(steps, once, atol=1e-5)


@many
@given(rows=matrices(), place=st.data(), bad=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_normalize_of_a_row_that_is_not_finite_raises(
    rows: Vectors, place: st.DataObject, bad: float
) -> None:
    row = place.draw(st.integers(0, rows.shape[0] - 1))
    column = place.draw(st.integers(0, rows.shape[1] - 1))
    rows[row, column] = bad
    with pytest.raises(InvalidVectorError) as caught:
        normalize(rows)
    assert row in caught.value.positions


@several
@given(texts=st.lists(TEXTS, min_size=1, max_size=6), size=st.integers(32, 128))
def test_truncate_equals_the_engines_own_size(
    texts: list[str], size: int, checkpoint: str, embedder: Embedder, remote: Embedder
) -> None:
    """In process and at a server that cuts itself."""
    server = {"base_url": remote.base_url, "api_key": remote._lease._arguments["api_key"]}
    for whole, sized in (
        (embedder, Embedder(checkpoint, dtype="float32", dimensions=size)),
        (remote, Embedder(dimensions=size, **server)),
    ):
        for role in ("encode_query", "encode_document"):
            expected = truncate(getattr(whole, role)(texts), size)
            np.testing.assert_allclose(getattr(sized, role)(texts), expected, atol=NOISE)


# Order and batches.


@several
@given(
    texts=st.lists(TEXTS, min_size=1, max_size=12),
    order=st.randoms(use_true_random=False),
    batch_size=st.integers(1, 13),
    parts=st.integers(1, 4),
)
def test_encode_in_any_order_and_batches_returns_the_same_vectors(
    texts: list[str], order: Any, batch_size: int, parts: int, checkpoint: str, embedder: Embedder
) -> None:
    expected = embedder.encode_document(texts)
    places = list(range(len(texts)))
    order.shuffle(places)
    batched = Embedder(checkpoint, dtype="float32", batch_size=batch_size)
    shuffled = [texts[place] for place in places]
    np.testing.assert_allclose(batched.encode_document(shuffled), expected[places], atol=NOISE)
    pieces = [batched.encode_document(texts[start::parts]) for start in range(parts)]
    for start, piece in enumerate(pieces):
        np.testing.assert_allclose(piece, expected[start::parts], atol=NOISE)
    twice = embedder.encode_document(texts + texts)
    np.testing.assert_allclose(twice, np.concatenate([expected, expected]), atol=NOISE)


@many
@given(
    body=st.lists(st.integers(0, 99), max_size=60),
    head=st.integers(0, 5),
    room=st.integers(1, 20),
)
def test_split_keeps_every_token_once(body: list[int], head: int, room: int) -> None:
    ids = [*range(100, 100 + head), *body, 7]
    limit = head + room + 1
    pieces = split(ids, limit, head)
    assert [token for piece in pieces for token in piece[head:-1]] == body
    assert all(piece[:head] == ids[:head] and piece[-1] == 7 for piece in pieces)
    assert all(len(piece) <= limit for piece in pieces)
    if len(ids) > limit:
        assert cut(ids, limit) == [*ids[: limit - 1], 7]


@many
@given(counts=st.lists(st.integers(1, 4), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_merge_returns_the_mean_of_each_text(counts: list[int], seed: int) -> None:
    chance = np.random.default_rng(seed)
    owners = np.repeat(np.arange(len(counts)), counts)
    rows = normalize(chance.standard_normal((len(owners), 32)).astype(np.float32))
    weights = chance.integers(1, 2000, len(owners)).astype(float)
    merged = merge(rows, owners.tolist(), weights.tolist())
    for text in range(len(counts)):
        mean = np.average(
            rows[owners == text].astype(float), axis=0, weights=weights[owners == text]
        )
        np.testing.assert_allclose(merged[text], mean / np.linalg.norm(mean), atol=1e-5)


# Fingerprints.

# Texts that tell settings apart: a plain one, and one over the context of 2,048 tokens.
PROBES = ["plain text", "a b " * 2500]

INSTRUCTIONS: list[dict[str, Any]] = [
    {},
    {"task": "code"},
    {"task": "similarity"},
    {"task": Task("renamed", "Retrieve semantically similar text", symmetric=True)},
    {"query_instruction": ""},
    {"query_instruction": "Find it"},
    {"document_instruction": "Find it"},
    {"task": "similarity", "document_instruction": ""},
    {"task": Task("other name for code", "Find it")},
]
SIZES: list[dict[str, Any]] = [{}, {"dimensions": 128}, {"dimensions": 64}, {"dimensions": 64.0}]
POLICIES: list[dict[str, Any]] = [
    *({}, {"overflow": "error"}, {"overflow": "truncate"}, {"overflow": "mean"}),
]
# On one engine: what batches or names differently. "auto" is this checkpoint's own float32.
SPEED: list[dict[str, Any]] = [{}, {"batch_size": 1}, {"dtype": "float32"}, {"dtype": "auto"}]


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    parts = (draw(st.sampled_from(kind)) for kind in (INSTRUCTIONS, SIZES, POLICIES, SPEED))
    return {name: value for part in parts for name, value in part.items()}


@pytest.fixture(scope="module")
def outcome(checkpoint: str) -> Callable[[dict[str, Any], Role], tuple[str, list[Any]]]:
    """The fingerprint of settings, and what becomes of the probes: rows, or the refusal."""
    known: dict[str, tuple[str, list[Any]]] = {}

    def find(settings: dict[str, Any], role: Role) -> tuple[str, list[Any]]:
        key = f"{sorted(settings.items(), key=str)} {role}"
        if key not in known:
            embedder = Embedder(checkpoint, **{"dtype": "float32"} | settings)
            encode = embedder.encode_query if role == "query" else embedder.encode_document
            rows: list[Any] = []
            for probe in PROBES:
                try:
                    rows.append(encode([probe])[0])
                except ValueError as error:
                    rows.append(type(error))
            known[key] = embedder.fingerprint(role), rows
        return known[key]

    return find


def same(one: Any, other: Any) -> bool:
    """Whether two outcomes are one vector beyond float noise, or one refusal."""
    if isinstance(one, type) or isinstance(other, type):
        return one is other
    return one.shape == other.shape and bool(np.abs(one - other).max() < NOISE)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    one=configurations(),
    other=configurations(),
    roles=st.tuples(*[st.sampled_from(["query", "document"])] * 2),
)
def test_fingerprint_changes_exactly_when_a_vector_does(
    one: dict[str, Any],
    other: dict[str, Any],
    roles: tuple[Role, Role],
    outcome: Callable[[dict[str, Any], Role], tuple[str, list[Any]]],
) -> None:
    (first, rows), (second, others) = outcome(one, roles[0]), outcome(other, roles[1])
    assert (first == second) == all(map(same, rows, others)), (first, second)


def test_fingerprint_depends_on_engine_arguments_that_change_vectors(
    checkpoint: str, tmp_path: Path
) -> None:
    """Settings too dear to start an engine for each, by what is known of them."""
    import shutil

    def name(**settings: Any) -> str:
        return Embedder(**{"model": checkpoint, "dtype": "float32"} | settings).fingerprint("query")

    neutral: list[dict[str, Any]] = [
        *({"max_num_seqs": 4}, {"max_num_batched_tokens": 512}, {"kv_cache_memory_bytes": 10**8}),
        *(
            {"gpu_memory_utilization": 0.5},
            {"enforce_eager": False},
            {"enable_prefix_caching": True},
        ),
    ]
    telling: list[dict[str, Any]] = [
        *({"quantization": "fp8"}, {"kv_cache_dtype": "fp8"}, {"load_format": "dummy"}),
        *({"hf_overrides": {"rope_theta": 1}}, {"revision": "v2"}, {"tokenizer": "other"}),
    ]
    assert {name(engine_kwargs=kwargs) for kwargs in neutral} == {name()}
    assert len({name(engine_kwargs=kwargs) for kwargs in telling} | {name()}) == len(telling) + 1
    assert name(dtype="bfloat16") != name() == name(engine="reference")
    shorter = {"max_model_len": 512}  # refuses more texts, or cuts them sooner
    assert name(engine_kwargs=shorter) == name()
    assert name(engine_kwargs=shorter, overflow="mean") != name(overflow="mean")
    copied = Path(shutil.copytree(checkpoint, tmp_path / "elsewhere" / Path(checkpoint).name))
    assert name(model=str(copied)) == name()
    tokenizer = json.loads((copied / "tokenizer_config.json").read_text())
    (copied / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"errors": "strict"}))
    assert name(model=str(copied)) != name()
    published = "Qwen/Qwen3-Embedding-0.6B"
    known = Embedder(published).fingerprint("query")
    same_model: list[dict[str, Any]] = [
        *({"dimensions": 1024}, {"dtype": "bfloat16"}, {"base_url": "http://localhost:1"}),
        {"base_url": "http://localhost:1", "dtype": "float32"},  # it has chosen its own
    ]
    assert {Embedder(published, **kwargs).fingerprint("query") for kwargs in same_model} == {known}
