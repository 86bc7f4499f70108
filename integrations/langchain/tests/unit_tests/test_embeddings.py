"""What holds before any engine or server is there, and what goes over the wire."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import langchain_qwen3_embeddings
import numpy as np
import pytest
import respx
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.load import dumpd, dumps
from langchain_qwen3_embeddings import Qwen3Embeddings
from pydantic import ValidationError

from qwen3_embeddings import (
    TASKS,
    ConfigurationError,
    DimensionsError,
    Embedder,
    EngineClosedError,
    Qwen3EmbeddingsError,
    Task,
    TextEncodingError,
    TextTypeError,
    UnknownTaskError,
    Usage,
)

URL = "http://embeddings.test/v1"
KEY = "sesame-street-123"
TEXTS = ["plain", "", "  outer \t", "def f():\n\treturn 1\n", "a<|endoftext|>b", "北京", "🙂", " "]


def test_public_names_are_complete_and_sorted() -> None:
    assert langchain_qwen3_embeddings.__all__ == sorted(langchain_qwen3_embeddings.__all__)
    assert all(hasattr(langchain_qwen3_embeddings, n) for n in langchain_qwen3_embeddings.__all__)


def test_class_has_its_own_async_methods() -> None:
    assert issubclass(Qwen3Embeddings, Embeddings)
    for name in ("embed_documents", "embed_query", "aembed_documents", "aembed_query"):
        ours, theirs = getattr(Qwen3Embeddings, name), getattr(Embeddings, name)
        assert ours is not theirs
        own, base = (inspect.signature(method).parameters for method in (ours, theirs))
        assert [*own][: len(base)] == [*base]
        assert all(parameter.default is None for parameter in [*own.values()][len(base) :])


def test_parameters_and_defaults_equal_the_cores() -> None:
    core = {n: p.default for n, p in inspect.signature(Embedder).parameters.items()}
    core["chunk_size"] = core.pop("batch_size")
    fields = Qwen3Embeddings.model_fields
    ours = {n: f.default for n, f in fields.items() if n not in {"show_progress_bar", "api_key"}}
    assert ours == {n: default for n, default in core.items() if n != "api_key"}
    assert Qwen3Embeddings().api_key is None


@pytest.mark.engine  # the constructor looks for vLLM
def test_construction_imports_and_starts_no_engine() -> None:
    code = (
        "import sys, langchain_qwen3_embeddings as p\n"
        "p.Qwen3Embeddings().with_task('code'); p.Qwen3Embeddings(base_url='http://h/v1')\n"
        "assert not {'vllm', 'sentence_transformers', 'langchain_openai'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Wrong arguments.


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"dimensions": 16}, DimensionsError, "32 to 1024"),
        ({"dimensions": 4096}, DimensionsError, "32 to 1024"),
        ({"task": "serach"}, UnknownTaskError, "web_search"),
        ({"dtype": "float16"}, ConfigurationError, "bfloat16"),
        ({"overflow": "cut"}, ConfigurationError, "truncate"),
        ({"engine": "onnx"}, ConfigurationError, "reference"),
        ({"engine": "server"}, ConfigurationError, "base_url"),
        ({"engine": "vllm", "base_url": URL}, ConfigurationError, "base_url"),
        ({"base_url": "localhost"}, ConfigurationError, "http://"),
        ({"base_url": URL, "engine_kwargs": {"zoom": 1}}, ConfigurationError, "engine_kwargs"),
        ({"chunk_size": 0}, ConfigurationError, "chunk_size=0"),
    ],
)
def test_wrong_values_raise_the_cores_errors(
    settings: dict[str, Any], error: type[Qwen3EmbeddingsError], said: str
) -> None:
    with pytest.raises(error, match=said):
        Qwen3Embeddings(**settings)


def test_errors_about_names_and_types_do_not_show_the_value() -> None:
    for settings in ({"apikey": KEY}, {"api_key": [KEY]}):
        with pytest.raises(ValidationError, match=r"apikey|api_key") as caught:
            Qwen3Embeddings(**settings)
        assert KEY not in str(caught.value)


def test_set_attribute_raises_and_model_copy_changes_settings() -> None:
    embeddings = Qwen3Embeddings(base_url=URL, api_key=KEY, model="tiny")
    with pytest.raises(ConfigurationError, match="model_copy"):
        embeddings.dimensions = 64
    for name in ("api_key", "default_headers", "apikey"):
        with pytest.raises(ConfigurationError, match="model_copy") as caught:
            setattr(embeddings, name, "sk-secret")
        assert "sk-secret" not in str(caught.value)
    small = embeddings.model_copy(update={"dimensions": 64})
    assert small.fingerprint("query") != embeddings.model_copy().fingerprint("query")
    assert small.api_key == embeddings.api_key
    with pytest.raises(DimensionsError):
        embeddings.model_copy(update={"dimensions": 1})


@pytest.mark.parametrize(
    ("brought", "own"),
    [
        ({"model_name": "tiny"}, {"model": "tiny"}),
        ({"openai_api_base": URL}, {"base_url": URL}),
        ({"api_base": URL}, {"base_url": URL}),
        ({"openai_api_key": KEY}, {"api_key": KEY}),
        ({"request_timeout": 5}, {"timeout": 5.0}),
        ({"timeout": None}, {}),
        ({"show_progress": True}, {"show_progress_bar": True}),
        ({"model": Path("tiny")}, {"model": "tiny"}),
        ({"openai_api_key": None, "cache_folder": None}, {}),
        ({"dimensions": 64.0}, {"dimensions": 64}),
    ],
)
def test_synonyms_are_accepted(brought: dict[str, Any], own: dict[str, Any]) -> None:
    server = {} if "base_url" in own else {"base_url": URL}
    one, other = Qwen3Embeddings(**server, **brought), Qwen3Embeddings(**server, **own)
    assert one == other
    assert one.api_key == other.api_key
    assert (one.model, one.dimensions) == (other.model, other.dimensions)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("check_embedding_ctx_length", "token ids.*overflow"),
        ("embedding_ctx_length", "token ids.*overflow"),
        ("tiktoken_enabled", "token ids"),
        ("encode_kwargs", "chunk_size"),
        ("model_kwargs", "engine_kwargs"),
        ("device", "CUDA_VISIBLE_DEVICES"),
        ("max_length", "overflow='truncate'"),
        ("cache_folder", r"HF_HOME.*\{'download_dir'"),
        ("trust_remote_code", "no code of its own|Leave it out"),
        ("prompts", "query_instruction.*document_instruction"),
        ("embed_instruction", "document_instruction"),
        ("prefix", "query_instruction.*document_instruction"),
        ("normalize", "Leave it out"),
        ("batch_size", "Pass chunk_size"),
        ("multi_process", "serve"),
        ("headers", "default_headers"),
        ("deployment", "AzureOpenAI"),
        ("openai_proxy", "HTTPS_PROXY"),
        ("http_async_client", "http_client"),
        ("text_instruction", "document_instruction"),
        ("async_client", "Pass client"),
        ("repo_id", "Pass model"),
        ("provider", "base_url"),
        ("huggingfacehub_api_token", "HF_TOKEN.*api_key"),
    ],
)
def test_foreign_arguments_raise_with_advice(name: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} is not an argument here.*({said})"):
        Qwen3Embeddings(**{name: "any"})
    assert Qwen3Embeddings(**{name: None}) == Qwen3Embeddings()


def test_argument_under_two_names_raises() -> None:
    with pytest.raises(ConfigurationError, match="model_name and model") as caught:
        Qwen3Embeddings(model="a", model_name="b")
    with pytest.raises(ConfigurationError, match="openai_api_key and api_key") as caught:
        Qwen3Embeddings(api_key=KEY, openai_api_key=KEY)
    assert KEY not in str(caught.value)


def test_dimensions_as_str_raise_as_in_the_core() -> None:
    for make in (Embedder, Qwen3Embeddings):
        with pytest.raises(DimensionsError, match=r"int\('512'\)"):
            make(dimensions="512")  # type: ignore[arg-type, operator]


async def test_embed_documents_accepts_a_chunk_size(recorder: Recorder) -> None:
    with Qwen3Embeddings(base_url=URL) as embeddings:
        rows = embeddings.embed_documents(TEXTS, chunk_size=3)
        assert await embeddings.aembed_documents(TEXTS, 3) == rows
        for wrong in (0, -1):
            with pytest.raises(ConfigurationError, match="chunk_size"):
                embeddings.embed_documents(TEXTS, chunk_size=wrong)
            with pytest.raises(ConfigurationError, match="chunk_size"):
                await embeddings.aembed_documents(TEXTS, chunk_size=wrong)


async def test_embed_documents_accepts_lists_of_any_library(recorder: Recorder) -> None:
    pandas, pyarrow = (pytest.importorskip(name) for name in ("pandas", "pyarrow"))
    with Qwen3Embeddings(base_url=URL) as embeddings:
        rows = embeddings.embed_documents(TEXTS)
        for make in (tuple, iter, np.array, pandas.Series, pyarrow.array):
            assert embeddings.embed_documents(make(TEXTS)) == rows
            assert await embeddings.aembed_documents(make(TEXTS)) == rows


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("one string", r"write \[text\]"),
        ({"text": 1}, r"\.values\(\)"),
        ({"a", "b"}, "no order"),
        (b"bytes", "Decode"),
        (Document("text"), r"\[text\.page_content\]"),
        ([Document("text")], r"texts\[0\].*use \.page_content"),
    ],
)
async def test_embed_documents_value_that_is_not_a_list_raises_with_advice(
    wrong: Any, said: str
) -> None:
    embeddings = Qwen3Embeddings()
    with pytest.raises(TextTypeError, match=said):
        embeddings.embed_documents(wrong)
    with pytest.raises(TextTypeError, match=said):
        await embeddings.aembed_documents(wrong)


async def test_embed_query_that_is_not_str_raises_with_advice() -> None:
    embeddings, document = Qwen3Embeddings(), Document("text")
    with pytest.raises(TextTypeError, match=r"use \.page_content"):
        embeddings.embed_query(document)  # type: ignore[arg-type]
    with pytest.raises(TextTypeError, match="flat list"):
        await embeddings.aembed_query(["a list"])  # type: ignore[arg-type]


def test_equal_settings_compare_and_hash_equal() -> None:
    headers = {"X-Team": "search", "Authorization": "Basic hush"}
    url = {"base_url": URL, "default_headers": headers}
    groups = [
        [
            Qwen3Embeddings(),
            Qwen3Embeddings(engine="vllm"),
            Qwen3Embeddings(task="code").with_task(),
        ],
        [Qwen3Embeddings(dimensions=64), Qwen3Embeddings().model_copy(update={"dimensions": 64})],
        [Qwen3Embeddings(show_progress_bar=True)],
        [Qwen3Embeddings(chunk_size=3)],
        [Qwen3Embeddings(**url), Qwen3Embeddings(**url, api_key=KEY)],
    ]
    for group in groups:
        same = [*group, *(pickle.loads(pickle.dumps(one)) for one in group), copy.copy(group[0])]
        assert all(one == other for one in same for other in same)
        assert len({hash(one) for one in same}) == 1
        others = [other for them in groups if them is not group for other in them]
        assert not [other for other in others if other in same]
    assert Qwen3Embeddings() != Qwen3Embeddings()._embedder


def test_equal_settings_of_a_server_compare_equal() -> None:
    twins = [
        Qwen3Embeddings(base_url=url, **settings)
        for url in (URL, f"{URL}/", f"{URL}/embeddings")
        for settings in ({}, {"timeout": 60}, {"timeout": None}, {"max_concurrency": 16})
    ]
    twins += [pickle.loads(pickle.dumps(one)) for one in twins]
    assert len(set(twins)) == 1
    assert Qwen3Embeddings(base_url=URL, timeout=61) not in twins


@pytest.mark.parametrize(
    "settings",
    [{"timeout": "10"}, {"timeout": (5, 10)}, {"restart_timeout": "10"}, {"max_concurrency": "4"}],
    ids=str,
)
def test_settings_of_another_type_raise_as_in_the_core(settings: dict[str, Any]) -> None:
    for make in (Embedder, Qwen3Embeddings):
        with pytest.raises(
            ConfigurationError, match=rf"{next(iter(settings))} is (str|tuple)\. Pass"
        ):
            make(base_url=URL, **settings)


def test_embedding_dimension_and_similarity_equal_the_cores() -> None:
    embeddings = Qwen3Embeddings(model="Qwen/Qwen3-Embedding-4B")
    assert embeddings.embedding_dimension == 2560
    assert embeddings.model_copy(update={"dimensions": 64}).embedding_dimension == 64
    assert embeddings.usage == Usage()
    assert embeddings.similarity([1.0, 0.0], [[0.0, 2.0], [3.0, 0.0]]).tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("text", [None, b"bytes", 3])
def test_texts_that_are_not_str_are_named_by_position(text: Any) -> None:
    embeddings = Qwen3Embeddings()
    with pytest.raises(TextTypeError, match=r"texts\[1\]"):
        embeddings.embed_documents(["right", text])
    with pytest.raises(TextTypeError, match=r"texts\[0\]"):
        embeddings.embed_query(text)


async def test_async_texts_that_are_not_str_are_named_by_position() -> None:
    embeddings = Qwen3Embeddings()
    with pytest.raises(TextTypeError, match="not a list"):
        await embeddings.aembed_documents("one string")  # type: ignore[arg-type]
    with pytest.raises(TextEncodingError, match=r"texts\[0\]"):
        await embeddings.aembed_query("half \ud83d")


def test_close_leaves_copies_and_siblings_open() -> None:
    with Qwen3Embeddings(base_url=URL) as embeddings:
        others = [embeddings.with_task("code"), embeddings.model_copy(), copy.copy(embeddings)]
        engine = embeddings._embedder._lease.engine
    embeddings.close()
    for closed in (embeddings, embeddings.with_task("code")):
        with pytest.raises(EngineClosedError):
            closed.embed_query("late")
    for other in others:
        assert other._embedder._lease.engine is engine
        other.close()
    with Qwen3Embeddings(base_url=URL) as again:
        assert again._embedder._lease.engine is not engine, "it stopped with the last handle"


async def test_async_with_closes() -> None:
    async with Qwen3Embeddings(base_url=URL) as embeddings:
        pass
    with pytest.raises(EngineClosedError):
        await embeddings.aembed_documents(["late"])


# Copies, pickles and secrets.


def test_with_task_changes_only_the_task() -> None:
    embeddings = Qwen3Embeddings(dimensions=64)
    code = embeddings.with_task("code")
    assert (code.task, code.dimensions, embeddings.task) == ("code", 64, "web_search")
    assert code.fingerprint("query") != embeddings.fingerprint("query")
    assert code.fingerprint("document") == embeddings.fingerprint("document")
    free = embeddings.with_task(query_instruction=TASKS["code"].instruction)
    assert free.fingerprint("query") == code.fingerprint("query")
    with pytest.raises(UnknownTaskError):
        embeddings.with_task("serach")


def test_fingerprint_of_a_symmetric_task_is_one_for_both_roles() -> None:
    embeddings = Qwen3Embeddings(task="similarity")
    assert embeddings.fingerprint("query") == embeddings.fingerprint("document")


def test_secrets_are_in_no_repr_dump_or_pickle() -> None:
    headers = {"X-Token": "hush-hush"}
    embeddings = Qwen3Embeddings(base_url=URL, api_key=KEY, default_headers=headers)
    shown = [repr(embeddings), str(embeddings), json.dumps(dumpd(embeddings)), dumps(embeddings)]
    shown += [repr(embeddings.with_task("code")), repr(embeddings._embedder)]
    assert not any(KEY in text or "hush-hush" in text for text in shown)
    kept = [str(embeddings.model_dump()), embeddings.model_dump_json()]
    kept += [pickle.dumps(embeddings, protocol=0).decode("latin-1"), str(vars(embeddings))]
    assert not any(KEY in text or "hush-hush" in text for text in kept)
    assert embeddings.model_copy()._embedder._lease.engine is embeddings._embedder._lease.engine
    team = Qwen3Embeddings(base_url=URL, default_headers=headers | {"X-Team": "search"})
    for other in (pickle.loads(pickle.dumps(team)), Qwen3Embeddings(**team.model_dump())):
        assert other.default_headers == {"X-Team": "search"}


def test_pickle_reads_the_key_where_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = Qwen3Embeddings(base_url=URL, api_key=KEY, dimensions=64).with_task("code")
    pickled = pickle.dumps(embeddings)
    monkeypatch.setenv("QWEN3_EMBEDDINGS_API_KEY", "another")
    monkeypatch.setenv("QWEN3_EMBEDDINGS_BASE_URL", "http://elsewhere.test/v1")
    loaded = pickle.loads(pickled)
    assert loaded.api_key.get_secret_value() == "another"
    assert loaded.model_dump(exclude={"engine"}) == embeddings.model_dump(exclude={"engine"})


def test_pickle_of_an_engine_in_process_ignores_the_environments_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pickled = pickle.dumps(Qwen3Embeddings())
    monkeypatch.setenv("QWEN3_EMBEDDINGS_BASE_URL", URL)
    assert pickle.loads(pickled).base_url is None
    assert Qwen3Embeddings().base_url == URL


def test_copies_keep_every_setting() -> None:
    mine = Task("mine", "Find mine", symmetric=True)
    embeddings = Qwen3Embeddings(task=mine, model="Qwen/Qwen3-Embedding-4B", dimensions=2000)
    dumped = Qwen3Embeddings(**embeddings.model_dump())
    for other in (copy.copy(embeddings), copy.deepcopy(embeddings), dumped):
        assert other.model_dump() == embeddings.model_dump()
        assert other.task == mine
        assert other.fingerprint("query") == embeddings.fingerprint("query")
    remote = Qwen3Embeddings(base_url=URL, api_key=KEY)
    assert copy.deepcopy(remote).api_key == remote.api_key


# The wire: a real server does not tell what it was sent.


class Recorder:
    """A server that keeps what it is sent and answers one vector a text."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        texts = json.loads(request.content)["input"]
        # Another vector for another text, or it would pass for a server that strips them.
        data = [{"index": i, "embedding": [1.0, len(text)] * 32} for i, text in enumerate(texts)]
        return httpx.Response(200, json={"object": "list", "data": data, "model": "tiny"})

    @property
    def inputs(self) -> list[list[str]]:
        return [json.loads(request.content)["input"] for request in self.requests]


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    answer = Recorder()
    with respx.mock(base_url=URL, using="httpx") as router:
        models = {"object": "list", "data": [{"id": "tiny", "max_model_len": 2048}]}
        router.get("/models").respond(json=models)
        router.post("/embeddings").mock(side_effect=answer)
        yield answer


