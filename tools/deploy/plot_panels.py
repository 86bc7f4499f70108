"""Draw the data of every dashboard panel, as `make test-monitoring` saw it.

    python tools/deploy/plot_panels.py build/monitoring/panels.json docs/images/monitoring

One picture per row of the dashboard. Not Grafana's rendering: the same series, by matplotlib.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DASHBOARD = Path(__file__).parents[2] / "integrations/monitoring/dashboard.json"
UNITS = {"s": "seconds", "percentunit": "share", "bytes": "MiB", "short": ""}


def label(legend: str, metric: dict[str, str]) -> str:
    """Fill in the legend as Grafana does; the server's port says nothing to a reader."""
    metric = metric | {"instance": ""}
    return re.sub(r"\{\{(\w+)\}\}", lambda name: metric.get(name[1], ""), legend).strip()


def draw(axes: Any, panel: dict[str, Any], queries: dict[str, Any]) -> None:
    """Draw one panel: lines over the minutes of the load."""
    unit = panel["fieldConfig"]["defaults"]["unit"]
    scale = 2.0**-20 if unit == "bytes" else 1.0
    for legend in [query["legendFormat"] for query in panel["targets"]]:
        for line in queries[legend]:
            times, values = zip(*line["values"], strict=True)
            minutes = [(time - times[0]) / 60 for time in times]
            points = [float(value) * scale for value in values]
            axes.plot(minutes, points, label=label(legend, line["metric"]) or None, linewidth=1.4)
    axes.set_title(panel["title"], fontsize=10)
    axes.set_ylabel(UNITS[unit], fontsize=8)
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8)


def main(source: Path, target: Path) -> None:
    """Write one PNG per row of the dashboard."""
    data = json.loads(source.read_text())
    target.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, Any]]] = {}
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        if panel["type"] == "row":
            row = rows.setdefault(panel["title"], [])
        else:
            row.append(panel)
    for title, panels in rows.items():
        columns = min(len(panels), 3 if len(panels) != 4 else 4)
        lines = -(-len(panels) // columns)
        figure, grid = plt.subplots(
            lines, columns, figsize=(4 * columns, 2.8 * lines), squeeze=False, layout="constrained"
        )
        for axes, panel in zip(grid.flat, panels, strict=True):
            draw(axes, panel, data[panel["title"]])
            axes.set_xlabel("minutes", fontsize=8)
        figure.savefig(target / f"{title.lower()}.png", dpi=100)
        plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
