"""Write trained weights and their tokenizer in the layout of the published embedding models."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from instructions import TASKS, with_instruction
from safetensors import safe_open
from student import EPS, HEAD, THETA
from tokenizers import Tokenizer
from vocabulary import SPECIAL

CONTEXT = 4096
MODULES = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
POOLING = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens")


def write(path: Path, content: object) -> None:
    """Write one JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def model_config(weights: Path, end: int) -> dict:
    """Return config.json with the keys of the published models; sizes come from the weights."""
    with safe_open(weights, "np") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    vocabulary, size = shapes["embed_tokens.weight"]
    heads = shapes["layers.0.self_attn.q_proj.weight"][0] // HEAD
    layers = sum(name.endswith("q_proj.weight") for name in shapes)
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": end,
        "eos_token_id": end,
        "head_dim": HEAD,
        "hidden_act": "silu",
        "hidden_size": size,
        "initializer_range": 0.02,
        "intermediate_size": shapes["layers.0.mlp.gate_proj.weight"][0],
        "max_position_embeddings": CONTEXT,
        "max_window_layers": layers,
        "model_type": "qwen3",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": heads,
        "rms_norm_eps": EPS,
        "rope_scaling": None,
        "rope_theta": THETA,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocabulary,
    }


def tokenizer_config() -> tuple[dict, dict]:
    """Return tokenizer_config.json and special_tokens_map.json."""
    special = [token for token in SPECIAL if token != "<|endoftext|>"]
    roles = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    settings = {
        "add_prefix_space": False,
        "additional_special_tokens": special,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    return settings | roles, roles | {"additional_special_tokens": special}


def sentence_transformers(out: Path, size: int) -> None:
    """Write the files of sentence-transformers."""
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (path, name) in enumerate(MODULES)
    ]
    write(out / "modules.json", modules)
    modes = {f"pooling_mode_{mode}": False for mode in POOLING} | {"pooling_mode_lasttoken": True}
    pooling = {"word_embedding_dimension": size} | modes | {"include_prompt": True}
    write(out / "1_Pooling/config.json", pooling)
    prompts = {"query": with_instruction(TASKS["web"].instructions[0], ""), "document": ""}
    settings = {
        "__version__": {"sentence_transformers": "6.2.0"},
        "prompts": prompts,
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    write(out / "config_sentence_transformers.json", settings)


def publish(weights: Path, tokenizer: Path, out: Path) -> None:
    """Write the folder."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(weights, out / "model.safetensors")
    content = json.loads(tokenizer.read_text("utf-8")) | {"truncation": None, "padding": None}
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    (out / "tokenizer.json").write_text(text, "utf-8")
    end = Tokenizer.from_file(str(tokenizer)).token_to_id("<|endoftext|>")
    config = model_config(weights, end)
    write(out / "config.json", config)
    settings, special = tokenizer_config()
    write(out / "tokenizer_config.json", settings)
    write(out / "special_tokens_map.json", special)
    sentence_transformers(out, config["hidden_size"])


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", type=Path, help="model.safetensors of train.py")
    parser.add_argument("tokenizer", type=Path, help="tokenizer.json of vocabulary.py")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    publish(args.weights, args.tokenizer, args.out)


if __name__ == "__main__":
    main()
