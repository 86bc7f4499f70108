"""Checkpoints that cannot be loaded: one plain sentence each, from either engine."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import numpy as np
import pytest

from qwen3_embeddings import (
    ConfigurationError,
    Embedder,
    EngineStartError,
    Qwen3EmbeddingsError,
    UnknownModelError,
    models,
)
from qwen3_embeddings.checkpoint import check_weights
from qwen3_embeddings.tokenizer import load_tokenizer

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:0437e45c94563b09e13cb7a64478fc406947a93cb34a7e05870fc8dcd48e23fd\n"
    "size 1191586416\n"
)


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def adapter(folder: Path) -> None:
    emptied(folder)
    base = {"base_model_name_or_path": "Qwen/Qwen3-Embedding-0.6B", "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(base))
    (folder / "adapter_model.safetensors").write_bytes(b"")


def ggufs(folder: Path) -> None:
    emptied(folder)
    (folder / "Qwen3-Embedding-0.6B-Q8_0.gguf").write_bytes(b"GGUF")


def weights_replaced(file: str, content: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / file).write_text(content)

    return change


def adapter_with_config(folder: Path) -> None:
    config = (folder / "config.json").read_text()
    adapter(folder)
    (folder / "config.json").write_text(config)


def without(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()

    return change


def pointer(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(POINTER)

    return change


def cut(name: str, size: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:size])

    return change


def sharded(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    files = {"norm.weight": "model-00001-of-00002.safetensors"}
    files["embed_tokens.weight"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def settings(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def tensors(change: Callable[[str], str | None]) -> Callable[[Path], None]:
    """Rename tensors of a valid file; None leaves one out."""

    def rewrite(folder: Path) -> None:
        from safetensors.numpy import load_file, save_file

        file = folder / "model.safetensors"
        kept = {change(name): value for name, value in load_file(file).items()}
        named = {name: value for name, value in kept.items() if name}
        save_file(named, file, metadata={"format": "pt"})

    return rewrite


def lacking(*parts: str) -> Callable[[Path], None]:
    return tensors(lambda name: None if any(part in name for part in parts) else name)


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty folder": (emptied, r"is empty\. Pass the folder of a downloaded checkpoint"),
    "LoRA adapter": (adapter, r"LoRA adapter of Qwen/Qwen3-Embedding-0\.6B, .* Merge the two"),
    "GGUF folder": (ggufs, r"Q8_0\.gguf' is a GGUF file, .*llama-server .*base_url="),
    "no config": (without("config.json"), r"has no config\.json, .* download the model again"),
    "no tokenizer": (without("tokenizer.json"), r"has no tokenizer\.json, .*Copy it from"),
    "no weights": (without("model.safetensors"), r"holds no weights: .* Download the whole model"),
    "config is a pointer": (pointer("config.json"), r"config\.json is a git-lfs pointer"),
    "tokenizer is a pointer": (pointer("tokenizer.json"), r"tokenizer\.json is a git-lfs pointer"),
    "weights are a pointer": (
        pointer("model.safetensors"),
        r"model\.safetensors is a git-lfs pointer, .* Run `git lfs pull`",
    ),
    "pickled weights are a pointer": (
        weights_replaced("pytorch_model.bin", POINTER),
        r"pytorch_model\.bin is a git-lfs pointer, .* Run `git lfs pull`",
    ),
    "tokenizer config is a pointer": (
        pointer("tokenizer_config.json"),
        r"tokenizer_config\.json is a git-lfs pointer",
    ),
    "modules are a pointer": (pointer("modules.json"), r"modules\.json is a git-lfs pointer"),
    "truncated modules": (
        cut("modules.json", 20),
        r"modules\.json is not JSON .* Download it again",
    ),
    "GGUF weights": (
        weights_replaced("Qwen3-Embedding-0.6B-Q8_0.gguf", "GGUF"),
        r"Q8_0\.gguf' is a GGUF file, .*llama-server .*base_url=",
    ),
    "LoRA adapter with a config": (
        adapter_with_config,
        r"LoRA adapter of Qwen/Qwen3-Embedding-0\.6B, .* Merge the two",
    ),
    "larger vocabulary": (
        settings(vocab_size=1000),
        r"not fit its config\.json: embed_tokens\.weight has the shape \[\d+, 128\], .*\[1000, 1",
    ),
    "more heads": (settings(num_attention_heads=8), r"q_proj\.weight has the shape \[128, 128\]"),
    "truncated weights": (
        cut("model.safetensors", 300_000),
        r"truncated: it has 300,000 of [\d,]+",
    ),
    "truncated header": (cut("model.safetensors", 500), r"not a complete safetensors file"),
    "empty weights": (cut("model.safetensors", 0), r"not a complete safetensors file"),
    "truncated tokenizer": (cut("tokenizer.json", 5000), r"tokenizer\.json is not a tokenizer"),
    "truncated config": (cut("config.json", 100), r"config\.json of .* cannot be read"),
    "missing shard": (sharded, r"model-00002-of-00002\.safetensors, which .*index\.json names, is"),
    "another architecture": (settings(model_type="bert"), r"model_type 'bert', not 'qwen3'"),
    "no q_proj": (
        lacking("layers.0.self_attn.q_proj"),
        r"lacks 1 of the 24 tensors .*: layers\.0\.self_attn\.q_proj\.weight\. Download the",
    ),
    "no gate_proj": (lacking("layers.1.mlp.gate_proj"), r"layers\.1\.mlp\.gate_proj\.weight\. D"),
    "no second layer": (lacking("layers.1."), r"lacks 11 of the 24 .*: (\S+, ){2}\S+ and 8 more\."),
    "names of an adapter": (
        tensors(lambda name: f"base_model.model.{name}"),
        r"lacks 24 of the 24 tensors .*: embed_tokens\.weight, .* Merge the adapter first",
    ),
    "AWQ in float32": (
        settings(quantization_config={"quant_method": "awq", "bits": 4}),
        r"quantized with awq, whose kernels compute in 16 bits\. Leave dtype out",
    ),
    "GPTQ in float32": (
        settings(quantization_config={"quant_method": "gptq", "bits": 4}),
        r"quantized with gptq, whose kernels compute in 16 bits\. Leave dtype out",
    ),
    "fp8 in float32": (
        settings(quantization_config={"quant_method": "fp8"}),
        r"quantized with fp8, whose kernels compute in 16 bits\. Leave dtype out",
    ),
}


@pytest.fixture
def copy(checkpoint: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def start_error(model: str, engine: str, **more: Any) -> str:
    """What a start says; nothing of the engine may have begun to load."""
    with (
        Embedder(model, engine=engine, dtype="float32", **more) as embedder,
        pytest.raises(Qwen3EmbeddingsError) as caught,
    ):
        embedder.start()
    assert isinstance(caught.value, UnknownModelError | ConfigurationError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("engine", ["vllm", "reference"])
@pytest.mark.parametrize("name", BROKEN)
def test_start_with_a_broken_checkpoint_says_what_is_wrong(
    name: str, engine: str, copy: Path
) -> None:
    change, expected = BROKEN[name]
    change(copy)
    assert re.search(expected, said := start_error(str(copy), engine)), said


@pytest.mark.parametrize("engine", ["vllm", "reference"])
def test_weights_with_the_prefix_of_a_causal_model_are_embedded(
    engine: str, checkpoint: str, copy: Path
) -> None:
    """The published checkpoints have none, and many fine-tunes do."""
    tensors(lambda name: f"model.{name}")(copy)
    with Embedder(str(copy), engine=engine, dtype="float32") as embedder:
        vector = embedder.encode_document("a")
    with Embedder(checkpoint, engine=engine, dtype="float32") as embedder:
        assert np.abs(vector - embedder.encode_document("a")).max() < 1e-5


@pytest.mark.parametrize("changes", [{"quantization_config": {"quant_method": "fp8"}}, {}])
def test_tensors_of_quantized_weights_have_names_of_their_own(
    changes: dict[str, Any], copy: Path
) -> None:
    settings(**changes)(copy)
    lacking("q_proj")(copy)
    refused = contextlib.nullcontext() if changes else pytest.raises(UnknownModelError)
    with refused:
        check_weights(str(copy))


@pytest.mark.engine
@pytest.mark.parametrize("engine", ["vllm", "reference"])
@pytest.mark.parametrize(
    ("file", "expected"),
    [("model.gguf", "is a GGUF file, .*base_url="), ("model.bin", "is a file, not a checkpoint")],
)
def test_start_with_a_file_as_model_says_what_to_pass(
    file: str, expected: str, engine: str, tmp_path: Path
) -> None:
    path = tmp_path / file
    path.write_bytes(b"GGUF")
    assert re.search(expected, said := start_error(str(path), engine)), said


@pytest.mark.parametrize("url", ["http://localhost:8000/v1", "https://example.org"])
def test_url_as_model_is_pointed_to_base_url(url: str) -> None:
    with pytest.raises(UnknownModelError, match=f"URL, not a model.*base_url='{url}'"):
        models.describe(url)


@pytest.mark.engine
@pytest.mark.parametrize("engine", ["vllm", "reference"])
@pytest.mark.parametrize("model", ["Qwen/Qwen3-Embedding-0.6B", "someone/a-fine-tune"])
def test_start_offline_with_a_hub_id_that_is_not_cached_says_both(
    model: str, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    said = start_error(model, engine)
    assert "HF_HUB_OFFLINE forbids asking the hub" in said
    assert f"hf download {model}" in said


def cached(checkpoint: str, cache: Path, name: str) -> Path:
    """Put a checkpoint into a hub cache, as a download would; return its files' folder."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    return Path(shutil.copytree(checkpoint, repository / "snapshots" / "abc"))


