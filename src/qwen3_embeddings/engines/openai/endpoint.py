"""The routes of one server, in the formats that it supports."""

from __future__ import annotations

import logging
import unicodedata
from typing import Any

from qwen3_embeddings.engines.base import Prompt, Served
from qwen3_embeddings.engines.openai import wire
from qwen3_embeddings.engines.openai.failures import SIZE_REFUSED, Response
from qwen3_embeddings.engines.openai.limiter import Slot
from qwen3_embeddings.engines.openai.retry import Connection
from qwen3_embeddings.engines.openai.wire import Embeddings
from qwen3_embeddings.errors import DimensionsError, ServerRefusedError, ServerResponseError
from qwen3_embeddings.vectors import Vectors

logger = logging.getLogger(__name__)


class Endpoint:
    """One server, with what is known of how to ask it.

    Attributes:
        base_url: root of its API.
        wire_format: the most compact format that it is known to speak, one of `wire.FORMATS`.
        cuts_itself: whether it returns smaller sizes, as far as it was asked.
        served: what it serves, once that is learned.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.base_url = connection.base_url
        self.wire_format = wire.FORMATS[0]
        self.cuts_itself = True
        self._ranks = True
        self.served: Served | None = None

    async def get(self, route: str) -> Response:
        """Return the response to a GET under the root, whatever its status."""
        return await self._connection.send("GET", self.base_url + route)

    async def look(self, route: str) -> bytes | None:
        """Return what an optional route above the root answers, or None."""
        return await self._connection.look(self.base_url.removesuffix("/v1") + route)

    def check(self, answer: Response) -> None:
        """Raise the typed error of a response that is no success."""
        self._connection.check(answer)

    async def tokenize(
        self, model: str, text: str, slot: Slot | None = None, retries: int | None = None
    ) -> list[int]:
        """Return token ids from ``/tokenize``, which is a sibling of the API root.

        vLLM and llama.cpp have such a route, with other names for the same two fields. Each
        ignores the other's.
        """
        url = self.base_url.removesuffix("/v1") + "/tokenize"
        body = {"model": model, "prompt": text, "add_special_tokens": True}
        body |= {"content": composed(text), "add_special": True}
        answer = await self._connection.post(url, body, slot, retries)
        return wire.read_tokens(answer.content)

    async def embed(
        self,
        model: str,
        prompts: list[Prompt],
        dimensions: int | None,
        urgent: bool,
        slot: Slot | None,
        retries: int | None = None,
    ) -> Embeddings:
        """Send one request. Fall back where the server turns out not to know a feature.

        Raises:
            ServerError: the request failed.
            TextTooLongError: the server says that a text is over its context.
            DimensionsError: the server cannot return `dimensions`.
        """
        form = self.wire_format
        body: dict[str, Any] = {"model": model, "input": prompts} | wire.ask(form)
        ask_size = dimensions is not None and self.cuts_itself
        if ask_size:
            body["dimensions"] = dimensions
        ranked = self._ranks and form in wire.VLLM_FORMATS
        if ranked:
            body["priority"] = 0 if urgent else 1  # vLLM schedules the lowest first
        try:
            answer = await self._connection.post(f"{self.base_url}/embeddings", body, slot, retries)
        except ServerRefusedError as error:
            if not self._fall_back(str(error), form, ask_size, ranked):
                raise
            return await self.embed(model, prompts, dimensions, urgent, slot, retries)
        content_type = answer.headers.get("content-type", "")
        read = wire.read(answer.content, content_type, len(prompts))
        self.wire_format = max(self.wire_format, read.form, key=wire.FORMATS.index)
        if self.served is None:
            return read
        return read._replace(vectors=self._fit(read.vectors, dimensions, ask_size))

    def _fall_back(self, refusal: str, form: str, ask_size: bool, ranked: bool) -> bool:
        """Do without a feature that may be why a request was refused. Return False if none is."""
        if ask_size and SIZE_REFUSED.search(refusal):
            self._cut_here(refusal)
        elif ranked and "priorit" in refusal.lower():
            self._ranks = False
        elif self.served is None and form != wire.FORMATS[-1]:
            self.wire_format = wire.FORMATS[wire.FORMATS.index(form) + 1]
        else:
            return False
        return True

    def _fit(self, vectors: Vectors, dimensions: int | None, asked: bool) -> Vectors:
        """Return vectors of the size asked for, truncated here if the server did not do it."""
        assert self.served is not None
        size, own = vectors.shape[1], self.served.dimensions
        if size != own and not (asked and size == dimensions):
            raise ServerResponseError(
                f"the server answered {size} dimensions per text, and {own} when it was first "
                "asked: another model runs behind base_url now. Close this embedder, create "
                "another, and embed everything again."
            )
        if dimensions is None or size == dimensions:
            return vectors
        if size < dimensions:
            raise DimensionsError(
                f"the server returns {size} dimensions per text and cannot return {dimensions}. "
                f"Ask for at most dimensions={size}, or start the server without a smaller default "
                "size."
            )
        self._cut_here(f"it answered {size} dimensions to dimensions={dimensions}")
        return vectors[:, :dimensions]  # the embedder normalises every row

    def _cut_here(self, why: str) -> None:
        if self.cuts_itself:
            logger.info("%s does not truncate vectors, done here: %s", self.base_url, why)
        self.cuts_itself = False


def composed(prompt: Prompt) -> Prompt:
    """Return a text in NFC, the published tokenizer's own first step, which llama.cpp omits."""
    return unicodedata.normalize("NFC", prompt) if isinstance(prompt, str) else prompt
