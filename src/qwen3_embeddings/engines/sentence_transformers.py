"""The reference: sentence-transformers, for platforms without vLLM and as yardstick of the tests.

Slow and plain on purpose. One call at a time, whatever the number of callers.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import importlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from qwen3_embeddings import checkpoint, event_loop, models
from qwen3_embeddings.engines.base import (
    Prompt,
    Served,
    Usage,
    check_lengths,
    closed_error,
    require,
)
from qwen3_embeddings.errors import (
    ConfigurationError,
    EngineStartError,
    MissingDependencyError,
    UnknownModelError,
)
from qwen3_embeddings.tokenizer import load_tokenizer
from qwen3_embeddings.vectors import Vectors

_INSTALL = (
    "Run pip install 'qwen3-embeddings[reference]'. To use a server instead, pass base_url=…."
)


class ReferenceEngine:
    """sentence-transformers in this process (`pip install 'qwen3-embeddings[reference]'`).

    Args:
        model: hub id or folder.
        dtype: "auto" (the checkpoint's own), "bfloat16" or "float32".
        engine_kwargs: keyword arguments of `sentence_transformers.SentenceTransformer`.

    Raises:
        MissingDependencyError: sentence-transformers is not installed.
    """

    chunk_texts = 32
    chunk_tokens = 8192
    chunks_in_flight = 2

    def __init__(
        self, model: str, *, dtype: str = "auto", engine_kwargs: dict[str, Any] | None = None
    ) -> None:
        require("sentence_transformers", "sentence-transformers is not installed.", _INSTALL)
        self.model = model
        self.dtype = dtype
        self.engine_kwargs = dict(engine_kwargs or {})
        self._encoder: Any = None
        self._loading: asyncio.Future[tuple[Any, Served]] | None = None
        self._turn = threading.Lock()
        self._closed = False

    async def start(self) -> Served:
        """Load the model once, or again after a load that failed; calls share one load."""
        if self._closed:
            raise closed_error()
        if self._loading is None or _failed(self._loading):
            self._loading = asyncio.ensure_future(event_loop.in_thread(self._load))
        encoder, served = await asyncio.shield(self._loading)
        if self._closed:
            raise closed_error()
        self._encoder = self._encoder or encoder
        return served

    async def tokenize(self, texts: list[str], urgent: bool = False) -> list[list[int]]:
        """Return the token ids of each text, end token included."""
        await self.start()
        return await event_loop.in_thread(_token_ids, self._encoder, texts)

    async def embed(
        self,
        prompts: list[Prompt],
        dimensions: int | None,
        urgent: bool,
        usage: Usage | None = None,
    ) -> Vectors:
        """Return one vector per prompt, in order."""
        await self.start()
        vectors, tokens = await event_loop.in_thread(self._encode_alone, self._encoder, prompts)
        if usage is not None:
            usage.add(len(prompts), tokens)
        return vectors if dimensions is None else vectors[:, :dimensions]

    async def close(self) -> None:
        """Free the model, once a load or a call in progress has ended."""
        self._closed = True
        self._encoder = self._loading = None

    def _load(self) -> tuple[Any, Served]:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise MissingDependencyError(
                f"sentence-transformers cannot be imported ({error}). {_INSTALL}"
            ) from error
        model = models.describe(self.model)
        checkpoint.check_weights(self.model)
        load_tokenizer(self.model, self.engine_kwargs.get("revision"))
        keywords = dict(self.engine_kwargs)
        dtype = model.precision(self.dtype)
        keywords["model_kwargs"] = {"dtype": dtype} | keywords.get("model_kwargs", {})
        try:
            with _no_progress_bar():
                encoder = SentenceTransformer(self.model, **keywords)
        except TypeError as error:
            raise ConfigurationError(
                f"engine_kwargs holds what SentenceTransformer does not know ({error})."
            ) from error
        except (OSError, ValueError) as error:
            raise UnknownModelError(
                f"sentence-transformers cannot load {self.model!r} ({error}). Pass a hub id that "
                "can be reached from here, or the path of a complete checkpoint."
            ) from error
        except ImportError as error:
            raise MissingDependencyError(
                f"sentence-transformers needs another package to load {self.model!r} ({error})."
            ) from error
        except Exception as error:
            raise EngineStartError(
                f"sentence-transformers could not load {self.model!r} ({type(error).__name__}: "
                f"{error}). Check that the checkpoint is complete."
            ) from error
        encoder.max_seq_length = model.context  # it would truncate without a warning
        size = model.dimensions
        return encoder, Served("reference", self.model, size, size, model.context)

    def _encode_alone(self, encoder: Any, prompts: list[Prompt]) -> tuple[Vectors, int]:
        with self._turn:  # the thread of a cancelled call still runs
            return _encode(encoder, prompts)


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Hide the bar "Loading weights" of transformers; those of downloads stay."""
    hub: Any = importlib.import_module("huggingface_hub.utils")
    from transformers.utils import logging

    shown, downloads_shown = logging.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()
    logging.disable_progress_bar()
    if downloads_shown:
        hub.enable_progress_bars()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
        if not downloads_shown:
            hub.disable_progress_bars()


def _failed(loading: asyncio.Future[Any]) -> bool:
    return loading.done() and (loading.cancelled() or loading.exception() is not None)


def _token_ids(encoder: Any, texts: list[str]) -> list[list[int]]:
    # A copy: sentence-transformers sets padding and truncation on its own.
    tokenizer = copy.deepcopy(encoder.tokenizer.backend_tokenizer)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)]


def _encode(encoder: Any, prompts: list[Prompt]) -> tuple[Vectors, int]:
    """Return the vectors and the number of tokens.

    Texts pass through `SentenceTransformer.encode`, token ids through the model's modules.
    """
    texts = {i: prompt for i, prompt in enumerate(prompts) if isinstance(prompt, str)}
    encoded = iter(_token_ids(encoder, list(texts.values())))
    ids = [next(encoded) if isinstance(prompt, str) else prompt for prompt in prompts]
    check_lengths(ids, encoder.max_seq_length)
    rows: dict[int, Any] = {}
    if texts:
        found = encoder.encode(
            list(texts.values()), prompt="", convert_to_tensor=True, show_progress_bar=False
        )
        rows.update(zip(texts, found.float().cpu().numpy(), strict=True))
    for i in range(len(prompts)):
        if i not in rows:
            rows[i] = _forward(encoder, ids[i])
    return np.stack([rows[i] for i in range(len(prompts))]), sum(map(len, ids))


def _forward(encoder: Any, ids: list[int]) -> Any:
    import torch

    tokens = torch.tensor([ids], device=encoder.device)
    features = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with torch.inference_mode():
        return encoder(features)["sentence_embedding"][0].float().cpu().numpy()
