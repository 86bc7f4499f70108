"""The engines of this process: concurrency, cancellation, death, closing, priorities."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest

from qwen3_embeddings import (
    MODELS,
    ConfigurationError,
    Embedder,
    EngineClosedError,
    EngineDeadError,
    EngineStartError,
    TextTooLongError,
    UnknownModelError,
    event_loop,
)
from qwen3_embeddings.engines import scheduling
from qwen3_embeddings.engines.base import Usage
from qwen3_embeddings.engines.stepping import SteppingEngine
from qwen3_embeddings.engines.torch import lifecycle as torch_lifecycle
from qwen3_embeddings.engines.vllm import lifecycle as vllm_lifecycle
from qwen3_embeddings.engines.vllm.defaults import Device, engine_arguments
from qwen3_embeddings.tokenizer import load_tokenizer
from qwen3_embeddings.vectors import Vectors

if TYPE_CHECKING:
    from tests.conftest import RunScript


Kind = Literal["vllm", "torch"]
BACKENDS: dict[str, Any] = {"vllm": vllm_lifecycle, "torch": torch_lifecycle}


@pytest.fixture(params=BACKENDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    """The engines of this process."""
    name: Kind = request.param
    return name


def engine_of(embedder: Embedder) -> SteppingEngine:
    engine = embedder._lease.engine
    assert isinstance(engine, SteppingEngine)
    return engine


def thread_of(embedder: Embedder) -> Any:
    """The engine's thread, once it has started."""
    return engine_of(embedder)._thread


@contextlib.contextmanager
def overlapping_steps() -> Iterator[None]:
    """Engines started in the block have two steps in progress, as on a GPU.

    On a CPU vLLM turns that off, whatever is asked for, and PyTorch's computes one after the other.
    """
    from vllm.platforms.cpu import CpuPlatform

    from qwen3_embeddings.engines.torch import core as torch_core

    settle = CpuPlatform.check_and_update_config.__func__

    def overlap(cls: type, config: Any) -> None:
        settle(cls, config)
        config.scheduler_config.async_scheduling = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuPlatform, "check_and_update_config", classmethod(overlap))
        patch.setitem(torch_core.STEPS, "cpu", 2)
        yield


@pytest.fixture(
    scope="module",
    params=[("vllm", 1), ("vllm", 2), ("torch", 1), ("torch", 2)],
    ids=["vLLM", "vLLM, overlapping steps", "PyTorch", "PyTorch, overlapping steps"],
)
def either(request: pytest.FixtureRequest, checkpoint: str) -> Iterator[Embedder]:
    """Embedders of each engine, with one step in progress and with two."""
    kind, steps = request.param
    if steps == 1:
        yield request.getfixturevalue("embedder" if kind == "vllm" else "torch_embedder")
        return
    few = {"max_num_seqs": 256}
    with Embedder(checkpoint, dtype="float32", engine=kind, engine_kwargs=few) as overlapping:
        with overlapping_steps():
            overlapping.start()
        assert thread_of(overlapping)._schedule.limits.steps == 2
        yield overlapping


def test_encode_in_32_threads_returns_the_same_vectors(either: Embedder) -> None:
    """`vllm.LLM` hangs, or aborts the interpreter, when two threads call it."""
    expected = either.encode_document([f"thread {i}" for i in range(32)])
    barrier = threading.Barrier(32)

    def work(i: int) -> np.ndarray:
        barrier.wait()
        return np.concatenate([either.encode_document([f"thread {i}"]) for _ in range(5)])

    with ThreadPoolExecutor(32) as pool:
        for i, rows in enumerate(pool.map(work, range(32))):
            np.testing.assert_allclose(rows, np.tile(expected[i], (5, 1)), atol=2e-6)


