"""Arguments of an embedder, checked and completed before anything starts."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Literal

from qwen3_embeddings import long_texts, models
from qwen3_embeddings.engines.registry import KINDS
from qwen3_embeddings.errors import ConfigurationError
from qwen3_embeddings.redaction import Secret, SupportsSecret, hide
from qwen3_embeddings.vectors import check_dimensions

EngineKind = Literal["vllm", "torch", "server", "reference"]
"""Names of the engines: a key of `engines.registry.KINDS` each."""

Dtype = Literal["auto", "bfloat16", "float32"]
"""Precisions to run in; "auto" is the checkpoint's own."""

OnError = Literal["stop", "finish"]
"""What to do when a text cannot be embedded."""

Role = Literal["query", "document"]
"""What a text is; it decides which instruction the text carries."""

TIMEOUT = 60.0
"""Seconds that a request to a server may take when no time-out is set."""

RESTART_TIMEOUT = 180.0
"""Seconds that documents wait for a server that is down when no such time is set."""

MAX_CONCURRENCY = 16
"""Requests in flight per role when no maximum is set."""

SERVER_BATCH = 64
"""Texts per request to a server when no maximum is set."""

LEAST = {
    "batch_size": 1,
    "max_concurrency": 1,
    "max_retries": 0,
    "timeout": 1e-3,
    "restart_timeout": 0,
}


def resolve(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of an embedder, checked and completed from the environment.

    A pickle holds them as they are here, so that another process's environment does not change
    the model.

    Raises:
        ConfigurationError: an argument has a value that cannot work.
        DimensionsError: `dimensions` is out of range.
    """
    found = dict(settings) | {"model": _path_text(settings["model"])}
    check(found)
    found["base_url"] = _base_url(found)
    has_client = found["client"] is not None or found["http_client"] is not None
    found["engine"] = engine_kind(found["engine"], found["base_url"], has_client)
    model = found["model"] or os.environ.get("QWEN3_EMBEDDINGS_MODEL") or None
    found["model"] = model
    if found["engine"] != "server":
        found["model"] = local_path(model or models.DEFAULT_MODEL)
    if found["dimensions"] is not None:
        known = models.MODELS.get(found["model"] or "")
        found["dimensions"] = check_dimensions(
            found["dimensions"], known.dimensions if known else None
        )
    for name, default in (("timeout", TIMEOUT), ("restart_timeout", RESTART_TIMEOUT)):
        found[name] = float(default if found[name] is None else found[name])
    found["max_concurrency"] = found["max_concurrency"] or MAX_CONCURRENCY
    if found["engine"] == "server" and found["base_url"]:
        found["base_url"] = _addresses().normal_url(found["base_url"])
    found["default_headers"] = hide(found["default_headers"] or {})
    found["engine_kwargs"] = dict(found["engine_kwargs"] or {})
    return found


def engine_arguments(
    settings: Mapping[str, Any],
    api_key: str | SupportsSecret | None,
    batch_parameter: str = "batch_size",
) -> dict[str, Any]:
    """Return the keyword arguments of the engine's class.

    Args:
        settings: resolved arguments of an embedder.
        api_key: the server's key. Default: QWEN3_EMBEDDINGS_API_KEY.
        batch_parameter: name of the caller's argument for the batch size, for messages.

    Raises:
        ConfigurationError: the arguments contradict each other.
    """
    if settings["engine"] != "server":
        return {name: settings[name] for name in ("model", "dtype", "engine_kwargs")}
    if settings["engine_kwargs"]:
        raise ConfigurationError(
            "engine_kwargs are for an engine in this process. Set a server's where it starts."
        )
    names = ("timeout", "max_retries", "restart_timeout", "default_headers", "verify")
    arguments = {name: settings[name] for name in (*names, "model", "base_url")}
    arguments["max_concurrency"] = settings["max_concurrency"]
    arguments["batch_size"] = settings["batch_size"] or SERVER_BATCH
    arguments["batch_parameter"] = batch_parameter
    for name in ("client", "http_client"):
        if settings[name] is not None:
            arguments[name] = settings[name]
    if settings["client"] is None and settings["http_client"] is None:
        # Part of the key of the registry: a change, such as NO_PROXY, needs another engine.
        arguments["environment"] = _addresses().Environment.read(settings["base_url"])
    if settings["client"] is not None and api_key:
        raise ConfigurationError("client has a key of its own. Leave api_key out.")
    if settings["client"] is None:
        api_key = api_key or os.environ.get("QWEN3_EMBEDDINGS_API_KEY")
    return arguments | {"api_key": Secret.of(api_key)}


def _base_url(settings: Mapping[str, Any]) -> str | None:
    """Return the server's address: the argument, or the environment's for no other engine.

    A client of the caller's own has an address of its own, which the environment does not replace.
    """
    own = settings["client"] is not None or str(getattr(settings["http_client"], "base_url", ""))
    if settings["base_url"] or own or settings["engine"] not in {None, "server"}:
        url: str | None = settings["base_url"]
        return url
    return os.environ.get("QWEN3_EMBEDDINGS_BASE_URL")


def local_path(model: str | os.PathLike[str]) -> str:
    """Return a hub id or path as text, a leading ``~`` replaced by the home folder.

    A slash at the end is removed, so that both ways of writing a folder are one setting.
    """
    path = os.path.expanduser(os.fspath(model))
    return path.rstrip("/") or path


def _addresses() -> ModuleType:
    # Imported where a server is used: urllib.request is slow to import.
    from qwen3_embeddings.engines.openai import addresses

    return addresses


def _path_text(model: object) -> object:
    return os.fspath(model) if isinstance(model, os.PathLike) else model


def check(settings: Mapping[str, Any]) -> None:
    """Check each argument on its own.

    Raises:
        ConfigurationError: an argument is wrong; the message is about the first.
    """
    check_types(settings)
    for name, least in LEAST.items():
        check_at_least(name, settings[name], least)
    check_dtype(settings["dtype"])
    if settings["on_error"] not in {"stop", "finish"}:
        raise ConfigurationError(f"no on_error={settings['on_error']!r}. Use 'stop' or 'finish'.")
    long_texts.check_overflow(settings["overflow"])
    check_engine_kwargs(settings["engine_kwargs"] or {})


def check_can_pickle(settings: Mapping[str, Any]) -> None:
    """Raise if there is a client of the caller's own, which cannot be pickled.

    Raises:
        TypeError: there is one.
    """
    for name in ("client", "http_client"):
        if settings[name] is not None:
            raise TypeError(
                f"an object with {name}= is not pickled: its connections stay in this process. "
                "Pass base_url and default_headers instead."
            )


def check_types(settings: Mapping[str, Any]) -> None:
    """Raise for a wrong type, which would fail later with an error that names no argument."""
    texts = {"model", "base_url", "engine", "dtype", "overflow", "on_error"}
    texts |= {"query_instruction", "document_instruction"}
    counts = {"batch_size", "max_concurrency", "max_retries"}
    mappings = {"default_headers", "engine_kwargs"}
    seconds = {"timeout", "restart_timeout"}
    kinds = ((str, texts), (int, counts), (int | float, seconds), (Mapping, mappings))
    for kind, names in kinds:
        for name in sorted(names):
            value = settings[name]
            if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
                raise ConfigurationError(
                    f"{name} is {type(value).__name__}. Pass {getattr(kind, '__name__', 'number')}."
                )
            if isinstance(value, str) and not value.isascii():
                check_unicode(name, value)
    verify = settings["verify"]
    if not isinstance(verify, bool | str | ssl.SSLContext | None):
        raise ConfigurationError(
            f"verify is {type(verify).__name__}. Pass True, False, a CA file or an ssl.SSLContext."
        )


def check_unicode(name: str, value: str) -> None:
    """Raise for a lone surrogate, which no request or file name can hold."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigurationError(
            f"{name} holds a lone surrogate. Write whole characters."
        ) from None


