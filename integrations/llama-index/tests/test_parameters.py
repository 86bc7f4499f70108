"""Parameters, dumps, copies, pickles and errors: all that needs no engine."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import ssl
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.callbacks import CallbackManager
from llama_index.core.ingestion.pipeline import get_transformation_hash
from llama_index.core.schema import QueryBundle, TextNode
from llama_index.core.storage.kvstore import SimpleKVStore
from llama_index.embeddings.qwen3 import Qwen3Embedding

from qwen3_embeddings import (
    ConfigurationError,
    DimensionsError,
    Embedder,
    EngineClosedError,
    Task,
    TextTypeError,
    UnknownTaskError,
    Usage,
)

KEY = "sk-do-not-tell-anybody"
URL = "http://127.0.0.1:9/v1"

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


def test_class_is_an_embedding_model_with_its_name() -> None:
    assert issubclass(Qwen3Embedding, BaseEmbedding)
    assert Qwen3Embedding.class_name() == "Qwen3Embedding"


def test_defaults_equal_the_embedders() -> None:
    model = Qwen3Embedding()
    assert model.model_name == "Qwen/Qwen3-Embedding-0.6B"
    assert (model.task, model.dtype, model.overflow) == ("web_search", "auto", "error")
    assert (model.timeout, model.max_retries, model.verify) == (60.0, 4, True)
    assert model.embed_batch_size == 2048


def test_environment_supplies_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN3_EMBEDDINGS_MODEL", "Qwen/Qwen3-Embedding-8B")
    assert Qwen3Embedding().model_name == "Qwen/Qwen3-Embedding-8B"


@pytest.mark.parametrize(
    "way", ["dict", "json", "validate", "pickle", "copy", "deepcopy", "model_copy"]
)
def test_copies_and_dumps_keep_every_parameter(remote: Qwen3Embedding, way: str) -> None:
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


def test_copies_and_dumps_keep_engine_kwargs(checkpoint: str) -> None:
    model = Qwen3Embedding(checkpoint, engine_kwargs={"max_num_seqs": 8, "hf_overrides": {"a": 1}})
    for other in (Qwen3Embedding.from_json(model.to_json()), pickle.loads(pickle.dumps(model))):
        assert other.engine_kwargs == model.engine_kwargs
        assert other.fingerprint("document") == model.fingerprint("document")


def test_from_dict_does_not_change_its_input(remote: Qwen3Embedding) -> None:
    data = remote.to_dict()
    before = copy.deepcopy(data)
    Qwen3Embedding.from_dict(data)
    assert data == before


def test_from_dict_accepts_a_key(remote: Qwen3Embedding) -> None:
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


def test_key_is_in_no_dump_repr_or_error(
    remote: Qwen3Embedding, caplog: pytest.LogCaptureFixture
) -> None:
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


def test_pickle_leaves_out_handles_that_cannot_be_pickled(remote: Qwen3Embedding) -> None:
    class Unpicklable(CallbackManager):
        def __reduce__(self) -> Any:
            raise TypeError("no")

    manager = remote.callback_manager = Unpicklable([])
    other = pickle.loads(pickle.dumps(remote))
    assert type(other.callback_manager) is CallbackManager
    assert remote.callback_manager is manager


def test_pickle_of_a_tls_context_raises() -> None:
    model = Qwen3Embedding("tiny", api_base="https://host", verify=ssl.create_default_context())
    assert json.loads(model.to_json())["verify"] is True
    assert copy.deepcopy(model).verify is model.verify
    with pytest.raises(TypeError, match="SSLContext"):
        pickle.dumps(model)


def test_unpickle_raises_the_constructors_error(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_bad_arguments_raise_typed_errors(wrong: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        Qwen3Embedding(**wrong)
    if error not in (TypeError, ValueError):
        assert type(caught.value) is error


def test_set_attribute_of_a_setting_raises(remote: Qwen3Embedding) -> None:
    for name in PARAMETERS.keys() - {"num_workers"}:
        with pytest.raises(ConfigurationError, match=name):
            setattr(remote, name, PARAMETERS[name])
    remote.num_workers = None
    changed = remote.model_copy(update={"dimensions": 32, "embed_batch_size": 8})
    assert (changed.num_workers, changed.embed_batch_size) == (None, 8)
    assert changed._embedder.batch_size == 8


@pytest.mark.parametrize("name", ["api_base", "model_name", "text_instruction"])
def test_wrong_type_is_reported_under_the_parameters_own_name(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{name} is int. Pass str"):
        Qwen3Embedding(**{name: 5})


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
def test_ingestion_hash_changes_with_every_setting(checkpoint: str, change: dict[str, Any]) -> None:
    before = {"model_name": checkpoint, "dimensions": 64, "text_instruction": "x"}
    keys = {
        get_transformation_hash([TextNode(text="a")], Qwen3Embedding(**parameters))
        for parameters in (before, before, before | change)
    }
    assert len(keys) == 2


def test_ingestion_hash_ignores_key_and_handles(checkpoint: str) -> None:
    node = TextNode(text="a")
    handles: list[dict[str, Any]] = [
        {},
        {"api_key": KEY},
        {"embeddings_cache": SimpleKVStore()},
        {"callback_manager": CallbackManager([])},
    ]
    keys = {get_transformation_hash([node], Qwen3Embedding(checkpoint, **h)) for h in handles}
    assert len(keys) == 1


def test_to_dict_without_a_server_has_no_fingerprint() -> None:
    model = Qwen3Embedding(api_base="http://127.0.0.1:9/v1", max_retries=0)
    assert "fingerprint" not in model.to_dict()


def test_with_task_changes_only_the_task(remote: Qwen3Embedding) -> None:
    sibling = remote.with_task("code", text_instruction="Code")
    assert (sibling.task, sibling.text_instruction) == ("code", "Code")
    assert sibling.dimensions == remote.dimensions
    assert sibling.fingerprint("query") != remote.fingerprint("query")
    with pytest.raises(UnknownTaskError):
        remote.with_task("nothing")


async def test_close_leaves_copies_and_siblings_open(
    remote: Qwen3Embedding,
) -> None:
    siblings = [remote.with_task("code"), remote.model_copy(), copy.copy(remote)]
    engine = remote._embedder._lease.engine
    async with remote:
        pass
    remote.close()
    for closed in (remote, remote.with_task("code")):
        with pytest.raises(EngineClosedError):
            closed.get_query_embedding("a")
        with pytest.raises(EngineClosedError):
            await closed.aget_text_embedding("a")
    for sibling in siblings:
        assert sibling._embedder._lease.engine is engine
        with sibling:
            pass
    again = Qwen3Embedding(**PARAMETERS, api_key=KEY)
    assert again._embedder._lease.engine is not engine, "it stopped with the last handle"


@pytest.mark.parametrize(
    ("brought", "own"),
    [
        ({"model": "tiny"}, {"model_name": "tiny"}),
        ({"base_url": URL}, {"api_base": URL}),
        ({"timeout": None}, {}),
        ({"model_name": Path("tiny")}, {"model_name": "tiny"}),
        ({"device": None, "max_length": None}, {}),
        ({"dimensions": 64.0}, {"dimensions": 64}),
    ],
)
def test_synonyms_are_accepted(brought: dict[str, Any], own: dict[str, Any]) -> None:
    server = {} if "api_base" in own else {"api_base": URL}
    one, other = Qwen3Embedding(**server, **brought), Qwen3Embedding(**server, **own)
    assert one == other
    assert one.to_dict() == other.to_dict()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("device", "CUDA_VISIBLE_DEVICES"),
        ("max_length", "overflow='truncate'"),
        ("cache_folder", r"HF_HOME.*\{'download_dir'"),
        ("trust_remote_code", "Leave it out"),
        ("pooling", "Leave it out"),
        ("normalize", "Leave it out"),
        ("model_kwargs", "engine_kwargs"),
        ("parallel_process", "serve"),
        ("mode", "methods of their own"),
        ("additional_kwargs", "Leave it out"),
        ("api_version", "AzureOpenAI"),
        ("reuse_client", "share"),
        ("async_http_client", "http_client"),
        ("auth_token", "api_key"),
        ("truncate_text", "overflow"),
        ("batch_size", "Pass embed_batch_size"),
        ("document_instruction", "Pass text_instruction"),
        ("prompts", "query_instruction.*text_instruction"),
        ("suffix", "query_instruction.*text_instruction"),
        ("show_progress_bar", "show_progress=True"),
        ("repo_id", "Pass model"),
        ("provider", "base_url"),
        ("huggingfacehub_api_token", "HF_TOKEN.*api_key"),
        ("async_client", "Pass client"),
    ],
)
def test_foreign_arguments_raise_with_advice(name: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} is not an argument here.*{said}"):
        Qwen3Embedding(**{name: "any"})
    assert Qwen3Embedding(**{name: None}) == Qwen3Embedding()


def test_argument_under_two_names_raises() -> None:
    with pytest.raises(ConfigurationError, match="model and model_name"):
        Qwen3Embedding("a", model="b")


def test_dimensions_as_str_raise_as_in_the_core() -> None:
    for make in (Embedder, Qwen3Embedding):
        with pytest.raises(DimensionsError, match=r"int\('512'\)"):
            make(dimensions="512")  # type: ignore[arg-type, operator]


def test_equal_settings_compare_and_hash_equal() -> None:
    headers = {"X-Team": "search", "Authorization": "Basic hush"}
    url: dict[str, Any] = {"api_base": URL, "default_headers": headers}
    handles: dict[str, Any] = {"embeddings_cache": SimpleKVStore()}
    handles["callback_manager"] = CallbackManager([])
    groups = [
        [Qwen3Embedding(), Qwen3Embedding(**handles), Qwen3Embedding(task="code").with_task()],
        [Qwen3Embedding(dimensions=64), Qwen3Embedding().model_copy(update={"dimensions": 64})],
        [Qwen3Embedding(embed_batch_size=100)],
        [Qwen3Embedding(num_workers=3)],
        [Qwen3Embedding(**url), Qwen3Embedding(**url, api_key=KEY)],
    ]
    for group in groups:
        same = [*group, *(pickle.loads(pickle.dumps(one)) for one in group), copy.copy(group[0])]
        same += [Qwen3Embedding.from_dict(one.to_dict()) for one in group[:1] if not one.api_base]
        assert all(one == other for one in same for other in same)
        assert len({hash(one) for one in same}) == 1
        others = [other for them in groups if them is not group for other in them]
        assert not [other for other in others if other in same]


def test_equal_settings_of_a_server_compare_equal() -> None:
    twins = [
        Qwen3Embedding(api_base=url, **settings)
        for url in (URL, f"{URL}/", f"{URL}/embeddings")
        for settings in ({}, {"timeout": 60}, {"timeout": None}, {"max_concurrency": 16})
    ]
    twins += [pickle.loads(pickle.dumps(one)) for one in twins]
    assert len(set(twins)) == 1
    assert Qwen3Embedding(api_base=URL, timeout=61) not in twins


@pytest.mark.parametrize(
    "settings",
    [{"timeout": "10"}, {"timeout": (5, 10)}, {"restart_timeout": "10"}, {"max_concurrency": "4"}],
    ids=str,
)
def test_settings_of_another_type_raise_as_in_the_core(settings: dict[str, Any]) -> None:
    for make in (Embedder, Qwen3Embedding):
        with pytest.raises(
            ConfigurationError, match=rf"{next(iter(settings))} is (str|tuple)\. Pass"
        ):
            make(base_url=URL, **settings)


def test_repr_shows_no_address_and_no_secret() -> None:
    handles: dict[str, Any] = {"embeddings_cache": SimpleKVStore(), "rate_limiter": object()}
    handles["default_headers"] = {"X-Api-Key": KEY}
    shown = repr(Qwen3Embedding("tiny", api_base=URL, api_key=KEY, **handles))
    assert " at 0x" not in shown
    assert KEY not in shown


def test_embedding_dimension_and_usage_equal_the_cores() -> None:
    model = Qwen3Embedding("Qwen/Qwen3-Embedding-8B")
    assert model.embedding_dimension == 4096
    assert model.model_copy(update={"dimensions": 64}).embedding_dimension == 64
    assert model.usage == Usage()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("document", r"write \[text\]"),
        ({"text": 1}, r"\.values\(\)"),
        ({"a", "b"}, "no order"),
        (b"bytes", "Decode"),
        (TextNode(text="a"), r"\[text\.get_content\(\)\]"),
        ([TextNode(text="a")], r"texts\[0\].*use \.get_content\(\)"),
        (None, r"write \[text\]"),
    ],
)
async def test_embed_value_that_is_not_a_list_raises_with_advice(wrong: Any, said: str) -> None:
    model = Qwen3Embedding()
    for embed in (model.get_text_embedding_batch, model._get_text_embeddings):
        with pytest.raises(TextTypeError, match=said):
            embed(wrong)
    for aembed in (model.aget_text_embedding_batch, model._aget_text_embeddings):
        with pytest.raises(TextTypeError, match=said):
            await aembed(wrong)


async def test_aggregate_of_one_string_raises_with_advice() -> None:
    """The base class would embed the letters of a query."""
    model = Qwen3Embedding()
    with pytest.raises(TextTypeError, match=r"write \[text\]"):
        model.get_agg_embedding_from_queries("query")
    with pytest.raises(TextTypeError, match=r"write \[text\]"):
        await model.aget_agg_embedding_from_queries("query")


async def test_embed_item_that_is_not_str_raises_with_advice() -> None:
    model = Qwen3Embedding()
    for wrong, said in (
        (QueryBundle("a"), r"use \.query_str"),
        (TextNode(text="a"), r"use \.get_content\(\)"),
        (["a"], "flat list"),
    ):
        for embed in (model.get_query_embedding, model.get_text_embedding):
            with pytest.raises(TextTypeError, match=said):
                embed(wrong)  # type: ignore[arg-type]
        for aembed in (model.aget_query_embedding, model.aget_text_embedding):
            with pytest.raises(TextTypeError, match=said):
                await aembed(wrong)  # type: ignore[arg-type]
