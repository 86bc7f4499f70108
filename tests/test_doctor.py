"""The doctor, run on engines and servers that are right and on ones with known faults."""

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
from qwen3_embeddings.doctor import known, pooling, rows, sizes, texts
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


# Engines and servers without faults.


def test_doctor_vllm_in_process_reports_no_failure(checkpoint: str, embedder: Embedder) -> None:
    report = embedder.doctor(reference=checkpoint)
    assert report.ok, report
    assert [finding.check for finding in report.findings] == ["reachable", *CHECKS]
    assert named(report, "skipped") == {"similarities", "wire formats", "authentication"}
    assert named(report, "warning") == set()


async def test_doctor_vllm_server_reports_no_failure(
    server: RunningServer, checkpoint: str
) -> None:
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


def test_doctor_sentence_transformers_reports_no_failure(reference: Embedder) -> None:
    report = reference.doctor()
    assert report.ok, report


def test_reference_other_checkpoint_fails(embedder: Embedder, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path, seed=1)
    assert named(embedder.doctor(reference=str(other)), "failure") == {"reference"}


def test_matryoshka_size_over_native_fails_alone(checkpoint: str) -> None:
    report = Embedder(checkpoint, dtype="float32", dimensions=129).doctor()
    assert named(report, "failure") == {"matryoshka"}
    assert "129" in finding(report, "matryoshka").message


# Faulty engines in this process, which start in seconds.


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
        ({"hf_overrides": {}}, set(), set()),  # an in-process engine is never asked for a size
    ],
    ids=["first-token", "mean", "no-activation", "no-matryoshka"],
)
def test_doctor_wrong_vllm_flags_names_the_fault(
    engine_kwargs: dict[str, Any], failures: set[str], warnings: set[str], checkpoint: str
) -> None:
    report = examine_in_process(checkpoint, engine_kwargs=engine_kwargs)
    assert named(report, "failure") == failures, report
    assert named(report, "warning") == warnings, report
    for found in report.findings:
        assert bool(found.effect and found.remedy) == (found.status in {"failure", "warning"})


def with_tokenizer(checkpoint: str, folder: Path, change: Callable[[dict[str, Any]], None]) -> str:
    """Copy the checkpoint, with another tokenizer.json."""
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


def prepend_start(tokenizer: dict[str, Any]) -> None:
    """Prepend a start token, as many servers do for models that need one."""
    end = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    tokenizer["post_processor"]["single"].insert(0, end)
    start = next(t for t in tokenizer["added_tokens"] if t["content"] == "<|im_start|>")
    special = {"id": "<|im_start|>", "ids": [start["id"]], "tokens": ["<|im_start|>"]}
    tokenizer["post_processor"]["special_tokens"]["<|im_start|>"] = special


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (flatten_newlines, "newlines become spaces"),
        (strip_and_lower, "trailing whitespace is stripped; case is folded"),
    ],
)
def test_unaltered_tokenizer_that_normalizes_fails(
    change: Callable[[dict[str, Any]], None], said: str, checkpoint: str, tmp_path: Path
) -> None:
    report = examine_in_process(with_tokenizer(checkpoint, tmp_path, change))
    assert named(report, "failure") == {"unaltered"}, report
    assert said in finding(report, "unaltered").message


def test_end_token_start_token_fails(checkpoint: str, tmp_path: Path) -> None:
    report = examine_in_process(with_tokenizer(checkpoint, tmp_path, prepend_start))
    assert {"end token", "token ids"} <= named(report, "failure"), report


@pytest.mark.parametrize("change", [append_nothing, append_another])
def test_reachable_engine_that_cannot_start_fails(
    change: Callable[[dict[str, Any]], None], checkpoint: str, tmp_path: Path
) -> None:
    report = examine_in_process(with_tokenizer(checkpoint, tmp_path, change))
    assert not report.ok
    assert report.served is None
    assert "<|endoftext|>" in finding(report, "reachable").message


