"""What the embedder promises whatever engine runs behind it."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import textwrap
from enum import Enum
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from pydantic import SecretStr

from qwen3_embeddings import (
    TASKS,
    ConfigurationError,
    DimensionsError,
    Embedder,
    EngineClosedError,
    ServerConnectionError,
    ServerResponseError,
    Task,
    TextEncodingError,
    TextsFailedError,
    TextTypeError,
    UnknownModelError,
    UnknownTaskError,
    Usage,
    event_loop,
    token_counts,
    truncate,
)
from qwen3_embeddings.cli.main import main
from qwen3_embeddings.config import check_can_pickle, engine_arguments, resolve
from qwen3_embeddings.engines.base import Served
from qwen3_embeddings.prompts import instruct
from qwen3_embeddings.request import Output, Plan, Texts, slices

if TYPE_CHECKING:
    from tests.conftest import FaultyServer


@pytest.mark.parametrize("engine", ["embedder", "reference", "remote"])
def test_encode_no_texts_returns_an_empty_matrix(
    engine: str, request: pytest.FixtureRequest
) -> None:
    embedder = request.getfixturevalue(engine)
    vectors = embedder.encode_document([])
    assert (vectors.shape, vectors.dtype) == ((0, 128), np.float32)
    assert embedder.encode_query([""]).shape == (1, 128)


def test_encode_no_texts_of_a_known_model_starts_no_engine() -> None:
    assert Embedder("Qwen/Qwen3-Embedding-4B", dimensions=256).encode_query([]).shape == (0, 256)
    assert Embedder("Qwen/Qwen3-Embedding-4B").encode_query([]).shape == (0, 2560)


@pytest.mark.parametrize("wrong", [None, b"bytes", 3, 2.5, ["nested"]])
def test_encode_item_that_is_not_str_is_named_by_position(
    wrong: object, embedder: Embedder
) -> None:
    for encode in (embedder.encode_query, embedder.encode_document):
        with pytest.raises(TextTypeError, match=r"texts\[1\]") as caught:
            encode(["fine", wrong])  # type: ignore[list-item]
        assert isinstance(caught.value, TypeError)
        assert caught.value.positions == (1,)


@pytest.mark.parametrize("wrong", [b"bytes", None, 7])
def test_encode_value_that_is_not_a_list_raises(wrong: object, embedder: Embedder) -> None:
    with pytest.raises(TextTypeError, match=r"\[text\]"):
        embedder.encode_document(wrong)  # type: ignore[arg-type]


async def test_encode_one_string_returns_one_vector(embedder: Embedder) -> None:
    for encode, aencode, role in (
        (embedder.encode_query, embedder.aencode_query, "query"),
        (embedder.encode_document, embedder.aencode_document, "document"),
    ):
        expected = encode(["one text"])[0]
        for vector in (encode("one text"), await aencode("one text")):
            assert vector.shape == (128,)
            np.testing.assert_allclose(vector, expected, atol=2e-6)
        count = embedder.count_tokens("one text", role=role)  # type: ignore[call-overload]
        assert [count] == embedder.count_tokens(["one text"], role=role)  # type: ignore[call-overload]
    with pytest.raises(TextEncodingError, match=r"texts\[0\]"):
        embedder.encode_document("torn \ud83d")


@pytest.mark.parametrize("engine", ["embedder", "reference", "remote"])
async def test_count_tokens_includes_instruction_and_end_token(
    engine: str, request: pytest.FixtureRequest
) -> None:
    from tokenizers import Tokenizer

    embedder: Embedder = request.getfixturevalue(engine)
    checkpoint = request.getfixturevalue("checkpoint")
    tokenizer = Tokenizer.from_file(str(Path(checkpoint) / "tokenizer.json"))
    texts = ["", "one text", " 北京\n", "word " * 3000]
    for role, instruction in (("document", ""), ("query", TASKS["web_search"].instruction)):
        expected = [len(tokenizer.encode(instruct(instruction, text)).ids) for text in texts]
        assert embedder.count_tokens(texts, role=role) == expected  # type: ignore[call-overload]
        assert await embedder.acount_tokens(texts, role=role) == expected  # type: ignore[call-overload]
    assert embedder.count_tokens("") == 1, "the end token"
    assert embedder.count_tokens([]) == []
    with pytest.raises(TextTypeError, match=r"texts\[1\]"):
        embedder.count_tokens(["a", None])  # type: ignore[list-item]


def test_count_tokens_in_process_starts_no_engine(checkpoint: str) -> None:
    with Embedder(checkpoint, engine_kwargs={"max_num_seqs": 3}) as embedder:
        assert embedder.count_tokens("") == 1
        assert embedder._lease.engine._thread is None  # type: ignore[attr-defined]
    with pytest.raises(UnknownModelError):
        Embedder("no-such-model").count_tokens(["a"])


def test_count_tokens_of_a_server_without_tokenize_uses_a_local_tokenizer(
    checkpoint: str,
) -> None:
    class Server:
        """No ``/tokenize``, like most servers that are not vLLM."""

        async def start(self) -> Served:
            return Served("server", "tiny", 128, 128, 512)

        async def tokenize(self, texts: list[str], urgent: bool) -> list[list[int]]:
            raise ServerResponseError("no such route.", 404)

    def count(model: str | None) -> list[int]:
        texts = Texts(["", "one text"], [1, 9], "", False, [])
        return event_loop.run(token_counts.remote(Server(), texts, model))  # type: ignore[arg-type]

    assert count(checkpoint) == Embedder(checkpoint).count_tokens(["", "one text"])
    for unknown in (None, "tiny"):
        with pytest.raises(ConfigurationError, match="no /tokenize"):
            count(unknown)


@pytest.mark.parametrize("engine", ["embedder", "remote"])
def test_usage_is_the_sum_of_the_calls_of_one_object(
    engine: str, request: pytest.FixtureRequest
) -> None:
    embedder: Embedder = copy.copy(request.getfixturevalue(engine))
    assert embedder.usage == Usage()
    texts, one = ["one text", "another longer text", ""], Usage()
    embedder.encode_document(texts, usage=one)
    tokens = sum(embedder.count_tokens(texts))
    assert one.texts == 3
    assert one.uncounted or one.tokens == tokens
    embedder.encode_query(texts[:1])
    with pytest.raises(TextTypeError):
        embedder.encode_document([None])  # type: ignore[list-item]
    assert embedder.usage.texts == 4
    queries = embedder.count_tokens(texts[0], role="query")
    assert embedder.usage.uncounted or embedder.usage.tokens == tokens + queries
    assert embedder.with_task("code").usage == Usage()
    embedder.usage.texts += 7
    assert embedder.usage.texts == 4, "a copy"


def test_embedding_dimension_of_a_known_model_needs_no_engine(checkpoint: str) -> None:
    sizes = {"0.6B": 1024, "4B": 2560, "8B": 4096}
    for name, size in sizes.items():
        published = Embedder(f"Qwen/Qwen3-Embedding-{name}")
        assert published.embedding_dimension == size
        assert published.with_task("code").embedding_dimension == size
        there = Embedder(f"Qwen/Qwen3-Embedding-{name}", base_url="http://127.0.0.1:9")
        assert there.embedding_dimension == size
    assert Embedder(checkpoint).embedding_dimension == 128
    assert Embedder(checkpoint, dimensions=64).embedding_dimension == 64
    assert Embedder(base_url="http://127.0.0.1:9", dimensions=64).embedding_dimension == 64
    with pytest.raises(UnknownModelError):
        _ = Embedder("no-such-model").embedding_dimension


def test_embedding_dimension_of_an_unknown_model_asks_the_server(remote: Embedder) -> None:
    assert remote.embedding_dimension == 128
    with pytest.raises(ServerConnectionError):
        _ = Embedder(base_url="http://127.0.0.1:9", max_retries=0).embedding_dimension


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dimensions", 32),
        ("model", "other"),
        ("base_url", "http://localhost:1/v1"),
        ("overflow", "truncate"),
        ("on_error", "finish"),
        ("batch_size", 8),
        ("task", TASKS["code"]),
        ("query_instruction", "Other"),
        ("timeout", 1.0),
        ("api_key", "secret"),
    ],
)
def test_setting_of_an_embedder_cannot_be_changed(name: str, value: object) -> None:
    embedder = Embedder("Qwen/Qwen3-Embedding-0.6B", dimensions=64)
    before = embedder.fingerprint("document"), repr(embedder)
    sibling = embedder.with_task("code")
    for one in (embedder, sibling, copy.copy(embedder), embedder._finishing()):
        with pytest.raises(ConfigurationError, match=f"{name} cannot be changed. Make a new"):
            setattr(one, name, value)
    assert (embedder.fingerprint("document"), repr(embedder)) == before
    assert (sibling.task, embedder._finishing().on_error) == (TASKS["code"], "finish")


def test_subclass_of_an_embedder_may_have_attributes_of_its_own() -> None:
    class Named(Embedder):
        def __init__(self, name: str) -> None:
            super().__init__("Qwen/Qwen3-Embedding-0.6B")
            self.name = name

    assert copy.copy(Named("a")).name == "a"


def test_count_tokens_without_model_reads_the_folder_that_the_server_names(
    checkpoint: str, faulty: FaultyServer
) -> None:
    served = {"data": [{"id": checkpoint, "max_model_len": 512}]}
    faulty.respond = lambda request: (
        (200, served) if request.path.startswith("/v1/models") else faulty.answer(request)
    )
    with Embedder(base_url=faulty.base_url) as embedder:
        assert embedder.count_tokens(["a", ""]) == [2, 1]


def test_similarity_returns_a_matrix_of_cosines(embedder: Embedder) -> None:
    queries, documents = embedder.encode_query(["a", "b"]), embedder.encode_document(["c"] * 3)
    np.testing.assert_allclose(
        embedder.similarity(queries, documents), queries @ documents.T, atol=1e-6
    )
    one = embedder.similarity(3 * queries[0], documents[0].tolist())
    np.testing.assert_allclose(one, [[queries[0] @ documents[0]]], atol=1e-6)


def test_model_path_and_home_folder_are_resolved(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(checkpoint)
    monkeypatch.setenv("HOME", str(path.parent))
    for model in (path, f"~/{path.name}"):
        assert Embedder(model).model == checkpoint
        assert Embedder(model).fingerprint("query") == Embedder(checkpoint).fingerprint("query")
    monkeypatch.setenv("QWEN3_EMBEDDINGS_MODEL", f"~/{path.name}")
    assert Embedder().model == checkpoint
    served = Embedder(Path("tiny"), base_url="http://127.0.0.1:9")
    assert served.model == "tiny"
    assert pickle.loads(pickle.dumps(Embedder(path))).model == checkpoint


def test_serve_resolves_the_home_folder(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(Path(checkpoint).parent))
    assert main(["serve", f"~/{Path(checkpoint).name}", "--print"]) == 0
    assert checkpoint in capsys.readouterr().out


def test_client_argument_selects_the_server_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment's server and key are not meant for it."""
    monkeypatch.setenv("QWEN3_EMBEDDINGS_BASE_URL", "http://elsewhere.test/v1")
    monkeypatch.setenv("QWEN3_EMBEDDINGS_API_KEY", "not-for-it")
    client = SimpleNamespace(base_url="http://127.0.0.1:9/v1")
    defaults = {name: p.default for name, p in signature(Embedder).parameters.items()}
    for name in ("client", "http_client"):
        settings = resolve(defaults | {name: client})
        assert (settings["engine"], settings["base_url"]) == ("server", None)
        arguments = engine_arguments(settings, None)
        assert arguments[name] is client
        assert (arguments["api_key"] is None) == (name == "client")
        with pytest.raises(TypeError, match=f"{name}= is not pickled"):
            check_can_pickle(settings)
        with pytest.raises(ConfigurationError, match="client contradict"):
            Embedder(engine="vllm", **{name: client})  # type: ignore[arg-type]
    bare = resolve(defaults | {"http_client": SimpleNamespace(base_url="")})
    assert bare["base_url"] == "http://elsewhere.test/v1"
    with pytest.raises(ConfigurationError, match="key of its own"):
        engine_arguments(resolve(defaults | {"client": client}), "key")


