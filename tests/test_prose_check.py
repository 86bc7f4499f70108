"""tools/prose/check.py finds banned terms and long sentences, and nothing in code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CHECK = Path(__file__).parents[1] / "tools/prose/check.py"


def check(path: Path, text: str) -> tuple[int, str]:
    path.write_text(text, encoding="utf-8")
    done = subprocess.run([sys.executable, CHECK, path], capture_output=True, text=True)
    return done.returncode, done.stdout.replace(str(path), "file")


def test_markdown_with_a_banned_term_is_reported_by_line(tmp_path: Path) -> None:
    code, said = check(tmp_path / "page.md", "# Title\n\nThe server mends it.\n")
    assert code == 1
    assert said == "file:3: 'mends': write fix\n"


def test_markdown_with_terms_in_code_only_has_no_findings(tmp_path: Path) -> None:
    text = "Call `road()` at [x](https://example.com/told).\n\n```python\nroom = road\n```\n"
    assert check(tmp_path / "page.md", text) == (0, "no findings\n")


def test_markdown_sentence_over_25_words_is_reported(tmp_path: Path) -> None:
    long, short = "word " * 25 + "end.", "Word " * 24 + "end."
    code, said = check(tmp_path / "page.md", f"{short}\n\n{long} Short.\n")
    assert code == 1
    assert said.startswith("file:3: over 25 words: word word")
    assert said.count("\n") == 1


def test_python_comments_docstrings_and_messages_are_read_but_not_identifiers(
    tmp_path: Path,
) -> None:
    source = '"""A road."""\nroad = 1  # the room\nraise ValueError("it was told so")\n'
    code, said = check(tmp_path / "module.py", source)
    assert code == 1
    assert [line.split(":")[1] for line in said.splitlines()] == ["2", "1", "3"]


def test_python_docstring_sentence_over_25_words_is_reported(tmp_path: Path) -> None:
    long = "word " * 25 + "end."
    source = f'def f():\n    """Do it.\n\n    {long}\n    """\n    return "{long}"\n'
    code, said = check(tmp_path / "module.py", source)
    assert (code, said.count("\n")) == (1, 1)
    assert said.startswith("file:4: over 25 words")
