"""Faults of a process in production: no memory, dead workers, Ctrl-C, exits, long runs.

Scripts run in an interpreter of their own, because the faults would end this one. Two environment
variables make the random tests longer: QWEN3_SOAK_CALLS (2,000 calls) and QWEN3_SOAK_SIGNALS (20
interrupted calls).
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import signal
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pytest

from qwen3_embeddings import Embedder, EngineStartError
from qwen3_embeddings.engines.vllm import oom

if TYPE_CHECKING:
    from tests.conftest import Ended, RunScript

CALLS = int(os.environ.get("QWEN3_SOAK_CALLS", "2000"))
SIGNALS = int(os.environ.get("QWEN3_SOAK_SIGNALS", "20"))


@pytest.fixture(scope="module")
def ended(
    checkpoint: str,
    embedder: Embedder,
    run_script: RunScript,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Ended]:
    """How the scripts below ended. Two run at a time: all at once would overload two cores."""
    expected = tmp_path_factory.mktemp("workers") / "expected.npy"
    np.save(expected, embedder.encode_document(["one", "two"]))
    scripts = {"workers": WORKERS, "scarce": SCARCE, "fork": FORK}  # the longest first
    for name, script in EXITS.items():
        indented = textwrap.indent(textwrap.dedent(script).strip(), "    ").strip()
        scripts[name] = LEAVING.format(work=indented)

    def run(script: str) -> Ended:
        one_core = {"VLLM_CPU_OMP_THREADS_BIND": "0|0"} if script is WORKERS else {}
        return run_script(script, checkpoint, str(expected), **one_core)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(scripts, pool.map(run, scripts.values()), strict=True))


# Memory.


@pytest.mark.parametrize(
    ("engine_kwargs", "said"),
    [
        ({"kv_cache_memory_bytes": 10**15}, ["Lower kv_cache_memory_bytes", "931322.57"]),
        ({"kv_cache_memory_bytes": 1000}, ["lower max_model_len", "kv_cache_memory_bytes=1000"]),
        (
            {"kv_cache_memory_bytes": None, "gpu_memory_utilization": 1.0},
            ["Lower gpu_memory_utilization", "gpu_memory_utilization=1.0"],
        ),
    ],
)
def test_start_without_memory_names_sizes_and_settings(
    checkpoint: str, engine_kwargs: dict[str, float], said: list[str]
) -> None:
    embedder = Embedder(checkpoint, dtype="float32", engine_kwargs=engine_kwargs)
    with pytest.raises(EngineStartError, match="could not start") as caught:
        embedder.start()
    for part in (*said, "max_model_len=2048", "GiB are free"):
        assert part in str(caught.value)
    embedder.close()


SCARCE = """
    import resource, sys
    import torch, vllm
    from vllm.v1.engine.llm_engine import LLMEngine
    from qwen3_embeddings import Embedder, EngineStartError
    Embedder(sys.argv[1], dtype="float32").start()  # all is loaded
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + 2**30, -1))
    try:
        kwargs = {"kv_cache_memory_bytes": 3 * 2**30}
        Embedder(sys.argv[1], dtype="float32", engine_kwargs=kwargs).start()
    except EngineStartError as error:
        print(error)
    print(Embedder(sys.argv[1], dtype="float32").encode_document(["still there"]).shape)
