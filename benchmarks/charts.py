"""Draws benchmarks.json: throughput by length, latency by clients, share of the card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt


def draw(results: dict[str, Any], folder: Path) -> None:
    """Write one SVG a chart that has figures."""
    folder.mkdir(parents=True, exist_ok=True)
    if figures := results.get("bulk"):
        throughput(figures, folder / "throughput.svg")
        if "card" in figures:
            share(figures, folder / "share.svg")
    if figures := results.get("server"):
        latency(figures, folder / "latency.svg")


def throughput(figures: dict[str, Any], path: Path) -> None:
    """Texts a second by tokens a text, both logarithmic."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, mine in figures.items():
        lengths = [int(n) for n in mine if n.isdigit()]
        if lengths:
            axes.plot(lengths, [max(mine[str(n)]) for n in lengths], marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens a text", ylabel="texts/s, best run")
    _finish(figure, axes, path)


def share(figures: dict[str, Any], path: Path) -> None:
    """How much of the card's matrix products is used, by tokens a text."""
    figure, axes = plt.subplots(figsize=(7, 4))
    peak = figures["card"]["peak_tokens_per_second"]
    for name, mine in figures.items():
        lengths = [int(n) for n in mine if n.isdigit()]
        if lengths:
            values = [100 * max(mine[str(n)]) * n / peak for n in lengths]
            axes.plot(lengths, values, marker="o", label=name)
    axes.set(xscale="log", ylim=(0, 100), xlabel="tokens a text", ylabel="% of the card")
    _finish(figure, axes, path)


def latency(figures: dict[str, Any], path: Path) -> None:
    """99th percentile of single texts by number of clients."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for kind, contenders in figures.items():
        for name, mine in contenders.items():
            loops = mine.get("clients", {})
            if loops:
                label = f"{kind} server, {name}"
                values = [loop["p99_ms"] for loop in loops.values()]
                axes.plot([int(n) for n in loops], values, marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel="clients, one text each", ylabel="p99, ms")
    _finish(figure, axes, path)


def _finish(figure: Any, axes: Any, path: Path) -> None:
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    print(path)
