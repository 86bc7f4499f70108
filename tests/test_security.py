"""What SECURITY.md promises: no key, no text, no foreign code, no bytes that break the decoder."""

from __future__ import annotations

import base64
import io
import json
import logging
import pickle
import shutil
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
import respx
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_embeddings import (
    ConfigurationError,
    Embedder,
    EngineStartError,
    Qwen3EmbeddingsError,
    UnknownModelError,
)
from qwen3_embeddings.engines.openai import failures, wire
from qwen3_embeddings.redaction import hide_texts

if TYPE_CHECKING:
    from conftest import RunningServer

KEY = "sk-key-nobody-may-see"
HEADER = "header-nobody-may-see"
TEXT = "The confidential merger of Aldgate and Bishop closes in March."
URL = "http://decoder.test/v1"


def sensible(request: httpx.Request) -> httpx.Response:
    """Answer every text with a vector of its own."""
    rows = [
        np.random.default_rng(list(text.encode())).standard_normal(32).tolist()
        for text in json.loads(request.content)["input"]
    ]
    data = [{"index": i, "embedding": row} for i, row in enumerate(rows)]
    return httpx.Response(200, json={"data": data})


def shows(said: Any) -> list[str]:
    """Return the secrets that occur in `said`, as they are or as base64."""
    text = said if isinstance(said, str) else str(said)
    secrets = {name: name for name in (KEY, HEADER)}
    secrets |= {base64.b64encode(name.encode()).decode(): name for name in (KEY, HEADER)}
    return [name for literal, name in secrets.items() if literal in text]


# Keys and headers.


@pytest.fixture
def remote() -> Embedder:
    """Return an embedder with a key and a secret header, whose server does not exist."""
    headers = {"X-Api-Key": HEADER}
    return Embedder(base_url=URL, api_key=KEY, default_headers=headers, max_retries=0, timeout=2)


def test_repr_of_embedder_and_engine_shows_no_secret(remote: Embedder) -> None:
    sibling = remote.with_task("code")
    engine = remote._lease.engine
    for held in (remote, sibling, remote._lease, engine, engine.connection):  # type: ignore[attr-defined]
        assert not shows([repr(held), str(held), f"{held}", remote._lease._key])
    for held in (remote, sibling, remote._lease, engine):
        assert not shows(repr(vars(held)))


def test_pickle_holds_no_secret(remote: Embedder) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert not shows(pickle.dumps(remote, protocol=protocol).decode("latin-1"))


def test_adapter_dumps_hold_no_secret() -> None:
    from langchain_core.load import dumpd, dumps
    from langchain_qwen3_embeddings import Qwen3Embeddings
    from llama_index.embeddings.qwen3 import Qwen3Embedding

    headers = {"X-Api-Key": HEADER}
    lang = Qwen3Embeddings(base_url=URL, api_key=KEY, default_headers=headers, model="m")
    llama = Qwen3Embedding(api_base=URL, api_key=KEY, default_headers=headers, model_name="m")
    dumped: list[Any] = [dumps(lang), dumps(lang, pretty=True), json.dumps(dumpd(lang))]
    dumped += [llama.to_dict(), llama.to_json(), llama.to_payload(), llama.__getstate__()]
    for model in (lang, llama, lang.with_task("code"), llama.with_task("code")):
        dumped += [repr(model), str(model), f"{model}", list(model.__repr_args__())]
        dumped += [model.model_dump(), model.model_dump(mode="json"), model.model_dump_json()]
        dumped += [pickle.dumps(model, protocol=0).decode("latin-1"), pickle.dumps(model)]
    assert not [text for text in dumped if shows(text)]


