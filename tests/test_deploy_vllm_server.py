"""integrations/vllm-server: what is committed is valid, current, and starts a real server.

vLLM's CPU build is started with the flags of the Compose file. Docker, a GPU and the published
weights are not at hand here: docs/deploy-vllm-server.md says what was not run.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import RunningServer, free_port, wait_until_healthy
from qwen3_embeddings.models import MODELS

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "integrations/vllm-server"
GUIDE = ROOT / "docs/deploy-vllm-server.md"
KEY = "sesame-street-789"
COMPOSE_FILES = sorted((ROOT / "integrations").glob("*/compose.yaml"))


@pytest.fixture(scope="module")
def scripts() -> Iterator[Any]:
    """The modules `generate` and `memory` of the folder."""
    sys.path.insert(0, str(FOLDER))
    try:
        import generate
        import memory

        yield generate, memory
    finally:
        sys.path.remove(str(FOLDER))


def services() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    return loaded


def unit() -> dict[str, str]:
    """The unit's settings; the last of a name wins."""
    lines = (FOLDER / "qwen3-embeddings.service").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


# Validity.


@pytest.mark.parametrize("path", COMPOSE_FILES, ids=lambda path: path.parent.name)
def test_compose_file_matches_the_specification(path: Path) -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*check, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", COMPOSE_FILES, ids=lambda path: path.parent.name)
def test_compose_images_are_pinned_and_ports_are_on_loopback(path: Path) -> None:
    for name, service in yaml.safe_load(path.read_text())["services"].items():
        image = service["image"].split(":-")[-1].rstrip("}")
        assert ":" in image, name
        assert not image.endswith(("latest", "main")), name
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", [])), name


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_systemd_unit_is_valid(tmp_path: Path) -> None:
    """With a program that exists, since systemd looks for it."""
    text = (FOLDER / "qwen3-embeddings.service").read_text()
    program = "/opt/qwen3-embeddings/bin/qwen3-embeddings"
    assert text.count(f"ExecStart={program} ") == 1
    path = tmp_path / "qwen3-embeddings.service"
    path.write_text(text.replace(f"ExecStart={program} ", "ExecStart=/bin/true "))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


# Currency: one source of flags.


def test_compose_file_is_what_generate_py_writes(scripts: Any) -> None:
    generate, _ = scripts
    assert (FOLDER / "compose.yaml").read_text() == generate.compose()


@pytest.mark.engine
def test_compose_flags_are_read_by_vllm(scripts: Any) -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    generate, memory = scripts
    assert {service["command"][0] for service in services().values()} == set(MODELS)
    for variant in generate.VARIANTS:
        service = services()["vllm-" + variant.profile.replace(".", "-")]
        model, *flags = service["command"]
        read = make_arg_parser(FlexibleArgumentParser()).parse_args(flags)
        assert (model, read.served_model_name) == (variant.model, [variant.model])
        assert (read.runner, read.convert, read.dtype) == ("pooling", "embed", "bfloat16")
        assert read.hf_overrides == {"is_matryoshka": True}
        assert read.quantization == ("fp8" if "fp8" in variant.profile else None)
        assert not read.disable_log_stats, "the monitoring reads /metrics"
        longest = memory.SMALL_CARD.context if variant.small else MODELS[model].context
        assert read.max_model_len == longest
        cache = read.kv_cache_memory_bytes / MODELS[model].kv_bytes_per_token
        assert cache > longest, "the longest text fits"


def test_compose_variants_fit_their_cards(scripts: Any) -> None:
    generate, memory = scripts
    for variant in generate.VARIANTS:
        flags = dict(flag.split("=", 1) for flag in generate.flags(variant) if "=" in flag)
        model = MODELS[variant.model]
        need = memory.weight_bytes(model, variant.precision) + memory.RUNTIME_BYTES
        need += int(flags["--kv-cache-memory-bytes"])
        need += memory.activation_bytes(model, int(flags["--max-num-batched-tokens"]))
        share = float(flags["--gpu-memory-utilization"])
        assert need <= share * variant.card * memory.GIB <= 0.95 * variant.card * memory.GIB


def test_systemd_unit_starts_serve_with_flags_it_knows(capsys: pytest.CaptureFixture[str]) -> None:
    """`serve` chooses the rest, for the card at hand: the same as in the Compose file."""
    from qwen3_embeddings.cli.main import main

    program, command, *arguments = shlex.split(unit()["ExecStart"])
    assert (program.rsplit("/", 1)[-1], command) == ("qwen3-embeddings", "serve")
    model = "Qwen/Qwen3-Embedding-0.6B"
    arguments = [word.replace("${MODEL}", model) for word in arguments]
    assert main(["serve", *arguments, "--print"]) == 0
    words = capsys.readouterr().out
    assert model in words
    assert "--host 127.0.0.1" in words
    example = (FOLDER / "env.example").read_text()
    assert f"MODEL={model}" in example
    assert "QWEN3_EMBEDDINGS_API_KEY=" in example


