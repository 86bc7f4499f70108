"""What type checkers say about code that uses the installed packages, right and wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = re.compile(r"(qwen3_embeddings|langchain_qwen3|llama_index_embeddings_qwen3|_+editable)")

RIGHT = """
from pathlib import Path

import numpy as np
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_qwen3_embeddings import Qwen3Embeddings
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.embeddings.qwen3 import Qwen3Embedding
from numpy.typing import NDArray
from pydantic import SecretStr
from typing_extensions import assert_type

from qwen3_embeddings import TASKS, Embedder, Task, Usage, similarity
from qwen3_embeddings.integration import Dtype, EngineKind, OnError, Overflow, Role

Vector = np.ndarray[tuple[int], np.dtype[np.float32]]
Matrix = np.ndarray[tuple[int, int], np.dtype[np.float32]]


async def core(role: Role, overflow: Overflow, on_error: OnError, engine: EngineKind) -> None:
    dtype: Dtype = "bfloat16"
    embedder = Embedder(
        Path("model"), dimensions=64, task=Task("mine", "Find it"), api_key="key", timeout=None,
        overflow=overflow, on_error=on_error, engine=engine, dtype=dtype,
    )
    Embedder("model", api_key=SecretStr("key"), default_headers={"X-Team": "a"}, overflow="mean")
    assert_type(embedder.encode_query("text"), Vector)
    assert_type(embedder.encode_document(["text"]), Matrix)
    assert_type(await embedder.aencode_query("text"), Vector)
    assert_type(await embedder.aencode_document(text for text in "ab"), Matrix)
    rows: NDArray[np.float32] = embedder.encode_document(("a", "b"), show_progress=True)
    assert_type(embedder.count_tokens("text"), int)
    assert_type(embedder.count_tokens(["text"], role=role), list[int])
    assert_type(await embedder.acount_tokens("text"), int)
    assert_type(embedder.usage, Usage)
    assert_type(embedder.embedding_dimension, int)
    assert_type(embedder.similarity(rows, rows[0]), Matrix)
    assert_type(similarity(rows, rows), Matrix)
    with embedder.with_task("code") as code:
        assert_type(code, Embedder)


async def langchain(embeddings: Qwen3Embeddings) -> None:
    Qwen3Embeddings(model="model", api_key="key", base_url="http://host/v1", dimensions=64)
    Qwen3Embeddings(model=Path("model"), api_key=SecretStr("key"), task=TASKS["code"])
    Qwen3Embeddings(overflow="truncate", on_error="stop", dtype="float32", engine="server")
    Qwen3Embeddings(model_name="model", openai_api_key="key", openai_api_base="http://host/v1")
    Qwen3Embeddings(request_timeout=5, timeout=None, default_headers={"X-Team": "a"})
    base: Embeddings = embeddings
    InMemoryVectorStore(base)
    assert_type(embeddings.embed_query("text"), list[float])
    assert_type(embeddings.embed_documents(["text"], chunk_size=8), list[list[float]])
    assert_type(await embeddings.aembed_documents(["text"]), list[list[float]])
    assert_type(embeddings.count_tokens("text"), int)
    assert_type(embeddings.with_task("code"), Qwen3Embeddings)
    assert_type(embeddings.embedding_dimension, int)
    assert_type(embeddings.dimensions, int | None)
    async with embeddings as same:
        assert_type(same, Qwen3Embeddings)


async def llama_index(model: Qwen3Embedding) -> None:
    Qwen3Embedding("model", api_key="key", api_base="http://host/v1", dimensions=64)
    Qwen3Embedding(Path("model"), api_key=SecretStr("key"), task=Task("mine", "Find it"))
    Qwen3Embedding(overflow="truncate", on_error="stop", dtype="float32", engine="server")
    Qwen3Embedding(model="model", base_url="http://host/v1", timeout=None)
    base: BaseEmbedding = model
    base.get_query_embedding("text")
    assert_type(model.get_query_embedding("text"), list[float])
    assert_type(model.get_text_embedding_batch(["text"], show_progress=True), list[list[float]])
    assert_type(await model.aget_text_embedding_batch(["text"]), list[list[float]])
    assert_type(model.count_tokens(["text"]), list[int])
    assert_type(model.with_task("code"), Qwen3Embedding)
    with model as same:
        assert_type(same, Qwen3Embedding)
