"""Check the wording of documents, docstrings, comments and messages.

    python tools/prose/check.py [PATH ...]     default: every file

Terms: tools/prose/terms.txt. Markdown, also in notebooks, and docstrings are checked for
sentences over 25 words too.
Code, inline code and links are not read, so identifiers cause no findings.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import os
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

LONGEST_SENTENCE = 25  # words
TERMS = [
    (re.compile(rf"\b({pattern})\b", re.IGNORECASE), advice)
    for line in Path(__file__).with_name("terms.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
    for pattern, advice in [line.split("\t")]
]
SKIPPED = re.compile(r"^(\.|build/|dist/|tools/prose/)|/evaluation/")
CODE = re.compile(r"```.*?```|``.*?``|`[^`]*`|<!--.*?-->|\]\([^)]*\)|https?://\S+", re.DOTALL)


def python(source: str, with_strings: bool) -> Iterator[tuple[int, str, bool]]:
    """Yield comments, and docstrings or every string of two words: line, text, if a docstring."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string, False
    nodes = list(ast.walk(ast.parse(source)))
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            is_docstring = id(node) in docstrings
            if with_strings or is_docstring:
                yield node.lineno, node.value, is_docstring


def long_sentences(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line and start of each sentence of prose that is too long."""
    for block in re.finditer(r"(?:^(?![|#>\s]*$)(?!\||#|    ).+\n?)+", text, re.MULTILINE):
        items = re.split(r"\n\s*(?:[-*]|\d+\.)\s", block[0])
        for sentence in (s for item in items for s in re.split(r"(?<=[.!?:])\s+", item)):
            words = re.sub(r"\([^)]*\)", "", sentence).split()
            if sum(any(map(str.isalnum, word)) for word in words) > LONGEST_SENTENCE:
                yield text.count("\n", 0, text.index(sentence)) + 1, " ".join(words[:6])


def findings(path: Path) -> Iterator[str]:
    """Yield one line per finding in a file."""
    text = path.read_text(encoding="utf-8")
    pieces = [(1, text, True)]
    if path.suffix == ".py":
        pieces = list(python(text, with_strings="tests" not in path.parts))
    if path.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        pieces = [(1, "".join(cell["source"]), True) for cell in cells]
    for start, piece, is_prose in pieces:
        prose = CODE.sub(lambda m: "`" + "\n" * m[0].count("\n"), piece)
        for pattern, advice in TERMS:
            for match in pattern.finditer(prose):
                line = start + prose.count("\n", 0, match.start())
                yield f"{path}:{line}: {' '.join(match[0].split())!r}: write {advice}"
        if is_prose:
            prose = inspect.cleandoc(prose) if path.suffix == ".py" else prose
            yield from (f"{path}:{start + n - 1}: over {LONGEST_SENTENCE} words: {s} …"
                        for n, s in long_sentences(prose))  # fmt: skip


def main() -> int:
    """Print the findings; return 1 if there are any."""
    tops = [Path(name) for name in sys.argv[1:] or sorted(os.listdir())]
    files = [f for t in tops if not SKIPPED.search(f"{t}/") for f in (t, *t.rglob("*"))]
    paths = {
        f for f in files if f.suffix in {".ipynb", ".md", ".py"} and not SKIPPED.search(str(f))
    }
    found = [finding for path in sorted(paths) for finding in findings(path)]
    print("\n".join(found) or "no findings")
    return bool(found)


if __name__ == "__main__":
    raise SystemExit(main())