# A real server.


@pytest.fixture(scope="module")
def compose_server(
    checkpoint: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """vLLM's CPU build with the flags of the Compose service vllm-0-6b.

    Another model, address and size of the cache; every other flag is the file's own.
    """
    replaced = ("--max-model-len", "--kv-cache-memory-bytes", "--host", "--port", "--served")
    _, *flags = services()["vllm-0-6b"]["command"]
    kept = [flag for flag in flags if not flag.startswith(replaced)]
    assert len(flags) - len(kept) == len(replaced)
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", checkpoint]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny"]
    command += ["--kv-cache-memory-bytes", str(1 << 28), *kept]
    log = tmp_path_factory.mktemp("compose") / "log"
    environment = os.environ | {"VLLM_API_KEY": KEY, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}", process, log)
        yield RunningServer(f"http://127.0.0.1:{port}/v1", KEY, "tiny")
    finally:
        process.terminate()
        process.wait(timeout=30)


def verify(url: str, key: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run verify.sh with this source's `qwen3-embeddings` on the path."""
    program = folder / "qwen3-embeddings"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m qwen3_embeddings "$@"\n')
    program.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "QWEN3_EMBEDDINGS_API_KEY": key,
    }
    return subprocess.run(
        ["bash", str(FOLDER / "verify.sh"), url],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_verify_passes_on_a_server_with_the_flags_of_compose(
    compose_server: RunningServer, tmp_path: Path
) -> None:
    done = verify(compose_server.base_url.removesuffix("/v1"), KEY, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("All checks passed.\n")
    assert "ok    qwen3-embeddings doctor" in done.stdout
    assert "2 vectors of 32 dimensions" in done.stdout
    assert KEY not in done.stdout + done.stderr


def test_verify_fails_with_a_wrong_key(compose_server: RunningServer, tmp_path: Path) -> None:
    done = verify(compose_server.base_url.removesuffix("/v1"), "wrong", tmp_path)
    assert done.returncode == 1
    assert "FAIL  embeddings (200)" in done.stdout
    assert "FAIL  qwen3-embeddings doctor" in done.stdout


def test_verify_fails_when_no_server_answers(tmp_path: Path) -> None:
    done = verify(f"http://127.0.0.1:{free_port()}", KEY, tmp_path)
    assert done.returncode == 1
    assert "still starting" in done.stdout


# Memory.


def test_memory_weights_count_every_parameter(scripts: Any) -> None:
    _, memory = scripts
    for model in MODELS.values():
        assert sum(memory.parts(model).values()) == model.parameters
        assert memory.weight_bytes(model, "bf16") == 2 * model.parameters


def test_memory_bits_are_those_of_a_real_checkpoint(checkpoint: str, scripts: Any) -> None:
    """The weights' bytes computed from the shape are the bytes in the safetensors file."""
    from qwen3_embeddings.models import describe

    _, memory = scripts
    model = describe(checkpoint)
    (path,) = Path(checkpoint).glob("*.safetensors")
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    stored = sum(end - begin for begin, end in (t["data_offsets"] for t in header.values()))
    width = 4 if {tensor["dtype"] for tensor in header.values()} == {"F32"} else 2
    assert stored == width * sum(memory.parts(model).values())


def test_memory_table_of_the_guide_is_what_memory_py_prints(scripts: Any) -> None:
    _, memory = scripts
    assert "\n".join(memory.table()) in GUIDE.read_text()


# Open WebUI: its own test is deploy_open_webui.py.


def test_open_webui_compose_starts_vllm_with_the_flags_of_compose() -> None:
    ours = yaml.safe_load((ROOT / "integrations/open-webui/compose.yaml").read_text())["services"]
    assert ours["vllm"]["command"] == services()["vllm-0-6b-8gb"]["command"]
    assert ours["vllm"]["image"] in services()["vllm-0-6b-8gb"]["image"]
    assert ours["open-webui"]["environment"]["RAG_EMBEDDING_MODEL"] == ours["vllm"]["command"][0]


def test_open_webui_query_prefix_is_the_default_instruction_with_a_real_newline() -> None:
    from qwen3_embeddings.prompts import TASKS, instruct

    ours = yaml.safe_load((ROOT / "integrations/open-webui/compose.yaml").read_text())["services"]
    prefix = ours["open-webui"]["environment"]["RAG_EMBEDDING_QUERY_PREFIX"]
    assert prefix.count("\n") == 1
    assert prefix + "how long" == instruct(TASKS["web_search"].instruction, "how long")
