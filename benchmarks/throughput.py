"""Texts a second of this package against raw vLLM and sentence-transformers, in one run.

    python benchmarks/throughput.py [--model MODEL] [--tokens 32 128 512] [--texts 2000]
                                    [--dtype bfloat16] [--repeat 3] [--json FILE]

Each contender runs alone in a process of its own, on the same texts, best of several repeats after
a warm-up. The figures that travel between machines are the ratios to `LLM.embed` at its defaults.
Without --model a tiny random checkpoint is measured: that shows overhead, not a model's speed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from qwen3_embeddings import Embedder, models
from qwen3_embeddings.testing import write_checkpoint

Encode = Callable[[list[str]], Any]
WORDS = ["search", "index", "vector", "query", "passage", "answer", "model", "token", "server"]


def raw_vllm(model: str, dtype: str) -> Encode:
    """`LLM.embed` as its documentation shows it."""
    from vllm import LLM

    engine = LLM(model, runner="pooling", convert="embed", dtype=dtype)
    return lambda texts: engine.embed(texts, use_tqdm=False)


def in_process(model: str, dtype: str) -> Encode:
    """This package, vLLM in the process."""
    return Embedder(model, dtype=dtype).encode_document


def sentence_transformers(model: str, dtype: str) -> Encode:
    """`SentenceTransformer.encode`, batch 128."""
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(model, model_kwargs={"dtype": dtype})
    return lambda texts: encoder.encode(texts, batch_size=128, show_progress_bar=False)


CONTENDERS = {
    "LLM.embed": raw_vllm,
    "qwen3-embeddings": in_process,
    "sentence-transformers": sentence_transformers,
}


def corpus(model: str, tokens: int, count: int, seed: int) -> list[str]:
    """`count` different texts of about `tokens` tokens each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    sample = " ".join(WORDS)
    per_word = (len(tokenizer(sample)["input_ids"]) - 1) / len(WORDS)
    words = max(1, round((tokens - 1) / per_word))
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=words)) for _ in range(count)]


def measure(name: str, options: argparse.Namespace) -> dict[int, list[float]]:
    """Texts a second of one contender: for each length, one figure a repeat."""
    encode = CONTENDERS[name](options.model, options.dtype)
    figures: dict[int, list[float]] = {}
    for tokens in options.tokens:
        encode(corpus(options.model, tokens, 64, seed=-1))
        figures[tokens] = []
        for repeat in range(options.repeat):
            # New texts each time: at its defaults vLLM remembers the prefixes of old ones.
            texts = corpus(options.model, tokens, options.texts, seed=repeat)
            start = time.perf_counter()
            encode(texts)
            figures[tokens].append(len(texts) / (time.perf_counter() - start))
    return figures


def in_a_process_of_its_own(name: str, arguments: list[str]) -> dict[str, list[float]]:
    """What `measure` gives in a fresh interpreter."""
    command = [sys.executable, "-W", "ignore", __file__, *arguments, "--only", name]
    # On a CPU `LLM` would claim nearly all memory at its defaults, more than may be free.
    environment = {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_LOGGING_LEVEL": "ERROR"} | os.environ
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    figures: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return figures


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """Best texts a second, and in brackets the ratio to `LLM.embed`."""
    lengths = list(results["LLM.embed"])
    lines = [f"{'texts a second':24}" + "".join(f"{n + ' tokens':>20}" for n in lengths)]
    for name, figures in results.items():
        best = {n: max(figures[n]) for n in lengths}
        ratios = {n: best[n] / max(results["LLM.embed"][n]) for n in lengths}
        cells = (f"{best[n]:,.0f} ({ratios[n]:.2f})" for n in lengths)
        lines.append(f"{name:24}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="hub id or folder (a tiny random checkpoint)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--texts", type=int, default=2000, help="texts a measurement (2000)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--repeat", type=int, default=3, help="repeats, of which the best counts")
    parser.add_argument("--json", metavar="FILE", help="write every figure there")
    parser.add_argument("--only", choices=CONTENDERS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Measure every contender and print the table."""
    options = parse(arguments)
    if options.only:
        print("\n" + json.dumps(measure(options.only, options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if not options.model:
            arguments = [*arguments, "--model", str(write_checkpoint(folder))]
            print("no --model: a tiny random checkpoint is measured, overhead rather than speed")
        elif options.model not in models.MODELS:
            models.describe(options.model)  # a wrong name is said before an engine starts
        results = {name: in_a_process_of_its_own(name, arguments) for name in CONTENDERS}
    print(table(results))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main(sys.argv[1:])
