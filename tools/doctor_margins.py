"""Measure how far the doctor's limits are from what right and faulty engines return.

    python tools/doctor_margins.py [--checkpoint FOLDER ...]

Runs the checks with sentence-transformers in float32 and bfloat16. The checkpoints are random ones
of several shapes, the demo model, and the folders on the command line, first right, then faulty.
Prints docs/doctor.md's table "Margins": per check the closest value of a right engine, the limits,
and the closest value of a faulty one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from safetensors.numpy import load_file, save_file

from qwen3_embeddings.doctor.runner import CHECKS
from qwen3_embeddings.doctor.subject import CannotTellError, Subject
from qwen3_embeddings.engines.base import Prompt, Usage
from qwen3_embeddings.engines.sentence_transformers import ReferenceEngine
from qwen3_embeddings.testing import write_checkpoint
from qwen3_embeddings.vectors import Vectors

DEMO = Path(__file__).parents[1] / "models/demo/qwen3_embeddings_demo_model/checkpoint"
RANDOM = (
    *((128, 2, 0.02), (128, 2, 0.05), (128, 28, 0.02), (256, 12, 0.05), (512, 6, 0.02)),
    (1024, 4, 0.05),
)
"""(dimensions, layers, standard deviation) of the random checkpoints."""

LARGER_IS_RIGHT = {"end token", "pooling", "precision", "unaltered", "context"}
CHECKED = (
    *("unit length", "precision", "repeatable", "batch", "end token", "pooling", "unaltered"),
    *("token ids", "matryoshka", "reference", "context"),
)
Values = dict[str, list[tuple[float, str]]]


def random_checkpoint(folder: Path, dimensions: int, layers: int, std: float) -> Path:
    """Write a checkpoint whose matrices all have one standard deviation, as before training."""
    write_checkpoint(folder, dimensions=dimensions, layers=layers)
    weights = dict(load_file(folder / "model.safetensors"))
    for name, matrix in weights.items():
        if matrix.ndim == 2:
            weights[name] = matrix * np.float32(std / matrix.std())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_pooling(checkpoint: Path, folder: Path, mode: str) -> Path:
    """Copy a checkpoint, with another pooling mode."""
    shutil.copytree(checkpoint, folder)
    file = folder / "1_Pooling/config.json"
    change = {"pooling_mode_lasttoken": False, f"pooling_mode_{mode}": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    return folder


def with_end(checkpoint: Path, folder: Path, end: str | None) -> Path:
    """Copy a checkpoint, with another end token or none."""
    shutil.copytree(checkpoint, folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    if end is None:
        tokenizer["post_processor"] = None
    else:
        ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
        text = json.dumps(tokenizer["post_processor"]).replace("<|endoftext|>", end)
        text = text.replace(str(ids["<|endoftext|>"]), str(ids[end]))
        tokenizer["post_processor"] = json.loads(text)
    file.write_text(json.dumps(tokenizer))
    config = folder / "tokenizer_config.json"  # Qwen2Tokenizer would restore its own parts
    config.write_text(config.read_text().replace("Qwen2Tokenizer", "PreTrainedTokenizerFast"))
    return folder


class Altered(ReferenceEngine):
    """The reference engine, with texts, token ids or rows altered."""

    text: Callable[[str], str] = staticmethod(lambda text: text)
    cut: slice = slice(None)
    row: Callable[[Vectors], Vectors] = staticmethod(lambda rows: rows)

    async def embed(
        self,
        prompts: list[Prompt],
        dimensions: int | None,
        urgent: bool,
        usage: Usage | None = None,
    ) -> Vectors:
        """Return altered rows of altered prompts."""
        altered: list[Prompt] = []
        for prompt in prompts:
            if isinstance(prompt, str):
                [ids] = await self.tokenize([self.text(prompt)])
                prompt = [*ids[:-1][self.cut], ids[-1]]
            altered.append(prompt)
        return self.row(await super().embed(altered, dimensions, urgent))


FAULTS: dict[str, dict[str, Any]] = {
    "unaltered": {"text": lambda text: text.replace("\n", " ")},
    "context": {"cut": slice(1700)},
    "batch": {"row": lambda rows: rows[::-1]},
    "matryoshka": {"row": lambda rows: rows[:, ::-1] if rows.shape[1] > 32 else rows},
    "precision": {"row": lambda rows: np.round(rows, 2)},
}
"""Alterations by the check that must notice them."""


def faulty(folder: Path, checkpoint: Path, dtype: str) -> Iterator[tuple[str, ReferenceEngine]]:
    """Yield faulty engines, each with the check that must notice the fault."""
    for mode in ("mean_tokens", "cls_token"):
        path = with_pooling(checkpoint, folder / mode, mode)
        yield "pooling", ReferenceEngine(str(path), dtype=dtype)
    for end in (None, "<|im_end|>"):
        path = with_end(checkpoint, folder / f"end-{end and end[2:-2]}", end)
        yield "end token", ReferenceEngine(str(path), dtype=dtype)
    for check, alteration in FAULTS.items():
        engine = Altered(str(checkpoint), dtype=dtype)
        for name, value in alteration.items():
            setattr(engine, name, value)
        yield check, engine


async def measure(
    engine: ReferenceEngine, checkpoint: Path, checks: tuple[str, ...], label: str, into: Values
) -> None:
    """Run checks on one engine and collect what each compares with its limits."""
    served = await engine.start()
    subject = Subject(engine, served, None, None, "", str(checkpoint))
    for check in checks:
        try:
            finding = await CHECKS[check](subject)
        except CannotTellError as reason:
            print(f"{label}: {check}: cannot tell: {reason}", file=sys.stderr)
            continue
        print(f"{label}: {check}: {finding.status} {finding.measured}", file=sys.stderr)
        if finding.measured is not None:
            into.setdefault(check, []).append((finding.measured, label))
    await engine.close()


async def run(folders: list[Path], dtypes: list[str]) -> tuple[Values, Values]:
    """Measure right and faulty engines of every checkpoint and precision."""
    right: Values = {}
    wrong: Values = {}
    with tempfile.TemporaryDirectory() as scratch:
        random = [
            random_checkpoint(Path(scratch, "x".join(map(str, shape))), *shape) for shape in RANDOM
        ]
        for checkpoint in [*folders, DEMO, *random]:
            name = "demo model" if checkpoint == DEMO else checkpoint.name
            for dtype in dtypes:
                label = f"{name} {dtype}"
                engine = ReferenceEngine(str(checkpoint), dtype=dtype)
                await measure(engine, checkpoint, CHECKED, label, right)
                with tempfile.TemporaryDirectory() as copies:
                    for check, bad in faulty(Path(copies), checkpoint, dtype):
                        await measure(bad, checkpoint, (check,), label, wrong)
    return right, wrong


def table(right: Values, wrong: Values) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield "| check | right engines, closest | of checkpoint | faulty engines, closest |"
    yield "|---|---|---|---|"
    for check, values in right.items():
        ours, theirs = (min, max) if check in LARGER_IS_RIGHT else (max, min)
        value, label = ours(values)
        bad = f"{theirs(wrong[check])[0]:.2g}" if check in wrong else "-"
        yield f"| {check} | {value:.2g} | {label} | {bad} |"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Measure the margins of the doctor's limits.")
    parser.add_argument("--checkpoint", type=Path, action="append", default=[], metavar="FOLDER")
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    dtypes = options.dtype or ["float32", "bfloat16"]
    # The engine refuses a tokenizer without the end token. A server would serve it.
    with mock.patch("qwen3_embeddings.tokenizer._check_end_token"):
        print("\n".join(table(*asyncio.run(run(options.checkpoint, dtypes)))))


if __name__ == "__main__":
    main()