def test_encode_in_200_coroutines_of_five_loops_returns_the_same_vectors(either: Embedder) -> None:
    expected = either.encode_query([f"coroutine {i}" for i in range(200)])

    async def burst() -> np.ndarray:
        calls = (either.aencode_query([f"coroutine {i}"]) for i in range(200))
        return np.concatenate(await asyncio.gather(*calls))

    for _ in range(5):
        np.testing.assert_allclose(asyncio.run(burst()), expected, atol=2e-6)


def test_encode_in_threads_and_coroutines_returns_the_same_vectors(either: Embedder) -> None:
    texts = [f"both {i}" for i in range(232)]
    queries, documents = either.encode_query(texts), either.encode_document(texts)

    async def burst() -> list[np.ndarray]:
        calls = (either.aencode_query([text]) for text in texts[:200])
        return await asyncio.gather(*calls)

    with ThreadPoolExecutor(33) as pool:
        coroutines = pool.submit(asyncio.run, burst())
        threads = list(pool.map(lambda text: either.encode_document([text])[0], texts[200:]))
        np.testing.assert_allclose(np.concatenate(coroutines.result()), queries[:200], atol=2e-6)
    np.testing.assert_allclose(threads, documents[200:], atol=2e-6)


def test_embedders_with_equal_arguments_share_an_engine(
    checkpoint: str, embedder: Embedder
) -> None:
    assert engine_of(Embedder(checkpoint, dtype="float32", dimensions=64)) is engine_of(embedder)
    assert engine_of(embedder.with_task("similarity")) is engine_of(embedder)


def test_encode_after_ctrl_c_returns_the_new_texts_vectors(
    kind: Kind, checkpoint: str, run_script: RunScript
) -> None:
    """After Ctrl-C in `LLM.embed` the next call returned the vectors of the old texts."""
    done = run_script(
        """
        import os, signal, sys, threading
        import numpy as np
        from qwen3_embeddings import Embedder
        embedder = Embedder(sys.argv[1], dtype="float32", engine=sys.argv[2])
        expected = embedder.encode_document(["one", "two"])
        for wait in (0.05, 0.2, 0.5):
            threading.Timer(wait, os.kill, (os.getpid(), signal.SIGINT)).start()
            try:
                embedder.encode_document([f"interrupted {i} " * 100 for i in range(2000)])
                raise SystemExit("the call was not interrupted")
            except KeyboardInterrupt:
                pass
            again = embedder.encode_document(["one", "two"])
            assert again.shape == (2, 128), again.shape
            assert np.abs(again - expected).max() < 2e-6, "old vectors"
            assert not embedder._lease.engine._thread._jobs, "old texts are still in the engine"
        print("clean")
        """,
        checkpoint,
        kind,
    )
    assert (done.stdout.strip(), done.returncode) == ("clean", 0), done.stderr


