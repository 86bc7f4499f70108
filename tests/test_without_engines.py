"""What users see who installed neither vLLM nor torch.

`bare_environment` is a virtual environment with nothing but the built wheels and the server extra.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

RunBare = Callable[[str], subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def bare_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with this package's wheel and its server extra."""
    folder = tmp_path_factory.mktemp("bare")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", folder, ROOT], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", f"{wheel}[server]"], check=True)
    return python


@pytest.fixture(scope="session")
def run_bare(bare_environment: Path, tmp_path_factory: pytest.TempPathFactory) -> RunBare:
    """Runs a script in that environment; one that hangs fails."""
    folder = tmp_path_factory.mktemp("bare-scripts")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}

    def run(script: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [bare_environment, "-c", textwrap.dedent(script)],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    return run


def test_the_environment_has_no_engine(run_bare: RunBare) -> None:
    done = run_bare(
        """
        import importlib.util
        import qwen3_embeddings
        for name in ("torch", "vllm", "transformers", "sentence_transformers", "tokenizers"):
            assert importlib.util.find_spec(name) is None, name
        print(qwen3_embeddings.__file__)
        """
    )
    assert done.returncode == 0, done.stderr
    assert "site-packages" in done.stdout


@pytest.mark.parametrize("engine", ["None", "'vllm'", "'torch'", "'reference'"])
@pytest.mark.parametrize("model", ["Qwen/Qwen3-Embedding-0.6B", "/no/such/folder"])
def test_constructor_without_the_engine_names_the_extra_and_base_url(
    engine: str, model: str, run_bare: RunBare
) -> None:
    done = run_bare(
        f"""
        from qwen3_embeddings import Embedder, MissingDependencyError
        try:
            Embedder({model!r}, engine={engine})
        except MissingDependencyError as error:
            print(error)
        """
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "pip install 'qwen3-embeddings[" in done.stdout
    assert "base_url=" in done.stdout
    assert done.stdout.count("\n") == 1


def test_vllm_engine_that_cannot_be_imported_answers_every_waiter(run_bare: RunBare) -> None:
    """A vLLM that is there and broken passes the constructor; torch, which it lacks, is missing."""
    done = run_bare(
        """
        import os, pathlib, sys
        from concurrent.futures import ThreadPoolExecutor
        pathlib.Path("vllm.py").write_text("import torch")
        sys.path.insert(0, os.getcwd())
        from qwen3_embeddings import Embedder, MissingDependencyError
        embedder = Embedder("Qwen/Qwen3-Embedding-0.6B")

        def call(number):
            try:
                embedder.encode_query([str(number)])
            except MissingDependencyError as error:
                return str(error)

        with ThreadPoolExecutor(8) as pool:
            said = set(pool.map(call, range(8)))
        embedder.close()
        print(*said)
        """
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "vLLM cannot be imported (No module named 'torch')" in done.stdout
    assert done.stdout.count("\n") == 1


def test_command_line_without_the_engine_says_what_to_install(run_bare: RunBare) -> None:
    done = run_bare(
        """
        from qwen3_embeddings.cli.main import main
        raise SystemExit(main(["serve", "Qwen/Qwen3-Embedding-0.6B"]))
        """
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "pip install 'qwen3-embeddings[vllm]'" in done.stderr
