"""Draw training.json: the loss, and the pairs kept back."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PARTS = {"web": "English", "web_zh": "Chinese", "code": "code"}


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("training", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    facts = json.loads(args.training.read_text())
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    for name, label in (("loss", "texts"), ("pairs", "pairs")):
        rows = [row for row in facts["log"] if name in row]
        left.plot([r["step"] for r in rows], [r[name] for r in rows], linewidth=0.8, label=label)
    left.set(xlabel="step", ylabel="loss, five sizes together", ylim=(0, 8))
    left.legend()
    steps = [row["step"] for row in facts["curve"]]
    for part, name in PARTS.items():
        values = [row["kept_back"][part] for row in facts["curve"]]
        right.plot(steps, values, ".-", label=name)
    right.set(xlabel="step", ylabel="nDCG@10, pairs kept back", ylim=(0, 1))
    right.legend()
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