def test_timeout_none_means_the_default() -> None:
    url = "http://127.0.0.1:9"
    assert Embedder(base_url=url, timeout=None) == Embedder(base_url=url)


def test_equal_settings_compare_and_hash_equal(checkpoint: str) -> None:
    url = "http://127.0.0.1:9"
    headers = {"X-Team": "search", "Authorization": "Basic hush"}
    groups: list[list[Embedder]] = [
        [
            Embedder(checkpoint, dimensions=64),
            Embedder(Path(checkpoint), dimensions=64.0, task=TASKS["web_search"]),  # type: ignore[arg-type]
            Embedder(checkpoint, dimensions=64, task="code").with_task(),
        ],
        [Embedder(checkpoint), copy.copy(Embedder(checkpoint)), Embedder(checkpoint + "/")],
        [Embedder(checkpoint, task="code"), Embedder(checkpoint).with_task("code")],
        [Embedder(checkpoint, query_instruction="Find it")],
        [Embedder(checkpoint, engine_kwargs={"max_num_seqs": 8})],
        [
            Embedder(checkpoint, engine_kwargs={"download_dir": Path("x"), "a": {"b", "c", "d"}}),
            Embedder(checkpoint, engine_kwargs={"download_dir": "x", "a": {"d", "c", "b"}}),
        ],
        [
            Embedder(base_url=url, default_headers=headers),
            Embedder(base_url=url, api_key="k", default_headers=headers),
        ],
        [Embedder(base_url=url, timeout=5)],
    ]
    for group in groups:
        twins = [*group, *(pickle.loads(pickle.dumps(embedder)) for embedder in group)]
        assert len(set(twins)) == 1
        assert all(one == other for one in twins for other in twins)
        assert all(
            one != other for one in twins for them in groups for other in them if them is not group
        )
        assert "hush" not in repr(twins)
    assert Embedder(checkpoint) != checkpoint