"""


def test_start_with_a_refused_allocation_names_sizes_and_settings(ended: dict[str, Ended]) -> None:
    """The operating system refuses memory; another engine of the process keeps working."""
    done = ended["scarce"]
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Lower max_num_batched_tokens" in done.stdout
    assert "kv_cache_memory_bytes=3221225472" in done.stdout
    assert done.stdout.endswith("(1, 128)\n")


@pytest.mark.engine
@pytest.mark.parametrize(
    ("said", "advice"),
    [  # wordings of vLLM 0.25.1 and 0.32.0, and of PyTorch, on a GPU
        (
            "ValueError: Free memory on device cuda:0 (3.25/23.43 GiB) on startup is less than "
            "desired GPU memory utilization (0.96, 22.49 GiB). Decrease GPU memory utilization "
            "or reduce GPU memory used by other processes.",
            "Lower gpu_memory_utilization",
        ),
        (
            "ValueError: No available memory for the cache blocks. Try increasing "
            "`gpu_memory_utilization` when initializing the engine",
            "raise kv_cache_memory_bytes",
        ),
        (
            "ValueError: To serve at least one request with the model's max seq len (32768), "
            "(3.50 GiB KV cache is needed, which is larger than the available KV cache memory "
            "(1.00 GiB).",
            "lower max_model_len",
        ),
        (
            "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total "
            "capacity of 79.11 GiB of which 1.50 GiB is free.",
            "max_num_batched_tokens",
        ),
    ],
)
def test_advice_for_each_message_of_a_gpu_names_the_setting(said: str, advice: str) -> None:
    asked = {"max_model_len": 32768, "gpu_memory_utilization": 0.96}
    given = oom.advice(said, lambda: asked)
    assert given is not None
    assert advice in given
    assert "max_model_len=32768, " not in given.split("Asked for")[0]
    assert "Asked for: gpu_memory_utilization=0.96, max_model_len=32768; " in given
    assert oom.advice("ValueError: bad config", lambda: asked) is None


# Death.

WORKERS = """
    import os, signal, sys, threading
    import numpy as np
    from qwen3_embeddings import Embedder, EngineDeadError
    expected = np.load(sys.argv[2])
    embedder = Embedder(sys.argv[1], dtype="float32", engine_kwargs={"tensor_parallel_size": 2})
    close = lambda rows: np.abs(rows - expected).max() < 1e-5
    assert close(embedder.encode_document(["one", "two"]))
    def workers():
        found = []
        for entry in os.listdir("/proc"):
            try:
                stat = open(f"/proc/{entry}/stat").read()
                name = open(f"/proc/{entry}/cmdline").read()
            except OSError:
                continue
            if stat.rsplit(")", 1)[1].split()[1] == str(os.getpid()) and "Worker" in name:
                found.append(int(entry))
        return found
    first = workers()
    assert len(first) == 2, first
    threading.Timer(0.3, os.kill, (first[-1], signal.SIGKILL)).start()
    try:
        embedder.encode_document(["long " * 300] * 3000)
        raise SystemExit("the death went unnoticed")
    except EngineDeadError as error:
        print("died:", error)
    assert close(embedder.encode_document(["one", "two"]))
    assert len(set(workers()) - set(first)) == 2
    embedder.close()
    assert not set(workers()), "workers outlive their engine"
    print("revived")
"""


def test_killed_worker_process_raises_and_is_replaced(ended: dict[str, Ended]) -> None:
    """An engine with processes of its own (tensor parallelism), one of which is killed."""
    done = ended["workers"]
    assert done.returncode == 0, done.stderr[-3000:]
    assert "died: the vLLM engine died" in done.stdout
    assert done.stdout.endswith("revived\n")


# Forks.

FORK = """
    import os, sys
    import numpy as np
    from qwen3_embeddings import Embedder
    embedder = Embedder(sys.argv[1], dtype="float32")
    expected = embedder.encode_document(["one", "two"])
    pid = os.fork()
    rows = embedder.encode_document(["one", "two"])
    assert np.abs(rows - expected).max() < 2e-6, "wrong vectors"
    if pid == 0:
        embedder.close()
        print("child", flush=True)
        sys.exit()
    assert os.waitpid(pid, 0)[1] == 0
    print("parent")
"""


def test_fork_after_the_start_works_in_parent_and_child(ended: dict[str, Ended]) -> None:
    """On a CPU the child starts an engine of its own, and the parent's keeps working."""
    done = ended["fork"]
    assert (done.stdout, done.returncode) == ("child\nparent\n", 0), done.stderr[-3000:]


# Exits.

LEAVING = """
    import asyncio, faulthandler, sys, threading, time
    faulthandler.enable()
    from qwen3_embeddings import Embedder
    embedder = Embedder(sys.argv[1], dtype="float32")
    texts = ["at work " * 100] * 3000
    embedder.start()
    {work}
    time.sleep(0.5)
    print("leaving", flush=True)
"""
EXITS = {
    "sync in a daemon thread": """
        threading.Thread(target=embedder.encode_document, args=(texts,), daemon=True).start()
    """,
    "sync in a thread": """
        few = texts[:200]
        thread = threading.Thread(target=lambda: print(embedder.encode_document(few).shape))
        thread.start()
    """,
    "a call after the end": """
        def late():
            time.sleep(0.5)  # Python has closed its thread pools by now
            print(embedder.encode_document(texts[:200]).shape)
        threading.Thread(target=late).start()
    """,
    "async in a daemon thread": """
        calls = lambda: asyncio.run(embedder.aencode_document(texts))
        threading.Thread(target=calls, daemon=True).start()
    """,
    "exit inside a coroutine": """
        async def main():
            task = asyncio.create_task(embedder.aencode_document(texts))
            await asyncio.sleep(0.3)
            raise SystemExit(0)
        asyncio.run(main())
    """,
    "a loop nobody closes": """
        loop = asyncio.new_event_loop()
        task = loop.create_task(embedder.aencode_document(texts))
        loop.run_until_complete(asyncio.sleep(0.3))
        asyncio.get_event_loop_policy().set_event_loop(loop)
    """,
    "during the start": """
        early = Embedder(sys.argv[1], dtype="float32", engine_kwargs={"max_num_seqs": 32})
        threading.Thread(target=early.start, daemon=True).start()
    """,
}


