"""The PyTorch engine: its model, its weights, its steps, and what it refuses."""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from qwen3_embeddings import (
    ConfigurationError,
    Embedder,
    EngineStartError,
    MissingDependencyError,
    UnknownModelError,
    models,
)
from qwen3_embeddings.engines import scheduling
from qwen3_embeddings.engines.scheduling import Limits
from qwen3_embeddings.engines.torch import lifecycle
from qwen3_embeddings.testing import write_checkpoint
from qwen3_embeddings.vectors import Vectors

if TYPE_CHECKING:
    from tests.conftest import RunScript

pytestmark = pytest.mark.engine


def worst_cosine(one: Vectors, other: Vectors) -> float:
    return float(np.abs((one.astype(np.float64) * other).sum(axis=1) - 1).max())


def direct(model: Path | str, **engine_kwargs: Any) -> Embedder:
    return Embedder(model, dtype="float32", engine="torch", engine_kwargs=engine_kwargs)


# Vectors.


@pytest.fixture(scope="module")
def alone(torch_embedder: Embedder, texts: list[str]) -> Vectors:
    """The vector of each text, embedded in a call of its own."""
    return np.concatenate([torch_embedder.encode_document([text]) for text in texts])


def test_vector_in_any_batch_is_the_vector_of_the_text_alone(
    torch_embedder: Embedder, texts: list[str], alone: Vectors
) -> None:
    chance = random.Random(7)
    np.testing.assert_allclose(torch_embedder.encode_document(texts), alone, atol=1e-6)
    for count in (len(texts), 2, 3, 7, 20, 33):
        group = chance.sample(range(len(texts)), count)
        rows = torch_embedder.encode_document([texts[i] for i in group])
        np.testing.assert_allclose(rows, alone[group], atol=1e-6)
        assert worst_cosine(rows, alone[group]) <= 1e-6


@pytest.mark.parametrize("engine_kwargs", [{"max_num_seqs": 3}, {"max_num_batched_tokens": 64}])
def test_vector_in_steps_of_any_size_is_the_vector_of_the_text_alone(
    engine_kwargs: dict[str, int], checkpoint: str, texts: list[str], alone: Vectors
) -> None:
    with direct(checkpoint, **engine_kwargs) as embedder:
        np.testing.assert_allclose(embedder.encode_document(texts), alone, atol=1e-6)


@pytest.mark.parametrize(
    "sizes", [{"dimensions": 96}, {"dimensions": 128, "layers": 1}, {"dimensions": 32}]
)
def test_checkpoint_of_another_shape_equals_the_reference(
    sizes: dict[str, int], texts: list[str], tmp_path: Path
) -> None:
    """As many key heads as query heads; one layer, which is the first and the last."""
    folder = write_checkpoint(tmp_path, seed=3, **sizes)
    with (
        direct(folder) as embedder,
        Embedder(folder, dtype="float32", engine="reference") as reference,
    ):
        few = texts[:20]
        found, expected = embedder.encode_document(few), reference.encode_document(few)
        assert worst_cosine(found, expected) <= 1e-6


def test_text_of_the_whole_context_equals_the_reference_and_needs_little_memory(
    tmp_path: Path, run_script: RunScript
) -> None:
    """Attention scores of 6,144 tokens would need 576 MiB."""
    folder = write_checkpoint(tmp_path / "model", context=6144)
    texts = ["1" * 6143, "short", "2" * 2000, ""]
    done = run_script(
        """
        import json, resource, sys
        import numpy as np
        from qwen3_embeddings import Embedder
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        embedder = Embedder(sys.argv[1], dtype="float32", engine="torch")
        embedder.encode_document(["short"])
        before = peak()
        np.save(sys.argv[3], embedder.encode_document(json.loads(sys.argv[2])))
        assert peak() - before < 250, f"{peak() - before} MiB"
        """,
        *(str(folder), json.dumps(texts), str(tmp_path / "rows.npy")),
    )
    assert (done.stdout, done.returncode) == ("", 0), done.stderr[-3000:]
    with Embedder(folder, dtype="float32", engine="reference") as reference:
        expected = reference.encode_document(texts)
    assert worst_cosine(np.load(tmp_path / "rows.npy"), expected) <= 1e-6


