"""Write a tiny random checkpoint, to test code that embeds without downloading weights.

It has the files, architecture, template and end token of a published Qwen3-Embedding model. So
vLLM, sentence-transformers and this package load it like a published one. Its vectors have no
meaning; everything else about them is right.

    python -m qwen3_embeddings.testing PATH
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_embeddings.engines.base import require
from qwen3_embeddings.errors import ConfigurationError
from qwen3_embeddings.models import END_TOKEN
from qwen3_embeddings.prompts import instruct

# The 26 added tokens of the Qwen3 tokenizer, in their order. They follow the base vocabulary, as
# ids 151643 to 151668 do there.
SPECIAL_TOKENS = (
    END_TOKEN,
    *("<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    *("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>"),
    *("<think>", "</think>"),
)
_PLAIN = 14  # from <tool_call> on they are ordinary added tokens, which decoding keeps

# Pre-tokenizer of the Qwen2 and Qwen3 tokenizers (tokenizer.json).
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# What the tokenizer is trained on. It is not `TASKS`, so a new preset does not change checkpoints.
_SENTENCES = (
    ("Given a web search query, retrieve relevant passages that answer the query", "web_search"),
    (
        "Given a question, retrieve Wikipedia passages that answer the question",
        "question_answering",
    ),
    (
        "Given a multi-hop question, retrieve documents that can help answer the question",
        "multi_hop",
    ),
    ("Given a claim, retrieve documents that support or refute the claim", "fact_checking"),
    ("Given a claim, find documents that refute the claim", "counter_argument"),
    (
        "Given a financial question, retrieve user replies that best answer the question",
        "finance",
    ),
    (
        "Given a scientific paper title, retrieve paper abstracts that are cited by the given "
        "paper",
        "citation",
    ),
    (
        "Given a question, retrieve questions that are semantically equivalent to the given "
        "question",
        "duplicate_question",
    ),
    ("Given a code comment, retrieve the code snippet corresponding to that comment.", "code"),
    (
        "Given a Chinese search query, retrieve web passages that answer the question",
        "chinese_web_search",
    ),
    ("Retrieve semantically similar text", "similarity"),
    ("Retrieve parallel sentences", "bitext"),
    ("Identify the topic or theme of the given news articles", "clustering"),
    (
        "Classify the sentiment expressed in the given movie review text from the IMDB dataset",
        "sentiment",
    ),
    ("Given a online banking query, find the corresponding intents", "intent"),
)


def write_checkpoint(
    path: str | Path,
    *,
    dimensions: int = 128,
    layers: int = 2,
    context: int = 2048,
    vocabulary: int = 640,
    seed: int = 0,
) -> Path:
    """Write a tiny random Qwen3 embedding checkpoint and return its folder.

    The same arguments give the same bytes.

    Args:
        path: folder to write; it is created if needed.
        dimensions: native embedding size, a multiple of 32.
        layers: number of transformer layers.
        context: longest input in tokens.
        vocabulary: largest size of the base vocabulary, at least 256; 26 special tokens follow.
        seed: seed of the random weights.

    Returns:
        The folder, which can be passed as `model`.

    Raises:
        ConfigurationError: a size does not fit the architecture.
        MissingDependencyError: tokenizers or safetensors is not installed.

    Example:
        >>> folder = write_checkpoint("tiny")
        >>> Embedder(str(folder)).encode_query(["capital of China"]).shape
        (1, 128)
    """
    _check_sizes(dimensions, layers, context, vocabulary)
    tokenizer = _train_tokenizer(vocabulary)
    config = _config(dimensions, layers, context, tokenizer.get_vocab_size())
    end = tokenizer.token_to_id(END_TOKEN)
    folder = Path(os.path.expanduser(path))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_weights(folder, _weights(config, end, np.random.default_rng(seed)))
    _write_json(folder, _json_files(config, end))
    return folder


def _check_sizes(dimensions: int, layers: int, context: int, vocabulary: int) -> None:
    if dimensions < 32 or dimensions % 32 or vocabulary < 256 or layers < 1 or context < 8:
        raise ConfigurationError(
            "write_checkpoint needs dimensions that are a multiple of 32, vocabulary >= 256, "
            "layers >= 1 and context >= 8."
        )
    for module in ("tokenizers", "safetensors"):
        require(
            module,
            f"a test checkpoint needs {module}, which is not installed.",
            "Run pip install 'qwen3-embeddings[testing]'.",
        )


def _write_weights(folder: Path, weights: dict[str, NDArray[np.float32]]) -> None:
    from safetensors.numpy import save_file

    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _write_json(folder: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _train_tokenizer(vocabulary: int) -> Any:
    """Train a byte-level BPE tokenizer with the layout of Qwen3's."""
    from tokenizers import AddedToken, pre_tokenizers, processors, trainers

    tokenizer = _untrained_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([instruct(text, word) for text, word in _SENTENCES], trainer)
    tokenizer.add_tokens(
        [
            AddedToken(token, special=position < _PLAIN, normalized=False)
            for position, token in enumerate(SPECIAL_TOKENS)
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END_TOKEN}",
        pair=f"$A {END_TOKEN} $B:1 {END_TOKEN}:1",
        special_tokens=[(END_TOKEN, tokenizer.token_to_id(END_TOKEN))],
    )
    return tokenizer


