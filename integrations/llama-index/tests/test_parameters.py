"""Parameters, dumps, copies, pickles and errors: all that needs no engine."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import ssl
from typing import Any

import pytest
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.callbacks import CallbackManager
from llama_index.core.ingestion.pipeline import get_transformation_hash
from llama_index.core.schema import TextNode
from llama_index.core.storage.kvstore import SimpleKVStore
from llama_index.embeddings.qwen3 import Qwen3Embedding

from qwen3_embeddings import (
    ConfigurationError,
    DimensionsError,
    EngineClosedError,
    Task,
    UnknownTaskError,
)

KEY = "sk-do-not-tell-anybody"

PARAMETERS: dict[str, Any] = {
    "model_name": "tiny",
    "api_base": "http://127.0.0.1:9/v1",
    "dimensions": 64,
    "task": Task("mine", "Find what matches", symmetric=True),
    "query_instruction": None,
    "text_instruction": "Represent this",
    "dtype": "bfloat16",
    "overflow": "truncate",
    "on_error": "finish",
    "engine": "server",
    "embed_batch_size": 7,
    "num_workers": 3,
    "max_retries": 1,
    "timeout": 5.0,
    "restart_timeout": 3.0,
    "default_headers": {"X-Team": "search"},
    "verify": False,
    "max_concurrency": 2,
    "engine_kwargs": None,
}


@pytest.fixture
def remote() -> Qwen3Embedding:
    return Qwen3Embedding(**PARAMETERS, api_key=KEY)


def test_is_an_embedding_model_under_its_name() -> None:
    assert issubclass(Qwen3Embedding, BaseEmbedding)
    assert Qwen3Embedding.class_name() == "Qwen3Embedding"


def test_defaults_are_the_embedders() -> None:
    model = Qwen3Embedding()
    assert model.model_name == "Qwen/Qwen3-Embedding-0.6B"
    assert (model.task, model.dtype, model.overflow) == ("web_search", "auto", "error")
    assert (model.timeout, model.max_retries, model.verify) == (60.0, 4, True)
    assert model.embed_batch_size == 2048


def test_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN3_EMBEDDINGS_MODEL", "Qwen/Qwen3-Embedding-8B")
    assert Qwen3Embedding().model_name == "Qwen/Qwen3-Embedding-8B"


@pytest.mark.parametrize(
    "way", ["dict", "json", "validate", "pickle", "copy", "deepcopy", "model_copy"]
)
def test_everything_comes_through(remote: Qwen3Embedding, way: str) -> None:
    other = {
        "dict": lambda: Qwen3Embedding.from_dict(remote.to_dict()),
        "json": lambda: Qwen3Embedding.from_json(remote.to_json()),
        "validate": lambda: Qwen3Embedding.model_validate(remote.model_dump()),
        "pickle": lambda: pickle.loads(pickle.dumps(remote)),
        "copy": lambda: copy.copy(remote),
        "deepcopy": lambda: copy.deepcopy(remote),
        "model_copy": lambda: remote.model_copy(deep=True),
    }[way]()
    assert type(other) is Qwen3Embedding
    assert {name: getattr(other, name) for name in PARAMETERS} == PARAMETERS
    assert other.to_dict() == remote.to_dict()
    for role in ("query", "document"):
        assert other.fingerprint(role) == remote.fingerprint(role)


def test_engine_kwargs_come_through(checkpoint: str) -> None:
    model = Qwen3Embedding(checkpoint, engine_kwargs={"max_num_seqs": 8, "hf_overrides": {"a": 1}})
    for other in (Qwen3Embedding.from_json(model.to_json()), pickle.loads(pickle.dumps(model))):
        assert other.engine_kwargs == model.engine_kwargs
        assert other.fingerprint("document") == model.fingerprint("document")


def test_dumping_does_not_change_what_is_dumped(remote: Qwen3Embedding) -> None:
    data = remote.to_dict()
    before = copy.deepcopy(data)
    Qwen3Embedding.from_dict(data)
    assert data == before


def test_from_dict_takes_a_key(remote: Qwen3Embedding) -> None:
    other = Qwen3Embedding.from_dict(remote.to_dict(), api_key=KEY)
    assert other.api_key is not None
    assert other.api_key.get_secret_value() == KEY


def test_secret_headers_are_in_no_dump() -> None:
    headers = {"X-Api-Key": KEY, "X-Team": "search"}
    model = Qwen3Embedding("tiny", api_base="http://127.0.0.1:9/v1", default_headers=headers)
    shown = [repr(model), model.to_json(), str(model.to_dict()), str(vars(model))]
    shown += [str(model.__getstate__()), str(pickle.dumps(model))]
    assert [text for text in shown if KEY in text] == []
    for other in (Qwen3Embedding.from_dict(model.to_dict()), pickle.loads(pickle.dumps(model))):
        assert other.default_headers == {"X-Team": "search"}
    copied = copy.deepcopy(model)
    assert copied._embedder._lease.engine is model._embedder._lease.engine


def test_key_is_nowhere(remote: Qwen3Embedding, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    shown = [
        *(repr(remote), str(remote), f"{remote}", remote.to_json(), remote.model_dump_json()),
        *map(str, (remote.to_dict(), remote.model_dump(), remote.dict(), dict(remote))),
        *map(str, (vars(remote), remote.__getstate__(), remote.to_payload())),
        str(pickle.dumps(remote)),
        str(pickle.dumps(copy.deepcopy(remote))),
    ]
    with pytest.raises(ValueError, match="misplaced") as misplaced:
        Qwen3Embedding(misplaced=KEY)
    with pytest.raises(ConfigurationError, match="api_key cannot be changed") as changed:
        remote.api_key = KEY  # type: ignore[assignment]
    shown += [str(misplaced.value), str(changed.value), caplog.text]
    assert [text for text in shown if KEY in text] == []


def test_copies_keep_the_key(remote: Qwen3Embedding) -> None:
    for other in (copy.copy(remote), copy.deepcopy(remote), remote.with_task("code")):
        assert other.api_key is not None
        assert other.api_key.get_secret_value() == KEY


def test_handles_that_cannot_be_pickled_stay_behind(remote: Qwen3Embedding) -> None:
    class Unpicklable(CallbackManager):
        def __reduce__(self) -> Any:
            raise TypeError("no")

    manager = remote.callback_manager = Unpicklable([])
    other = pickle.loads(pickle.dumps(remote))
    assert type(other.callback_manager) is CallbackManager
    assert remote.callback_manager is manager


def test_tls_context_stays_in_the_process() -> None:
    model = Qwen3Embedding("tiny", api_base="https://host", verify=ssl.create_default_context())
    assert json.loads(model.to_json())["verify"] is True
    assert copy.deepcopy(model).verify is model.verify
    with pytest.raises(TypeError, match="SSLContext"):
        pickle.dumps(model)


def test_unpickling_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    data = pickle.dumps(Qwen3Embedding("tiny", engine="vllm"))
    monkeypatch.setattr(Qwen3Embedding, "__init__", _refuse)
    with pytest.raises(ConfigurationError, match="refused"):
        pickle.loads(data)


def _refuse(*_: object, **__: object) -> None:
    raise ConfigurationError("refused")


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"dimensions": 7}, DimensionsError),
        ({"dimensions": "many"}, DimensionsError),
        ({"dimensions": True}, DimensionsError),
        ({"task": "no such task"}, UnknownTaskError),
        ({"task": 5}, UnknownTaskError),
        ({"dtype": "float16"}, ConfigurationError),
        ({"overflow": "cut"}, ConfigurationError),
        ({"engine": "onnx"}, ConfigurationError),
        ({"engine": "server"}, ConfigurationError),
        ({"api_base": "localhost"}, ConfigurationError),
        ({"api_base": "http://host/v1", "engine_kwargs": {"what": 1}}, ConfigurationError),
        ({"api_base": "http://host/v1", "max_retries": -1}, ConfigurationError),
        ({"embeddings_cache": {}}, TypeError),
        ({"dimension": 64}, ValueError),
        ({"embed_batch_size": 0}, ValueError),
    ],
)
def test_bad_arguments_have_their_own_errors(wrong: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        Qwen3Embedding(**wrong)
    if error not in (TypeError, ValueError):
        assert type(caught.value) is error


def test_settings_are_fixed(remote: Qwen3Embedding) -> None:
    for name in PARAMETERS.keys() - {"embed_batch_size", "num_workers"}:
        with pytest.raises(ConfigurationError, match=name):
            setattr(remote, name, PARAMETERS[name])
    remote.embed_batch_size = 64
    remote.num_workers = None
    assert remote.model_copy(update={"dimensions": 32}).embed_batch_size == 64


@pytest.mark.parametrize(
    "change",
    [
        {"model_name": "Qwen/Qwen3-Embedding-4B"},
        {"dimensions": 128},
        {"task": "code"},
        {"query_instruction": "Find it"},
        {"text_instruction": ""},
        {"dtype": "float32"},
        {"overflow": "mean"},
        {"engine_kwargs": {"what": "else"}},
    ],
)
def test_ingestion_cache_sees_every_change(checkpoint: str, change: dict[str, Any]) -> None:
    before = {"model_name": checkpoint, "dimensions": 64, "text_instruction": "x"}
    keys = {
        get_transformation_hash([TextNode(text="a")], Qwen3Embedding(**parameters))
        for parameters in (before, before, before | change)
    }
    assert len(keys) == 2


def test_ingestion_cache_ignores_key_and_handles(checkpoint: str) -> None:
    node = TextNode(text="a")
    handles: list[dict[str, Any]] = [
        {},
        {"api_key": KEY},
        {"embeddings_cache": SimpleKVStore()},
        {"callback_manager": CallbackManager([])},
    ]
    keys = {get_transformation_hash([node], Qwen3Embedding(checkpoint, **h)) for h in handles}
    assert len(keys) == 1


def test_dump_needs_no_server() -> None:
    model = Qwen3Embedding(api_base="http://127.0.0.1:9/v1", max_retries=0)
    assert "fingerprint" not in model.to_dict()


def test_with_task(remote: Qwen3Embedding) -> None:
    sibling = remote.with_task("code", text_instruction="Code")
    assert (sibling.task, sibling.text_instruction) == ("code", "Code")
    assert sibling.dimensions == remote.dimensions
    assert sibling.fingerprint("query") != remote.fingerprint("query")
    with pytest.raises(UnknownTaskError):
        remote.with_task("nothing")


async def test_closed_is_closed(remote: Qwen3Embedding) -> None:
    with remote.with_task("code") as sibling:
        assert sibling.task == "code"
    async with remote:
        pass
    remote.close()
    with pytest.raises(EngineClosedError):
        remote.get_query_embedding("a")
    with pytest.raises(EngineClosedError):
        await sibling.aget_text_embedding("a")
