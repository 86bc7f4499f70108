"""The settings of the PyTorch engine, by kind of device.

Settings that vLLM has too carry its names, so that `engine_kwargs` fit both engines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from qwen3_embeddings.engines.vllm.defaults import Device, profile
from qwen3_embeddings.errors import ConfigurationError
from qwen3_embeddings.models import Model

KERNELS = ("auto", "torch", "triton", "vllm")
"""Implementations of the operations between matrix products (`kernels`)."""


@dataclass(frozen=True)
class Settings:
    """Settings of an engine. All except `dtype` are names that `engine_kwargs` accepts.

    Attributes:
        dtype: precision of weights and activations.
        device: PyTorch device, such as "cpu" or "cuda:0". Default: the first GPU, else the CPU.
        max_model_len: longest input in tokens. Default: the model's context.
        max_num_batched_tokens: most tokens in one step; a longer text is a step of its own.
        max_num_seqs: most texts in one step.
        enforce_eager: whether to run without CUDA graphs.
        kernels: one of `KERNELS`. "auto" uses the fastest that work on this machine.
        revision: branch, tag or commit on the hub.
    """

    dtype: torch.dtype
    device: torch.device
    max_model_len: int
    max_num_batched_tokens: int
    max_num_seqs: int
    enforce_eager: bool = False
    kernels: str = "auto"
    revision: str | None = None

    @property
    def gpu(self) -> bool:
        """Whether the device is a GPU."""
        return bool(self.device.type == "cuda")


def check_names(engine_kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the arguments, if the engine knows all of their names.

    Raises:
        ConfigurationError: it does not know one of them.
    """
    known = [field.name for field in fields(Settings) if field.name != "dtype"]
    for name in engine_kwargs:
        if name not in known:
            raise ConfigurationError(
                f"engine_kwargs holds {name!r}, which engine='torch' does not know. Use "
                f"{', '.join(known)}, or engine='vllm'."
            )
    return engine_kwargs


def choose(model: Model, dtype: str, engine_kwargs: Mapping[str, Any]) -> Settings:
    """Return the settings for a model on this machine.

    Args:
        model: description of the checkpoint.
        dtype: "auto" (the checkpoint's own), "bfloat16" or "float32".
        engine_kwargs: settings that override the defaults.

    Raises:
        ConfigurationError: a setting has a value that cannot work.
    """
    device = _device(engine_kwargs.get("device"))
    described = _describe(device)
    defaults = profile(described)
    precision = model.precision(dtype)
    if precision == "bfloat16" and not described.bfloat16:
        precision = "float32"
    values = {
        "max_model_len": model.context,
        "max_num_batched_tokens": defaults.step_tokens,
        "max_num_seqs": defaults.step_texts,
        **{name: value for name, value in engine_kwargs.items() if value is not None},
        "device": device,
    }
    for name in ("max_model_len", "max_num_batched_tokens", "max_num_seqs"):
        if type(values[name]) is not int or values[name] < 1:
            raise ConfigurationError(
                f"engine_kwargs[{name!r}] is {values[name]!r}. Pass an int of at least 1."
            )
    if values["max_model_len"] > model.context:
        raise ConfigurationError(
            f"max_model_len={values['max_model_len']} is over the context of {model.name!r}, "
            f"{model.context} tokens. Lower it, or leave it out."
        )
    if values.get("kernels", "auto") not in KERNELS:
        raise ConfigurationError(
            f"no kernels={values['kernels']!r}. Use one of {', '.join(KERNELS)}."
        )
    return Settings(dtype=getattr(torch, precision), **values)


def _device(name: str | None) -> torch.device:
    """Return the device of a name, with its index; without a name the first GPU, else the CPU.

    Raises:
        ConfigurationError: it is not here, or this engine does not run on it.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ConfigurationError(
            f"no device {name!r} ({error}). Use 'cpu', 'cuda' or 'cuda:N'."
        ) from error
    count = torch.cuda.device_count()
    if device.type == "cpu":
        return torch.device("cpu")  # safetensors does not know "cpu:0"
    index = device.index or 0
    if device.type == "cuda" and index < count:
        return torch.device("cuda", index)
    raise ConfigurationError(
        f"device={name!r} is not here: PyTorch sees {count} GPUs, and engine='torch' runs on a CPU "
        "or an NVIDIA GPU. Use another device, or install PyTorch's build for it."
    )


def _describe(device: torch.device) -> Device:
    """Return what decides the defaults for a device."""
    if device.type == "cpu":
        return Device("cpu")
    properties = torch.cuda.get_device_properties(device)
    return Device("gpu", properties.total_memory, properties.major >= 8)