def test_close_leaves_copies_and_siblings_open(checkpoint: str) -> None:
    parent = Embedder(checkpoint, engine="reference", dtype="bfloat16")
    sibling, copied = parent.with_task("code"), copy.copy(parent)
    engine = parent._lease.engine
    parent.close()
    with pytest.raises(EngineClosedError):
        parent.encode_query(["a"])
    for closed in (parent.with_task("code"), copy.copy(parent)):
        with pytest.raises(EngineClosedError):
            closed.encode_query(["a"])
    assert sibling.encode_query(["a"]).shape == (1, 128)
    sibling.close()
    assert copied._lease.engine is engine
    assert copied.encode_query(["a"]).shape == (1, 128)
    copied.close()
    again = Embedder(checkpoint, engine="reference", dtype="bfloat16")
    assert again._lease.engine is not engine, "the engine stopped with the last handle"


def test_encode_any_list_of_texts_returns_the_same_vectors(embedder: Embedder) -> None:
    expected = embedder.encode_document(["a", "b"])
    for texts in (("a", "b"), iter(["a", "b"]), np.array(["a", "b"])):
        np.testing.assert_allclose(embedder.encode_document(texts), expected, atol=2e-6)


def test_encode_str_subclass_embeds_its_text(embedder: Embedder) -> None:
    class Fruit(str, Enum):  # noqa: UP042 (a StrEnum formats as its text)
        APPLE = "red apple"

    for encode in (embedder.encode_query, embedder.encode_document):
        np.testing.assert_array_equal(encode([Fruit.APPLE]), encode(["red apple"]))