@pytest.mark.parametrize("change", [append_nothing, append_another])
def test_end_token_missing_or_other_fails(
    change: Callable[[dict[str, Any]], None], checkpoint: str, tmp_path: Path
) -> None:
    """The end token is identified from vectors alone, on any engine."""
    own = {"device": "cpu"}  # not the session's engine, because this test modifies it
    with Embedder(checkpoint, engine="reference", dtype="float32", engine_kwargs=own) as right:
        engine = right._lease.engine
        right.start()
        wrong = with_tokenizer(checkpoint, tmp_path, change)
        from sentence_transformers import SentenceTransformer

        engine._encoder = SentenceTransformer(wrong)  # type: ignore[attr-defined]
        report = right.doctor()
    assert {"end token", "token ids"} <= named(report, "failure"), report


def test_finite_nan_weights_fails(checkpoint: str, tmp_path: Path) -> None:
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


# Single checks on the reference engine, with altered texts or rows.


DEMO = Path(__file__).parents[1] / "models/demo/qwen3_embeddings_demo_model/checkpoint"


class Altering(ReferenceEngine):
    """The reference engine, with texts, token ids or rows altered."""

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


async def test_doctor_demo_model_reports_no_failure() -> None:
    """Trained weights, and a tokenizer that keeps case and whitespace."""
    async with Embedder(str(DEMO), dtype="float32", engine="reference") as demo:
        report = await demo.adoctor()
    assert report.ok, report
    assert finding(report, "pooling").status == "ok"
    assert finding(report, "unaltered").status == "ok"


async def test_unaltered_demo_model_with_folded_text_names_both_changes() -> None:
    """A server that strips and lowers texts, in front of trained weights."""
    engine = Altering(str(DEMO), text=lambda text: text.strip().lower())
    found = await texts.unaltered(await subject_of(engine))
    assert "trailing whitespace is stripped; case is folded" in found.message
    assert "left out" not in found.message
    assert "accents" not in found.message


async def test_pooling_mean_of_trained_weights_fails(tmp_path: Path) -> None:
    wrong = with_pooling(DEMO, tmp_path / "wrong", "mean_tokens")
    found = await pooling.pooling(await subject_of(ReferenceEngine(wrong, dtype="float32")))
    assert found.status == "failure"
    assert "the mean is pooled" in found.message


