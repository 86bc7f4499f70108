"""Draw the training's curves from training.json."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("training", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    log = [row for row in json.loads(args.training.read_text())["log"] if "loss" in row]
    steps = [row["step"] for row in log]
    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    axes.plot(steps, [float(row["loss"]) for row in log], linewidth=0.8)
    axes.set(xlabel="step", ylabel="loss (four sizes together)", yscale="log")
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