def test_encode_scalar_array_raises(embedder: Embedder) -> None:
    with pytest.raises(TextTypeError, match="not a list"):
        embedder.encode_document(np.array("one text"))


def test_encode_lone_surrogate_is_named_by_position(embedder: Embedder) -> None:
    with pytest.raises(TextEncodingError, match=r"texts\[2\]") as caught:
        embedder.encode_document(["a", "🙂", "torn \ud83d"])
    assert isinstance(caught.value, ValueError)


def test_encode_query_uses_the_template_byte_for_byte(embedder: Embedder, texts: list[str]) -> None:
    for task in ("web_search", "code"):
        literal = [f"Instruct: {TASKS[task].instruction}\nQuery:{text}" for text in texts]
        queries = embedder.with_task(task).encode_query(texts)
        np.testing.assert_allclose(queries, embedder.encode_document(literal), atol=2e-6)


def test_encode_document_has_an_instruction_in_symmetric_tasks_only(embedder: Embedder) -> None:
    query, document = (f(["text"]) for f in (embedder.encode_query, embedder.encode_document))
    assert np.abs(query - document).max() > 1e-3
    similar = embedder.with_task("similarity")
    np.testing.assert_array_equal(similar.encode_query(["text"]), similar.encode_document(["text"]))


def test_free_text_instructions_replace_the_tasks(embedder: Embedder) -> None:
    def literal(text: str) -> np.ndarray:
        return embedder.encode_document([text])

    own = embedder.with_task("similarity", query_instruction="Find the recipe")
    np.testing.assert_array_equal(
        own.encode_query(["x"]), literal(instruct("Find the recipe", "x"))
    )
    np.testing.assert_array_equal(own.encode_document(["x"]), literal("x"))
    bare = embedder.with_task(query_instruction="")
    np.testing.assert_array_equal(bare.encode_query(["x"]), literal("x"))
    sides = embedder.with_task(document_instruction="Name the dish")
    np.testing.assert_array_equal(
        sides.encode_document(["x"]), literal(instruct("Name the dish", "x"))
    )
    symmetric = embedder.with_task(Task("mine", "Match recipes", symmetric=True))
    np.testing.assert_array_equal(
        symmetric.encode_document(["x"]), literal("Instruct: Match recipes\nQuery:x")
    )


