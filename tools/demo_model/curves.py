"""Draw training.json: the loss, and the written evaluation on the way."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PARTS = {"en": "English", "zh": "Chinese", "code": "code"}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("training", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    facts = json.loads(args.training.read_text())
    log = [row for row in facts["log"] if "loss" in row]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    left.plot([row["step"] for row in log], [float(row["loss"]) for row in log], linewidth=0.8)
    left.set(xlabel="step", ylabel="loss, four sizes together")
    steps = [row["step"] for row in facts["curve"]]
    for part, name in PARTS.items():
        right.plot(steps, [row[f"ndcg@10_{part}"] for row in facts["curve"]], ".-", label=name)
    right.set(xlabel="step", ylabel="nDCG@10, 256 numbers", ylim=(0, 1))
    right.legend()
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