def test_token_without_a_row_in_the_table_has_a_finite_vector(tmp_path: Path) -> None:
    """The published 4B and 8B have fewer rows than their tokenizer has tokens."""
    from safetensors.numpy import load_file, save_file

    folder = write_checkpoint(tmp_path / "whole")
    with direct(folder) as embedder:
        expected = embedder.encode_document(["plain"])
    weights = load_file(folder / "model.safetensors")
    weights["embed_tokens.weight"] = weights["embed_tokens.weight"][:-1]  # "</think>"
    save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] -= 1
    (folder / "config.json").write_text(json.dumps(config))
    with direct(folder, max_num_seqs=2) as embedder:
        rows = embedder.encode_document(["plain", "a </think> b"])
    np.testing.assert_allclose(rows[:1], expected, atol=1e-6)
    assert np.isfinite(rows).all()


def test_doctor_finds_nothing_wrong(torch_embedder: Embedder) -> None:
    report = torch_embedder.doctor()
    assert {finding.status for finding in report.findings} <= {"ok", "skipped"}, str(report)


# Weights.


def sharded(folder: Path, prefix: str = "") -> None:
    """Split the weights of a checkpoint over three files, under another prefix."""
    from safetensors.numpy import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    files = {}
    for number in range(3):
        part = {f"{prefix}{name}": weights[name] for name in names[number::3]}
        if number == 0:
            part["lm_head.weight"] = np.zeros((4, 4), dtype=np.float32)
        file = f"model-{number + 1:05}-of-00003.safetensors"
        save_file(part, folder / file)
        files |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


@pytest.mark.parametrize("prefix", ["", "model."])
def test_sharded_weights_give_the_same_vectors(
    prefix: str, checkpoint: str, torch_embedder: Embedder, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "sharded"))
    sharded(folder, prefix)
    with direct(folder) as embedder:
        found = embedder.encode_document(["one", "two"])
    np.testing.assert_array_equal(found, torch_embedder.encode_document(["one", "two"]))


@pytest.mark.parametrize("shards", [False, True])
def test_model_in_the_hub_cache_is_loaded_offline(
    shards: bool, checkpoint: str, torch_embedder: Embedder, tmp_path: Path
) -> None:
    """In a process of its own: huggingface_hub reads HF_HOME when it is imported."""
    snapshot = tmp_path / "hub" / "models--someone--qwen3" / "snapshots" / "abc"
    shutil.copytree(checkpoint, snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    if shards:
        sharded(snapshot)
    script = """
        import sys
        import numpy as np
        from qwen3_embeddings import Embedder
        embedder = Embedder("someone/qwen3", dtype="float32", engine="torch")
        np.save(sys.argv[1], embedder.encode_document(["one"]))
    """
    out = tmp_path / "rows.npy"
    run_python(script, str(out), HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    expected = torch_embedder.encode_document(["one"])
    np.testing.assert_allclose(np.load(out), expected, atol=1e-6)


def run_python(script: str, *arguments: str, **environment: str) -> str:
    import os

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    ("name", "array", "said"),
    [
        (
            "layers.1.mlp.up_proj.weight",
            None,
            r"lacks 1 of the 24 tensors.* layers.1.mlp.up_proj.weight",
        ),
        ("norm.weight", np.ones(64, dtype=np.float32), r"norm.weight has the size \(64,\), not"),
        (
            "embed_tokens.weight",
            np.ones(64, dtype=np.float32),
            r"has the shape \[64\], and config.json",
        ),
    ],
)
def test_weights_that_do_not_fit_the_configuration_are_refused(
    name: str, array: np.ndarray | None, said: str, checkpoint: str, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    folder = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    if array is not None:
        weights[name] = array
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UnknownModelError, match=said):
        direct(folder).start()


def test_weights_of_another_format_are_refused(checkpoint: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "pickled"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigurationError, match="engine='vllm'"):
        direct(folder).start()


# Refusals.


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "quantized with awq"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, r"rotary embedding \(yarn\)"),
        ({"use_sliding_window": True}, "sliding windows"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding windows"),
        ({"attention_bias": True}, "attention biases"),
        ({"hidden_act": "gelu"}, "activation gelu"),
    ],
)
def test_checkpoint_that_needs_something_else_is_refused(
    change: dict[str, Any], said: str, checkpoint: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match=f"{said}.*engine='vllm'"):
        Embedder(folder, engine="torch").start()