async def test_cancelled_task_drops_its_texts(either: Embedder) -> None:
    expected = await either.aencode_document(["after"])
    task = asyncio.create_task(either.aencode_document([f"{i} " * 200 for i in range(3000)]))
    await asyncio.sleep(0.3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    np.testing.assert_allclose(await either.aencode_document(["after"]), expected, atol=2e-6)
    assert not thread_of(either)._jobs, "cancelled texts are still in the engine"


def test_killed_process_leaves_no_process_behind(
    kind: Kind, checkpoint: str, run_script: RunScript
) -> None:
    """A killed parent left `VLLM::EngineCore` alive, which held its memory."""
    done = run_script(
        """
        import os, signal, sys, threading
        from qwen3_embeddings import Embedder
        embedder = Embedder(sys.argv[1], dtype="float32", engine=sys.argv[2])
        embedder.encode_document(["hello"])
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
        while True:
            embedder.encode_document(["hello " * 100] * 100)
        """,
        checkpoint,
        kind,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.left == []


def test_dimensions_as_whole_float_is_accepted(checkpoint: str, embedder: Embedder) -> None:
    """`PoolingParams(dimensions=64.0)` hangs the engine."""
    sized = Embedder(checkpoint, dtype="float32", dimensions=64.0)  # type: ignore[arg-type]
    assert sized.encode_document(["hello"]).shape == (1, 64)


def test_encode_after_a_text_that_is_too_long_returns_right_vectors(either: Embedder) -> None:
    expected = either.encode_document(["fine"])
    with pytest.raises(TextTooLongError) as caught:
        either.encode_document(["fine", "long " * 3000, "fine"])
    assert caught.value.positions == (1,)
    assert "overflow='truncate'" in str(caught.value)
    np.testing.assert_allclose(either.encode_document(["fine"]), expected, atol=2e-6)


def test_longest_input_in_one_step_and_in_several_is_embedded(
    kind: Kind, checkpoint: str, embedder: Embedder
) -> None:
    """In one step and in several, where vLLM before 0.32 itself hangs (vllm#48039)."""
    longest = "1" * 2047  # a digit is a token, and the end token is one
    expected = embedder.encode_document([longest, "short"])
    steps = {"max_num_batched_tokens": 512, "max_num_seqs": 16}
    with Embedder(checkpoint, dtype="float32", engine=kind, engine_kwargs=steps) as small:
        np.testing.assert_allclose(small.encode_document([longest, "short"]), expected, atol=2e-6)


def test_dead_engine_raises_with_the_computed_vectors_and_is_replaced(
    kind: Kind, checkpoint: str
) -> None:
    settings: dict[str, Any] = {"batch_size": 4, "engine_kwargs": {"max_num_seqs": 128}}
    embedder = Embedder(checkpoint, dtype="float32", engine=kind, **settings)
    texts = [f"text {i}" for i in range(200)]
    expected = embedder.encode_document(texts)
    thread = engine_of(embedder)._thread
    assert thread is not None
    collect, collected = thread._collect, 0

    def die(names: list[str], rows: Vectors) -> None:
        nonlocal collected
        collected += len(names)
        if collected > 60:
            raise MemoryError("as if the device were out of memory")
        collect(names, rows)

    thread._collect = die  # type: ignore[method-assign]
    expected_error = r"MemoryError.*Lower max_num_batched_tokens.* of 200 texts"
    with pytest.raises(EngineDeadError, match=expected_error) as caught:
        embedder.encode_document(texts)
    done = caught.value.computed
    assert done is not None
    assert 0 < len(done.positions) <= 60
    np.testing.assert_allclose(done.vectors, expected[done.positions], atol=2e-6)
    np.testing.assert_allclose(embedder.encode_document(texts), expected, atol=2e-6)
    embedder.close()


def test_dead_engine_answers_every_caller_and_frees_its_memory(
    kind: Kind, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"max_num_seqs": 96}
    embedder = Embedder(checkpoint, dtype="float32", engine=kind, engine_kwargs=few)
    built: list[weakref.ref[object]] = []
    build = BACKENDS[kind].start

    def remember(*settings: Any) -> Any:
        result = build(*settings)
        built.append(weakref.ref(result[0]))
        return result

    def no_memory(*_: object) -> None:
        deadline = time.monotonic() + 60  # a caller who comes later starts another engine
        while len(thread._jobs) + thread._inbox.qsize() < 4 and time.monotonic() < deadline:
            time.sleep(0.001)
        raise MemoryError("while a row is copied out")

    monkeypatch.setattr(BACKENDS[kind], "start", remember)
    embedder.start()
    thread = thread_of(embedder)
    with monkeypatch.context() as broken:
        broken.setattr(thread, "_collect", no_memory)
        with ThreadPoolExecutor(4) as pool:
            calls = [pool.submit(embedder.encode_document, [f"{i}"]) for i in range(4)]
            for call in calls:
                with pytest.raises(EngineDeadError, match="copied out"):
                    call.result(timeout=60)
    thread.join(60)  # callers are answered before the memory is freed
    gc.collect()
    assert built[0]() is None, "the dead engine still holds its memory"
    assert embedder.encode_document(["again"]).shape == (1, 128)
    embedder.close()


def test_close_during_a_start_fails_waiting_calls(
    kind: Kind, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed, start = threading.Event(), BACKENDS[kind].start

    def begin(*settings: Any) -> Any:
        if kind == "torch":  # its start is over too soon
            assert closed.wait(60)
        return start(*settings)

    monkeypatch.setattr(BACKENDS[kind], "start", begin)
    few = {"max_num_seqs": 48}
    embedder = Embedder(checkpoint, dtype="float32", engine=kind, engine_kwargs=few)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(embedder.encode_document, ["early"])
        while engine_of(embedder)._thread is None:
            time.sleep(0.01)
        thread = engine_of(embedder)._thread
        embedder.close()
        closed.set()
        with pytest.raises(EngineClosedError):
            call.result(timeout=60)
    assert thread is not None
    thread.join(timeout=120)
    assert not thread.is_alive(), "the engine nobody wants is still there"


def test_close_during_a_call_fails_it_and_ends_the_thread(kind: Kind, checkpoint: str) -> None:
    few = {"max_num_seqs": 64}
    embedder = Embedder(checkpoint, dtype="float32", engine=kind, engine_kwargs=few)
    embedder.start()
    thread = engine_of(embedder)._thread
    assert thread is not None
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(embedder.encode_document, ["slow " * 300] * 2000)
        time.sleep(1)
        embedder.close()
        with pytest.raises(EngineClosedError):
            call.result(timeout=30)
    thread.join(timeout=30)
    assert not thread.is_alive()
    with pytest.raises(EngineClosedError, match="closed"):
        embedder.encode_document(["late"])
    embedder.close()


def test_exit_without_close_prints_nothing(
    kind: Kind, checkpoint: str, run_script: RunScript
) -> None:
    done = run_script(
        """
        import sys
        from qwen3_embeddings import Embedder
        embedder = Embedder(sys.argv[1], dtype="float32", engine=sys.argv[2])
        print(embedder.encode_document(["hello"]).shape)
        """,
        checkpoint,
        kind,
    )
    assert (done.stdout, done.returncode) == ("(1, 128)\n", 0), done.stderr
    assert "Traceback" not in done.stderr
    assert "leaked" not in done.stderr


def test_start_keeps_the_random_states_of_the_process(kind: Kind, checkpoint: str) -> None:
    """vLLM seeds Python, NumPy and torch when it starts in a process."""
    np.random.seed(7)
    expected = np.random.random()
    np.random.seed(7)
    few = {"max_num_seqs": 32}
    with Embedder(checkpoint, dtype="float32", engine=kind, engine_kwargs=few) as embedder:
        embedder.start()
        assert np.random.random() == expected


def test_start_in_a_process_that_imported_flask_succeeds(
    checkpoint: str, run_script: RunScript
) -> None:
    """Flask's `request` raises RuntimeError for any attribute outside of a request."""
    done = run_script(
        """
        import sys
        import flask
        from qwen3_embeddings import Embedder
        print(Embedder(sys.argv[1], dtype="float32").encode_document(["hello"]).shape)
        """,
        checkpoint,
    )
    assert (done.stdout, done.returncode) == ("(1, 128)\n", 0), done.stderr


def test_start_that_fails_says_why(checkpoint: str, tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match=r"there is no folder .*/nothing"):
        Embedder(str(tmp_path / "nothing")).start()
    with pytest.raises(ConfigurationError, match="EngineArgs"):
        Embedder(checkpoint, engine_kwargs={"no_such_argument": 1}).start()
    with pytest.raises(EngineStartError, match="max_model_len"):
        Embedder(checkpoint, engine_kwargs={"max_model_len": 10**6}).start()


def test_tokenizer_without_the_end_token_is_refused(
    kind: Kind, checkpoint: str, tmp_path: Path
) -> None:
    import json
    import shutil

    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    tokenizer = json.loads((broken / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None
    (broken / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UnknownModelError, match="does not append"):
        Embedder(str(broken), engine=kind).start()


def test_engine_arguments_for_a_gpu_claim_only_the_memory_needed() -> None:
    card = Device("gpu", 80 << 30)
    small, large = (MODELS[f"Qwen/Qwen3-Embedding-{size}"] for size in ("0.6B", "8B"))
    arguments = engine_arguments(small, "auto", card)
    assert arguments["dtype"] == "bfloat16"
    assert arguments["gpu_memory_utilization"] < 0.3
    assert 0.3 < engine_arguments(large, "auto", card)["gpu_memory_utilization"] < 0.7
    older = Device("gpu", 16 << 30, bfloat16=False)
    assert engine_arguments(small, "auto", older)["dtype"] == "float32", "vLLM picks float16"


@pytest.mark.parametrize("gibibytes", [8, 16, 24, 40, 80, 141])
def test_cache_holds_two_steps_and_the_longest_input(gibibytes: int) -> None:
    model = MODELS["Qwen/Qwen3-Embedding-0.6B"]
    arguments = engine_arguments(model, "bfloat16", Device("gpu", gibibytes << 30))
    tokens = arguments["kv_cache_memory_bytes"] // model.kv_bytes_per_token
    assert tokens >= 2 * arguments["max_num_batched_tokens"] + 8 * arguments["max_num_seqs"]
    assert tokens > model.context
    assert arguments["gpu_memory_utilization"] <= 0.92


@pytest.mark.parametrize("in_progress", [1, 2])
@pytest.mark.parametrize("step_texts", [16, 1])
def test_queries_during_documents_are_answered_first(
    kind: Kind, checkpoint: str, in_progress: int, step_texts: int
) -> None:
    """Steps are small, so that a call spans many; two are in progress when steps overlap."""
    steps = {"max_num_batched_tokens": 128, "max_num_seqs": step_texts}
    with Embedder(checkpoint, dtype="float32", engine=kind, engine_kwargs=steps) as embedder:
        with overlapping_steps() if in_progress == 2 else contextlib.nullcontext():
            embedder.start()
        assert thread_of(embedder)._schedule.limits.steps == in_progress
        texts = [f"text {i} " + "word " * (i * 7 % 30) for i in range(100)]
        texts.append("longer than a step " * 40)
        expected = embedder.encode_document(texts[::-1])[::-1]
        done: list[str] = []
        with ThreadPoolExecutor(2) as pool:
            documents = pool.submit(embedder.encode_document, texts * 4)
            documents.add_done_callback(lambda _: done.append("documents"))
            for _ in range(3):
                embedder.encode_query(["passes"])
            done.append("queries")
            np.testing.assert_allclose(documents.result()[-101:], expected, atol=2e-6)
        assert done[0] == "queries"


def test_query_during_documents_longer_than_a_step_is_answered_first(
    kind: Kind, checkpoint: str
) -> None:
    """The core holds no more than a step: behind more of them a query would wait for all."""
    steps = {"max_num_batched_tokens": 64, "max_num_seqs": 16}
    with Embedder(checkpoint, dtype="float32", engine=kind, engine_kwargs=steps) as embedder:
        embedder.start()
        thread = thread_of(embedder)
        held: list[int] = []
        fill = thread._fill

        def watched(core: object) -> None:
            fill(core)
            held.append(len(thread._owners))

        thread._fill = watched  # type: ignore[method-assign]
        texts = ["word " * 150 + str(i) for i in range(20)]
        with ThreadPoolExecutor(1) as pool:
            documents = pool.submit(embedder.encode_document, texts)
            while not held and not documents.done():
                time.sleep(0.01)
            assert embedder.encode_query(["passes"]).shape == (1, 128)
            assert not documents.done()
            assert documents.result().shape == (20, 128)
        assert max(held) <= 2, "a document, and perhaps the query on top of it"
        assert not any(thread._schedule.held.values())


def test_documents_soon_after_a_query_go_in_small_overlapping_steps(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The core would merge two small steps given at once, and none would overlap it.

    Small are the steps of documents: queries go first, as many as a whole step holds.
    """
    monkeypatch.setattr(scheduling, "MIXED_TOKENS", 128)
    monkeypatch.setattr(scheduling, "MIXED_SECONDS", 600)
    steps = {"max_num_batched_tokens": 2048, "max_num_seqs": 256}
    given: dict[bool, list[int]] = {True: [], False: []}  # tokens for the next step, by urgency

    def watched(core: Any) -> None:
        fill(core)
        fresh = {True: 0, False: 0}
        for name, request in core._client.engine_core.scheduler.requests.items():
            if not request.num_computed_tokens:
                fresh[thread._owners[name][0].urgent] += request.num_tokens
        for urgent, tokens in fresh.items():
            given[urgent].append(tokens)

    with (
        Embedder(checkpoint, dtype="float32", engine_kwargs=steps) as embedder,
        ThreadPoolExecutor(1) as pool,
    ):
        with overlapping_steps():
            embedder.start()
        thread = thread_of(embedder)
        fill, thread._fill = thread._fill, watched
        embedder.encode_query(["the first query makes the steps small"])
        documents = pool.submit(embedder.encode_document, ["word " * 6] * 1200)
        for count in [1] * 20 + [60]:
            embedder.encode_query([f"query {i}" for i in range(count)])
        assert not documents.done()
        while not documents.done():
            embedder.encode_query(["another query"])
        assert documents.result().shape == (1200, 128)
    assert max(given[False]) <= 128
    assert max(given[True]) > 1000, "60 queries of some 20 tokens"
    full = [tokens for tokens in given[False] if tokens > 64]
    assert len(full) > 200, "30,000 tokens"
    assert given[False].count(0) < len(full) / 4, "steps that overlap no step of documents"


@pytest.mark.parametrize("texts", [1, 2, 16], ids=["one text", "two texts", "few tokens"])
def test_documents_during_endless_queries_are_answered(
    kind: Kind, checkpoint: str, texts: int
) -> None:
    """More queries wait than a step holds, and go first; documents get on nevertheless."""
    steps = {"max_num_batched_tokens": 64, "max_num_seqs": texts}
    over = threading.Event()

    def ask(number: int) -> int:
        for count in itertools.count():
            if over.is_set():
                return count
            embedder.encode_query([f"query {number} " + "word " * 10])

    with (
        Embedder(checkpoint, dtype="float32", engine=kind, engine_kwargs=steps) as embedder,
        ThreadPoolExecutor(9) as pool,
    ):
        queries = [pool.submit(ask, number) for number in range(8)]
        documents = pool.submit(embedder.encode_document, ["word " * 20] * 10)
        try:
            assert documents.result(timeout=120).shape == (10, 128)
        finally:
            over.set()
        assert min(future.result() for future in queries) > 0


def test_constructor_starts_nothing(checkpoint: str) -> None:
    embedder = Embedder(checkpoint, dtype="float32", engine_kwargs={"max_num_seqs": 16})
    assert engine_of(embedder)._thread is None
    assert os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") is None


@pytest.mark.parametrize("name", ["embedder", "torch_embedder", "reference"])
def test_embed_with_usage_counts_texts_and_tokens_exactly(
    name: str, texts: list[str], checkpoint: str, request: pytest.FixtureRequest
) -> None:
    engine = request.getfixturevalue(name)._lease.engine
    encoded = load_tokenizer(checkpoint).encode_batch(texts)
    usage = Usage(texts=1, tokens=10)
    ids = [1, 2, 3]  # token ids count as they are
    event_loop.run(engine.embed([*texts, ids], None, False, usage))
    tokens = sum(len(encoding.ids) for encoding in encoded)
    assert usage == Usage(texts=len(texts) + 2, tokens=tokens + 13, uncounted=0)
    with pytest.raises(TextTooLongError):
        event_loop.run(engine.embed(["long " * 3000], None, False, usage))
    assert usage.texts == len(texts) + 2, "what was not embedded is not counted"
