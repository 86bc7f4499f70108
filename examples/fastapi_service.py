"""Search over HTTP: a FastAPI service with the engine in its own process.

    python examples/fastapi_service.py [MODEL]
    curl 'http://127.0.0.1:8080/search?q=why+does+bread+dough+rise'

The lifespan starts the engine and embeds the corpus before the first request, and closes the engine
at the end. Requests await `aencode_query`, so concurrent ones share the engine's steps.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import uvicorn
from fastapi import FastAPI, HTTPException, Query

from qwen3_embeddings import Embedder, TextError

PASSAGES = [
    "Bread dough rises because yeast turns sugar into carbon dioxide.",
    "The Moon causes the tides: its gravity pulls the oceans towards it.",
    "Bees tell each other where flowers are by dancing.",
]


def make_app(model: str | None = None) -> FastAPI:
    """Return the application."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with Embedder(model) as embedder:
            app.state.embedder = embedder
            app.state.documents = await embedder.aencode_document(PASSAGES)
            yield

    app = FastAPI(lifespan=lifespan)

    @app.get("/search")
    async def search(
        q: str, k: Annotated[int, Query(ge=1, le=100)] = 2
    ) -> list[dict[str, float | str]]:
        try:
            vector = await app.state.embedder.aencode_query(q)
        except TextError as error:  # for example over the model's context
            raise HTTPException(422, str(error)) from error
        scores = app.state.documents @ vector
        best = scores.argsort()[::-1][:k]
        return [{"score": float(scores[i]), "text": PASSAGES[i]} for i in best]

    return app


if __name__ == "__main__":
    uvicorn.run(make_app(*sys.argv[1:]), port=8080)
