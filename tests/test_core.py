"""The pure parts: names, models, instructions, sizes, overflow."""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import pickle
import re
import ssl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import numpy as np
import pytest

import qwen3_embeddings
from qwen3_embeddings import (
    MODELS,
    TASKS,
    DimensionsError,
    Embedder,
    InvalidVectorError,
    Qwen3EmbeddingsError,
    TextTooLongError,
    UnknownModelError,
    errors,
    integration,
    long_texts,
    similarity,
    truncate,
)
from qwen3_embeddings.canonical import canonical
from qwen3_embeddings.config import EngineKind
from qwen3_embeddings.engines.registry import KINDS
from qwen3_embeddings.models import describe
from qwen3_embeddings.prompts import instruct
from qwen3_embeddings.redaction import Secret
from qwen3_embeddings.vectors import BLOCK, alists, lists


def test_public_names_are_complete_and_sorted() -> None:
    names = qwen3_embeddings.__all__
    shouting, rest = [n for n in names if n.isupper()], [n for n in names if not n.isupper()]
    assert names == sorted(shouting) + sorted(rest)
    assert all(hasattr(qwen3_embeddings, name) for name in names)
    own = {n for n, v in vars(errors).items() if getattr(v, "__module__", "") == errors.__name__}
    assert own <= set(names)


def test_integration_names_are_complete() -> None:
    assert all(hasattr(integration, name) for name in integration.__all__)
    assert integration.__all__ == sorted(integration.__all__, key=lambda n: (not n.isupper(), n))