def test_requests_hold_the_texts_unaltered(recorder: Recorder) -> None:
    with Qwen3Embeddings(base_url=URL) as embeddings:
        embeddings.embed_documents(TEXTS)
        assert recorder.inputs[-1] == TEXTS
        instruction = TASKS["web_search"].instruction
        for text in TEXTS:
            embeddings.embed_query(text)
            assert recorder.inputs[-1] == [f"Instruct: {instruction}\nQuery:{text}"]


def test_requests_hold_chunks_headers_and_key(recorder: Recorder) -> None:
    settings: dict[str, Any] = {"api_key": KEY, "default_headers": {"X-Tenant": "a"}}
    with Qwen3Embeddings(base_url=URL, chunk_size=3, **settings) as embeddings:
        assert len(embeddings.embed_documents(TEXTS)) == len(TEXTS)
    assert sorted(map(len, recorder.inputs[1:])) == [2, 3, 3]
    for request in recorder.requests:
        assert request.headers["Authorization"] == f"Bearer {KEY}"
        assert request.headers["X-Tenant"] == "a"


def test_show_progress_bar_counts_every_text(
    recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    with Qwen3Embeddings(base_url=URL, show_progress_bar=True) as embeddings:
        embeddings.embed_query("quiet")
        assert capsys.readouterr().err == ""
        embeddings.embed_documents(TEXTS)
        assert f"{len(TEXTS)}/{len(TEXTS)}" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["x", 1.5, True])
async def test_embed_documents_with_a_wrong_chunk_size_raises(size: Any) -> None:
    embeddings = Qwen3Embeddings(base_url=URL)
    with pytest.raises(ConfigurationError, match=r"chunk_size is \w+\. Pass int"):
        embeddings.embed_documents(["a"], chunk_size=size)
    with pytest.raises(ConfigurationError, match=r"chunk_size is \w+\. Pass int"):
        await embeddings.aembed_documents(["a"], chunk_size=size)
