"""What an engine of this process provides: a core, and the module that starts it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from qwen3_embeddings.engines.base import Served
from qwen3_embeddings.engines.scheduling import Limits
from qwen3_embeddings.vectors import Vectors

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Core(Protocol):
    """The part of an engine that computes vectors, step by step. One thread at a time uses it.

    Attributes:
        limits: how much it computes at once.
        context: longest input in tokens.
    """

    limits: Limits
    context: int

    def add(self, request_id: str, ids: list[int]) -> None:
        """Queue a text for the next steps.

        Args:
            request_id: what `step` and `abort` call the text.
            ids: its token ids, at most `context`.
        """

    def abort(self, request_ids: list[str]) -> None:
        """Drop texts that were added and not returned by `step`."""

    def wait(self) -> None:
        """Wait until it is time to add the texts of the next step.

        Texts that arrive meanwhile can be a part of that step. Called soon after a query only.
        """

    def step(self) -> tuple[list[str], Vectors]:
        """Compute one step.

        Returns:
            The ids of the texts that it finished, and their vectors in that order: float32
            (texts, native), which the core does not write to afterwards.
        """

    def prepare(self) -> bool:
        """Do one piece of the work that can wait until the engine is idle.

        Returns:
            Whether it did one, so that more may be left.
        """

    def shut_down(self) -> None:
        """Stop. The memory is freed with the last reference to the core."""


class Backend(Protocol):
    """The module of an engine that starts its core.

    Attributes:
        NAME: name of the engine, for messages.
    """

    NAME: str

    def load(self) -> None:
        """Import the libraries of the engine.

        This is not a part of `start`, because a library may keep an exception of its own import,
        and with it the frames of all callers. A frame of `start` would keep the core in memory.
        """

    def start(
        self, name: str, dtype: str, engine_kwargs: dict[str, Any]
    ) -> tuple[Core, Tokenizer, Served]:
        """Start a core; also return the model's tokenizer, and what the core serves.

        Args:
            name: hub id or folder of the model.
            dtype: "auto" (the checkpoint's own), "bfloat16" or "float32".
            engine_kwargs: arguments of the core that override the defaults.
        """

    def explain(
        self, said: str, name: str, dtype: str, engine_kwargs: dict[str, Any]
    ) -> str | None:
        """Return why a start failed and what to do; None if the error is unknown.

        Args:
            said: what `faults.message` returned for the error.
            name: hub id or folder of the model.
            dtype: as for `start`.
            engine_kwargs: as for `start`.

        Returns:
            The rest of a sentence that begins with "NAME could not start with 'model'".
        """