def test_wrong_arguments_raise_errors_that_say_what_to_do(checkpoint: str) -> None:
    with pytest.raises(UnknownTaskError, match="web_search"):
        Embedder(checkpoint, task="websearch")
    for size in (0, 31, -5, 1025, 64.5, True, "64"):
        with pytest.raises(DimensionsError, match="32 to 1024"):
            Embedder("Qwen/Qwen3-Embedding-0.6B", dimensions=size)  # type: ignore[arg-type]
    with pytest.raises(DimensionsError, match="32 to 128"):
        Embedder(checkpoint, dtype="float32", dimensions=256).encode_document(["x"])
    with pytest.raises(ConfigurationError, match="truncate"):
        Embedder(checkpoint, overflow="cut")
    with pytest.raises(ConfigurationError, match="finish"):
        Embedder(checkpoint, on_error="skip")
    with pytest.raises(ConfigurationError, match="bfloat16"):
        Embedder(checkpoint, dtype="float16")
    for name, dtype in {"dtype": "half", "torch_dtype": "torch.float16"}.items():
        with pytest.raises(ConfigurationError, match="bfloat16"):
            Embedder(checkpoint, engine_kwargs={"model_kwargs": {name: dtype}})
    with pytest.raises(ConfigurationError, match="reference"):
        Embedder(checkpoint, engine="onnx")
    with pytest.raises(ConfigurationError, match="base_url"):
        Embedder(checkpoint, engine="server")
    with pytest.raises(ConfigurationError, match="contradict"):
        Embedder(checkpoint, engine="vllm", base_url="http://localhost:8000")
    with pytest.raises(ConfigurationError, match="batch_size"):
        Embedder(checkpoint, batch_size=0)
    with pytest.raises(ConfigurationError, match="not a URL"):
        Embedder(base_url="localhost:8000")
    for wrong, said in (
        ({"engine_kwargs": {"max_num_seqs": 1}}, "engine_kwargs"),
        ({"base_url": "http://user:hunter2@localhost"}, "default_headers"),
        ({"verify": "/no/such/ca.pem"}, "/no/such/ca.pem"),
        ({"api_key": "käse"}, "api_key"),
        ({"max_retries": -1}, "max_retries"),
        ({"max_concurrency": 0}, "max_concurrency"),
        ({"timeout": 0}, "timeout"),
        ({"api_key": 5}, "api_key is int"),
        ({"base_url": 5}, "base_url is int"),
        ({"model": b"m"}, "model is bytes"),
        ({"engine": ["vllm"]}, "engine is list"),
        ({"query_instruction": 1}, "query_instruction"),
        ({"default_headers": ["a"]}, "default_headers"),
        ({"timeout": float("nan")}, "timeout"),
    ):
        with pytest.raises(ConfigurationError, match=said) as caught:
            Embedder(**{"base_url": "http://localhost:8000", **wrong})  # type: ignore[arg-type]
        assert "hunter2" not in str(caught.value)
        assert "käse" not in str(caught.value)