@pytest.mark.parametrize("engine", ["vllm", "reference"])
def test_start_offline_with_an_incomplete_download_names_the_file(
    engine: str, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    (cached(checkpoint, tmp_path, "some/model") / "model.safetensors").unlink()
    assert "holds no weights" in start_error("some/model", engine)


def test_cached_model_is_described_and_tokenized_without_the_hub(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("asked"))
    cached(checkpoint, tmp_path, "some/model")
    assert models.describe("some/model").dimensions == 128
    assert (
        load_tokenizer("some/model").encode("a").ids[-1:]
        == load_tokenizer(checkpoint).encode("").ids
    )


@pytest.mark.parametrize("error", ["missing", "file", "other"])
def test_hub_that_refuses_a_file_is_quoted_with_what_to_do(
    error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import httpx
    from huggingface_hub import errors

    answer = httpx.Response(404, request=httpx.Request("GET", "http://localhost"))
    raised, said = {
        "missing": (errors.RepositoryNotFoundError("404", response=answer), "no model .*HF_TOKEN"),
        "file": (errors.RemoteEntryNotFoundError("404", response=answer), "no config.json, so it"),
        "other": (OSError("reset by peer"), "reset by peer.*Try again"),
    }[error]

    def download(*_: object, **__: object) -> str:
        raise raised

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(UnknownModelError, match=said):
        models.describe("some/model")


@pytest.mark.parametrize(
    ("change", "engine_kwargs", "expected"),
    [
        (None, {"quantization": "fp8"}, r"quantized with fp8, .* compute in float32\. Leave dtype"),
        (None, {"quantization": "bitsandbytes"}, "does not know .* bitsandbytes"),
        (settings(num_hidden_layers=1), {}, r"no parameter [\w.]+\. Download the model again"),
    ],
)
def test_start_that_vllm_refuses_is_said_in_a_plain_sentence(
    change: Callable[[Path], None] | None,
    engine_kwargs: dict[str, Any],
    expected: str,
    copy: Path,
) -> None:
    """pydantic prints all arguments, and vLLM a list of all it knows."""
    if change:
        change(copy)
    with (
        Embedder(str(copy), dtype="float32", engine_kwargs=engine_kwargs) as embedder,
        pytest.raises(EngineStartError, match=expected) as caught,
    ):
        embedder.start()
    assert "\n" not in str(caught.value)
    assert "ArgsKwargs" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("config", "dtype", "precision"),
    [
        ({"quantization_config": {"quant_method": "awq"}, "dtype": "float16"}, "auto", "bfloat16"),
        ({"quantization_config": {"quant_method": "fp8"}}, "bfloat16", "bfloat16"),
        ({"quantization_config": {"quant_method": "torchao"}}, "float32", "float32"),
        ({"quantization_config": None}, "auto", "float32"),
    ],
)
def test_precision_of_a_quantized_checkpoint(
    config: dict[str, Any], dtype: str, precision: str, copy: Path
) -> None:
    settings(**config)(copy)
    assert models.describe(str(copy)).precision(dtype) == precision


def test_folder_under_the_home_folder_is_found(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(copy.parent))
    assert models.describe("~/copy").dimensions == 128
    assert load_tokenizer("~/copy").encode("a").ids
    assert models.weights_digest("~/copy") == models.weights_digest(str(copy))
    with pytest.raises(UnknownModelError, match="there is no folder"):
        models.describe("~no-such-user/copy")


def test_fingerprint_of_truncated_weights_is_refused(copy: Path) -> None:
    cut("model.safetensors", 300)(copy)
    with pytest.raises(UnknownModelError, match="safetensors"):
        models.weights_digest(str(copy))


def test_tokenizer_equals_that_of_transformers(checkpoint: str, texts: list[str]) -> None:
    """Which the server and sentence-transformers load."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(checkpoint)
    ours = load_tokenizer(checkpoint)
    assert [ours.encode(text).ids for text in texts] == [
        theirs(text)["input_ids"] for text in texts
    ]
