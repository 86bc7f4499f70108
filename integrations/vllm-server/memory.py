"""Device memory that each model needs, computed from its shape: the tables of the guide.

    python integrations/vllm-server/memory.py

GGUF sizes follow llama.cpp's choice of a type per tensor (src/llama-quant.cpp,
llama_tensor_get_type_impl) and the block sizes of ggml (ggml-common.h).
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen3_embeddings.engines.vllm.defaults import BLOCK_TOKENS, GIB
from qwen3_embeddings.models import MODELS, Model

RUNTIME_BYTES = int(1.5 * GIB)
"""Allowance for the CUDA context, CUDA graphs and libraries. An estimate, not a measurement."""
LLAMA_RUNTIME_BYTES = int(0.7 * GIB)
"""The same for llama.cpp, with its compute buffers for 512 tokens. An estimate."""

BITS = {"bf16": 16.0, "fp8": 8.0, "q8_0": 8.5, "q6_k": 6.5625, "q4_k": 4.5}
"""Bits per weight: Q8_0 is 34 bytes per 32 weights, Q6_K 210 and Q4_K 144 bytes per 256."""


@dataclass(frozen=True)
class Limits:
    """Limits of a server that set its memory.

    Attributes:
        context: Longest text, in tokens.
        step_tokens: Most tokens per step (``--max-num-batched-tokens``).
        step_texts: Most texts per step (``--max-num-seqs``).
    """

    context: int
    step_tokens: int
    step_texts: int

    @property
    def cache_tokens(self) -> int:
        """Tokens that the KV cache must hold: two steps, or a step and the longest text."""
        step = self.step_tokens + self.step_texts * BLOCK_TOKENS
        return max(2 * step, step + self.context)


SMALL_CARD = Limits(context=8192, step_tokens=2048, step_texts=128)


def parts(model: Model) -> dict[str, int]:
    """Return the number of weights by kind of tensor."""
    query = model.dimensions * model.heads * model.head_dim
    key = model.dimensions * model.kv_heads * model.head_dim
    mlp = model.dimensions * model.intermediate
    return {
        "table": model.vocabulary * model.dimensions,
        "attention": model.layers * (2 * query + key),
        "value": model.layers * key,
        "mlp_in": model.layers * 2 * mlp,
        "mlp_out": model.layers * mlp,
        "norms": model.layers * 2 * (model.dimensions + model.head_dim) + model.dimensions,
    }


def weight_bytes(model: Model, precision: str) -> int:
    """Return the bytes of the weights in a precision of `BITS`, or in ``q4_k_m``.

    fp8 keeps the embedding table in bfloat16, as vLLM does. GGUF keeps the norms in float32.
    """
    size = parts(model)
    norms = size.pop("norms") * (16 if precision in ("bf16", "fp8") else 32)
    bits = dict.fromkeys(size, BITS["q4_k" if precision == "q4_k_m" else precision])
    if precision == "fp8":
        bits["table"] = BITS["bf16"]
    if precision == "q4_k_m":
        # No output layer, so the table has the type of one; attn_v and ffn_down are mixed.
        more = sum(uses_more_bits(layer, model.layers) for layer in range(model.layers))
        share = more / model.layers
        mixed = share * BITS["q6_k"] + (1 - share) * BITS["q4_k"]
        bits |= {"table": BITS["q6_k"], "value": mixed, "mlp_out": mixed}
    return int(norms + sum(size[part] * bits[part] for part in size)) // 8


def uses_more_bits(layer: int, layers: int) -> bool:
    """Return llama.cpp's choice of layers that get Q6_K in a Q4_K_M file."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def activation_bytes(model: Model, tokens: int) -> int:
    """Return the bytes of the largest layer's activations in a step, in 16 bits."""
    width = 3 * model.intermediate + 4 * model.dimensions
    return 2 * tokens * (width + (model.heads + 2 * model.kv_heads) * model.head_dim)


def vllm_bytes(model: Model, precision: str, limits: Limits) -> int:
    """Return the device memory of a vLLM server, with `RUNTIME_BYTES` for the rest."""
    cache = limits.cache_tokens * model.kv_bytes_per_token
    activations = activation_bytes(model, limits.step_tokens)
    return weight_bytes(model, precision) + cache + activations + RUNTIME_BYTES


def llama_bytes(model: Model, precision: str, context: int) -> int:
    """Return the device memory of llama-server with one slot, its KV cache in 16 bits."""
    cache = context * model.kv_bytes_per_token
    return weight_bytes(model, precision) + cache + LLAMA_RUNTIME_BYTES


def smallest_card(need: int) -> str:
    """Return the smallest usual card, in GB, that holds `need` with a tenth to spare."""
    return next((f"{card}" for card in (6, 8, 12, 16, 24, 48) if need <= 0.9 * card * GIB), "80")


def table() -> list[str]:
    """Return the guide's table in Markdown."""
    lines = [
        "| model | precision | server | weights, GiB | KV cache, GiB | total, GiB | card, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in MODELS.values():
        name = model.name.rsplit("-", 1)[-1]
        for precision in ("bf16", "fp8", "q8_0", "q4_k_m"):
            is_vllm = precision in ("bf16", "fp8")
            tokens = SMALL_CARD.cache_tokens if is_vllm else SMALL_CARD.context
            total = (
                vllm_bytes(model, precision, SMALL_CARD)
                if is_vllm
                else llama_bytes(model, precision, SMALL_CARD.context)
            )
            weights, cache = weight_bytes(model, precision), tokens * model.kv_bytes_per_token
            label = precision if is_vllm else f"GGUF {precision.upper()}"
            lines.append(
                f"| {name} | {label} | {'vLLM' if is_vllm else 'llama.cpp'} "
                f"| {weights / GIB:.1f} | {cache / GIB:.1f} | {total / GIB:.1f} "
                f"| {smallest_card(total)} |"
            )
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
