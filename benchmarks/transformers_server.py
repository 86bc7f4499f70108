"""A simple server: SentenceTransformer behind FastAPI, one request at a time.

python benchmarks/transformers_server.py MODEL PORT [DTYPE]
"""

# No postponed annotations: FastAPI reads these while the module runs.
import sys
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer


class Request(BaseModel):
    """The fields of an OpenAI request that are used."""

    model: str
    input: str | list[str]


def make_app(model: str, dtype: str) -> FastAPI:
    """Create an application that embeds each request separately."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = SentenceTransformer(model, device=device, model_kwargs={"dtype": dtype})
    app = FastAPI()

    @app.post("/v1/embeddings")
    def embed(request: Request) -> dict[str, Any]:
        texts = [request.input] if isinstance(request.input, str) else request.input
        rows = encoder.encode(texts, show_progress_bar=False).tolist()
        data = [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)]
        usage = {"prompt_tokens": 0, "total_tokens": 0}
        return {"object": "list", "model": request.model, "data": data, "usage": usage}

    @app.get("/health")
    def health() -> dict[str, str]:
        return {}

    return app


if __name__ == "__main__":
    model, port, *dtype = sys.argv[1:]
    app = make_app(model, dtype[0] if dtype else "bfloat16")
    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="error")
