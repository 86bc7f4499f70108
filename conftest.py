"""Fixtures for every test of this repository: a small checkpoint, and one real server of a kind."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from qwen3_embeddings import MissingDependencyError
from qwen3_embeddings.testing import write_checkpoint

# Nothing of the caller's environment may steer a test, and no test reaches for a model hub.
for _name in [name for name in os.environ if name.startswith("QWEN3_EMBEDDINGS_")]:
    del os.environ[_name]
os.environ |= {
    "HAYSTACK_TELEMETRY_ENABLED": "False",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "true",
}

# What a shell runs with & ignores Ctrl-C, and its processes inherit that. Tests send it to theirs.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Each worker of `pytest -n 2` has a core of its own. Engines of two workers, each with a thread per
# core, would wait for each other's threads at every layer.
if _worker := os.environ.get("PYTEST_XDIST_WORKER"):
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cores[int(_worker.removeprefix("gw")) % len(_cores)]})
    os.environ["OMP_NUM_THREADS"] = "1"


NEED_ENGINE = {"any_server", "checkpoint", "engine", "run_script", "server", "torch_server"}
"""Fixtures whose tests run a model, and so need vLLM or torch."""


MODULES = {
    **dict.fromkeys(("test_checkpoint", "test_corpus_examples", "test_demo"), "engine"),
    **dict.fromkeys(("test_demo_model", "test_doctor", "test_notebooks"), "engine"),
    **dict.fromkeys(("test_corpus_faults", "test_corpus_ray", "test_corpus_s3"), "slow"),
    **dict.fromkeys(("test_types", "test_without_engines"), "slow"),
}
"""Modules of which every test has the marker, whatever its fixtures."""


SLOW = {
    "test_any_bytes_are_models_tokens_and_a_message_or_a_typed_error",
    "test_any_bytes_are_vectors_or_a_typed_error",
    "test_encode_document_limited_server_that_accepts_more_gets_full_concurrency",
    "test_encode_document_any_answers_return_unit_rows_or_typed_error",
    "test_main_closed_pipe_exits_quietly",
    "test_whatever_a_server_says_no_row_is_wrong",
}
"""Slow tests in modules of fast ones."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    """Pause garbage collection during imports, where it costs seconds and frees hardly anything.

    Later collections skip what was imported.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out modules of which every test is deselected, whose imports need a second."""
    marker = MODULES.get(collection_path.stem)
    return True if marker and deselected(config, marker) else None


def deselected(config: pytest.Config, marker: str) -> bool:
    """Whether the command line deselects the tests with a marker, as `make test-fast` does."""
    return f"not {marker}" in config.option.markexpr


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make test-fast` deselects: tests that run a model, and slow ones."""
    for item in items:
        if item.name.partition("[")[0] in SLOW:
            item.add_marker("slow")
        if marker := MODULES.get(item.path.stem):
            item.add_marker(marker)
        if NEED_ENGINE & set(getattr(item, "fixturenames", ())):
            item.add_marker("engine")


ENGINE_MODULES = {"torch", "transformers", "sentence_transformers", "vllm"}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Skip a test of `make test-fast` that runs no model and yet needs an engine's packages."""
    try:
        return (yield)
    except (MissingDependencyError, ModuleNotFoundError) as error:
        module = (getattr(error, "name", None) or "vllm").split(".")[0]
        missing = module in ENGINE_MODULES and not find_spec(module)
        if missing and deselected(item.config, "engine"):
            pytest.skip(f"{module} is not installed")
        raise


@dataclass(frozen=True)
class RunningServer:
    """A server of the test checkpoint, in float32, that requires a key."""

    base_url: str
    api_key: str
    model: str


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random checkpoint: 128 dimensions, a context of 2,048 tokens."""
    return str(write_checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="session")
def server(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One real vLLM server per session, which needs a minute to start."""
    with running_server(checkpoint, tmp_path_factory.mktemp("server") / "log") as running:
        yield running


@pytest.fixture(scope="session")
def torch_server(
    checkpoint: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """One real server over the PyTorch engine per session, which starts in seconds."""
    log = tmp_path_factory.mktemp("torch-server") / "log"
    with running_server(checkpoint, log, "--engine", "torch") as running:
        yield running


@pytest.fixture(scope="session", params=["server", "torch_server"])
def any_server(request: pytest.FixtureRequest) -> RunningServer:
    """Each kind of server in turn."""
    running: RunningServer = request.getfixturevalue(request.param)
    return running


@contextlib.contextmanager
def running_server(checkpoint: str, log: Path, *flags: str) -> Iterator[RunningServer]:
    """`qwen3-embeddings serve`, with further flags, until the block ends.

    On a CPU vLLM would run the model in a third process, which starts as slowly as the other two.
    Here the engine's process runs it. tests/test_serve.py has a server with all three.
    """
    running = RunningServer(f"http://127.0.0.1:{free_port()}/v1", "sesame-street-123", "tiny")
    command = [
        *(sys.executable, "-m", "qwen3_embeddings", "serve", checkpoint),
        *("--port", running.base_url.split(":")[-1].removesuffix("/v1"), "--dtype", "float32"),
        *("--served-model-name", running.model, *flags),
    ]
    environment = os.environ | {
        "QWEN3_EMBEDDINGS_API_KEY": running.api_key,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        wait_until_healthy(running.base_url.removesuffix("/v1"), process, log, key=running.api_key)
        yield running
    finally:
        process.terminate()
        process.wait(timeout=30)


def wait_until_healthy(
    url: str, process: subprocess.Popen[bytes], log: Path, *, key: str = ""
) -> None:
    """Wait for `/health`, or fail with the end of the server's log."""
    import httpx

    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        try:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            if httpx.get(f"{url}/health", headers=headers).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    process.kill()
    raise RuntimeError(f"the server did not start:\n{log.read_text(errors='replace')[-4000:]}")


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
