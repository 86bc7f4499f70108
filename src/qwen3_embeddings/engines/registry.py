"""One engine per configuration and process, shared by all embedders of that configuration.

An engine starts at its first use. It stops when the last lease on it is released, and at the
latest when the interpreter exits. A lease that is garbage-collected without being released leaves
the engine running, for the next embedder of the same configuration.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import threading
import weakref
from importlib import import_module
from typing import Any

from qwen3_embeddings import event_loop
from qwen3_embeddings.canonical import canonical
from qwen3_embeddings.engines.base import Engine, closed_error
from qwen3_embeddings.errors import ConfigurationError

logger = logging.getLogger(__name__)

KINDS = {
    "vllm": ("qwen3_embeddings.engines.vllm.engine", "VLLMEngine"),
    "torch": ("qwen3_embeddings.engines.torch.engine", "TorchEngine"),
    "server": ("qwen3_embeddings.engines.openai.client", "ServerEngine"),
    "reference": ("qwen3_embeddings.engines.sentence_transformers", "ReferenceEngine"),
}
"""Engine classes by name, imported when first used."""

_lock = threading.RLock()  # a destructor may release a lease while another is made
_engines: dict[str, Engine] = {}
_abandoned: list[object] = []  # a parent's engines: their destructors would reach its sockets
_leases: dict[str, weakref.WeakSet[Lease]] = {}


class Lease:
    """A claim on one shared engine.

    Args:
        kind: one of `KINDS`.
        arguments: keyword arguments of the engine's class; equal arguments share an engine.

    Raises:
        ConfigurationError: the engine does not know an argument.
        MissingDependencyError: the engine's extra is not installed.
    """

    def __init__(self, kind: str, arguments: dict[str, Any]) -> None:
        self._kind, self._arguments = kind, arguments
        described = canonical([kind, arguments])
        self._key = hashlib.sha256(described.encode()).hexdigest()  # headers may hold secrets
        self._engine: Engine | None = None
        self._acquire()

    def _acquire(self) -> None:
        with _lock:
            if self._key not in _engines:
                _engines[self._key] = _make(self._kind, self._arguments)
                _leases[self._key] = weakref.WeakSet()
            self._engine = _engines[self._key]
            self._process = os.getpid()
            _leases[self._key].add(self)

    @property
    def engine(self) -> Engine:
        """The engine.

        Raises:
            EngineClosedError: the lease was released.
        """
        if self._engine is None:
            raise closed_error()
        if self._process != os.getpid():
            # A forked child must not use its parent's connections: each would read the other's
            # answers.
            self._acquire()
        return self._engine

    def share(self) -> Lease:
        """Return another hold on the same engine; a released one when this one was released."""
        other = object.__new__(Lease)
        other.__dict__.update(self.__dict__)
        with _lock:
            if self._engine is not None and _engines.get(self._key) is self._engine:
                _leases[self._key].add(other)
        return other

    def detach(self) -> Engine | None:
        """Release the claim; return the engine to close if it was the last. May be repeated."""
        with _lock:
            engine, self._engine = self._engine, None
            others = _leases.get(self._key)
            if engine is None or others is None or _engines.get(self._key) is not engine:
                return None  # released before, or of the parent process
            others.discard(self)
            if others:
                return None
            del _engines[self._key], _leases[self._key]
        return engine


def _make(kind: str, arguments: dict[str, Any]) -> Engine:
    module, name = KINDS[kind]
    try:
        engine: Engine = getattr(import_module(module), name)(**arguments)
    except TypeError as error:
        raise ConfigurationError(
            f"the {kind} engine does not accept an argument: {error}"
        ) from error
    return engine


def _close_all() -> None:
    """Stop every engine before the interpreter exits, while threads still run."""
    with _lock:
        engines = list(_engines.values())
        _engines.clear()
        _leases.clear()
    for engine in engines:
        try:
            event_loop.run(engine.close())
        except BaseException:  # Ctrl-C among them: the others still have to close
            logger.exception("an engine did not close")


def _forget_engines() -> None:
    """Forget the parent's engines in a forked child, which has none of the parent's threads."""
    global _lock
    _lock = threading.RLock()
    if _engines and "TOKENIZERS_PARALLELISM" in os.environ:
        # The tokenizer's threads are missing in the child too: with this set it would wait forever.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _abandoned.append(dict(_engines))
    _engines.clear()
    _leases.clear()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_engines)