def _untrained_tokenizer() -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _config(dimensions: int, layers: int, context: int, vocabulary: int) -> dict[str, Any]:
    heads = dimensions // 32
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": vocabulary - len(SPECIAL_TOKENS),
        "eos_token_id": vocabulary - len(SPECIAL_TOKENS),
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": dimensions,
        "initializer_range": 0.02,
        "intermediate_size": 2 * dimensions,
        "max_position_embeddings": context,
        "max_window_layers": layers,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": heads // 2 if heads % 2 == 0 else heads,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocabulary,
    }


def _weights(
    config: dict[str, Any], end: int, random: np.random.Generator
) -> dict[str, NDArray[np.float32]]:
    """Return weights under the published names, scaled so that the vectors differ clearly."""
    size, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]

    def matrix(rows: int, columns: int) -> NDArray[np.float32]:
        scale = np.float32(columns**-0.5)
        return random.standard_normal((rows, columns), dtype=np.float32) * scale

    def ones(count: int) -> NDArray[np.float32]:
        return np.ones(count, dtype=np.float32)

    table = random.standard_normal((config["vocab_size"], size), dtype=np.float32)
    table[end] *= 0.1  # the last position should represent the text, not its own token
    weights = {"embed_tokens.weight": table, "norm.weight": ones(size)}
    for layer in range(config["num_hidden_layers"]):
        weights |= {
            f"layers.{layer}.{name}.weight": value
            for name, value in {
                "input_layernorm": ones(size),
                "post_attention_layernorm": ones(size),
                "self_attn.q_proj": matrix(queries, size),
                "self_attn.k_proj": matrix(keys, size),
                "self_attn.v_proj": matrix(keys, size),
                "self_attn.o_proj": matrix(size, queries),
                "self_attn.q_norm": ones(config["head_dim"]),
                "self_attn.k_norm": ones(config["head_dim"]),
                "mlp.gate_proj": matrix(inner, size),
                "mlp.up_proj": matrix(inner, size),
                "mlp.down_proj": matrix(size, inner),
            }.items()
        }
    return weights


def _json_files(config: dict[str, Any], end: int) -> dict[str, Any]:
    """Return the other files of a published checkpoint, by path in the folder."""
    modules = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    return {
        "config.json": config,
        "tokenizer_config.json": _tokenizer_config(config["max_position_embeddings"], end),
        "modules.json": [
            {
                "idx": index,
                "name": str(index),
                "path": folder,
                "type": f"sentence_transformers.models.{kind}",
            }
            for index, (folder, kind) in enumerate(modules.items())
        ],
        "config_sentence_transformers.json": {
            "prompts": {"query": instruct(_SENTENCES[0][0], ""), "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
        "1_Pooling/config.json": {
            "word_embedding_dimension": config["hidden_size"],
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": False,
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
            "pooling_mode_weightedmean_tokens": False,
            "pooling_mode_lasttoken": True,
            "include_prompt": True,
        },
        "2_Normalize/config.json": {},
    }


def _tokenizer_config(context: int, end: int) -> dict[str, Any]:
    added = {
        str(end + position): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": position < _PLAIN,
        }
        for position, token in enumerate(SPECIAL_TOKENS)
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:_PLAIN]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": context,
        "pad_token": END_TOKEN,
        "padding_side": "left",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def main() -> None:
    """Run the command line ``python -m qwen3_embeddings.testing``."""
    parser = argparse.ArgumentParser(description="Write a tiny random Qwen3-Embedding checkpoint.")
    parser.add_argument("path", metavar="PATH", help="folder to write; it is created if needed")
    parser.add_argument("--dimensions", type=int, default=128, help="native size (128)")
    parser.add_argument("--layers", type=int, default=2, help="transformer layers (2)")
    parser.add_argument("--context", type=int, default=2048, help="longest input in tokens (2048)")
    parser.add_argument("--vocabulary", type=int, default=640, help="base vocabulary (640)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (0)")
    print(write_checkpoint(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