def test_environment_supplies_omitted_arguments(
    monkeypatch: pytest.MonkeyPatch, checkpoint: str
) -> None:
    monkeypatch.setenv("QWEN3_EMBEDDINGS_BASE_URL", "http://localhost:8000")
    monkeypatch.setenv("QWEN3_EMBEDDINGS_MODEL", "served")
    monkeypatch.setenv("QWEN3_EMBEDDINGS_API_KEY", "from-the-environment")
    embedder = Embedder()
    assert (embedder.engine, embedder.model) == ("server", "served")
    assert (
        embedder._lease.engine.connection._client.headers["authorization"]
        == "Bearer from-the-environment"
    )  # type: ignore[attr-defined]
    assert Embedder(checkpoint, engine="reference").engine == "reference"
    monkeypatch.setenv("QWEN3_EMBEDDINGS_MODEL", "")
    assert Embedder().model is None, "empty is not set"


def test_batch_size_changes_no_vector(
    checkpoint: str, texts: list[str], embedder: Embedder
) -> None:
    expected = embedder.encode_document(texts)
    for size in (1, 7, 1000):
        sized = Embedder(checkpoint, dtype="float32", batch_size=size)
        np.testing.assert_allclose(sized.encode_document(texts), expected, atol=2e-6)


def test_slices_respect_limits_of_texts_and_tokens() -> None:
    class Small:
        chunk_texts = 4
        chunk_tokens = 100

    prompts = ["a"] * 6 + ["b" * 600, "c", list(range(99)), "d" * 3]
    chunks = list(slices(prompts, None, Small()))  # type: ignore[arg-type]
    covered = [i for chunk in chunks for i in range(chunk.start, chunk.stop)]
    assert covered == list(range(10)), "in order, each once"
    assert [(c.start, c.stop) for c in chunks] == [(0, 4), (4, 6), (6, 7), (7, 9), (9, 10)]
    assert [(c.start, c.stop) for c in slices(["a"] * 5, 2, Small())] == [(0, 2), (2, 4), (4, 5)]  # type: ignore[arg-type]


def test_show_progress_counts_every_text(
    embedder: Embedder, capsys: pytest.CaptureFixture[str]
) -> None:
    embedder.encode_document(["a"] * 600, show_progress=True)
    assert "600/600" in capsys.readouterr().err


def test_overflow_mean_weighs_pieces_by_their_tokens(checkpoint: str, embedder: Embedder) -> None:
    text = "x y " * 2000
    averaged = Embedder(checkpoint, dtype="float32", overflow="mean").encode_document(["a", text])
    engine = embedder._lease.engine
    ids = event_loop.run(engine.tokenize([text]))[0]
    body, end = ids[:-1], ids[-1]
    pieces = [[*body[i : i + 2047], end] for i in range(0, len(body), 2047)]
    rows = event_loop.run(engine.embed(pieces, None, False))
    weights = [len(piece) - 1 for piece in pieces]
    mean = np.average(rows, axis=0, weights=weights)
    np.testing.assert_allclose(averaged[1], mean / np.linalg.norm(mean), atol=1e-5)
    assert len(pieces) > 1


def test_overflow_truncate_keeps_instruction_and_end_token(
    checkpoint: str, embedder: Embedder
) -> None:
    text = "x y " * 2000
    cut = Embedder(checkpoint, dtype="float32", overflow="truncate").encode_query([text])
    engine = embedder._lease.engine
    prompt = instruct(TASKS["web_search"].instruction, text)
    ids = event_loop.run(engine.tokenize([prompt]))[0]
    row = event_loop.run(engine.embed([[*ids[:2047], ids[-1]]], None, False))
    np.testing.assert_allclose(cut, row, atol=2e-6)


def test_overflow_with_texts_that_grow_in_nfc_embeds_them(checkpoint: str) -> None:
    """In NFC these have three times their bytes, and so more tokens than bytes."""
    texts = ["\u0958" * 680, "\U0001d160" * 500]
    for overflow in ("truncate", "mean"):
        rows = Embedder(checkpoint, dtype="float32", overflow=overflow).encode_document(texts)
        assert rows.shape == (2, 128)