FAULTS: dict[str, Any] = {
    "refused": httpx.Response(401, text=f"Bearer {KEY} and {HEADER} are not known here"),
    "echo": httpx.Response(400, json={"error": {"message": f"headers: Bearer {KEY}, {HEADER}"}}),
    "busy": httpx.Response(503, text=KEY),
    "moved": httpx.Response(307, headers={"Location": f"http://other.test/?key={KEY}"}),
    "missing": httpx.Response(404, text=f"model? {HEADER}"),
    "nonsense": httpx.Response(200, text=f"<html>{KEY} {HEADER}"),
    "gone": httpx.ConnectError(f"Bearer {KEY}"),
    "slow": httpx.ReadTimeout(HEADER),
    "torn": httpx.RemoteProtocolError(f"illegal header {HEADER}"),
    "broken": RuntimeError(KEY),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_traceback_of_a_server_error_shows_no_secret(
    fault: str, remote: Embedder, caplog: pytest.LogCaptureFixture
) -> None:
    """Local variables of every frame below the call count too."""
    caplog.set_level(logging.DEBUG)
    with respx.mock(assert_all_called=False, using="httpx") as router:
        outcome = FAULTS[fault]
        kind = "side_effect" if isinstance(outcome, Exception) else "return_value"
        router.get(f"{URL}/models").mock(**{kind: outcome})
        router.post(f"{URL}/embeddings").mock(**{kind: outcome})
        with pytest.raises(Qwen3EmbeddingsError) as caught:
            remote.encode_query([TEXT])
    link: BaseException | None = caught.value
    while link is not None:
        assert not shows([str(link), repr(link), repr(link.args), repr(vars(link))])
        link = link.__cause__ or link.__context__
    assert not shows("".join(traceback.format_exception(caught.value)))
    below = caught.value.with_traceback(caught.tb.tb_next)  # this test's own frame knows them
    if fault != "nonsense":  # there the server's own body holds them
        located = traceback.TracebackException.from_exception(below, capture_locals=True)
        assert not shows("".join(located.format()))
    assert not shows(caplog.text)
    remote.close()


LOUD = """
    import asyncio, logging, sys
    logging.basicConfig(level=logging.DEBUG, stream=sys.stdout, format="%(levelname)s %(message)s")
    from qwen3_embeddings import Embedder, event_loop
    text = sys.argv[1]
    settings = dict(zip(sys.argv[2::2], sys.argv[3::2]))
    if "base_url" in settings:
        settings["default_headers"] = {"X-Api-Key": settings.pop("header")}
    loop = event_loop._running_loop()
    loop.slow_callback_duration = 0  # in debug mode asyncio names every callback
    with Embedder(**settings) as embedder:
        embedder.encode_query([text]), embedder.encode_document([text] * 40)
        asyncio.run(embedder.aencode_query([text]), debug=True)
        for wrong in ([text * 500], [text, "\\ud800"]):
            try:
                embedder.encode_document(wrong)
                raise SystemExit("not refused")
            except ValueError as error:
                logging.exception("as a user logs it")
        if settings.get("api_key"):
            try:
                Embedder(base_url=settings["base_url"], api_key="wrong").encode_query([text])
                raise SystemExit("not refused")
            except PermissionError:
                logging.exception("as a user logs it")
    print("DONE")
"""


def loud(environment: dict[str, str], *settings: str) -> list[str]:
    """Return the lines that a run writes with every logger and asyncio in debug mode."""
    import os

    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(LOUD)]
    done = subprocess.run(
        [*command, TEXT, *settings],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env=os.environ
        | {"PYTHONASYNCIODEBUG": "1", "PYTHONPATH": ":".join(sys.path)}
        | environment,
    )
    assert "DONE" in done.stdout, done.stderr[-2000:]
    return (done.stdout + done.stderr).splitlines()


def test_log_of_a_client_shows_no_secret_or_text(server: RunningServer) -> None:
    lines = loud({}, "base_url", server.base_url, "api_key", server.api_key, "header", HEADER)
    assert any("HTTP Request: POST" in line for line in lines)
    assert any("Executing" in line for line in lines), "asyncio was not in debug mode"
    assert not [line for line in lines if server.api_key in line or HEADER in line]
    assert not [line for line in lines if TEXT[:24] in line and not line.startswith("DEBUG")]


def test_log_of_an_engine_shows_no_text(checkpoint: str) -> None:
    lines = loud({"VLLM_LOGGING_LEVEL": "DEBUG"}, "model", checkpoint, "dtype", "float32")
    assert any("Executing" in line for line in lines), "asyncio was not in debug mode"
    assert not [line for line in lines if TEXT[:24] in line and not line.startswith("DEBUG")]


def test_vllm_logs_errors_only(checkpoint: str) -> None:
    code = "import sys, qwen3_embeddings as q; q.Embedder(sys.argv[1], dtype='float32').start()"
    command = [sys.executable, "-W", "ignore", "-c", code, checkpoint]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=True)
    assert "INFO" not in done.stdout + done.stderr