def random_weights(folder: Path, std: float, **shape: int) -> str:
    """Write a checkpoint whose matrices all have one standard deviation, as before training."""
    write_checkpoint(folder, **shape)
    weights = dict(load_file(folder / "model.safetensors"))
    for name, matrix in weights.items():
        if matrix.ndim == 2:
            weights[name] = matrix * np.float32(std / matrix.std())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def with_pooling(checkpoint: str | Path, folder: Path, mode: str) -> str:
    """Copy a checkpoint, with another pooling mode in sentence-transformers' file."""
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    file = folder / "1_Pooling" / "config.json"
    change = {"pooling_mode_lasttoken": False, f"pooling_mode_{mode}": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    return str(folder)


SHAPES = pytest.mark.parametrize(
    ("std", "dimensions", "layers"), [(0.02, 128, 2), (0.02, 256, 12), (0.05, 128, 28)]
)


@SHAPES
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_pooling_last_token_of_random_weights_is_ok(
    std: float, dimensions: int, layers: int, dtype: str, tmp_path: Path
) -> None:
    """Untrained weights move little with the last token; a fixed limit calls that a mean."""
    checkpoint = random_weights(tmp_path, std, dimensions=dimensions, layers=layers)
    subject = await subject_of(ReferenceEngine(checkpoint, dtype=dtype))
    found = await pooling.pooling(subject)
    assert found.status == "ok"
    assert found.measured is not None
    assert found.measured > 1.5 * pooling.LAST
    assert (await pooling.end_token(subject)).status == "ok"


@SHAPES
@pytest.mark.parametrize(
    ("mode", "said"),
    [("mean_tokens", "the mean is pooled"), ("cls_token", "the first token is pooled")],
)
async def test_pooling_wrong_mode_of_random_weights_fails(
    std: float, dimensions: int, layers: int, mode: str, said: str, tmp_path: Path
) -> None:
    right = random_weights(tmp_path / "right", std, dimensions=dimensions, layers=layers)
    wrong = with_pooling(right, tmp_path / "wrong", mode)
    for dtype in ("float32", "bfloat16"):
        subject = await subject_of(ReferenceEngine(wrong, dtype=dtype))
        try:
            found = await pooling.pooling(subject)
        except CannotTellError:
            # The rounding of bfloat16 differs between CPUs, and may hide the mean.
            assert (dtype, mode) == ("bfloat16", "mean_tokens")
            continue
        assert found.status == "failure"
        assert said in found.message
        assert found.measured is not None
        assert found.measured < 0.8 * pooling.MEAN


async def test_pooling_short_context_cannot_tell_the_mean(tmp_path: Path) -> None:
    """In a run of 255 tokens the mean is not claimed."""
    write_checkpoint(tmp_path / "right", context=512)
    wrong = with_pooling(tmp_path / "right", tmp_path / "wrong", "mean_tokens")
    with pytest.raises(CannotTellError, match="--reference"):
        await pooling.pooling(await subject_of(ReferenceEngine(wrong, dtype="float32")))


class PlainEndToken(ReferenceEngine):
    """The reference engine, reading the end token in a text as plain text."""

    async def tokenize(self, texts: list[str], urgent: bool = False) -> list[list[int]]:
        return await super().tokenize([text.replace("<|", "< |") for text in texts], urgent)

    async def embed(
        self,
        prompts: list[Prompt],
        dimensions: int | None,
        urgent: bool,
        usage: Usage | None = None,
    ) -> Vectors:
        plain: list[Prompt] = [
            prompt.replace("<|", "< |") if isinstance(prompt, str) else prompt for prompt in prompts
        ]
        return await super().embed(plain, dimensions, urgent)


async def test_end_token_read_as_plain_text_cannot_tell(checkpoint: str) -> None:
    """Such a server is right about every text without special tokens."""
    subject = await subject_of(PlainEndToken(checkpoint, dtype="float32"))
    with pytest.raises(CannotTellError, match="plain text"):
        await pooling.end_token(subject)
    assert (await texts.token_ids(subject)).status == "ok"


def jitter(rows: Vectors) -> Vectors:
    """Add noise of 1-cos 1e-2 at most, as replicas of two precisions have."""
    size = np.linalg.norm(rows, axis=1, keepdims=True) / rows.shape[1] ** 0.5
    noise = np.random.default_rng().standard_normal(rows.shape, dtype=np.float32)
    return rows + np.float32(0.1) * size * noise


async def test_rows_noise_of_another_precision_warns(checkpoint: str) -> None:
    subject = await subject_of(Altering(checkpoint, row=jitter))
    for check in (rows.repeatable, rows.batch, sizes.matryoshka, texts.token_ids):
        assert (await check(subject)).status == "warning"


@pytest.mark.parametrize("name", ["Qwen/Qwen3-Embedding-0.6B", "./qwen3-embedding-0.6b-Q8_0.gguf"])
async def test_published_own_or_quantized_name_is_compared(name: str, checkpoint: str) -> None:
    subject = await subject_of(ReferenceEngine(checkpoint, dtype="float32"))
    assert replace(subject, model=name).published == "0.6b"


async def test_published_name_of_a_fine_tune_is_not_compared(checkpoint: str) -> None:
    subject = await subject_of(ReferenceEngine(checkpoint, dtype="float32"))
    tuned = replace(subject, model="acme/qwen3-embedding-0.6b-legal")
    assert tuned.published is None
    with pytest.raises(CannotTellError, match="published"):
        await known.similarities(tuned)


@pytest.mark.parametrize("cut", [slice(512), slice(-512, None), slice(1700), slice(-1700, None)])
async def test_context_text_cut_inside_context_fails(cut: slice, checkpoint: str) -> None:
    found = await texts.context(await subject_of(Altering(checkpoint, cut=cut)))
    assert found.status == "failure"
    assert "a text of 2040 tokens is truncated without an error" in found.message


class Refusing(ReferenceEngine):
    """The reference engine, refusing prompts longer than 64 characters."""

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


async def test_context_text_refused_inside_context_warns(checkpoint: str) -> None:
    subject = await subject_of(Refusing(checkpoint, dtype="float32"))
    assert (await texts.context(subject)).status == "warning"
    untold = replace(subject, served=replace(subject.served, context=None))
    assert (await texts.context(untold)).status == "ok"


class TextsOnly(ReferenceEngine):
    """The reference engine, refusing token ids as infinity-emb does."""

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


async def test_pooling_token_ids_refused_cannot_tell(checkpoint: str) -> None:
    with pytest.raises(CannotTellError, match="needs a run of 255 token ids"):
        await pooling.pooling(await subject_of(TextsOnly(checkpoint, dtype="float32")))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (str.rstrip, "trailing whitespace"),
        (str.lstrip, "leading whitespace"),
        (lambda text: normalize("NFKC", text), "NFKC"),
        (lambda text: text.replace("é", "e"), "accents"),
        (lambda text: text.expandtabs(1), "tabs"),
        (lambda text: text.replace("a\n\n", "a\n"), "blank lines"),
        (lambda text: text.replace("🙂", ""), "emoji"),
    ],
)
async def test_unaltered_text_altered_fails(
    text: Callable[[str], str], said: str, checkpoint: str
) -> None:
    found = await texts.unaltered(await subject_of(Altering(checkpoint, text=text)))
    assert found.status == "failure"
    assert said in found.message
    assert ";" not in found.message  # and nothing else


