"""Compare the engines of this process in one run, on one machine, as ratios.

    python benchmarks/engines.py --model MODEL [--engines vllm torch torch,kernels=torch]

Each engine runs in a process of its own: start, GPU memory, accuracy against float32, documents by
length, concurrent callers, idle queries, and queries while documents are embedded. Engine arguments
follow the name, as in torch,kernels=triton or torch,enforce_eager=true. Results are written to
--json FILE after each engine. Without --model a tiny random checkpoint is used, which measures
overhead only.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measure import closed_loop, result_of

from qwen3_embeddings import Embedder
from qwen3_embeddings.cli.bench import Query, per_second, take
from qwen3_embeddings.testing import write_checkpoint
from qwen3_embeddings.tokenizer import load_tokenizer

QUERY_WORDS = 12
"""Words of a query, about 20 tokens with the published tokenizer."""
Options = dict[str, Any]


def main(arguments: Sequence[str]) -> None:
    """Measure every engine and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    option = parser.add_argument
    option("--model", help="hub id or folder (a tiny random checkpoint)")
    option("--engines", nargs="+", default=["vllm", "torch"])
    option("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    option("--tokens", type=int, nargs="+", default=[512, 128, 32], help="lengths of documents")
    option("--total", type=int, default=2_500_000, help="tokens per measurement (2,500,000)")
    option("--callers", type=int, nargs="+", default=[1, 64, 256])
    option("--seconds", type=float, default=4.0, help="seconds per closed loop (4)")
    option("--repeat", type=int, default=2, help="runs per length of documents (2)")
    option("--exact", default="reference", help="engine of the float32 vectors, or none")
    option("--json", default="build/engines.json", metavar="FILE")
    option("--only", help=argparse.SUPPRESS)
    options = vars(parser.parse_args(arguments))
    if options["only"]:
        print("\n" + json.dumps(measure(options)), flush=True)
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        options["model"] = options["model"] or str(write_checkpoint(folder))
        options["exact_rows"] = str(Path(folder) / "exact.npy")
        names = [] if options["exact"] == "none" else [f"exact,{options['exact']}"]
        for name in [*names, *options["engines"]]:
            results[name] = in_process_of_its_own(name, options)
            Path(options["json"]).parent.mkdir(parents=True, exist_ok=True)
            Path(options["json"]).write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(table({name: results[name] for name in options["engines"]}))


def in_process_of_its_own(name: str, options: Options) -> Any:
    """Measure one engine. A failure is part of the result."""
    print(f"… {name}", file=sys.stderr, flush=True)
    command = [sys.executable, "-W", "ignore", __file__, "--only", json.dumps([name, options])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    result = result_of(done.stdout)
    return {"failed": f"exit code {done.returncode}"} if result is None else result


def measure(parsed: Options) -> dict[str, Any]:
    """Measure one engine in this process."""
    name, options = json.loads(parsed["only"])
    kind, *arguments = name.split(",")
    sample = [*take(12, QUERY_WORDS, 3), *take(12, 80, 4), *take(6, 330, 5), "短い 文", "x" * 1500]
    if kind == "exact":
        with Embedder(options["model"], engine=arguments[0], dtype="float32") as exact:
            np.save(options["exact_rows"], exact.encode_document(sample))
        return {}
    engine_kwargs = {key: value_of(word) for key, word in (a.split("=") for a in arguments)}
    figures: dict[str, Any] = {"memory_mib": {"before": gpu_memory()}}
    embedder = Embedder(
        options["model"], engine=kind, dtype=options["dtype"], engine_kwargs=engine_kwargs
    )
    began = time.perf_counter()
    graphs = watch_graphs(kind)  # imports PyTorch, as a start does
    embedder.start()
    figures["start_s"] = {"started": time.perf_counter() - began}
    embedder.encode_query(["the first one"])
    figures["start_s"]["first vector"] = time.perf_counter() - began
    if graphs is not None:
        graphs.wait(120)
    figures["start_s"]["all graphs"] = time.perf_counter() - began
    figures["memory_mib"]["started"] = gpu_memory()
    figures["accuracy"] = accuracy(embedder, sample, options["exact_rows"])
    figures |= speed(embedder, options)
    figures["memory_mib"]["used"] = gpu_memory()
    embedder.close()
    figures["memory_mib"]["closed"] = gpu_memory()
    return figures


def speed(embedder: Embedder, options: Options) -> dict[str, Any]:
    """Measure documents by length, callers of single texts, and queries idle and with documents."""
    figures: dict[str, Any] = {"documents": {}, "callers": {}}
    words_of = {tokens: words_for(options["model"], tokens) for tokens in (*options["tokens"], 128)}
    gc.collect()
    gc.freeze()  # a collection over the libraries' objects would stop all callers for 0.1 s
    for tokens in options["tokens"]:
        words, count = words_of[tokens], max(64, options["total"] // tokens)
        embedder.encode_document(take(min(count, 2048), words, seed=-1))
        figures["documents"][str(tokens)] = [
            per_second(lambda: embedder.encode_document(texts), count)  # noqa: B023
            for texts in (take(count, words, seed) for seed in range(options["repeat"]))
        ]

    def query(text: str) -> Any:
        return embedder.aencode_query([text])

    seconds, words = options["seconds"], words_of[128]
    for callers in options["callers"]:
        figures["callers"][str(callers)] = closed_loop(query, callers, seconds, words)
    figures["idle query"] = closed_loop(query, 1, seconds, QUERY_WORDS)
    figures["query with documents"] = with_documents(embedder, query, options)
    return figures


def with_documents(embedder: Embedder, query: Query, options: Options) -> dict[str, float]:
    """Measure sequential queries while documents of 512 tokens are embedded, and their rate."""
    texts = take(max(64, options["total"] // 512), words_for(options["model"], 512), seed=9)
    done, rates = threading.Event(), []

    def corpus() -> None:
        while not done.is_set():
            rates.append(per_second(lambda: embedder.encode_document(texts), len(texts)))

    thread = threading.Thread(target=corpus)
    thread.start()
    time.sleep(0.5)
    figures = closed_loop(query, 1, max(options["seconds"], 8.0), QUERY_WORDS)
    done.set()
    thread.join()
    return figures | {"documents_per_second": max(rates)}


def accuracy(embedder: Embedder, sample: list[str], exact: str) -> dict[str, float]:
    """Return the largest 1 - cosine to the float32 vectors, and of texts alone to their batch."""
    together = embedder.encode_document(sample)
    alone = np.concatenate([embedder.encode_document([text]) for text in sample])
    found = {"alone": worst(together, alone)}
    if Path(exact).exists():
        found["to float32"] = worst(together, np.load(exact))
    return found


def worst(one: Any, other: Any) -> float:
    """Return the largest 1 - cosine of two arrays of unit vectors."""
    return float((1 - (one.astype(np.float64) * other).sum(axis=1)).max())


def words_for(model: str, tokens: int) -> int:
    """Return the number of words that have about this many tokens."""
    encoded = load_tokenizer(model).encode_batch(take(50, 80, -1))
    return max(1, round(tokens * 50 * 80 / sum(len(e.ids) for e in encoded)))


def watch_graphs(kind: str) -> threading.Event | None:
    """Return an event that is set when the PyTorch engine has captured its last CUDA graph."""
    if kind != "torch":
        return None
    from qwen3_embeddings.engines.torch.core import Core

    prepare, done = Core.prepare, threading.Event()

    def watched(core: Core) -> bool:
        more = prepare(core)
        if not more:
            done.set()
        return more

    Core.prepare = watched  # type: ignore[method-assign]
    return done


def gpu_memory() -> int | None:
    """Return the used memory of the first GPU, in MiB; None without one."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    try:
        return int(subprocess.check_output(query, text=True).split()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def value_of(word: str) -> Any:
    """Return a word of the command line as JSON reads it, or else as it is."""
    try:
        return json.loads(word)
    except ValueError:
        return word


def table(results: dict[str, Any]) -> str:
    """Return the results, one row per figure, each with its ratio to the first engine's."""
    names = list(results)
    rows = {name: dict(flat(results[name])) for name in names}
    lines = [f"{'':44}" + "".join(f"{name:>32}" for name in names)]
    for figure in dict.fromkeys(key for name in names for key in rows[name]):
        cells = []
        first = rows[names[0]].get(figure)
        for name in names:
            value = rows[name].get(figure)
            if not isinstance(value, int | float):
                cells.append(f"{value!s:>32}")
            elif name == names[0] or not first or isinstance(first, str):
                cells.append(f"{value:>32,.4g}")
            else:
                cells.append(f"{value:>22,.4g} ({value / first:6.2f})")
        lines.append(f"{figure:44}" + "".join(cells))
    return "\n".join(lines)


def flat(figures: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each figure with the path to it; of repeats, the best."""
    if isinstance(figures, list):
        yield prefix, max(figures)
    elif isinstance(figures, dict):
        for key, value in figures.items():
            yield from flat(value, f"{prefix} / {key}" if prefix else key)
    else:
        yield prefix, figures


if __name__ == "__main__":
    main(sys.argv[1:])
