"""A small trained checkpoint of the Qwen3-Embedding shape: for demos and tests, nothing else."""

from pathlib import Path

__version__ = "0.1.0"

__all__ = ["__version__", "path"]


def path() -> Path:
    """The checkpoint's folder: 256 numbers a vector, Matryoshka sizes down to 32."""
    return Path(__file__).parent / "checkpoint"