@pytest.mark.parametrize("row", [np.sign, lambda rows: np.round(rows, 2)], ids=["signs", "rounded"])
async def test_precision_few_distinct_values_warns(
    row: Callable[[Vectors], Vectors], checkpoint: str
) -> None:
    found = await rows.precision(await subject_of(Altering(checkpoint, row=row)))
    assert found.status == "warning"


async def test_authentication_response_not_http_counts_as_no_answer() -> None:
    """Neither a response that is not HTTP nor a slow one stops the run."""

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
    assert not await engine.connection.answers_without_key(url + "/metrics", None)
    assert not await engine.connection.answers_without_key(url + "/trickle", None)
    await engine.close()
    await asyncio.gather(*handlers)
    listener.close()


# Servers with faults.


def examine(server: RunningServer, **arguments: Any) -> Report:
    with Embedder(base_url=server.base_url, api_key=server.api_key, **arguments) as remote:
        return remote.doctor()


def test_doctor_server_with_many_faults_names_each(wrong_server: RunningServer) -> None:
    report = examine(wrong_server, model="tiny")
    assert named(report, "failure") == {"end token", "token ids"}, report
    assert named(report, "warning") == {"unit length", "matryoshka", "authentication"}, report


def test_model_other_weights_under_published_name_fails(wrong_server: RunningServer) -> None:
    report = examine(wrong_server, model="Qwen/Qwen3-Embedding-0.6B")
    assert {"model", "similarities"} <= named(report, "failure"), report


def test_cli_doctor_returns_exit_code(
    server: RunningServer,
    wrong_server: RunningServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("QWEN3_EMBEDDINGS_API_KEY", server.api_key)
    assert main(["doctor", "--base-url", server.base_url, "--dimensions", "64"]) == 0
    table = capsys.readouterr().out
    assert "size 32 and 64: truncated by the engine" in table
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
def test_cli_doctor_wrong_usage_exits_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["doctor", *arguments])
    assert stop.value.code == 2
    assert "usage: qwen3-embeddings" in capsys.readouterr().err