"""

# Each line is wrong for both checkers.
WRONG = """
Embedder("model", overflow="cut")
Embedder("model", on_error="skip")
Embedder("model", dtype="float16")
Embedder("model", engine="onnx")
Embedder("model", dimension=64)
Embedder("model", dimensions="512")
Embedder("model", api_key=5)
Embedder("model").encode_query(5)
Embedder("model").encode_query("text").tolist(5)
Embedder("model").fingerprint("passage")
Qwen3Embeddings(overflow="cut")
Qwen3Embeddings(on_error="skip")
Qwen3Embeddings(dtype="float16")
Qwen3Embeddings(engine="onnx")
Qwen3Embeddings(dimension=64)
Qwen3Embeddings(dimensions="512")
Qwen3Embeddings(modle="model")
Qwen3Embeddings(device="cuda")
Qwen3Embeddings(api_key=5)
Qwen3Embeddings().embed_query(["text"])
Qwen3Embeddings().embed_documents([5])
Qwen3Embeddings().misspelt = 5
Qwen3Embedding("model", overflow="cut")
Qwen3Embedding("model", on_error="skip")
Qwen3Embedding("model", dtype="float16")
Qwen3Embedding("model", engine="onnx")
Qwen3Embedding("model", dimension=64)
Qwen3Embedding("model", dimensions="512")
Qwen3Embedding("model", api_bas="http://host/v1")
Qwen3Embedding("model", device="cuda")
Qwen3Embedding("model", embed_batch_size="10")
Qwen3Embedding("model", api_key=5)
Qwen3Embedding("model").get_query_embedding(["text"])
Qwen3Embedding("model").get_text_embedding_batch([5])
"""
IMPORTS = """
from langchain_qwen3_embeddings import Qwen3Embeddings
from llama_index.embeddings.qwen3 import Qwen3Embedding
from qwen3_embeddings import Embedder
"""


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the user's code, and an environment that has the packages installed."""
    folder = tmp_path_factory.mktemp("user")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    for entry in (Path(path) for path in sys.path if path.endswith("-packages")):
        link_all(entry, site)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    projects = [ROOT, ROOT / "integrations" / "langchain", ROOT / "integrations" / "llama-index"]
    build += ["--no-build-isolation", "--wheel-dir", str(folder / "wheels"), *map(str, projects)]
    subprocess.run(build, check=True)
    for wheel in (folder / "wheels").iterdir():
        zipfile.ZipFile(wheel).extractall(site)
    (folder / "right.py").write_text(RIGHT)
    (folder / "wrong.py").write_text(IMPORTS.strip() + WRONG)
    return folder


def link_all(source: Path, target: Path) -> None:
    """Link what is installed, except what this repository builds; namespace folders are made."""
    for entry in source.iterdir():
        linked = target / entry.name
        if OURS.match(entry.name) or entry.suffix == ".pth" or linked.is_symlink():
            continue
        if entry.name in {"llama_index", "embeddings"} and entry.is_dir():
            linked.mkdir(exist_ok=True)
            link_all(entry, linked)
        elif entry.name != "qwen3":
            linked.symlink_to(entry)


def wrong_lines() -> set[tuple[str, int]]:
    first = IMPORTS.strip().count("\n") + 2
    return {("wrong.py", first + i) for i in range(len(WRONG.strip().splitlines()))}


def test_mypy_strict_accepts_right_code_and_flags_every_wrong_line(user: Path) -> None:
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary"]
    command += ["--python-executable", str(user / "env" / "bin" / "python")]
    command += ["--cache-dir", str(user / "cache"), "right.py", "wrong.py"]
    run = subprocess.run(command, cwd=user, capture_output=True, text=True, env={"PATH": ""})
    found = {
        (match[1], int(match[2])) for match in re.finditer(r"(?m)^(\S+?):(\d+): error", run.stdout)
    }
    assert found == wrong_lines(), run.stdout + run.stderr


def test_pyright_accepts_right_code_and_flags_every_wrong_line(user: Path) -> None:
    """basedpyright in its standard mode has pyright's rules, and brings the Node.js it needs."""
    config = {"typeCheckingMode": "standard", "include": ["right.py", "wrong.py"]}
    (user / "pyrightconfig.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath"]
    command += [str(user / "env" / "bin" / "python"), "--project", str(user)]
    run = subprocess.run(command, cwd=user, capture_output=True, text=True)
    found = {
        (Path(finding["file"]).name, finding["range"]["start"]["line"] + 1)
        for finding in json.loads(run.stdout)["generalDiagnostics"]
        if finding["severity"] == "error"
    }
    assert found == wrong_lines(), run.stdout + run.stderr
