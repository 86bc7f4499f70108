"""The engines and the texts the core's tests share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from qwen3_embeddings import Embedder

if TYPE_CHECKING:
    from conftest import RunningServer

CODE = 'def f(x):\n    if x:\n\t\treturn {"a": [1, 2]}\n    # done\n'
TEXTS = [
    *("", " ", "\n", "a", "A", "hello", "Hello, world!", "  both sides  ", "\tindented\n\n"),
    *("What is the capital of China?", "Explain gravity", "The capital of China is Beijing."),
    *("word " * 300, "long, long line; " * 100, "x" * 1500, "line\n" * 200, "Query:", "Instruct: "),
    *("中国的首都是哪里？", "北京是中华人民共和国的首都。", "你好，世界！", "数据库索引" * 60),
    *(
        "ما هي عاصمة الصين؟",
        "السلام عليكم ورحمة الله",
        "Привет, мир",
        "日本語のテキスト",
        "한국어 문장",
    ),
    *(
        "🙂",
        "👩‍👩‍👧‍👦 family 🏳️‍🌈",
        "mixed 中文 and English 🙂 text",
        "e\u0301 and \u00e9",
        "\u0958\u0001\u007f",
    ),
    *(CODE, "SELECT *\n  FROM t\n WHERE a <> 'b';", "for (;;) { /* */ }", "\r\nwindows\r\n"),
    *("<|endoftext|>", "before <|endoftext|> after", "<|im_start|>user\nhi<|im_end|>"),
    *(
        "https://example.org/a?b=c&d=%20",
        "1234567890",
        "3.14159e-10",
        "ＦＵＬＬ width",
        "ﬁ ligature",
    ),
    *("same text", "same text", "a" * 3 + " " * 50 + "b"),
]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Texts that go wrong elsewhere; two of them are equal."""
    assert len(TEXTS) >= 40
    return TEXTS


@pytest.fixture(scope="session")
def embedder(checkpoint: str) -> Iterator[Embedder]:
    """vLLM in this process, float32: the session's shared engine."""
    with Embedder(checkpoint, dtype="float32") as shared:
        yield shared


@pytest.fixture(scope="session")
def reference(checkpoint: str) -> Iterator[Embedder]:
    """sentence-transformers, float32: the yardstick."""
    with Embedder(checkpoint, dtype="float32", engine="reference") as shared:
        yield shared


@pytest.fixture(scope="session")
def remote(server: RunningServer) -> Iterator[Embedder]:
    """The real vLLM server."""
    with Embedder(base_url=server.base_url, api_key=server.api_key) as shared:
        yield shared