def test_rotary_base_in_the_newer_layout_is_read(
    checkpoint: str, torch_embedder: Embedder, tmp_path: Path
) -> None:
    """transformers 5 writes `rope_parameters`."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "newer"))
    config = json.loads((folder / "config.json").read_text())
    theta = config.pop("rope_theta")
    del config["rope_scaling"]
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    (folder / "config.json").write_text(json.dumps(config))
    with direct(folder) as embedder:
        np.testing.assert_array_equal(
            embedder.encode_document(["one"]), torch_embedder.encode_document(["one"])
        )


@pytest.mark.parametrize(
    ("engine_kwargs", "said"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size.*engine='vllm'"),
        ({"dtype": "float32"}, "does not know"),
        ({"max_model_len": 10**6}, "over the context"),
        ({"max_num_seqs": 0}, "at least 1"),
        ({"max_num_batched_tokens": 1.5}, "at least 1"),
        ({"device": "cuda:99"}, "is not here"),
        ({"device": "abacus"}, "no device"),
        ({"kernels": "fast"}, "auto, torch, triton, vllm"),
        ({"kernels": "vllm", "device": "cpu"}, "needs a GPU"),
    ],
)
def test_engine_kwargs_that_cannot_work_are_refused(
    engine_kwargs: dict[str, Any], said: str, checkpoint: str
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        direct(checkpoint, **engine_kwargs).start()


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_device_is_any_name_of_pytorch_for_the_cpu(
    device: str, checkpoint: str, torch_embedder: Embedder
) -> None:
    with direct(checkpoint, device=device) as embedder:
        found = embedder.encode_document(["one"])
    np.testing.assert_array_equal(found, torch_embedder.encode_document(["one"]))


@pytest.mark.parametrize(
    ("where", "said", "advice"),
    [
        ("weights.read", "CUDA out of memory", "max_num_batched_tokens"),
        # Otherwise each call would start an engine that dies at its first step.
        ("kernels.TorchKernels.attend", "cuDNN version incompatibility", "device='cpu'"),
    ],
)
def test_start_that_fails_on_the_device_says_why_and_what_to_do(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, where: str, said: str, advice: str
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(f"qwen3_embeddings.engines.torch.{where}", fails)
    with pytest.raises(EngineStartError, match=rf"PyTorch could not start.*{said}.*{advice}"):
        direct(checkpoint, max_num_seqs=5).start()
    assert lifecycle.explain("ValueError: something else", "", "", {}) is None


def test_model_with_many_parameters_has_small_steps_soon_after_a_query(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"max_num_seqs": 7}
    with direct(checkpoint, **few) as embedder:
        embedder.start()
        assert embedder._lease.engine._thread._schedule.limits.mixed == 4096  # type: ignore
    monkeypatch.setattr(scheduling, "LARGE_MODEL", 1000)
    with direct(checkpoint, **few) as embedder:
        embedder.start()
        assert embedder._lease.engine._thread._schedule.limits.mixed == 2048  # type: ignore


# Steps.


def test_take_fills_a_step_in_order_and_sorts_it_by_length() -> None:
    from qwen3_embeddings.engines.torch import batches

    waiting = {"a": [1] * 5, "b": [1] * 2, "c": [1] * 4, "d": [1]}
    assert batches.take(waiting, Limits(11, 10, 1, 11)) == ["b", "c", "a"]
    assert batches.take(waiting, Limits(100, 2, 1, 100)) == ["b", "a"]
    assert batches.take(waiting, Limits(4, 10, 1, 4)) == ["a"], "a text is never split"
    assert batches.take({}, Limits(4, 10, 1, 4)) == []


def test_pack_with_padding_makes_the_padding_a_text_of_its_own() -> None:
    from qwen3_embeddings.engines.torch import batches

    texts = [[7], [8, 9, 10]]
    size = batches.Size(8, 4, 8)
    batch = batches.unpack(batches.pack(texts, size), size, [1, 3])
    assert batch.ids.tolist() == [7, 8, 9, 10, 0, 0, 0, 0]
    assert batch.positions.tolist() == [0, 0, 1, 2, 0, 0, 0, 0]
    assert batch.bounds.tolist() == [0, 1, 4, 8, 8]
    assert batch.last.tolist() == [0, 3, 7, 7]
    assert batch.runs == [(1, 1), (1, 3)]
    exact = batches.size_of(texts)
    assert batches.unpack(batches.pack(texts, exact), exact).bounds.tolist() == [0, 1, 4]


@pytest.mark.parametrize("padding", [[9], [7, 2]])
def test_padded_step_has_the_vectors_of_the_plain_one(checkpoint: str, padding: list[int]) -> None:
    """What a CUDA graph computes, on the CPU: padded texts and tokens change no vector."""
    import torch

    from qwen3_embeddings.engines.torch import batches

    core, tokenizer, _ = lifecycle.start(checkpoint, "float32", {})
    texts = [tokenizer.encode(text).ids for text in ("one", "two words", "a longer text")]
    texts.sort(key=len)
    size = batches.size_of(texts)
    padded = batches.Size(size.tokens + 9, len(texts) + len(padding), padding[0])
    lengths = [*map(len, texts), *padding]
    with torch.inference_mode():
        plain = batches.unpack(batches.pack(texts, size), size, map(len, texts))
        other = batches.unpack(batches.pack(texts, padded), padded, lengths)
        assert other.bounds.diff().tolist() == lengths
        expected = core._model.forward(plain)
        torch.testing.assert_close(core._model.forward(other)[:3], expected, atol=1e-6, rtol=0)


def test_forward_records_its_event_after_half_of_the_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from qwen3_embeddings.engines.torch import batches

    core, _, _ = lifecycle.start(str(write_checkpoint(tmp_path, layers=4)), "float32", {})
    model = core._model
    attend, attended, recorded = model.kernels.attend, [], []

    def count(*arguments: Any) -> Any:
        attended.append(1)
        return attend(*arguments)

    class Event:
        def record(self) -> None:
            recorded.append(len(attended))

    monkeypatch.setattr(model.kernels, "attend", count)
    size = batches.size_of([[5, 6]])
    with torch.inference_mode():
        model.forward(batches.unpack(batches.pack([[5, 6]], size), size, [2]), Event())  # type: ignore[arg-type]
    assert (len(attended), recorded) == (4, [2])


def test_wait_of_a_core_waits_for_half_of_the_newest_step(checkpoint: str) -> None:
    import torch

    from qwen3_embeddings.engines.torch.core import _Flight

    waited: list[str] = []

    class Event:
        def __init__(self, name: str) -> None:
            self.name = name

        def synchronize(self) -> None:
            waited.append(self.name)

    core, _, _ = lifecycle.start(checkpoint, "float32", {})
    core.wait()  # nothing is computed
    none = torch.empty(0)
    for name in ("oldest", "newest"):
        core._flights.append(_Flight([name], none, Event(name), None, none))  # type: ignore[arg-type]
    core.wait()
    assert waited == ["newest"]


@pytest.mark.parametrize("narrow", [False, True])
def test_every_step_up_to_the_largest_graph_fits_with_its_padding(narrow: bool) -> None:
    from qwen3_embeddings.engines.torch import graphs
    from qwen3_embeddings.engines.torch.batches import Size

    sizes = graphs.graph_sizes(8192, narrow=narrow)
    small = graphs.graph_sizes(1000, narrow=False)
    assert [size.tokens for size in small] == [32, 64, 128, 256, 384, 512, 768]
    for tokens in range(1, 8193):
        for texts in (1, 2, 16, 100, 256):
            if texts > tokens:
                continue
            longest = min(tokens, graphs.LONGEST)
            padded = graphs.fitting(Size(tokens, texts, longest), sizes)
            assert padded is not None
            assert padded.texts > texts
            assert padded.longest >= longest
            assert 0 <= padded.tokens - tokens <= (padded.texts - texts) * padded.longest
    assert graphs.fitting(Size(4000, 1, 4000), sizes) is None, "a text longer than LONGEST"
    assert graphs.fitting(Size(8193, 100, 100), sizes) is None
    assert graphs.fitting(Size(300, 257, 2), sizes) is None


@pytest.mark.parametrize(
    ("step", "graph"),
    [
        ((4000, 27, 150), (4096, 257, 256)),
        ((4090, 9, 512), (4096, 33, 2048)),
        ((4090, 33, 512), (4096, 257, 2048)),  # too many texts and too long ones
        ((5200, 100, 100), (6144, 257, 256)),  # the padding becomes four texts
        ((5200, 254, 100), (6144, 257, 2048)),  # not enough texts are left for that
        ((30, 1, 30), (32, 5, 32)),
    ],
)
def test_step_runs_in_the_narrowest_graph_that_fits(
    step: tuple[int, int, int], graph: tuple[int, int, int]
) -> None:
    from qwen3_embeddings.engines.torch import graphs
    from qwen3_embeddings.engines.torch.batches import Size

    sizes = graphs.graph_sizes(8192, narrow=True)
    assert graphs.fitting(Size(*step), sizes) == Size(*graph)


@pytest.mark.parametrize(("model", "most"), [("0.6B", 8192), ("4B", 2048), ("8B", 2048)])
@pytest.mark.parametrize("dense_grid", [False, True])
def test_graphs_of_a_core_fit_its_model_and_its_attention(
    monkeypatch: pytest.MonkeyPatch, model: str, most: int, dense_grid: bool
) -> None:
    """Of a large model only small steps have graphs; FlashAttention 2 has narrow ones too."""
    from qwen3_embeddings.engines.torch import core, graphs

    settings = replace(a_gpu("auto")[1], max_num_batched_tokens=32768)
    for name in ("set_device", "graph_pool_handle", "Stream"):
        monkeypatch.setattr(graphs.torch.cuda, name, lambda *_: None)
    loaded: Any = SimpleNamespace(kernels=SimpleNamespace(dense_grid=dense_grid))
    parameters = models.describe(f"Qwen/Qwen3-Embedding-{model}").parameters
    prepared = core.Core(loaded, settings, parameters)._graphs
    assert prepared is not None
    assert prepared._sizes == graphs.graph_sizes(most, narrow=dense_grid)
    assert prepared._sizes[-1].tokens == most


# The environment.


def test_engine_runs_without_vllm_and_transformers(
    checkpoint: str, torch_embedder: Embedder, tmp_path: Path
) -> None:
    out = tmp_path / "rows.npy"
    run_python(
        """
        import sys
        import numpy as np

        class Missing:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("vllm", "transformers", "sentence_transformers"):
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, Missing())
        from qwen3_embeddings import Embedder
        embedder = Embedder(sys.argv[1], dtype="float32", engine="torch")
        np.save(sys.argv[2], embedder.encode_document(["one", "two"]))
        """,
        checkpoint,
        str(out),
    )
    expected = torch_embedder.encode_document(["one", "two"])
    np.testing.assert_allclose(np.load(out), expected, atol=1e-6)


def test_fork_after_the_start_works_in_parent_and_child(
    checkpoint: str, run_script: RunScript
) -> None:
    done = run_script(
        """
        import os, sys
        import numpy as np
        from qwen3_embeddings import Embedder
        embedder = Embedder(sys.argv[1], dtype="float32", engine="torch")
        expected = embedder.encode_document(["one", "two"])
        pid = os.fork()
        rows = embedder.encode_document(["one", "two"])
        assert np.abs(rows - expected).max() < 2e-6, "wrong vectors"
        if pid == 0:
            embedder.close()
            print("child", flush=True)
            sys.exit()
        assert os.waitpid(pid, 0)[1] == 0
        print("parent")
        """,
        checkpoint,
        seconds=120,
    )
    assert (done.stdout, done.returncode) == ("child\nparent\n", 0), done.stderr[-3000:]


FUSED = """
import torch
from torch.nn.functional import rms_norm, silu
from qwen3_embeddings.engines.torch import fused