@pytest.mark.parametrize("overflow", ["error", "mean"])
def test_on_error_finish_loses_only_the_bad_texts(
    checkpoint: str, embedder: Embedder, overflow: str
) -> None:
    long = "x y " * 2000
    texts: list[Any] = ["a", None, "b", "torn \ud83d", long, *(f"text {i}" for i in range(600)), 7]
    good = [i for i, text in enumerate(texts) if isinstance(text, str) and i != 3]
    if overflow == "error":
        good.remove(4)
    finishing = Embedder(checkpoint, dtype="float32", overflow=overflow, on_error="finish")
    with pytest.raises(TextsFailedError, match=f"{len(good)} of 606 texts") as caught:
        finishing.encode_document(texts)
    error = caught.value
    assert error.positions == tuple(i for i in range(606) if i not in good)
    assert [type(kind) for kind in error.errors][:2] == [TextTypeError, TextEncodingError]
    assert error.errors[0].positions == (1, 605)
    assert error.computed is not None
    assert error.computed.positions.tolist() == good
    assert error.computed.missing == list(error.positions)
    plain = Embedder(checkpoint, dtype="float32", overflow=overflow)
    expected = plain.encode_document([texts[i] for i in good])
    np.testing.assert_allclose(error.computed.vectors, expected, atol=2e-6)
    twin = pickle.loads(pickle.dumps(error))
    assert (str(twin), twin.errors[1].positions) == (str(error), (3,))
    np.testing.assert_array_equal(twin.computed.vectors, error.computed.vectors)


async def test_on_error_finish_with_only_bad_texts_raises(checkpoint: str) -> None:
    finishing = Embedder(checkpoint, dtype="float32", on_error="finish")
    with pytest.raises(TextsFailedError) as caught:
        await finishing.aencode_query([None, "\ud83d"])  # type: ignore[list-item]
    assert (caught.value.positions, caught.value.computed) == ((0, 1), None)


def test_output_pieces_that_cancel_out_fail_only_their_text() -> None:
    """A mean of zero has no direction; such a text must not take the others along."""
    plan = Plan(list("abbc"), [3, 5, 5, 8], [1.0] * 4, split=True)
    output = Output(plan, 32, [])
    rows = np.eye(32, dtype=np.float32)[[0, 1, 1, 2]]
    rows[2] *= -1
    output.put(range(4), rows)
    computed = output.texts(32, 9)
    assert [failure.positions for failure in output.failures] == [(5,)]
    assert computed.positions.tolist() == [3, 8]
    np.testing.assert_array_equal(computed.vectors, rows[[0, 3]])


def test_fingerprint_differs_for_every_setting_that_changes_a_vector(checkpoint: str) -> None:
    plain = Embedder(checkpoint)
    fingerprints = {
        name: embedder.fingerprint("query")
        for name, embedder in {
            "plain": plain,
            "task": plain.with_task("code"),
            "instruction": plain.with_task(query_instruction="Find"),
            "size": Embedder(checkpoint, dimensions=64),
            "dtype": Embedder(checkpoint, dtype="bfloat16"),
            "overflow": Embedder(checkpoint, overflow="mean"),
            "quantised": Embedder(checkpoint, engine_kwargs={"quantization": "fp8"}),
            "model": Embedder("Qwen/Qwen3-Embedding-4B"),
        }.items()
    }
    assert len(set(fingerprints.values())) == len(fingerprints)
    assert plain.fingerprint("document") != plain.fingerprint("query")
    assert plain.fingerprint("document") == plain.with_task("code").fingerprint("document")
    same = Embedder(checkpoint, engine="reference", batch_size=3)
    assert same.fingerprint("query") == plain.fingerprint("query")
    faster = Embedder(checkpoint, engine_kwargs={"max_num_seqs": 8})
    assert faster.fingerprint("query") == plain.fingerprint("query")
    with pytest.raises(ConfigurationError, match="role"):
        plain.fingerprint("passage")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("constant", "changed", "kept"),
    [
        ("prompts.TEMPLATE_VERSION", {"role": "query"}, {"role": "document"}),
        ("long_texts.TRUNCATE_VERSION", {"overflow": "truncate"}, {"overflow": "mean"}),
        ("long_texts.MEAN_VERSION", {"overflow": "mean"}, {"overflow": "error"}),
        ("vectors.SIZE_VERSION", {"dimensions": 64}, None),
    ],
)
def test_fingerprint_changes_with_the_version_of_an_algorithm_it_depends_on(
    constant: str, changed: Any, kept: Any, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def name(settings: dict[str, Any]) -> str:
        role = settings.get("role", "document")
        others = {k: v for k, v in settings.items() if k != "role"}
        return Embedder(checkpoint, **others).fingerprint(role)

    before = name(changed), kept and name(kept)
    monkeypatch.setattr(f"qwen3_embeddings.{constant}", 1000)
    assert name(changed) != before[0]
    assert not kept or name(kept) == before[1]


def test_fingerprint_is_equal_in_every_process(checkpoint: str) -> None:
    script = """
        import sys
        from pathlib import Path
        from types import SimpleNamespace
        from qwen3_embeddings import Embedder

        class Plain:
            def __init__(self): self.words = {"a", "b", "c", "d"}

        kwargs = {"names": {"x", "y", "z", "w"}, "plain": Plain(), "path": Path("p")}
        kwargs |= {"nested": {"deep": frozenset("abcdef")}}
        embedder = Embedder(sys.argv[1], overflow="mean", dimensions=64, engine_kwargs=kwargs)
        print(embedder.fingerprint("query"))
    """
    names = {
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), checkpoint],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "123"
    }
    assert len(names) == 1