def test_hide_texts_removes_quoted_texts() -> None:
    text = "The quick brown fox\njumps over the lazy dog."
    for said in (f"bad input {text!r}!", f"bad input {json.dumps(text)}!", f"bad {text[5:25]}!"):
        assert "quick brown" not in hide_texts(said, [text])
        assert "…" in hide_texts(said, [text])
    assert hide_texts("bad: sardines", ["sardines"]) == "bad: …", "a whole text of 8"
    assert hide_texts("bad: herring", ["herring"]) == "bad: herring", "a shorter one"


def test_pickled_weights_next_to_safetensors_are_not_read(checkpoint: str, tmp_path: Path) -> None:
    folder = tmp_path / "both"
    shutil.copytree(checkpoint, folder)
    ran = tmp_path / "ran"

    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (ran,)

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harm()))
    for engine in ("vllm", "reference"):
        with Embedder(str(folder), dtype="float32", engine=engine) as embedder:
            assert embedder.encode_query(["text"]).shape == (1, 128)
    assert not ran.exists()


@pytest.mark.parametrize(
    "quoting",
    [
        {"error": {"message": f"cannot read {TEXT!r}"}},
        {"detail": [{"type": "string", "loc": ["body"], "msg": "bad", "input": TEXT}]},
        {"detail": [{"msg": "bad", "input": TEXT[:30] + "…" + TEXT[-20:]}]},
        {"echo": [TEXT]},
    ],
)
@pytest.mark.parametrize("status", [200, 400, 401, 404, 413, 500])
def test_server_error_quotes_no_text(quoting: dict[str, Any], status: int) -> None:
    def quote(request: httpx.Request) -> httpx.Response:
        mine = TEXT in json.loads(request.content)["input"][0]
        return httpx.Response(status, json=quoting) if mine else httpx.Response(status)

    with respx.mock(assert_all_called=False, using="httpx") as router:
        router.get(f"{URL}/models").respond(json={"data": [{"id": "m"}]})
        route = router.post(f"{URL}/embeddings")
        route.mock(side_effect=sensible)
        with Embedder(base_url=URL, max_retries=0) as embedder:
            embedder.start()
            route.mock(side_effect=quote)
            for encode in (embedder.encode_query, embedder.encode_document):
                with pytest.raises(Qwen3EmbeddingsError) as caught:
                    encode([TEXT])
                said = "".join(traceback.format_exception(caught.value))
                assert TEXT[:20] not in said
                assert TEXT[-20:] not in said


def test_engine_kwargs_hub_token_is_refused(checkpoint: str) -> None:
    for engine_kwargs in ({"hf_token": KEY}, {"model_kwargs": {"token": KEY}}):
        with pytest.raises(ConfigurationError, match="HF_TOKEN") as caught:
            Embedder(checkpoint, engine_kwargs=engine_kwargs)
        assert not shows(caught.value)


# Code in a checkpoint.

CODE = """
import pathlib
pathlib.Path({trace!r}).touch()
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3Model
class Tokenizer(Qwen2TokenizerFast): pass
class Config(Qwen3Config): pass
class Model(Qwen3Model): pass
"""