torch.manual_seed(0)
close = {"rtol": 2**-7, "atol": 2**-7}  # the interpreter cuts off what 16 bits cannot hold

for rows, width in ((7, 128), (1, 1024), (3, 2560)):
    x, weight = torch.randn(rows, width).bfloat16(), torch.rand(width).bfloat16()
    residual = torch.randn(rows, width)
    total = residual + x
    out = fused.add_norm(x, residual, weight, 1e-6)
    assert torch.equal(residual, total)
    assert out.dtype == torch.bfloat16
    expected = rms_norm(total, (width,), weight.float(), 1e-6)
    torch.testing.assert_close(out.float(), expected, **close)

for queries, keys, size in ((16, 8, 128), (2, 1, 64), (32, 8, 128)):
    positions = torch.tensor([0, 3, 1, 7, 2], dtype=torch.int32)
    angles = torch.outer(torch.arange(9.0), torch.rand(size // 2))
    qkv = torch.randn(5, (queries + 2 * keys) * size).bfloat16()
    q_norm, k_norm = torch.rand(size).bfloat16(), torch.rand(size).bfloat16()
    before = qkv.unflatten(1, (-1, size)).float()
    weights = torch.cat([q_norm.expand(queries, size), k_norm.expand(keys, size)]).float()
    normed = rms_norm(before[:, : queries + keys], (size,), eps=1e-6) * weights
    first, second = normed.chunk(2, -1)
    turns = angles[positions].unsqueeze(1)
    cos, sin = turns.cos(), turns.sin()
    turned = [first * cos - second * sin, second * cos + first * sin]
    table = torch.cat([angles.cos(), angles.sin()], 1)
    fused.heads(qkv, q_norm, k_norm, table, positions, (queries, keys), 1e-6)
    after = qkv.unflatten(1, (-1, size)).float()
    torch.testing.assert_close(after[:, : queries + keys], torch.cat(turned, -1), **close)
    assert torch.equal(after[:, queries + keys :], before[:, queries + keys :])

for width in (1, 200, 3072):
    gate_up = torch.randn(3, 2 * width).bfloat16()
    gate, up = gate_up.float().chunk(2, -1)
    torch.testing.assert_close(fused.gate(gate_up).float(), silu(gate) * up, **close)
"""


def test_fused_kernels_on_a_simulated_gpu_equal_pytorch() -> None:
    """Triton's interpreter runs the kernels on the CPU."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", FUSED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_fused_kernels_compile_for_a_gpu() -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from qwen3_embeddings.engines.torch import fused

    kernels: list[tuple[Any, str, dict[str, int]]] = [
        (fused._add_norm, "*bf16 *fp32 *bf16 *bf16 fp32", {"width": 1024, "block": 1024}),
        (
            fused._heads,
            "*bf16 *i32 *fp32 *bf16 *bf16 fp32",
            {"row": 4096, "queries": 16, "heads": 24, "half": 64, "block": 32},
        ),
        (fused._gate, "*bf16 *bf16", {"width": 3072, "block": 1024}),
    ]
    for kernel, types, constants in kernels:
        named = [*types.split(), *["constexpr"] * len(constants)]
        signature = dict(zip(kernel.arg_names, named, strict=True))
        source = ASTSource(kernel, signature, constexprs=constants)
        assert "ptx" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm


def a_gpu(kernels_wanted: str) -> tuple[Any, Any]:
    """Return a shape, and settings for a GPU that need not be there."""
    import torch

    from qwen3_embeddings.engines.torch.architecture import Shape
    from qwen3_embeddings.engines.torch.settings import Settings

    shape = Shape(
        layers=2,
        hidden=128,
        intermediate=256,
        heads=2,
        kv_heads=1,
        head_dim=64,
        epsilon=1e-6,
        theta=1e6,
    )
    device = torch.device("cuda", 0)
    return shape, Settings(torch.bfloat16, device, 512, 4096, 256, kernels=kernels_wanted)


def test_kernels_without_a_compiler_fall_back_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from qwen3_embeddings.engines.torch import fused, kernels

    def no_compiler(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(kernels.torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(kernels.torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(fused, "gate", no_compiler)
    assert type(kernels.choose(*a_gpu("auto"))) is kernels.TorchKernels
    assert "Failed to find C compiler" in caplog.text
    with pytest.raises(MissingDependencyError, match="python3-dev"):
        kernels.choose(*a_gpu("triton"))


ATTENTION = """
FA2_AVAILABLE, FA3_AVAILABLE = False, True
FA2_UNAVAILABLE_REASON = "no extension for FlashAttention 2"
def flash_attn_varlen_func(*, fa_version):
    return fa_version
"""


def test_kernels_of_an_installed_vllm_are_preferred(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Importing all of vLLM would take half of the start, so only one of its files is imported."""
    from qwen3_embeddings.engines.torch import flash_attention, fused, kernels

    folder = tmp_path / "vllm" / "vllm_flash_attn"
    folder.mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").write_text("raise ValueError('vLLM was imported')")
    (folder / "flash_attn_interface.py").write_text(ATTENTION)
    for name in ("vllm", flash_attention.PACKAGE, flash_attention.INTERFACE):
        monkeypatch.setitem(sys.modules, name, None)  # undoes also what the test imports
        del sys.modules[name]
    monkeypatch.syspath_prepend(str(tmp_path))
    capability = [9, 0]
    monkeypatch.setattr(kernels.torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(kernels.torch.cuda, "get_device_capability", lambda _: tuple(capability))
    monkeypatch.setattr(fused, "gate", lambda _: None)
    chosen = kernels.choose(*a_gpu("auto"))
    assert type(chosen) is kernels.VLLMKernels
    assert chosen._attention() == 3
    assert not chosen.dense_grid
    triton = kernels.choose(*a_gpu("triton"))
    assert type(triton) is kernels.TritonKernels
    assert triton.dense_grid
    capability[0] = 8
    assert type(kernels.choose(*a_gpu("auto"))) is kernels.TritonKernels
    with pytest.raises(MissingDependencyError, match="no extension for FlashAttention 2"):
        kernels.choose(*a_gpu("vllm"))
    with_both = ATTENTION.replace("False, True", "True, True")
    (folder / "flash_attn_interface.py").write_text(with_both)
    importlib.invalidate_caches()
    assert kernels.choose(*a_gpu("vllm")).dense_grid
    del sys.modules[flash_attention.INTERFACE], sys.modules[flash_attention.PACKAGE]
    for unlike, said in [
        ("raise OSError('libcudart')", "OSError: libcudart"),
        ("FA2_AVAILABLE = True", "flash_attn_varlen_func"),
        ("import not_there", "No module named 'not_there'"),
        (None, "No module named 'vllm.vllm_flash_attn.flash_attn_interface'"),
    ]:
        caplog.clear()
        shutil.rmtree(folder)
        folder.mkdir()
        if unlike:
            (folder / "flash_attn_interface.py").write_text(unlike)
        importlib.invalidate_caches()
        assert type(kernels.choose(*a_gpu("auto"))) is kernels.TritonKernels
        assert said in caplog.text
    monkeypatch.setitem(sys.modules, "vllm", object())
    assert type(kernels.choose(*a_gpu("auto"))) is kernels.TritonKernels
    with pytest.raises(MissingDependencyError, match="vLLM is not installed"):
        kernels.choose(*a_gpu("vllm"))


def test_attention_of_a_vllm_for_cpus_says_why_it_is_not_there() -> None:
    """The real file, in a process that has imported nothing else."""
    source = (
        "import sys, torch\n"
        "from qwen3_embeddings.engines.torch import flash_attention\n"
        "torch.cuda.get_device_capability = lambda device: (9, 0)\n"
        "try:\n"
        "    flash_attention.load(None)\n"
        "except ImportError as error:\n"
        "    print(error)\n"
        "print({'vllm', 'torch._inductor'} & set(sys.modules))\n"
    )
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    said, loaded = done.stdout.splitlines()
    assert "_vllm_fa3_C" in said
    assert loaded == "set()"
