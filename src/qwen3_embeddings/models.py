"""The Qwen3-Embedding family: one frozen row per model, and the shape of any checkpoint.

Sources: the model cards and config.json files of Qwen/Qwen3-Embedding-0.6B, -4B and -8B, and
arXiv 2506.05176. `context` is the 32,768 tokens that all three cards promise, although the
config.json of two allows more positions.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qwen3_embeddings import checkpoint
from qwen3_embeddings.errors import ConfigurationError, UnknownModelError

MIN_DIMENSIONS = 32
"""Smallest Matryoshka size the family was trained for (model cards: 32 to native)."""

DEFAULT_MODEL = "Qwen/Qwen3-Embedding-0.6B"
END_TOKEN = "<|endoftext|>"
"""The token that the tokenizer itself appends. Its hidden state is the embedding."""

LARGE_MODEL = 2_000_000_000
"""Number of parameters from which the GPU, not the host, limits steps of 2,048 tokens. An H100 with
the 4B model embeds 143 texts of 512 tokens per second in such steps, so each needs 28 ms
(benchmarks/notes/torch-engine.md)."""
SIXTEEN_BIT = frozenset(
    {"awq", "gptq", "fp8", "compressed-tensors", "auto-round", "modelopt", "fbgemm_fp8"}
)
"""Quantization methods that vLLM runs with 16-bit activations only (`get_supported_act_dtypes` of
vllm/model_executor/layers/quantization)."""


@dataclass(frozen=True)
class Model:
    """Shape of one embedding model.

    Attributes:
        name: hub id, or the path as given.
        layers: number of transformer layers.
        heads: number of attention heads.
        kv_heads: number of key and value heads.
        head_dim: width of a head.
        intermediate: width of the hidden layer of each MLP.
        vocabulary: rows of the embedding table.
        dimensions: native number of dimensions, the end of the Matryoshka range.
        context: longest input in tokens, end token included.
        stored: precision of the weights in the checkpoint.
        quantization: method the weights are quantized with, as config.json names it.
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
    quantization: str | None = None

    def precision(self, dtype: str) -> str:
        """Return the precision to run in: `dtype`, or for "auto" the stored one.

        Never float16: some texts overflow it to NaN (the 8B on texts that start with "import").

        Raises:
            ConfigurationError: the weights are quantized for 16-bit kernels, and `dtype` is
                "float32".
        """
        if self.quantization in SIXTEEN_BIT:
            if dtype == "float32":
                raise ConfigurationError(
                    f"{self.name!r} is quantized with {self.quantization}, whose kernels compute "
                    "in 16 bits. Leave dtype out, or use a checkpoint that is not quantized."
                )
            return "bfloat16"
        chosen = self.stored if dtype == "auto" else dtype
        return "float32" if chosen == "float16" else chosen

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of 16-bit key and value cache per token."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def parameters(self) -> int:
        """Number of weights, embedding table included; an untied output head is not used."""
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
    """Return the shape of a model.

    A model outside `MODELS` is read from its ``config.json``. The hub is asked only if that file
    is neither in a local folder nor in the Hugging Face cache.

    Args:
        name: hub id or folder.

    Raises:
        UnknownModelError: there is no such model, or it has another architecture.

    Example:
        >>> describe("Qwen/Qwen3-Embedding-4B").dimensions
        2560
    """
    if name in MODELS:
        return MODELS[name]
    return from_config(name, checkpoint.read_json(name, "config.json"))


def known_shape(name: str) -> Model | None:
    """Return the shape of a published model or a folder; None for another hub id."""
    if name in MODELS or checkpoint.local_folder(name):
        with contextlib.suppress(UnknownModelError):
            return describe(name)
    return None


def from_config(name: str, config: Mapping[str, Any]) -> Model:
    """Return the shape in the contents of a ``config.json``.

    Raises:
        UnknownModelError: the architecture is not Qwen3, or a value is missing.
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
            quantization=(config.get("quantization_config") or {}).get("quant_method"),
        )
    except (KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise UnknownModelError(
            f"config.json of {name!r} lacks a usable value ({error}). Download it again."
        ) from error


def weights_digest(name: str) -> str:
    """Return what identifies a checkpoint: the hub id itself, or a digest of a folder's contents.

    Of a safetensors file only the header and the first bytes of every tensor are read. Another
    fine-tune differs there, and gigabytes are read in milliseconds.

    Raises:
        UnknownModelError: a safetensors file is truncated.
    """
    folder = None if name in MODELS else checkpoint.local_folder(name)
    if folder is None:
        return name
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in {".json", ".txt", ".safetensors"}:
            digest.update(path.relative_to(folder).as_posix().encode())
            for part in _telling_parts(path):
                digest.update(part)
    return digest.hexdigest()[:16]


def _telling_parts(path: Path) -> Iterator[bytes]:
    """Yield a small file whole; of a safetensors file the header and 512 bytes per tensor."""
    if path.suffix != ".safetensors":
        yield path.read_bytes()
        return
    header, starts = checkpoint.safetensors_header(path)
    yield header
    with path.open("rb") as file:
        for start in starts.values():
            file.seek(start)
            yield file.read(512)