def engine_kind(engine: str | None, base_url: str | None, client: bool = False) -> str:
    """Return the engine to use: a server if there is a `base_url` or a client, else vLLM."""
    server = bool(base_url) or client
    if engine is None:
        return "server" if server else "vllm"
    if engine not in KINDS:
        raise ConfigurationError(f"no engine {engine!r}. Use one of {', '.join(KINDS)}, or None.")
    if (engine == "server") != server:
        raise ConfigurationError(
            f"engine={engine!r} and {'a' if server else 'no'} base_url or client contradict each "
            "other. A server needs one, an engine in this process has none."
        )
    return engine


def check_dtype(dtype: str) -> None:
    """Raise if `dtype` is unknown or numerically unsafe for these models (float16)."""
    check_no_float16(dtype)
    if dtype not in {"auto", "bfloat16", "float32"}:
        raise ConfigurationError(f"no dtype {dtype!r}. Use 'auto', 'bfloat16' or 'float32'.")


def check_count(name: str, value: int) -> None:
    """Raise if a value is not an int of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigurationError(f"{name} is {type(value).__name__}. Pass int.")
    check_at_least(name, value, 1)


def check_no_float16(dtype: str) -> None:
    """Raise for float16, in which the vectors of some texts are NaN."""
    if dtype in {"float16", "half"}:
        raise ConfigurationError(
            "dtype='float16' overflows to NaN on some texts with these models. Use 'bfloat16' or "
            "'float32'."
        )


def check_at_least(name: str, value: float | None, least: float) -> None:
    """Raise if a number is too small.

    Raises:
        ConfigurationError: `value` is less than `least`.
    """
    if value is not None and not value >= least:
        raise ConfigurationError(f"{name}={value!r} is too small. Use {least:g} or more.")


def check_engine_kwargs(engine_kwargs: Mapping[str, Any]) -> None:
    """Raise for secrets, which dumps would show, for a checkpoint's own code, and for float16."""
    for name, value in engine_kwargs.items():
        if isinstance(value, Mapping):
            check_engine_kwargs(value)
        if name in {"hf_token", "token", "use_auth_token"} and isinstance(value, str):
            raise ConfigurationError(
                f"engine_kwargs[{name!r}] would show in dumps and pickles. Set HF_TOKEN in the "
                "environment instead."
            )
        if name == "trust_remote_code" and value:
            raise ConfigurationError(
                "trust_remote_code runs code from the checkpoint, and no Qwen3-Embedding model "
                "has any. Leave it out."
            )
        if name in {"dtype", "torch_dtype"}:
            check_no_float16(str(value).removeprefix("torch."))
