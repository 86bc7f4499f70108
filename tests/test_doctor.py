"""The doctor against engines and servers that are right, and against ones started wrongly."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle
from pathlib import Path
from threading import Thread
from typing import Any
from unicodedata import normalize

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conftest import RunningServer, free_port
from qwen3_embeddings import Embedder, Finding, Report
from qwen3_embeddings.cli.main import main
from qwen3_embeddings.doctor import known, pooling, rows, texts
from qwen3_embeddings.doctor.runner import CHECKS
from qwen3_embeddings.doctor.subject import CannotTellError, Subject
from qwen3_embeddings.engines.base import Engine, Prompt, Usage
from qwen3_embeddings.engines.openai.client import ServerEngine
from qwen3_embeddings.engines.sentence_transformers import ReferenceEngine
from qwen3_embeddings.errors import TextRefusedError, TextTooLongError
from qwen3_embeddings.models import MODELS
from qwen3_embeddings.testing import write_checkpoint
from qwen3_embeddings.vectors import Vectors

ALL = {"reachable", *CHECKS}


def named(report: Report, status: str) -> set[str]:
    return {finding.check for finding in report.findings if finding.status == status}


def finding(report: Report, check: str) -> Finding:
    return next(finding for finding in report.findings if finding.check == check)


# What is right.


def test_an_engine_in_this_process_is_right(checkpoint: str, embedder: Embedder) -> None:
    report = embedder.doctor(reference=checkpoint)
    assert report.ok, report
    assert [finding.check for finding in report.findings] == ["reachable", *CHECKS]
    assert named(report, "skipped") == {"similarities", "wire formats", "authentication"}
    assert named(report, "warning") == set()


async def test_a_server_is_right(server: RunningServer, checkpoint: str) -> None:
    async with Embedder(base_url=server.base_url, api_key=server.api_key) as remote:
        report = await remote.adoctor(reference=checkpoint)
    assert report.ok, report
    assert named(report, "skipped") == {"similarities"}
    assert named(report, "warning") == {"authentication"}
    # vLLM's key guards /v1 and /v2 only.
    said = finding(report, "authentication").message
    assert "/invocations" in said
    assert "/tokenize" in said
    assert "/v1/embeddings" not in said
    assert "/v2/embed" not in said


def test_sentence_transformers_is_right(reference: Embedder) -> None:
    report = reference.doctor()
    assert report.ok, report


def test_another_checkpoint_is_not_the_reference(embedder: Embedder, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path, seed=1)
    assert named(embedder.doctor(reference=str(other)), "failure") == {"reference"}


def test_a_size_there_is_not_is_no_finding_of_another(checkpoint: str) -> None:
    report = Embedder(checkpoint, dtype="float32", dimensions=129).doctor()
    assert named(report, "failure") == {"matryoshka"}
    assert "129" in finding(report, "matryoshka").message


# Engines in this process, started wrongly: they start in seconds.


def examine_in_process(model: str | Path, **arguments: Any) -> Report:
    with Embedder(str(model), dtype="float32", **arguments) as wrong:
        return wrong.doctor()


@pytest.mark.parametrize(
    ("engine_kwargs", "failures", "warnings"),
    [
        ({"pooler_config": {"pooling_type": "CLS"}}, {"pooling", "end token"}, set()),
        (
            {"pooler_config": {"pooling_type": "MEAN"}, "enable_chunked_prefill": False},
            {"pooling"},
            set(),
        ),
        ({"pooler_config": {"use_activation": False}}, set(), {"unit length"}),
        ({"hf_overrides": {}}, set(), set()),  # an engine in the process is never asked for a size
    ],
    ids=["first-token", "mean", "no-activation", "no-matryoshka"],
)
def test_wrong_flags(
    engine_kwargs: dict[str, Any], failures: set[str], warnings: set[str], checkpoint: str
) -> None:
    report = examine_in_process(checkpoint, engine_kwargs=engine_kwargs)
    assert named(report, "failure") == failures, report
    assert named(report, "warning") == warnings, report
    for found in report.findings:
        assert bool(found.effect and found.remedy) == (found.status in {"failure", "warning"})


def with_tokenizer(checkpoint: str, folder: Path, change: Callable[[dict[str, Any]], None]) -> str:
    """A copy of the checkpoint with another tokenizer.json."""
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    # As it stands in the file: Qwen2Tokenizer would put its own normalizer back.
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace("Qwen2Tokenizer", "PreTrainedTokenizerFast"))
    return str(folder)


def flatten_newlines(tokenizer: dict[str, Any]) -> None:
    replace = {"type": "Replace", "pattern": {"String": "\n"}, "content": " "}
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}, replace]}


def strip_and_lower(tokenizer: dict[str, Any]) -> None:
    strip = {"type": "Strip", "strip_left": True, "strip_right": True}
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, strip]}


def append_nothing(tokenizer: dict[str, Any]) -> None:
    tokenizer["post_processor"] = None


def append_another(tokenizer: dict[str, Any]) -> None:
    other = next(t for t in tokenizer["added_tokens"] if t["content"] == "<|im_end|>")
    text = json.dumps(tokenizer["post_processor"]).replace("<|endoftext|>", other["content"])
    tokenizer["post_processor"] = json.loads(text)
    tokenizer["post_processor"]["special_tokens"]["<|im_end|>"]["ids"] = [other["id"]]


def stand_before(tokenizer: dict[str, Any]) -> None:
    """A start token, as many servers add to models that want one."""
    end = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    tokenizer["post_processor"]["single"].insert(0, end)
    start = next(t for t in tokenizer["added_tokens"] if t["content"] == "<|im_start|>")
    special = {"id": "<|im_start|>", "ids": [start["id"]], "tokens": ["<|im_start|>"]}
    tokenizer["post_processor"]["special_tokens"]["<|im_start|>"] = special


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (flatten_newlines, "newlines become spaces"),
        (strip_and_lower, "white space at the end is stripped; case is folded"),
    ],
)
def test_text_that_is_altered(
    change: Callable[[dict[str, Any]], None], said: str, checkpoint: str, tmp_path: Path
) -> None:
    report = examine_in_process(with_tokenizer(checkpoint, tmp_path, change))
    assert named(report, "failure") == {"unaltered"}, report
    assert said in finding(report, "unaltered").message


def test_a_token_before_every_text(checkpoint: str, tmp_path: Path) -> None:
    report = examine_in_process(with_tokenizer(checkpoint, tmp_path, stand_before))
    assert {"end token", "token ids"} <= named(report, "failure"), report


@pytest.mark.parametrize("change", [append_nothing, append_another])
def test_an_engine_that_cannot_start(
    change: Callable[[dict[str, Any]], None], checkpoint: str, tmp_path: Path
) -> None:
    report = examine_in_process(with_tokenizer(checkpoint, tmp_path, change))
    assert not report.ok
    assert report.served is None
    assert "<|endoftext|>" in finding(report, "reachable").message


@pytest.mark.parametrize("change", [append_nothing, append_another])
def test_sentence_transformers_with_a_wrong_end(
    change: Callable[[dict[str, Any]], None], checkpoint: str, tmp_path: Path
) -> None:
    """The end token is told from vectors alone, whatever the engine."""
    own = {"device": "cpu"}  # another engine than the session's, which this one spoils
    with Embedder(checkpoint, engine="reference", dtype="float32", engine_kwargs=own) as right:
        engine = right._lease.engine
        right.start()
        wrong = with_tokenizer(checkpoint, tmp_path, change)
        from sentence_transformers import SentenceTransformer

        engine._encoder = SentenceTransformer(wrong)  # type: ignore[attr-defined]
        report = right.doctor()
    assert {"end token", "token ids"} <= named(report, "failure"), report


def test_weights_that_give_nan(checkpoint: str, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    weights = dict(load_file(tmp_path / "model.safetensors"))
    table = weights["embed_tokens.weight"].copy()
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    table[vocabulary["🙂".encode().decode("latin-1")[0]]] = np.nan  # its first byte
    weights["embed_tokens.weight"] = table
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    report = examine_in_process(tmp_path)
    assert "finite" in named(report, "failure"), report
    assert "🙂" in finding(report, "finite").message


# The checks by themselves, on the reference engine: what a server may do to texts and rows.


DEMO = Path(__file__).parents[1] / "models/demo/qwen3_embeddings_demo_model/checkpoint"


class Altering(ReferenceEngine):
    """The reference, behind something that alters texts, token ids or rows."""

    def __init__(
        self,
        model: str,
        *,
        text: Callable[[str], str] = str,
        cut: slice = slice(None),
        row: Callable[[Vectors], Vectors] = np.asarray,
    ) -> None:
        super().__init__(model, dtype="float32")
        self.text, self.cut, self.row = text, cut, row

    async def embed(
        self,
        prompts: list[Prompt],
        dimensions: int | None,
        urgent: bool,
        usage: Usage | None = None,
    ) -> Vectors:
        texts = [self.text(prompt) for prompt in prompts if isinstance(prompt, str)]
        if len(texts) < len(prompts):
            return self.row(await super().embed(prompts, dimensions, urgent))
        ids: list[Prompt] = []
        for tokens in await self.tokenize(texts):
            ids.append([*tokens[:-1][self.cut], tokens[-1]])
        return self.row(await super().embed(ids, dimensions, urgent))


async def subject_of(engine: Engine) -> Subject:
    return Subject(engine, await engine.start(), None, None, "", None)


async def test_the_demo_model() -> None:
    """Trained weights; a tokenizer that folds case and drops white space, as the finding says."""
    subject = await subject_of(ReferenceEngine(str(DEMO), dtype="float32"))
    assert (await pooling.pooling(subject)).status == "ok"
    found = await texts.unaltered(subject)
    assert "white space at the end is stripped; case is folded" in found.message
    assert "left out" not in found.message
    assert "accents" not in found.message


async def test_mean_pooling_of_trained_weights(tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "1_Pooling" / "config.json"
    last = {"pooling_mode_lasttoken": False, "pooling_mode_mean_tokens": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | last))
    found = await pooling.pooling(await subject_of(ReferenceEngine(str(tmp_path), dtype="float32")))
    assert found.status == "failure"
    assert "the mean is pooled" in found.message


@pytest.mark.parametrize("cut", [slice(512), slice(-512, None), slice(1700), slice(-1700, None)])
async def test_a_server_that_cuts_inside_its_context(cut: slice, checkpoint: str) -> None:
    found = await texts.context(await subject_of(Altering(checkpoint, cut=cut)))
    assert found.status == "failure"
    assert "a text of 2040 tokens is cut in silence" in found.message


class Refusing(ReferenceEngine):
    """The reference, refusing what is longer than 64 characters."""

    async def embed(
        self,
        prompts: list[Prompt],
        dimensions: int | None,
        urgent: bool,
        usage: Usage | None = None,
    ) -> Vectors:
        if any(len(prompt) > 64 for prompt in prompts):
            raise TextTooLongError("over 64.")
        return await super().embed(prompts, dimensions, urgent)


async def test_a_server_that_refuses_what_it_promises(checkpoint: str) -> None:
    subject = await subject_of(Refusing(checkpoint, dtype="float32"))
    assert (await texts.context(subject)).status == "warning"
    untold = replace(subject, served=replace(subject.served, context=None))
    assert (await texts.context(untold)).status == "ok"


class TextsOnly(ReferenceEngine):
    """The reference, refusing token ids as infinity-emb does."""

    async def embed(
        self,
        prompts: list[Prompt],
        dimensions: int | None,
        urgent: bool,
        usage: Usage | None = None,
    ) -> Vectors:
        if any(not isinstance(prompt, str) for prompt in prompts):
            raise TextRefusedError("no ids.")
        return await super().embed(prompts, dimensions, urgent)


async def test_pooling_without_token_ids_cannot_be_told(checkpoint: str) -> None:
    with pytest.raises(CannotTellError, match="the mean takes token ids"):
        await pooling.pooling(await subject_of(TextsOnly(checkpoint, dtype="float32")))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (str.rstrip, "white space at the end"),
        (str.lstrip, "white space at the start"),
        (lambda text: normalize("NFKC", text), "NFKC"),
        (lambda text: text.replace("é", "e"), "accents"),
        (lambda text: text.expandtabs(1), "tabs"),
        (lambda text: text.replace("a\n\n", "a\n"), "blank lines"),
        (lambda text: text.replace("🙂", ""), "emoji"),
    ],
)
async def test_what_alters_texts(text: Callable[[str], str], said: str, checkpoint: str) -> None:
    found = await texts.unaltered(await subject_of(Altering(checkpoint, text=text)))
    assert found.status == "failure"
    assert said in found.message
    assert ";" not in found.message  # and nothing else


@pytest.mark.parametrize("row", [np.sign, lambda rows: np.round(rows, 2)], ids=["signs", "rounded"])
async def test_rows_of_few_numbers(row: Callable[[Vectors], Vectors], checkpoint: str) -> None:
    found = await rows.precision(await subject_of(Altering(checkpoint, row=row)))
    assert found.status == "warning"


async def test_metrics_that_are_no_http() -> None:
    """Neither an answer that is no HTTP nor one that takes too long stops the examination."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handlers.append(asyncio.current_task())
        with suppress(ConnectionError):
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"GET /trickle"):
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 40\r\n\r\n")
                for _ in range(40):
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(0.05)
            else:
                writer.write(b"HTTP/9 what\r\n\r\n")
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    handlers: list[Any] = []
    listener = await asyncio.start_server(answer, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    engine = ServerEngine(url, timeout=0.5)
    assert not await engine.connection.answers_strangers(url + "/metrics", None)
    assert not await engine.connection.answers_strangers(url + "/trickle", None)
    await engine.close()
    await asyncio.gather(*handlers)
    listener.close()


# Servers, started wrongly.


def examine(server: RunningServer, **arguments: Any) -> Report:
    with Embedder(base_url=server.base_url, api_key=server.api_key, **arguments) as remote:
        return remote.doctor()


def test_a_server_with_many_faults(wrong_server: RunningServer) -> None:
    report = examine(wrong_server, model="tiny")
    assert named(report, "failure") == {"end token", "token ids"}, report
    assert named(report, "warning") == {"unit length", "matryoshka", "authentication"}, report


def test_another_model_under_a_published_name(wrong_server: RunningServer) -> None:
    report = examine(wrong_server, model="Qwen/Qwen3-Embedding-0.6B")
    assert {"model", "similarities"} <= named(report, "failure"), report


def test_codes_for_ci(
    server: RunningServer,
    wrong_server: RunningServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("QWEN3_EMBEDDINGS_API_KEY", server.api_key)
    assert main(["doctor", "--base-url", server.base_url, "--dimensions", "64"]) == 0
    table = capsys.readouterr().out
    assert "size 32 and 64: cut by the engine" in table
    assert "right: " in table
    assert main(["doctor", "--base-url", wrong_server.base_url, "--model", "tiny", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert report["served"]["dimensions"] == 128
    assert {found["check"] for found in report["findings"]} == ALL
    assert server.api_key not in table + json.dumps(report)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--dimensions", "7"],
        ["--engine", "server"],
        ["--task", "nothing"],
        ["--engine-kwargs", "[]"],
        ["--engine-kwargs", "{"],
        ["--api-key", "secret"],
    ],
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["doctor", *arguments])
    assert stop.value.code == 2
    assert "usage: qwen3-embeddings" in capsys.readouterr().err


def test_what_cannot_be_reached(server: RunningServer) -> None:
    nobody = RunningServer(f"http://127.0.0.1:{free_port()}/v1", "", "")
    for report in (
        examine(nobody, max_retries=0),
        examine(RunningServer(server.base_url, "wrong", "")),
    ):
        assert [found.check for found in report.findings] == ["reachable"]
        assert not report.ok
        assert report.findings[0].remedy


# What stands between a client and real servers.


Alter = Callable[[dict[str, Any], bytes], bytes]


@contextmanager
def gateway(
    *servers: RunningServer, ask: dict[str, Any] | None = None, alter: Alter | None = None
) -> Iterator[RunningServer]:
    """A gateway that takes turns between servers, adds to requests and alters answers."""
    turns = cycle(servers)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._forward("GET", None)

        def do_POST(self) -> None:
            self._forward("POST", self.rfile.read(int(self.headers["content-length"])))

        def _forward(self, method: str, body: bytes | None) -> None:
            behind = next(turns)
            asked = json.loads(body or b"{}")
            if body is not None and self.path.endswith("/embeddings"):
                asked |= ask or {}
                body = json.dumps(asked).encode()
            url = behind.base_url.removesuffix("/v1") + self.path
            headers = {"authorization": f"Bearer {behind.api_key}"}
            headers |= {"content-type": "application/json"} if body else {}
            answer = httpx.request(method, url, content=body, headers=headers, timeout=60)
            content = answer.content
            if alter and answer.status_code == 200 and self.path.endswith("/embeddings"):
                content = alter(asked, content)
            self.send_response(answer.status_code)
            self.send_header("content-type", answer.headers["content-type"])
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=listener.serve_forever, daemon=True).start()
    try:
        yield RunningServer(f"http://127.0.0.1:{listener.server_port}/v1", "", "tiny")
    finally:
        listener.shutdown()
        listener.server_close()


def test_replicas_that_differ(server: RunningServer, wrong_server: RunningServer) -> None:
    with gateway(server, wrong_server) as between:
        report = examine(between, model="tiny")
    assert "repeatable" in named(report, "failure"), report


def test_a_gateway_that_cuts_long_texts(server: RunningServer) -> None:
    with gateway(server, ask={"truncate_prompt_tokens": 64}) as between:
        report = examine(between)
    assert "context" in named(report, "failure"), report


def reverse_rows(asked: dict[str, Any], body: bytes) -> bytes:
    if asked["encoding_format"] != "bytes_only" or isinstance(asked["input"], str):
        return body
    return np.frombuffer(body, "<f4").reshape(len(asked["input"]), -1)[::-1].tobytes()


def swap_bytes(asked: dict[str, Any], body: bytes) -> bytes:
    form = asked["encoding_format"]
    return np.frombuffer(body, "<f4").astype(">f4").tobytes() if form == "bytes_only" else body


@pytest.mark.parametrize(
    ("alter", "failing"), [(reverse_rows, "batch"), (swap_bytes, "wire formats")]
)
def test_a_gateway_that_alters_answers(server: RunningServer, alter: Alter, failing: str) -> None:
    with gateway(server, alter=alter) as between:
        report = examine(between)
    assert failing in named(report, "failure"), report


def test_a_gateway_that_lets_everybody_in(server: RunningServer) -> None:
    with gateway(server) as between:
        assert "loopback" in finding(examine(between), "authentication").message
        keyed = RunningServer(between.base_url, "a-key", "tiny")
        assert "/v1/embeddings" in finding(examine(keyed), "authentication").message


# The report.


def test_published_sizes_have_their_similarities() -> None:
    for size, matrix in known.PUBLISHED.items():
        assert np.shape(matrix) == (2, 2)
        assert MODELS[f"Qwen/Qwen3-Embedding-{size.upper()}"]


def test_the_report_reads_well() -> None:
    found = Finding("pooling", "failure", "the mean is pooled", "ranking is poor", "--pooling last")
    report = Report("http://localhost/v1", None, (found, Finding("batch", "ok", "equal " * 40)))
    text = report.to_text(80)
    assert max(map(len, text.splitlines())) <= 80
    assert "remedy: --pooling last" in text
    assert "WRONG: 1 ok, 1 failure" in text
    assert json.loads(json.dumps(report.to_dict()))["findings"][0]["effect"] == "ranking is poor"
