"""What a program that only uses the library sees on its terminal: nothing."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap

import pytest

from qwen3_embeddings.engines.vllm import compat

FIRST_CALL = """
    import sys
    from qwen3_embeddings import Embedder
    embedder = Embedder(sys.argv[1], engine=sys.argv[2])
    assert embedder.encode_document(["first call"]).shape == (1, 128)
    {then}
"""
TENSOR_PARALLEL = """
    import sys
    from qwen3_embeddings import Embedder
    with Embedder(sys.argv[1], engine_kwargs={"tensor_parallel_size": 2}) as embedder:
        assert embedder.encode_document(["first call"]).shape == (1, 128)
"""


def in_fresh_interpreter(
    script: str, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("engine", "environment"),
    [("vllm", {}), ("vllm", {"VLLM_LOGGING_LEVEL": "ERROR"}), ("reference", {})],
)
def test_first_call_and_exit_print_nothing(
    engine: str, environment: dict[str, str], checkpoint: str
) -> None:
    done = in_fresh_interpreter(FIRST_CALL.format(then=""), checkpoint, engine, **environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_traceback_after_a_call_is_pythons_own(checkpoint: str) -> None:
    """torch.distributed begins every line with the number of a process."""
    done = in_fresh_interpreter(FIRST_CALL.format(then="raise OSError"), checkpoint, "vllm")
    assert done.stderr.startswith("Traceback (most recent call last):\n")
    assert done.stderr.endswith("\nOSError\n")
    assert "rank" not in done.stderr


def test_logs_of_vllm_are_shown_to_those_who_ask(checkpoint: str) -> None:
    shown = in_fresh_interpreter(
        FIRST_CALL.format(then=""), checkpoint, "vllm", VLLM_LOGGING_LEVEL="INFO"
    )
    assert shown.returncode == 0, shown.stderr
    assert "INFO" in shown.stdout + shown.stderr
    asking = "import logging; logging.getLogger('vllm').setLevel(logging.WARNING)\n"
    shown = in_fresh_interpreter(
        asking + textwrap.dedent(FIRST_CALL.format(then="")), checkpoint, "vllm"
    )
    assert shown.returncode == 0, shown.stderr
    assert "WARNING" in shown.stdout + shown.stderr or "Triton" in shown.stderr


def test_engine_with_worker_processes_leaves_no_semaphore_behind(checkpoint: str) -> None:
    """Python would name them at exit."""
    one_core = {"VLLM_CPU_OMP_THREADS_BIND": "0|0"}
    done = in_fresh_interpreter(TENSOR_PARALLEL, checkpoint, **one_core)
    assert (done.returncode, done.stdout) == (0, "")
    assert "leaked" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.engine
@pytest.mark.parametrize(("level", "shown"), [(logging.ERROR, False), (logging.INFO, True)])
def test_capture_of_graphs_shows_a_bar_to_those_who_ask_for_logs(
    level: int, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bar itself was seen on a GPU only."""
    import torch
    from vllm.v1.worker.gpu import cudagraph_utils

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    bar = cudagraph_utils.tqdm
    monkeypatch.setattr(logging.getLogger("vllm"), "level", level)
    logging.getLogger("vllm").manager._clear_cache()
    with compat._no_capture_bar():
        assert (cudagraph_utils.tqdm is bar) == shown
        assert list(cudagraph_utils.tqdm([1, 2], desc="graphs", disable=True)) == [1, 2]
    assert cudagraph_utils.tqdm is bar


@pytest.mark.engine
def test_quiet_leaves_a_level_that_the_program_set(monkeypatch: pytest.MonkeyPatch) -> None:
    loggers = [logging.getLogger(name) for name in compat._LOGGERS]
    for logger in loggers:
        monkeypatch.setattr(logger, "level", logging.NOTSET)
    loggers[1].setLevel(logging.DEBUG)
    compat.quiet()
    assert [logger.level for logger in loggers] == [40, logging.DEBUG, 40, 40]
