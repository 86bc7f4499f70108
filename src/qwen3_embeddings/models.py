"""The Qwen3-Embedding family: one frozen row a model.

Sources: the model cards and config.json files of Qwen/Qwen3-Embedding-0.6B, -4B and -8B, and
arXiv 2506.05176. `context` is the 32,768 tokens all three cards promise, also where config.json
allows more positions.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qwen3_embeddings.errors import UnknownModelError

MIN_DIMENSIONS = 32
"""Smallest Matryoshka size the family was trained for (model cards: 32 to native)."""

DEFAULT_MODEL = "Qwen/Qwen3-Embedding-0.6B"
END_TOKEN = "<|endoftext|>"
"""The token the tokenizer itself appends and whose hidden state is the embedding."""


@dataclass(frozen=True)
class Model:
    """Shape of one embedding model.

    Attributes:
        name: hub id, or the path as given.
        layers: transformer layers.
        heads: attention heads.
        kv_heads: key and value heads.
        head_dim: numbers a head.
        intermediate: numbers in the hidden layer of each MLP.
        vocabulary: rows of the embedding table.
        dimensions: native embedding size, the largest of the Matryoshka range.
        context: longest input in tokens, end token included.
        stored: precision of the weights in the checkpoint.
    """

    name: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    dimensions: int
    context: int
    stored: str = "bfloat16"

    def precision(self, dtype: str) -> str:
        """The precision to run in: `dtype`, or for "auto" the stored one, but never float16.

        Some texts overflow float16 to NaN (the 8B on texts that start with "import").
        """
        chosen = self.stored if dtype == "auto" else dtype
        return "float32" if chosen == "float16" else chosen

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of 16-bit key and value cache a token takes."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def parameters(self) -> int:
        """Number of weights, with the embedding table (untied output heads are not used)."""
        attention = 2 * self.dimensions * (self.heads + self.kv_heads) * self.head_dim
        mlp = 3 * self.dimensions * self.intermediate
        norms = 2 * self.dimensions + 2 * self.head_dim
        table = self.vocabulary * self.dimensions
        return self.layers * (attention + mlp + norms) + self.dimensions + table


MODELS: Mapping[str, Model] = MappingProxyType(
    {
        row[0]: Model(*row)
        for row in (
            ("Qwen/Qwen3-Embedding-0.6B", 28, 16, 8, 128, 3072, 151669, 1024, 32768),
            ("Qwen/Qwen3-Embedding-4B", 36, 32, 8, 128, 9728, 151665, 2560, 32768),
            ("Qwen/Qwen3-Embedding-8B", 36, 32, 8, 128, 12288, 151665, 4096, 32768),
        )
    }
)
"""The published models by hub id."""


def describe(name: str) -> Model:
    """The shape of `name`: a row of `MODELS`, a local folder, or any hub id of the same shape.

    A folder or hub id outside the table is read from its ``config.json``; the hub is asked only
    then.

    Raises:
        UnknownModelError: no such model, or not of the Qwen3-Embedding shape.
    """
    if name in MODELS:
        return MODELS[name]
    return from_config(name, _read_config(name))


def known_shape(name: str) -> Model | None:
    """`describe`, as far as this machine can tell: the hub is not asked."""
    if name in MODELS or Path(name).is_dir():
        with contextlib.suppress(UnknownModelError):
            return describe(name)
    return None


def from_config(name: str, config: Mapping[str, Any]) -> Model:
    """A row from the contents of a ``config.json``.

    Raises:
        UnknownModelError: the config is not of the Qwen3 architecture.
    """
    if config.get("model_type") != "qwen3":
        raise UnknownModelError(
            f"{name!r} has model_type {config.get('model_type')!r}, not 'qwen3': this package "
            f"embeds with the Qwen3-Embedding family only. Use one of {', '.join(MODELS)} or a "
            "fine-tune of them."
        )
    try:
        heads = config["num_attention_heads"]
        return Model(
            name=name,
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads", heads),
            head_dim=config.get("head_dim", config["hidden_size"] // heads),
            intermediate=config["intermediate_size"],
            vocabulary=config["vocab_size"],
            dimensions=config["hidden_size"],
            context=min(config["max_position_embeddings"], 32768),
            stored=config.get("dtype") or config.get("torch_dtype") or "bfloat16",
        )
    except (KeyError, TypeError, ArithmeticError) as error:
        raise UnknownModelError(
            f"config.json of {name!r} has no usable {error}. Download it again."
        ) from error


def weights_digest(name: str) -> str:
    """A short digest that tells checkpoints apart: the hub id itself, or a folder's contents.

    Of a safetensors file the header and the first bytes of every tensor are read: another
    fine-tune differs there, and gigabytes take milliseconds.
    """
    folder = Path(name)
    if name in MODELS or not folder.is_dir():
        return name
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in {".json", ".txt", ".safetensors"}:
            digest.update(path.relative_to(folder).as_posix().encode())
            for part in _telling_parts(path):
                digest.update(part)
    return digest.hexdigest()[:16]


def _telling_parts(path: Path) -> Iterator[bytes]:
    """A small file whole; of safetensors the header and 512 bytes a tensor.

    Format: eight bytes of header length, little endian, the JSON header, the data
    (https://github.com/huggingface/safetensors, README).
    """
    if path.suffix != ".safetensors":
        yield path.read_bytes()
        return
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
        yield header
        for name, tensor in json.loads(header).items():
            if name != "__metadata__":
                file.seek(8 + length + tensor["data_offsets"][0])
                yield file.read(512)


def _read_config(name: str) -> dict[str, Any]:
    folder = Path(name)
    try:
        path = folder / "config.json" if folder.is_dir() else _download_config(name)
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnknownModelError(
            f"model {name!r} is neither one of {', '.join(MODELS)}, nor a folder with a "
            f"config.json, nor a hub id that can be reached from here ({error}). Check the "
            "spelling, or pass the path of a downloaded checkpoint."
        ) from error
    if not isinstance(config, dict):
        raise UnknownModelError(f"config.json of {name!r} is not a JSON object. Download it again.")
    return config


def _download_config(name: str) -> Path:
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise FileNotFoundError(f"no folder {name}")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise FileNotFoundError(
            f"no folder {name}, and huggingface_hub is not installed"
        ) from error
    return Path(hf_hub_download(name, "config.json"))
