"""The reference: sentence-transformers, for platforms without vLLM and as yardstick of the tests.

Slow and plain on purpose. One call at a time, whatever the number of callers.
"""

from __future__ import annotations

import asyncio
import copy
import threading
from typing import Any

import numpy as np

from qwen3_embeddings import event_loop, models
from qwen3_embeddings.engines.base import Prompt, Served, Usage, check_lengths, closed_error
from qwen3_embeddings.errors import (
    ConfigurationError,
    MissingDependencyError,
    UnknownModelError,
)
from qwen3_embeddings.vectors import Vectors


class ReferenceEngine:
    """sentence-transformers in this process (`pip install 'qwen3-embeddings[reference]'`).

    Args:
        model: hub id or folder.
        dtype: "auto" (the checkpoint's own), "bfloat16" or "float32".
        engine_kwargs: keyword arguments of `sentence_transformers.SentenceTransformer`.
    """

    chunk_texts = 32
    chunk_tokens = 8192
    chunks_in_flight = 2

    def __init__(
        self, model: str, *, dtype: str = "auto", engine_kwargs: dict[str, Any] | None = None
    ) -> None:
        self.model = model
        self.dtype = dtype
        self.engine_kwargs = dict(engine_kwargs or {})
        self._encoder: Any = None
        self._served: Served | None = None
        self._lock = asyncio.Lock()
        self._turn = threading.Lock()
        self._closed = False

    async def start(self) -> Served:
        """Load the model once."""
        async with self._lock:
            return await self._start()

    async def _start(self) -> Served:
        if self._closed:
            raise closed_error()
        if self._served is None:
            self._encoder = await event_loop.in_thread(self._load)
            model = models.describe(self.model)
            size = model.dimensions
            self._served = Served("reference", self.model, size, size, model.context)
        return self._served

    async def tokenize(self, texts: list[str], urgent: bool = False) -> list[list[int]]:
        """Token ids of each text, end token included."""
        await self.start()
        return await event_loop.in_thread(self._token_ids, texts)

    async def embed(
        self,
        prompts: list[Prompt],
        dimensions: int | None,
        urgent: bool,
        usage: Usage | None = None,
    ) -> Vectors:
        """One vector a prompt, in order."""
        await self.start()
        vectors = await event_loop.in_thread(self._encode_alone, prompts)
        return vectors if dimensions is None else vectors[:, :dimensions]

    async def close(self) -> None:
        """Free the model."""
        async with self._lock:
            self._closed = True
            self._encoder = self._served = None

    def _load(self) -> Any:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise MissingDependencyError(
                f"sentence-transformers cannot be imported ({error}). Run "
                "pip install 'qwen3-embeddings[reference]'."
            ) from error
        keywords = dict(self.engine_kwargs)
        dtype = models.describe(self.model).precision(self.dtype)
        keywords["model_kwargs"] = {"dtype": dtype} | keywords.get("model_kwargs", {})
        try:
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
        encoder.max_seq_length = models.describe(self.model).context  # it cuts without a word
        return encoder

    def _token_ids(self, texts: list[str]) -> list[list[int]]:
        # A copy: sentence-transformers sets padding and truncation on its own.
        tokenizer = copy.deepcopy(self._encoder.tokenizer.backend_tokenizer)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return [encoding.ids for encoding in tokenizer.encode_batch(texts)]

    def _encode_alone(self, prompts: list[Prompt]) -> Vectors:
        with self._turn:  # a cancelled call's thread still runs
            return self._encode(prompts)

    def _encode(self, prompts: list[Prompt]) -> Vectors:
        """Texts through sentence-transformers' own road, token ids through its modules."""
        strings = [prompt for prompt in prompts if isinstance(prompt, str)]
        check_lengths(self._token_ids(strings), self._encoder.max_seq_length)
        texts = [i for i, prompt in enumerate(prompts) if isinstance(prompt, str)]
        others = [i for i, prompt in enumerate(prompts) if not isinstance(prompt, str)]
        rows: dict[int, Any] = {}
        if texts:
            encoded = self._encoder.encode(
                strings, prompt="", convert_to_tensor=True, show_progress_bar=False
            )
            rows.update(zip(texts, encoded.float().cpu().numpy(), strict=True))
        for i in others:
            rows[i] = self._forward(prompts[i])
        return np.stack([rows[i] for i in range(len(prompts))])

    def _forward(self, ids: Prompt) -> Any:
        import torch

        tokens = torch.tensor([ids], device=self._encoder.device)
        features = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        with torch.inference_mode():
            return self._encoder(features)["sentence_embedding"][0].float().cpu().numpy()
