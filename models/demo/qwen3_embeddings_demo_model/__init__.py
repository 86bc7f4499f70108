"""A small trained checkpoint with the interface of Qwen3-Embedding, for demos and tests."""

from pathlib import Path

__version__ = "0.2.0"

__all__ = ["__version__", "path"]


def path() -> Path:
    """Return the folder of the checkpoint.

    Returns:
        A folder that vLLM and sentence-transformers load: 384 dimensions, Matryoshka sizes down
        to 32, a context of 4,096 tokens.
    """
    return Path(__file__).parent / "checkpoint"
