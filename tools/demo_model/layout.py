"""Copy a trained checkpoint into the layout of the published embedding models."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from instructions import TASKS, with_instruction
from safetensors import safe_open

CONTEXT = 4096
MODULES = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
POOLING = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens")


def write(path: Path, content: object) -> None:
    """One JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def model_config(trained: Path) -> dict:
    """config.json with the published models' keys."""
    config = json.loads((trained / "config.json").read_text())
    end = config.pop("pad_token_id")  # the published models, too, name one token for all roles
    for key in ("rope_parameters", "dtype", "layer_types", "transformers_version"):
        config.pop(key, None)
    return config | {
        "architectures": ["Qwen3ForCausalLM"],
        "bos_token_id": end,
        "eos_token_id": end,
        "max_position_embeddings": CONTEXT,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def tokenizer_config(trained: Path) -> tuple[dict, dict]:
    """tokenizer_config.json and special_tokens_map.json."""
    special = json.loads((trained / "tokenizer_config.json").read_text())["extra_special_tokens"]
    roles = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    settings = {
        "additional_special_tokens": special,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    return settings | roles, roles | {"additional_special_tokens": special}


def publish(trained: Path, out: Path) -> None:
    """Write the folder."""
    out.mkdir(parents=True, exist_ok=True)
    with safe_open(trained / "model.safetensors", "np") as weights:
        assert "embed_tokens.weight" in weights.keys(), "names carry a prefix"  # noqa: SIM118
    shutil.copyfile(trained / "model.safetensors", out / "model.safetensors")
    tokenizer = json.loads((trained / "tokenizer.json").read_text("utf-8"))
    tokenizer |= {"truncation": None, "padding": None}
    text = json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":"))
    (out / "tokenizer.json").write_text(text, "utf-8")
    settings, special = tokenizer_config(trained)
    config = model_config(trained)
    write(out / "config.json", config)
    write(out / "tokenizer_config.json", settings)
    write(out / "special_tokens_map.json", special)
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (path, name) in enumerate(MODULES)
    ]
    write(out / "modules.json", modules)
    modes = {f"pooling_mode_{mode}": False for mode in POOLING} | {"pooling_mode_lasttoken": True}
    size = {"word_embedding_dimension": config["hidden_size"]}
    write(out / "1_Pooling/config.json", size | modes | {"include_prompt": True})
    prompts = {"query": with_instruction(TASKS["web"].instructions[0], ""), "document": ""}
    versions = {"sentence_transformers": "6.2.0"}
    write(
        out / "config_sentence_transformers.json",
        {
            "__version__": versions,
            "prompts": prompts,
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trained", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    publish(args.trained, args.out)


if __name__ == "__main__":
    main()