@pytest.mark.parametrize("name", EXITS)
def test_exit_during_a_call_ends_the_interpreter_cleanly(
    name: str, ended: dict[str, Ended]
) -> None:
    """It ends with the status it would have had, and nothing crashes."""
    done = ended[name]
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Fatal" not in done.stderr
    assert "Segmentation" not in done.stderr
    assert "leaked" not in done.stderr
    assert done.left == []
    assert name == "exit inside a coroutine" or "leaving" in done.stdout
    # Python waits for threads, and they get their vectors.
    if name in {"sync in a thread", "a call after the end"}:
        assert "(200, 128)" in done.stdout


# Signals.

INTERRUPTS = """
    import asyncio, os, random, signal, sys, threading, time
    import numpy as np
    from qwen3_embeddings import Embedder
    seed, signals = int(sys.argv[2]), int(sys.argv[3])
    chance = random.Random(seed)
    embedder = Embedder(sys.argv[1], dtype="float32", engine=sys.argv[4])
    texts = [f"text {i} " * (i % 40 + 1) for i in range(200)]
    queries, documents = embedder.encode_query(texts), embedder.encode_document(texts)
    armed = threading.Event()
    def strike():
        while armed.wait():
            time.sleep(chance.random() ** 3 * 0.2)
            if armed.is_set():
                armed.clear()
                os.kill(os.getpid(), signal.SIGINT)
    def right(rows, wanted):
        assert rows.shape == wanted.shape, rows.shape
        assert np.abs(rows - wanted).max() < 2e-6, "wrong vectors"
    def one_call():
        few = sorted(chance.sample(range(200), chance.randint(1, 200)))
        some = [texts[i] for i in few]
        kind = chance.randrange(4)
        if kind == 0:
            right(embedder.encode_query(some), queries[few])
        elif kind == 1:
            right(embedder.encode_document(some), documents[few])
        elif kind == 2:
            right(asyncio.run(embedder.aencode_document(some)), documents[few])
        else:
            right(embedder.with_task("web_search").encode_query(some), queries[few])
    threading.Thread(target=strike, daemon=True).start()
    struck = calls = 0
    while struck < signals or calls < signals / 3:
        try:
            if chance.random() < 0.6:
                armed.set()
            one_call()
            armed.clear()
            calls += 1
        except KeyboardInterrupt:
            struck += 1
    while True:  # a last signal may still arrive
        try:
            armed.clear()
            time.sleep(0.5)
            break
        except KeyboardInterrupt:
            struck += 1
    right(embedder.encode_query(texts), queries)
    right(embedder.encode_document(texts), documents)
    deadline = time.monotonic() + 60
    engine = embedder._lease.engine
    while engine._thread._jobs and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not engine._thread._jobs, "interrupted texts are still in the engine"
    assert threading.active_count() < 40, threading.enumerate()
    print("interrupted", struck, "finished", calls)
"""


@pytest.mark.parametrize("engine", ["vllm", "torch"])
def test_ctrl_c_at_random_moments_never_gives_a_wrong_vector(
    engine: str, checkpoint: str, run_script: RunScript
) -> None:
    """Each call ends or is interrupted, at any bytecode."""
    seed = str(time.time_ns() % 10**6)
    signals = SIGNALS if engine == "vllm" else SIGNALS // 3 + 1  # most of the code is shared
    done = run_script(INTERRUPTS, *(checkpoint, seed, str(signals), engine), seconds=600 + SIGNALS)
    assert done.returncode == 0, f"seed {seed}: {done.stdout}\n{done.stderr[-3000:]}"
    print(done.stdout)


# Thread pools and loops of the caller that are closed.


@pytest.mark.engine
@pytest.mark.parametrize("engine", ["embedder", "remote"])
def test_encode_after_the_callers_thread_pool_is_shut_down_works(
    engine: str, request: pytest.FixtureRequest
) -> None:
    embedder = request.getfixturevalue(engine)
    expected = embedder.encode_document(["text"])

    async def without_a_pool() -> np.ndarray:
        await asyncio.to_thread(embedder.encode_document, ["text"])
        await asyncio.get_running_loop().shutdown_default_executor()
        rows: np.ndarray = await embedder.aencode_document(["text"])
        await embedder.astart()
        return rows

    np.testing.assert_allclose(asyncio.run(without_a_pool()), expected, atol=2e-6)


def test_close_without_a_thread_pool_works(checkpoint: str) -> None:
    async def close() -> None:
        await asyncio.get_running_loop().shutdown_default_executor()
        async with Embedder(checkpoint, dtype="float32", engine_kwargs={"max_num_seqs": 8}) as one:
            await one.aencode_document(["text"])

    asyncio.run(close())