URL = "http://127.0.0.1:9/v1"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"timeout": 60}, {"timeout": 60.0}),
        ({"timeout": None}, {}),
        ({"restart_timeout": 180}, {}),
        ({"max_concurrency": 16}, {}),
        ({"batch_size": 64}, {}),
        *(({"base_url": url}, {}) for url in (f"{URL}/", f"{URL}/embeddings", URL[:-3])),
    ],
    ids=str,
)
def test_equal_settings_of_a_server_compare_equal_and_share_an_engine(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    a, b = (Embedder(**{"base_url": URL} | settings) for settings in (one, other))
    twins = [a, b, *(pickle.loads(pickle.dumps(embedder)) for embedder in (a, b))]
    assert len(set(twins)) == 1
    assert len({id(embedder._lease.engine) for embedder in twins}) == 1
    assert Embedder(base_url=URL, timeout=61) not in twins
    for embedder in twins:
        embedder.close()


def test_canonical_of_equal_values_is_equal() -> None:
    names = [f"name{i}" for i in range(50)]
    one = {"a": Path("/x"), "b": set(names), "c": MappingProxyType({"d": frozenset(names)})}
    other = {"c": {"d": {*reversed(names)}}, "b": {*reversed(names)}, "a": "/x"}
    assert canonical(one) == canonical(other) == canonical(pickle.loads(pickle.dumps(other)))
    contexts = [ssl.create_default_context(), ssl.create_default_context()]
    assert canonical(contexts[0]) != canonical(contexts[1])
    assert canonical(Secret("a")) != canonical(Secret("b"))


@pytest.mark.parametrize("adapter", ["chroma", "haystack", "langchain", "llama-index"])
def test_adapters_import_only_public_modules(adapter: str) -> None:
    folder = Path(__file__).parents[1] / "integrations" / adapter
    modules = {
        node.module
        for path in folder.rglob("*.py")
        if "tests" not in path.parts
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qwen3_embeddings")
    }
    assert modules == {"qwen3_embeddings", "qwen3_embeddings.integration"}


def test_engine_names_are_the_registered_engines() -> None:
    assert set(get_args(EngineKind)) == set(KINDS)


def test_distributions_share_one_version() -> None:
    root = Path(__file__).parents[1]
    declared = {
        path: re.findall(r'^__version__ = "(.+)"$', path.read_text(), re.MULTILINE)
        for folder in ("src", "integrations", "models")
        for path in (root / folder).rglob("__init__.py")
        if "__version__ =" in path.read_text()
    }
    assert len(declared) == 6
    assert {tuple(version) for version in declared.values()} == {(qwen3_embeddings.__version__,)}
    assert f"## [{qwen3_embeddings.__version__}]" in (root / "CHANGELOG.md").read_text()


def test_import_loads_only_numpy_and_the_standard_library() -> None:
    script = (
        "import sys; before = set(sys.modules); import qwen3_embeddings;"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    command = [sys.executable, "-c", script]
    packages = set(subprocess.run(command, capture_output=True, text=True).stdout.split())
    assert packages - sys.stdlib_module_names == {"numpy", "qwen3_embeddings"}


def test_models_have_the_published_sizes() -> None:
    sizes = [(m.dimensions, m.context, m.parameters) for m in MODELS.values()]
    assert sizes == [
        (1024, 32768, 595_776_512),
        (2560, 32768, 4_021_774_336),
        (4096, 32768, 7_567_295_488),
    ]
    cache = [model.kv_bytes_per_token // 1024 for model in MODELS.values()]
    assert cache == [112, 144, 144]
    with pytest.raises(TypeError):
        MODELS["x"] = MODELS["Qwen/Qwen3-Embedding-4B"]  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        MODELS["Qwen/Qwen3-Embedding-4B"].layers = 1  # type: ignore[misc]


def test_describe_of_a_folder_reads_its_config(checkpoint: str, tmp_path: Path) -> None:
    model = describe(checkpoint)
    assert (model.dimensions, model.context, model.layers) == (128, 2048, 2)
    folder = tmp_path
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UnknownModelError, match="'bert'"):
        describe(str(folder))
    (folder / "config.json").write_text("[]")
    with pytest.raises(UnknownModelError, match="JSON object"):
        describe(str(folder))
    with pytest.raises(UnknownModelError, match="spelling"):
        describe("Qwen3-Embedding-0.6B")


def test_precision_of_a_float16_checkpoint_is_float32() -> None:
    model = MODELS["Qwen/Qwen3-Embedding-8B"]
    assert [model.precision(d) for d in ("auto", "float32")] == ["bfloat16", "float32"]
    assert dataclasses.replace(model, stored="float16").precision("auto") == "float32"


def test_instruct_is_the_published_template() -> None:
    assert instruct("Do it", " q\n") == "Instruct: Do it\nQuery: q\n"
    assert instruct("", " q\n") == " q\n"


def test_tasks_have_the_published_wording() -> None:
    assert len(TASKS) >= 12
    assert {task.symmetric for task in TASKS.values()} == {True, False}
    assert all(name == task.name for name, task in TASKS.items())
    assert (
        TASKS["web_search"].instruction
        == "Given a web search query, retrieve relevant passages that answer the query"
    )
    assert TASKS["code"].instruction.endswith("comment.")


def test_truncate_returns_unit_rows_of_the_size() -> None:
    vectors = np.random.default_rng(0).standard_normal((5, 256))
    cut = truncate(vectors, 64)
    expected = vectors[:, :64] / np.linalg.norm(vectors[:, :64], axis=1, keepdims=True)
    assert (cut.dtype, cut.shape) == (np.float32, (5, 64))
    np.testing.assert_allclose(cut, expected, atol=1e-6)
    np.testing.assert_allclose(truncate(vectors[0], 64), expected[0], atol=1e-6)
    np.testing.assert_allclose(truncate(cut, 64), cut, atol=1e-6)
    np.testing.assert_allclose(truncate(truncate(vectors, 128), 64), cut, atol=1e-6)
    assert truncate(vectors.tolist(), 256.0).shape == (5, 256)
    assert truncate(np.empty((0, 256)), 32).shape == (0, 32)


@pytest.mark.parametrize("size", [31, 257, 0, -1, 40.5, True, "64", None])
def test_truncate_to_a_size_out_of_range_raises(size: object) -> None:
    with pytest.raises(DimensionsError, match="32 to 256"):
        truncate(np.ones((2, 256)), size)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_truncate_of_a_row_without_direction_raises(bad: float) -> None:
    vectors = np.ones((4, 64))
    vectors[2] = bad
    with pytest.raises(InvalidVectorError) as caught:
        truncate(vectors, 32)
    assert caught.value.positions == (2,)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: similarity([[1, np.nan]], [[1, 0]]), InvalidVectorError, r"^a\[0\] is not finite"),
        (
            lambda: similarity([1, 0], [[1, 0], [0, 0]]),
            InvalidVectorError,
            r"^b\[1\] is not finite",
        ),
        (lambda: similarity("abc", [1, 0]), InvalidVectorError, "^a cannot be read as vectors"),
        (lambda: similarity(["1", "0"], [1, 0]), InvalidVectorError, "values are <U1"),
        (lambda: similarity([1, 1j], [1, 0]), InvalidVectorError, "values are complex128"),
        (lambda: similarity([[1, 0], [1]], [1, 0]), InvalidVectorError, "^a cannot be read"),
        (lambda: similarity([1, 0], np.ones((2, 2, 2))), InvalidVectorError, "^b is an array of 3"),
        (
            lambda: truncate(np.ones((2, 2, 64)), 32),
            InvalidVectorError,
            "array of 3 axes. Pass one",
        ),
        (lambda: truncate(3.0, 32), InvalidVectorError, "array of 0 axes. Pass one"),
        (lambda: truncate(np.ones(64) * 1j, 32), InvalidVectorError, "values are complex128"),
        (lambda: truncate([], 32), DimensionsError, "have no dimensions"),
        (lambda: truncate(np.zeros(64), 32), InvalidVectorError, "^vectors is not finite"),
    ],
)
def test_vectors_that_cannot_be_used_raise_errors_that_name_the_argument(
    call: Callable[[], object], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said) as caught:
        call()
    assert "texts[" not in str(caught.value)
    assert "bfloat16" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_cut_and_split_keep_head_and_end_token() -> None:
    ids = [1, 2, *range(100, 120), 0]
    assert long_texts.cut(ids, 10) == [1, 2, 100, 101, 102, 103, 104, 105, 106, 0]
    pieces = long_texts.split(ids, 10, head=2)
    assert all(piece[:2] == [1, 2] and piece[-1] == 0 and len(piece) <= 10 for piece in pieces)
    assert [i for piece in pieces for i in piece[2:-1]] == list(range(100, 120))
    assert long_texts.shared_head(ids, [1, 2, 9]) == 2
    assert long_texts.shared_head(ids, [1, 2]) == 2
    with pytest.raises(Qwen3EmbeddingsError, match="no space"):
        long_texts.split(ids, 10, head=9)


def test_merge_returns_normalized_weighted_means() -> None:
    vectors = np.eye(4, dtype=np.float32)
    merged = long_texts.merge(vectors, [0, 1, 1, 2], [5.0, 3.0, 1.0, 2.0])
    middle = np.array([0, 3, 1, 0]) / np.sqrt(10)
    np.testing.assert_allclose(merged, [vectors[0], middle, vectors[3]], atol=1e-6)


def test_errors_keep_positions_and_status_in_pickles() -> None:
    error = TextTooLongError("too long.", [3, 1])
    twin = pickle.loads(pickle.dumps(error))
    assert (str(twin), twin.positions) == (str(error), (3, 1))
    assert error.at([9, 7]).positions == (7, 9)
    refused = pickle.loads(pickle.dumps(errors.ServerBusyError("busy", 503)))
    assert (str(refused), refused.status) == ("busy", 503)


@pytest.mark.parametrize("count", [0, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 3])
async def test_lists_return_the_rows_and_let_other_tasks_run(count: int) -> None:
    vectors = np.random.default_rng(0).random((count, 32), dtype=np.float32)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    assert lists(vectors) == await alists(vectors) == vectors.tolist()
    task.cancel()
    assert turns >= -(-count // BLOCK)
