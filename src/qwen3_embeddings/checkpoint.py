"""The files of a checkpoint: find them, and say what is wrong with them before an engine starts.

A model is a local folder, or a hub id whose files are in the Hugging Face cache or on the hub. The
hub is asked only for what is not on this machine.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qwen3_embeddings.errors import ConfigurationError, UnknownModelError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""First bytes of a git-lfs pointer file (git-lfs, docs/spec.md)."""

INDEX = "model.safetensors.index.json"
"""File that says which file holds each tensor of sharded weights."""

ADAPTER = "adapter_config.json"

ENGINE_FILES = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("generation_config.json", "modules.json", "config_sentence_transformers.json"),
    *("sentence_bert_config.json", "1_Pooling/config.json", "2_Normalize/config.json"),
)
"""JSON files that transformers, vLLM or sentence-transformers read where they exist."""

LAYER_TENSORS = (
    *("input_layernorm", "post_attention_layernorm"),
    *(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
"""Tensors of each layer of a Qwen3 model (transformers, models/qwen3/modeling_qwen3.py)."""


def local_folder(name: str) -> Path | None:
    """Return the folder `name`, a leading ``~`` expanded; None when there is no such folder."""
    folder = Path(os.path.expanduser(name))
    return folder if folder.is_dir() else None


def find_file(name: str, file: str, revision: str | None = None) -> Path:
    """Return the path of one file of a checkpoint.

    Args:
        name: hub id or folder.
        file: name of the file.
        revision: branch, tag or commit on the hub.

    Raises:
        UnknownModelError: there is no such model, it has no such file, or the file is a git-lfs
            pointer.
    """
    if folder := local_folder(name):
        path = folder / file
        if not path.is_file():
            raise UnknownModelError(_incomplete(folder, file))
    elif _is_hub_id(name):
        path = _from_hub(name, file, revision)
    else:
        raise UnknownModelError(_no_checkpoint(name))
    _refuse_pointer(path)
    return path


def read_json(name: str, file: str, revision: str | None = None) -> dict[str, Any]:
    """Return the contents of one JSON file of a checkpoint.

    Args:
        name: hub id or folder.
        file: name of the file.
        revision: branch, tag or commit on the hub.

    Raises:
        UnknownModelError: as `find_file`, or the file is not a JSON object.
    """
    try:
        content = json.loads(find_file(name, file, revision).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if isinstance(error, UnknownModelError):
            raise
        raise UnknownModelError(
            f"{file} of {name!r} cannot be read ({error}). Download it again."
        ) from error
    if not isinstance(content, dict):
        raise UnknownModelError(f"{file} of {name!r} is not a JSON object. Download it again.")
    return content


def check_weights(name: str) -> None:
    """Check that the weights on this machine are complete, by their sizes and headers.

    A hub id is checked only in offline mode: otherwise the engine downloads what is missing.

    Raises:
        UnknownModelError: weights are missing, truncated, or git-lfs pointers.
    """
    folder = local_folder(name) or _offline_snapshot(name)
    if folder is None:
        return
    for read in ENGINE_FILES:
        _check_json(folder / read)
    files = sorted(set(folder.glob("*.safetensors")) - {folder / "adapter_model.safetensors"})
    files += [folder / shard for shard in _shards(folder) if folder / shard not in files]
    pickles = [] if files else sorted(folder.glob("pytorch_model*.bin"))
    if not files and not pickles:
        raise UnknownModelError(_incomplete(folder, "weights"))
    for file in pickles:
        _refuse_pointer(file)
    for file in files:
        if not file.is_file():
            raise UnknownModelError(
                f"{file.name}, which model.safetensors.index.json names, is missing in {folder}. "
                "Download the model again."
            )
        safetensors_header(file)
    _check_tensors(name, folder, files)


def _check_tensors(name: str, folder: Path, files: list[Path]) -> None:
    """Check that safetensors files hold every tensor that ``config.json`` implies, in its shape.

    vLLM fuses tensors such as q, k and v, and does not notice when one of them is missing.
    transformers puts random values in the place of any missing tensor.

    Raises:
        UnknownModelError: a tensor is missing, or has another shape.
    """
    config = read_json(str(folder), "config.json")
    if not files or config.get("model_type") != "qwen3" or config.get("quantization_config"):
        return
    found: dict[str, Any] = {}
    for file in files:
        header = json.loads(safetensors_header(file)[0])
        header.pop("__metadata__", None)
        found |= {tensor: entry.get("shape") for tensor, entry in header.items()}
    layers = range(config.get("num_hidden_layers") or 0)
    needed = ["embed_tokens.weight", "norm.weight"]
    needed += [f"layers.{layer}.{part}.weight" for layer in layers for part in LAYER_TENSORS]
    missing = [tensor for tensor in needed if not {tensor, f"model.{tensor}"} & found.keys()]
    if missing:
        raise UnknownModelError(_lacks(name, missing, len(needed), found))
    for tensor, shape in _implied_shapes(config).items():
        stored = found.get(tensor) or found.get(f"model.{tensor}")
        if stored and stored != shape:
            raise UnknownModelError(
                f"the weights of {name!r} do not fit its config.json: {tensor} has the shape "
                f"{stored}, and config.json implies {shape}. Download the whole model again."
            )


def _implied_shapes(config: dict[str, Any]) -> dict[str, list[int]]:
    """Return the shapes of the tensors that show whether the sizes in ``config.json`` are right."""
    size, head = config.get("hidden_size"), config.get("head_dim")
    rows = {
        "embed_tokens": config.get("vocab_size"),
        "layers.0.mlp.gate_proj": config.get("intermediate_size"),
    }
    if head:
        for part, count in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            rows[f"layers.0.self_attn.{part}"] = head * (config.get(count) or 0)
    return {f"{name}.weight": [count, size] for name, count in rows.items() if count and size}


def _lacks(name: str, missing: list[str], needed: int, found: Iterable[str]) -> str:
    """Describe weights without some of the tensors that they need."""
    advice = "Download the whole model again."
    if any(tensor.startswith("base_model.") for tensor in found):
        advice = (
            "Names that begin with base_model. are those of peft. Merge the adapter first "
            "(PeftModel.merge_and_unload, then save_pretrained), and pass the merged folder."
        )
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return (
        f"{name!r} lacks {len(missing)} of the {needed} tensors that its config.json implies: "
        f"{', '.join(missing[:3])}{more}. {advice}"
    )


def safetensors_files(name: str, revision: str | None = None) -> list[Path]:
    """Return the files that hold the weights: one, or those that the index names.

    Args:
        name: hub id or folder.
        revision: branch, tag or commit on the hub.

    Raises:
        ConfigurationError: the folder has weights in another format only.
        UnknownModelError: there is no such model, or a file is missing.
    """
    if folder := local_folder(name):
        names = list(_shards(folder)) or [path.name for path in folder.glob("*.safetensors")]
        if not names and list(folder.glob("pytorch_model*.bin")):
            raise ConfigurationError(
                f"{name!r} has its weights as pytorch_model.bin only, and this engine reads "
                "safetensors. Use engine='vllm', or save the model again with save_pretrained."
            )
        return [find_file(name, file) for file in sorted(names)]
    try:
        return [find_file(name, "model.safetensors", revision)]
    except UnknownModelError as missing:
        try:
            index = find_file(name, INDEX, revision)
        except UnknownModelError:
            raise missing from None
    return [find_file(name, file, revision) for file in _shards(index.parent)]


def safetensors_header(path: Path) -> tuple[bytes, dict[str, int]]:
    """Return the header of a safetensors file, and where the data of each tensor begins.

    Format: eight bytes of header length, little endian, the JSON header, the data
    (https://github.com/huggingface/safetensors, README).

    Raises:
        UnknownModelError: the file is not a safetensors file, or it is truncated.
    """
    _refuse_pointer(path)
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, size))
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        offsets = {name: tensor["data_offsets"] for name, tensor in entries.items()}
        end = 8 + length + max((stop for _, stop in offsets.values()), default=0)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UnknownModelError(
            f"{path} is not a complete safetensors file ({error}). Download it again."
        ) from error
    if size < end:
        raise UnknownModelError(
            f"{path} is truncated: it has {size:,} of {end:,} bytes. Download it again."
        )
    return header, {name: 8 + length + start for name, (start, _) in offsets.items()}


def _check_json(path: Path) -> None:
    """Raise for a file that an engine could not read; none is no fault."""
    if not path.is_file():
        return
    _refuse_pointer(path)
    try:
        json.loads(path.read_bytes())
    except ValueError as error:
        raise UnknownModelError(f"{path} is not JSON ({error}). Download it again.") from error


def _shards(folder: Path) -> Iterator[str]:
    """Return the files that the index of sharded weights names; none without an index."""
    if not (folder / INDEX).is_file():
        return
    files = read_json(str(folder), INDEX).get("weight_map")
    if not isinstance(files, dict):
        raise UnknownModelError(f"{folder / INDEX} has no weight_map. Download it again.")
    yield from sorted({str(file) for file in files.values()})


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UnknownModelError(
                f"{path} is a git-lfs pointer, not the file itself: the model was cloned without "
                "git-lfs. Run `git lfs pull` in that folder, or download the model with "
                "`hf download`."
            )


def _incomplete(folder: Path, file: str) -> str:
    """Describe a folder without one of the files that a checkpoint needs."""
    if file in {"config.json", "weights"} and (folder / ADAPTER).is_file():
        base = read_json(str(folder), ADAPTER).get("base_model_name_or_path", "its base model")
        return (
            f"{str(folder)!r} is a LoRA adapter of {base}, not a whole model. Merge the two with "
            "peft (PeftModel.merge_and_unload, then save_pretrained) and pass the merged folder."
        )
    if ggufs := sorted(folder.glob("*.gguf")):
        return _gguf(ggufs[0])
    if not any(folder.iterdir()):
        return f"the folder {str(folder)!r} is empty. Pass the folder of a downloaded checkpoint."
    if file == "weights":
        return (
            f"{str(folder)!r} holds no weights: no *.safetensors and no pytorch_model.bin. "
            "Download the whole model."
        )
    if file == "tokenizer.json":
        return (
            f"{str(folder)!r} has no tokenizer.json, so there is no tokenizer that appends the end "
            "token. Copy it from the published model, or download the model again."
        )
    return (
        f"the folder {str(folder)!r} has no {file}, so it is not a complete checkpoint. Pass the "
        "folder that holds it, or download the model again."
    )


def _no_checkpoint(name: str) -> str:
    """Describe a name that is neither a folder nor the id of a hub repository."""
    if name.startswith(("http://", "https://")):
        return f"{name!r} is a URL, not a model. If a server has it, pass base_url={name!r}."
    path = Path(os.path.expanduser(name))
    if path.is_file():
        if path.suffix == ".gguf":
            return _gguf(path)
        return f"{name!r} is a file, not a checkpoint. Pass the folder that holds config.json."
    return (
        f"there is no folder {name!r}, and it is no hub id, which has the form owner/name. Check "
        "the spelling, or pass the path of a downloaded checkpoint."
    )


def _gguf(path: Path) -> str:
    return (
        f"{str(path)!r} is a GGUF file, which vLLM and sentence-transformers do not load here. "
        "Pass the original checkpoint, or serve the file with llama.cpp (llama-server "
        "--embedding --pooling last) and pass base_url=…."
    )


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _from_hub(name: str, file: str, revision: str | None) -> Path:
    """Return a file of a hub repository, from the cache where it is there."""
    try:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError as error:
        raise UnknownModelError(
            f"there is no folder {name!r}, and huggingface_hub is not installed to ask the hub. "
            "Check the spelling, or run pip install huggingface_hub."
        ) from error
    try:
        cached = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
        return Path(hf_hub_download(name, file, revision=revision))
    except (OSError, ValueError, EntryNotFoundError) as error:
        raise UnknownModelError(_hub_refusal(name, file, error)) from error


def _hub_refusal(name: str, file: str, error: Exception) -> str:
    """Describe why the hub does not return a file."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        why = "the hub cannot be reached"
        if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE forbids asking the hub"
        return (
            f"there is no folder {name!r} and no copy of that model's {file} in the Hugging Face "
            f"cache, and {why}. Check the spelling (for example Qwen/Qwen3-Embedding-0.6B), or run "
            f"`hf download {name}` where the hub can be reached and pass the path of the download."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"the hub has no model {name!r} that this machine may read. Check the spelling; for a "
            "private or gated model set HF_TOKEN."
        )
    if isinstance(error, errors.EntryNotFoundError):
        return (
            f"the hub repository {name!r} has no {file}, so it is not a complete checkpoint. It "
            "may hold GGUF files or a LoRA adapter only: pass the original checkpoint."
        )
    return f"the hub did not return {file} of {name!r} ({error}). Try again, or pass a folder."


def _offline_snapshot(name: str) -> Path | None:
    """Return the cached folder of a hub id if the hub will not be asked for more files."""
    if not _is_hub_id(name):
        return None
    try:
        from huggingface_hub import constants, try_to_load_from_cache
    except ImportError:
        return None
    cached = try_to_load_from_cache(name, "config.json")
    if not constants.HF_HUB_OFFLINE or not isinstance(cached, str):
        return None
    return Path(cached).parent
