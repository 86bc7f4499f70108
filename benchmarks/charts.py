"""Draw the two charts of docs/performance.md from a file of results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

IN_PROCESS = {
    "sentence-transformers": "sentence-transformers",
    "LLM.embed": "vllm.LLM.embed",
    "ours": 'Embedder, engine="vllm"',
    "ours, torch": 'Embedder, engine="torch"',
    "ours, LangChain": 'Qwen3Embeddings (LangChain), engine="vllm"',
    "ours, LlamaIndex": 'Qwen3Embedding (LlamaIndex), engine="vllm"',
}
THROUGH_SERVER = {
    ("torch", "ours"): "serve --engine torch + Embedder",
    ("ours", "ours"): "serve + Embedder",
    ("plain", "ours"): "vllm serve + Embedder",
    ("plain", "langchain-openai"): "vllm serve + langchain-openai",
    ("transformers", "langchain-openai"): "Transformers + FastAPI",
}


def draw(results: dict[str, Any], folder: Path) -> None:
    """Write one SVG file per section that has results."""
    folder.mkdir(parents=True, exist_ok=True)
    plt.rcParams["svg.hashsalt"] = "qwen3-embeddings"  # the same results make the same file
    if figures := results.get("bulk"):
        in_process(figures, folder / "in-process.svg")
    if figures := results.get("server"):
        through_server(figures, folder / "server.svg")


def in_process(figures: dict[str, Any], path: Path) -> None:
    """Tokens per second by tokens per text, as groups of bars."""
    figure, axes = plt.subplots(figsize=(7, 3.6))
    shown = [name for name in IN_PROCESS if name in figures]
    lengths = [n for n in figures[shown[0]] if n.isdigit()]
    width = 0.84 / len(shown)
    for i, name in enumerate(shown):
        places = [x + (i - (len(shown) - 1) / 2) * width for x in range(len(lengths))]
        best = [max(figures[name][n]) * int(n) / 1000 for n in lengths]
        bars = axes.bar(places, best, 0.95 * width, label=IN_PROCESS[name])
        axes.bar_label(bars, fmt="{:,.0f}", fontsize=6)
    axes.set_xticks(range(len(lengths)), [f"{n} tokens per text" for n in lengths])
    axes.set(ylabel="thousand tokens/s, best of two runs")
    _finish(figure, axes, path)


def through_server(figures: dict[str, Any], path: Path) -> None:
    """Single texts per second by number of concurrent callers."""
    figure, axes = plt.subplots(figsize=(7, 3.6))
    for (kind, client), label in THROUGH_SERVER.items():
        loops = figures.get(kind, {}).get(client, {}).get("clients")
        if not loops:
            continue
        rates = [loop["texts_per_second"] for loop in loops.values()]
        axes.plot([int(n) for n in loops], rates, marker="o", label=label)
    axes.set(
        xscale="log", yscale="log", xlabel="concurrent callers, one text each", ylabel="texts/s"
    )
    axes.set_xticks([1, 8, 64, 256], ["1", "8", "64", "256"])
    _finish(figure, axes, path)


def _finish(figure: Any, axes: Any, path: Path) -> None:
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    print(path)
