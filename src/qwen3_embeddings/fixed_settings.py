"""What follows from settings that never change: equality, hashes, copies and pickles."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Self

from qwen3_embeddings import config
from qwen3_embeddings.canonical import canonical
from qwen3_embeddings.config import EngineKind
from qwen3_embeddings.engines.base import Usage
from qwen3_embeddings.engines.registry import Lease
from qwen3_embeddings.errors import ConfigurationError
from qwen3_embeddings.pipeline import Policy
from qwen3_embeddings.prompts import Task
from qwen3_embeddings.redaction import shown


class FixedSettings:
    """What `Embedder` inherits; it sets the attributes, and `_lease` as the last of them."""

    engine: EngineKind
    task: Task
    _settings: dict[str, Any]
    _policy: Policy
    _lease: Lease
    _usage: Usage

    if not TYPE_CHECKING:  # type checkers would allow any name to be set

        def __setattr__(self, name: str, value: Any) -> None:
            # A setting changed later would reach neither the engine nor all of the fingerprint.
            if "_lease" in self.__dict__ and (name in self._settings or name == "api_key"):
                raise ConfigurationError(
                    f"{name} cannot be changed. Make a new Embedder, or for another task call "
                    "with_task."
                )
            super().__setattr__(name, value)

    def __eq__(self, other: object) -> bool:
        """Compare settings. Keys and secret headers do not count, as they change no vector."""
        return type(other) is type(self) and other._identity() == self._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> str:
        """Return what equal settings have in common, without secrets."""
        settings = self._public_settings() | {"task": dataclasses.astuple(self.task)}
        if self.engine == "server":
            settings["batch_size"] = settings["batch_size"] or config.SERVER_BATCH
        return canonical(settings)

    def __copy__(self) -> Self:
        """Return another handle on the same engine, which is closed on its own."""
        sibling = object.__new__(type(self))
        sibling.__dict__.update(self.__dict__)
        sibling._lease = self._lease.share()
        sibling._usage = Usage()
        return sibling

    def _finishing(self) -> Self:
        """Return another handle that embeds all other texts when one fails."""
        sibling = self.__copy__()
        sibling.__dict__["on_error"] = "finish"
        sibling._policy = dataclasses.replace(self._policy, on_error="finish")
        sibling._settings = self._settings | {"on_error": "finish"}
        return sibling

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a copy as `copy.copy` does: an engine is not copied."""
        return self.__copy__()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings, without key and secret headers.

        The other process reads the key from its environment.

        Raises:
            TypeError: the embedder uses a client of the caller's own.
        """
        config.check_can_pickle(self._settings)
        return _rebuild, (type(self), self._public_settings())

    def _public_settings(self) -> dict[str, Any]:
        headers = shown(self._settings["default_headers"])
        return self._settings | {"default_headers": headers}


def _rebuild(cls: type[FixedSettings], settings: dict[str, Any]) -> FixedSettings:
    return cls(**settings)