def test_fingerprint_depends_on_the_checkpoint_not_its_path(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    from qwen3_embeddings.testing import write_checkpoint

    folder = tmp_path
    one, twin = (write_checkpoint(folder / name / "model") for name in ("a", "b"))
    tuned = write_checkpoint(folder / "c" / "model")
    weights = load_file(tuned / "model.safetensors")
    weights["layers.0.mlp.up_proj.weight"] *= -1
    save_file(weights, tuned / "model.safetensors", metadata={"format": "pt"})
    prints = [Embedder(str(path)).fingerprint("document") for path in (one, twin, tuned)]
    assert prints[0] == prints[1] != prints[2]


def test_pickles_and_copies_embed_alike(checkpoint: str, embedder: Embedder) -> None:
    custom = Embedder(checkpoint, dtype="float32", dimensions=64).with_task(Task("mine", "Find it"))
    expected = custom.encode_query(["x"])
    for twin in (pickle.loads(pickle.dumps(custom)), copy.copy(custom), copy.deepcopy(custom)):
        assert twin.fingerprint("query") == custom.fingerprint("query")
        np.testing.assert_allclose(twin.encode_query(["x"]), expected, atol=2e-6)


def test_pickle_ignores_another_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pickled = pickle.dumps(Embedder())
    monkeypatch.setenv("QWEN3_EMBEDDINGS_BASE_URL", "http://localhost:8000")
    monkeypatch.setenv("QWEN3_EMBEDDINGS_MODEL", "another")
    twin = pickle.loads(pickled)
    assert (twin.engine, twin.model) == ("vllm", "Qwen/Qwen3-Embedding-0.6B")


def test_key_is_never_shown_or_pickled() -> None:
    key = "sk-very-secret"
    embedder = Embedder(base_url="http://localhost:1/v1", api_key=key)
    shown = [repr(embedder), str(embedder), repr(vars(embedder)), str(pickle.dumps(embedder))]
    shown += [repr(vars(embedder._lease)), repr(vars(embedder._lease.engine)), embedder._lease._key]
    assert not [text for text in shown if key in text]


def test_secret_headers_are_never_shown_or_pickled() -> None:
    headers = {"Authorization": "Basic hush-1", "X-Api-Key": "hush-2", "X-Team": "search"}
    given = headers | {"X-Pin": SecretStr("hush-3")}
    embedder = Embedder(base_url="http://localhost:1/v1", default_headers=given)
    client = embedder._lease.engine.connection._client  # type: ignore[attr-defined]
    sent = {name.lower(): value for name, value in headers.items()} | {"x-pin": "hush-3"}
    assert sent.items() <= dict(client.headers).items()
    shown = [repr(embedder), repr(vars(embedder)), str(pickle.dumps(embedder))]
    shown += [repr(vars(embedder._lease)), repr(vars(embedder._lease.engine)), embedder._lease._key]
    assert not [text for text in shown if "hush" in text]
    twin = pickle.loads(pickle.dumps(embedder))
    assert twin._settings["default_headers"] == {"X-Team": "search"}
    assert copy.deepcopy(embedder)._lease.engine is embedder._lease.engine


def test_dimensions_equal_truncated_full_vectors(checkpoint: str, embedder: Embedder) -> None:
    sized = Embedder(checkpoint, dtype="float32", dimensions=64).encode_document(["a", "b"])
    cut = truncate(embedder.encode_document(["a", "b"]), 64)
    np.testing.assert_allclose(sized, cut, atol=2e-6)
