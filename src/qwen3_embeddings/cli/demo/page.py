"""Write the demo as one HTML page without external resources."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from qwen3_embeddings.cli.demo.corpus import Passage, Query
from qwen3_embeddings.cli.demo.report import Line, Search
from qwen3_embeddings.errors import ConfigurationError
from qwen3_embeddings.prompts import TASKS

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --paper: #fff; --soft: #5a6474;
  --edge: #d9dee6; --bar: #4a76c9; --right: #1d7f4e; --tint: #eef7f1; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ef; --paper: #14181f; --soft: #9aa5b5;
  --edge: #323a46; --bar: #6d97e6; --right: #5cc793; --tint: #17281f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 58rem; padding: 1.5rem 1rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, "Noto Sans CJK SC", "PingFang SC",
  "Microsoft YaHei", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0 0 1rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 0; }
p { margin: .2rem 0; }
dl { display: grid; grid-template-columns: 7rem 1fr; gap: .3rem 1rem; margin: 1rem 0; }
dt, .task, .id { color: var(--soft); }
dd { margin: 0; }
.task, .id { font-size: .85rem; }
ol { list-style: none; margin: .6rem 0 0; padding: 0; }
li { border: 1px solid var(--edge); border-radius: 6px; margin: .5rem 0; padding: .6rem .8rem; }
li.right { border-color: var(--right); background: var(--tint); }
.right b { color: var(--right); }
.text { margin: .2rem 0 .5rem; white-space: pre-wrap; }
.code { font: .85rem/1.45 ui-monospace, monospace; }
.score { display: grid; grid-template-columns: 6rem 1fr 3.2rem; gap: .6rem; align-items: center;
  font-size: .8rem; color: var(--soft); }
.score span:last-child { text-align: right; font-variant-numeric: tabular-nums; }
.track { height: .45rem; border-radius: 3px; background: var(--edge); }
.bar { display: block; height: 100%; border-radius: 3px; background: var(--bar); }
.right .bar { background: var(--right); }
@media (max-width: 36rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin: 0 0 .6rem; } }
"""


def check(path: Path) -> None:
    """Check that the page can be written, before an engine starts.

    Raises:
        ConfigurationError: `path` is a folder, its folder is missing, or it cannot be written.
    """
    try:
        if path.is_dir():
            raise ConfigurationError(f"--html {path} is a folder. Name a file in it.")
        if not path.parent.is_dir():
            raise ConfigurationError(
                f"--html: no folder {path.parent}. Create it, or name another."
            )
        with path.open("a"):
            pass
    except OSError as error:  # is_dir() also raises it, for a name that is too long
        raise ConfigurationError(f"--html {path} cannot be written ({error.strerror}).") from error


def write(
    path: Path,
    facts: Sequence[Line],
    passages: Sequence[Passage],
    queries: Sequence[Query],
    searches: Sequence[Search],
) -> None:
    """Write the page.

    Args:
        path: File to write; an existing one is replaced.
        facts: The labelled lines of the terminal, in order.
        passages: The corpus.
        queries: The queries, in the order of the results.
        searches: The results of each framework.
    """
    path.write_text(page(facts, passages, queries, searches), encoding="utf-8")


def page(
    facts: Sequence[Line],
    passages: Sequence[Passage],
    queries: Sequence[Query],
    searches: Sequence[Search],
) -> str:
    """Return the page as HTML; the arguments are those of `write`."""
    rows = "\n".join(f"<dt>{escape(label)}</dt><dd>{escape(text)}</dd>" for label, text in facts)
    corpus = {passage.id: passage for passage in passages}
    sections = "\n".join(
        _section(
            number,
            query,
            corpus,
            {s.name: {hit.id: hit.score for hit in s.found[number - 1]} for s in searches},
        )
        for number, query in enumerate(queries, 1)
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>qwen3-embeddings demo</title>
<style>{STYLE}</style>
</head>
<body>
<h1>qwen3-embeddings demo</h1>
<dl>
{rows}
</dl>
<p>Each query with its task and instruction, and its nearest passages. A bar is the cosine of query
and passage, from 0 to 1. The right passage is green and marked ✓.</p>
{sections}
</body>
</html>
"""


def _section(
    number: int, query: Query, corpus: dict[str, Passage], found: dict[str, dict[str, float]]
) -> str:
    """Return a query and its hits; `found` has the score of each passage in each framework."""
    hits = list(dict.fromkeys(name for scores in found.values() for name in scores))
    items = "\n".join(_hit(corpus[name], name == query.answer, found) for name in hits)
    absent = "" if query.answer in hits else "\n<p>The right passage is not among them.</p>"
    return f"""<section>
<h2>{number}. {escape(query.text)}</h2>
<p class="task"><b>{escape(query.task)}</b> · {escape(TASKS[query.task].instruction)}</p>
<ol>
{items}
</ol>{absent}
</section>"""


def _hit(passage: Passage, right: bool, found: dict[str, dict[str, float]]) -> str:
    """Return one passage with its score in each framework that found it."""
    scores = "\n".join(
        f'<div class="score"><span>{escape(framework)}</span><span class="track"><span class="bar" '
        f'style="width: {100 * min(1.0, max(0.0, of[passage.id])):.1f}%"></span></span>'
        f"<span>{of[passage.id]:.3f}</span></div>"
        for framework, of in found.items()
        if passage.id in of
    )
    kind = "text" if passage.language in {"en", "zh"} else "text code"
    mark = " <b>✓ right passage</b>" if right else ""
    return f"""<li{' class="right"' if right else ""}>
<div class="id">{escape(passage.id)}{mark}</div>
<div class="{kind}" lang="{escape(passage.language)}">{escape(passage.text)}</div>
{scores}
</li>"""