def test_reachable_no_server_or_wrong_key_fails(server: RunningServer) -> None:
    nobody = RunningServer(f"http://127.0.0.1:{free_port()}/v1", "", "")
    for report in (
        examine(nobody, max_retries=0),
        examine(RunningServer(server.base_url, "wrong", "")),
    ):
        assert [found.check for found in report.findings] == ["reachable"]
        assert not report.ok
        assert report.findings[0].remedy


# Gateways between a client and real servers.


Alter = Callable[[dict[str, Any], bytes], bytes]


@contextmanager
def gateway(
    *servers: RunningServer, ask: dict[str, Any] | None = None, alter: Alter | None = None
) -> Iterator[RunningServer]:
    """A gateway that alternates between servers, adds to requests and alters responses."""
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
    Thread(target=listener.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield RunningServer(f"http://127.0.0.1:{listener.server_port}/v1", "", "tiny")
    finally:
        listener.shutdown()
        listener.server_close()


def test_repeatable_replicas_that_differ_fails(
    server: RunningServer, wrong_server: RunningServer
) -> None:
    with gateway(server, wrong_server) as between:
        report = examine(between, model="tiny")
    assert "repeatable" in named(report, "failure"), report


def test_context_gateway_that_truncates_fails(server: RunningServer) -> None:
    with gateway(server, ask={"truncate_prompt_tokens": 64}) as between:
        report = examine(between)
    assert named(report, "failure") == {"context"}, report


def reverse_rows(asked: dict[str, Any], body: bytes) -> bytes:
    if asked.get("encoding_format") != "bytes_only" or isinstance(asked["input"], str):
        return body
    return np.frombuffer(body, "<f4").reshape(len(asked["input"]), -1)[::-1].tobytes()


def swap_bytes(asked: dict[str, Any], body: bytes) -> bytes:
    if asked.get("encoding_format") != "bytes_only":
        return body
    return np.frombuffer(body, "<f4").astype(">f4").tobytes()


@pytest.mark.parametrize(
    ("alter", "failing"), [(reverse_rows, "batch"), (swap_bytes, "wire formats")]
)
def test_doctor_gateway_that_alters_rows_fails(
    server: RunningServer, alter: Alter, failing: str
) -> None:
    with gateway(server, alter=alter) as between:
        report = examine(between)
    assert failing in named(report, "failure"), report


def round_values(asked: dict[str, Any], body: bytes) -> bytes:
    """Round to the 16 bits of bfloat16, as servers do that send embed_dtype bfloat16."""
    if asked.get("encoding_format") != "bytes_only":
        return body
    bits = np.frombuffer(body, "<u4") + np.uint32(0x8000)
    return (bits & np.uint32(0xFFFF0000)).tobytes()


def test_wire_formats_rounded_values_are_ok(server: RunningServer) -> None:
    with gateway(server, alter=round_values) as between:
        assert finding(examine(between), "wire formats").status == "ok"


def test_authentication_gateway_without_key_warns(server: RunningServer) -> None:
    with gateway(server) as between:
        assert "loopback" in finding(examine(between), "authentication").message
        keyed = RunningServer(between.base_url, "a-key", "tiny")
        assert "/v1/embeddings" in finding(examine(keyed), "authentication").message


# The report.


def test_published_every_model_has_similarities() -> None:
    for size, matrix in known.PUBLISHED.items():
        assert np.shape(matrix) == (2, 2)
        assert MODELS[f"Qwen/Qwen3-Embedding-{size.upper()}"]


def test_report_to_text_fits_the_width() -> None:
    found = Finding("pooling", "failure", "the mean is pooled", "ranking is poor", "--pooling last")
    report = Report("http://localhost/v1", None, (found, Finding("batch", "ok", "equal " * 40)))
    text = report.to_text(80)
    assert max(map(len, text.splitlines())) <= 80
    assert "remedy: --pooling last" in text
    assert "WRONG: 1 ok, 1 failure" in text
    assert json.loads(json.dumps(report.to_dict()))["findings"][0]["effect"] == "ranking is poor"