def test_encode_in_a_thread_of_a_closed_loop_works(embedder: Embedder) -> None:
    expected = embedder.encode_document(["late"])
    begun, rows = threading.Event(), []

    def slow() -> None:
        begun.set()
        time.sleep(0.2)  # the loop this came from is closed by now
        rows.append(embedder.encode_document(["late"]))

    loop = asyncio.new_event_loop()
    future = loop.run_in_executor(None, slow)
    begun.wait(10)
    loop.call_soon(loop.stop)
    loop.run_forever()
    loop.close()
    deadline = time.monotonic() + 30
    while not rows and time.monotonic() < deadline:
        time.sleep(0.05)
    np.testing.assert_allclose(rows[0], expected, atol=2e-6)
    del future


# Long runs.


def footprint() -> dict[str, int]:
    """Resident memory in MiB, threads, open files and Python objects of this process, when idle.

    The OpenMP threads of an ended thread end some time after it. Free memory that malloc keeps is
    returned first, because its amount varies.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    threads, rest = -1, 0
    for _ in range(100):
        status = Path("/proc/self/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        rest = rest + 1 if int(fields["Threads"]) == threads else 0
        if rest == 10:  # 1 s without a change
            break
        threads = int(fields["Threads"])
        time.sleep(0.1)
    return {
        "memory": int(fields["VmRSS"].split()[0]) // 1024,
        "threads": int(fields["Threads"]),
        "files": len(list(Path("/proc/self/fd").iterdir())),
        "objects": len(gc.get_objects()),
    }


@pytest.mark.engine
@pytest.mark.parametrize("engine", ["embedder", "torch_embedder", "remote"])
def test_many_calls_leave_no_memory_threads_or_files_behind(
    engine: str, request: pytest.FixtureRequest
) -> None:
    """Sync calls from a pool, coroutines, refusals and cancellations, over and over."""
    embedder = request.getfixturevalue(engine)
    texts = [f"call {i}" for i in range(8)]
    expected = embedder.encode_query(texts)

    async def cancelled(text: str) -> None:
        task = asyncio.create_task(embedder.aencode_document([text * 50] * 20))
        await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    def batch(number: int) -> None:
        with ThreadPoolExecutor(8) as pool:
            rows = list(pool.map(lambda text: embedder.encode_query([text])[0], texts * 8))
        np.testing.assert_allclose(rows, np.tile(expected, (8, 1)), atol=2e-6)

        async def burst() -> None:
            calls = [embedder.aencode_query([text]) for text in texts * 4]
            np.testing.assert_allclose(
                np.concatenate(await asyncio.gather(*calls)), np.tile(expected, (4, 1)), atol=2e-6
            )
            await cancelled(f"cancelled {number} ")

        asyncio.run(burst())
        with pytest.raises(ValueError, match="over"):
            embedder.encode_document(["long " * 3000])
        embedder.with_task("code").encode_document([f"sibling {number}"])

    for number in range(4):
        batch(number)
    before = footprint()
    for number in range(max(CALLS // 100, 1)):  # 99 calls each
        batch(number)
    after = footprint()
    print(engine, CALLS, "calls:", before, "->", after)
    # In process oneDNN keeps a primitive for each new shape of a step, up to 1024 of them
    # (ONEDNN_PRIMITIVE_CACHE_CAPACITY).
    assert after["memory"] - before["memory"] < 40 + CALLS * 16 // 1024
    assert after["threads"] <= before["threads"] + 2
    assert after["files"] <= before["files"] + 4
    assert after["objects"] - before["objects"] < 5000


@pytest.mark.parametrize("kind", ["vllm", "torch"])
def test_engines_started_and_closed_leave_nothing_behind(
    kind: Literal["vllm", "torch"], checkpoint: str
) -> None:
    few = {"max_num_seqs": 4}

    def once() -> None:
        with Embedder(checkpoint, dtype="float32", engine=kind, engine_kwargs=few) as embedder:
            embedder.encode_document(["text"])

    once()
    before = footprint()
    for _ in range(3):
        once()
    after = footprint()
    assert after["threads"] <= before["threads"] + 1
    assert after["files"] <= before["files"] + 2
    assert after["memory"] - before["memory"] < 60


def test_terminated_process_ends_by_the_signal(checkpoint: str, run_script: RunScript) -> None:
    """No handler of vLLM delays the signal."""
    done = run_script(
        """
        import os, signal, sys, threading
        from qwen3_embeddings import Embedder
        embedder = Embedder(sys.argv[1], dtype="float32")
        embedder.start()
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        embedder.encode_document(["at work " * 100] * 100_000)
        """,
        checkpoint,
    )
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert done.left == []