@pytest.fixture
def armed(checkpoint: str, tmp_path: Path) -> tuple[str, Path]:
    """Return a checkpoint that names its own code, and the file which that code makes."""
    import shutil

    folder = Path(shutil.copytree(checkpoint, tmp_path / "armed"))
    trace = tmp_path / "executed"
    (folder / "own.py").write_text(CODE.format(trace=str(trace)))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModel": "own.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {
        "tokenizer_class": "Tokenizer",
        "auto_map": {"AutoTokenizer": ["own.Tokenizer", "own.Tokenizer"]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return str(folder), trace


@pytest.mark.parametrize("engine", ["vllm", "reference"])
def test_checkpoint_code_is_not_run(
    engine: str, armed: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, trace = armed
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\ny\n"))  # nobody is asked either
    try:
        with Embedder(folder, dtype="float32", engine=engine) as embedder:
            assert embedder.encode_document(["a"]).shape == (1, 128)
    except (UnknownModelError, EngineStartError):
        pass  # refused is as good
    assert not trace.exists()


@pytest.mark.parametrize(
    "engine_kwargs",
    [{"trust_remote_code": True}, {"model_kwargs": {"trust_remote_code": True}}],
)
@pytest.mark.parametrize("engine", ["vllm", "reference"])
def test_engine_kwargs_cannot_enable_remote_code(engine: str, engine_kwargs: Any) -> None:
    with pytest.raises(ConfigurationError, match="trust_remote_code"):
        Embedder("Qwen/Qwen3-Embedding-0.6B", engine=engine, engine_kwargs=engine_kwargs)
    Embedder("Qwen/Qwen3-Embedding-0.6B", engine_kwargs={"trust_remote_code": False})


# The decoder: tools/fuzz/decoder.py does the same for longer.

NAMES = ["data", "index", "embedding", "id", "root", "max_model_len", "tokens", "version"]
NAMES += ["error", "message"]
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([1e38, 1e300, 10**400, -1]))
CELLS = st.one_of(
    st.lists(st.floats(width=32), max_size=4),
    st.binary(max_size=16).map(lambda raw: base64.b64encode(raw).decode()),
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(st.characters(), max_size=8), CELLS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
    ),
    max_leaves=12,
)
ROWS = st.lists(
    st.fixed_dictionaries({"index": st.integers(0, 3), "embedding": st.one_of(CELLS, JSON)}),
    max_size=4,
)
DEEP = st.integers(1, 1500).map(lambda depth: b'{"data":' + b"[" * depth + b"]" * depth + b"}")
ANSWERS = st.one_of(JSON, st.fixed_dictionaries({"data": st.one_of(ROWS, JSON)})).map(
    lambda value: json.dumps(value).encode()
)
BODIES = st.one_of(st.binary(max_size=64), ANSWERS, DEEP)
KINDS = st.sampled_from(["application/octet-stream", "application/json", "text/html", ""])


def answer_of(read: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a reader makes of bytes, or None for a typed error that can be printed."""
    try:
        return read(*arguments)
    except Qwen3EmbeddingsError as error:
        str(error).encode()
        return None


@settings(max_examples=500, deadline=None)
@given(body=BODIES, kind=KINDS, rows=st.integers(1, 4))
def test_read_any_bytes_returns_vectors_or_typed_error(body: bytes, kind: str, rows: int) -> None:
    answer = answer_of(wire.read, body, kind, rows)
    if answer is not None:
        form, vectors, tokens = answer
        assert tokens is None or tokens > 0
        assert form in wire.FORMATS
        assert (vectors.dtype, vectors.ndim, vectors.shape[0]) == (np.float32, 2, rows)
        assert vectors.shape[1] > 0


@settings(max_examples=500, deadline=None)
@given(body=BODIES)
def test_read_models_and_others_any_bytes_returns_value_or_typed_error(body: bytes) -> None:
    for row in answer_of(wire.read_models, body) or []:
        row["id"].encode()
    assert all(type(token) is int for token in answer_of(wire.read_tokens, body) or [])
    major, minor = wire.read_version(body)
    assert type(major) is type(minor) is int
    said = failures.message_of(body)
    said.encode()
    assert len(said) <= 500


@settings(max_examples=100, deadline=None)
@given(listing=BODIES, probe=BODIES, answer=BODIES, kind=KINDS, status=st.sampled_from([200, 400]))
def test_encode_document_any_answers_return_unit_rows_or_typed_error(
    listing: bytes, probe: bytes, answer: bytes, kind: str, status: int
) -> None:
    """An embedder returns unit rows of finite numbers, or raises a typed error."""
    said = httpx.Response(status, content=answer, headers={"content-type": kind})
    for served in (False, True):
        with respx.mock(assert_all_called=False, using="httpx") as router:
            names = b'{"data": [{"id": "m"}]}' if served else listing
            router.get(f"{URL}/models").respond(content=names)
            route = router.post(f"{URL}/embeddings")
            first = [httpx.Response(200, content=probe), *[said] * 20]
            route.mock(side_effect=sensible if served else first)
            with Embedder(base_url=URL, max_retries=0) as embedder:
                if served:
                    embedder.start()
                    route.mock(side_effect=None, return_value=said)
                vectors = answer_of(embedder.encode_document, ["a", "b"])
        if vectors is not None:
            assert vectors.shape[0] == 2
            assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-5
