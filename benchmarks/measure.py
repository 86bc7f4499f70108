"""Run one measurement of one contender in its own process.

python benchmarks/measure.py SECTION OPTIONS prints the result as a line of JSON. OPTIONS
is JSON too.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import resource
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from contenders import IN_PROCESS, THROUGH_SERVER, Contender

from qwen3_embeddings import Embedder
from qwen3_embeddings.cli import bench
from qwen3_embeddings.cli.bench import Query, per_second, take, texts_of

Options = dict[str, Any]
WORDS, TOKENS = 80, 135
"""Words per text in measurements through a server, and their tokens with the published tokenizer.
For another tokenizer, the number of words is chosen to give as many tokens."""


def words_for(model: str, tokens: int) -> int:
    """Return the number of words that have about this many tokens."""
    from transformers import AutoTokenizer

    sample = take(50, WORDS, -1)
    encoded = AutoTokenizer.from_pretrained(model)(sample)["input_ids"]
    return max(1, round(tokens * 50 * WORDS / sum(map(len, encoded))))


RUNNER = asyncio.Runner()
"""One event loop for all calls: some clients work in the first loop of their life only."""


def closed_loop(query: Query, clients: int, seconds: float, words: int = WORDS) -> dict[str, float]:
    """Run `bench.closed_loop` on the shared event loop."""
    return RUNNER.run(bench.closed_loop(query, clients, seconds, words))


def bulk(options: Options) -> dict[str, Any]:
    """Measure texts/s in the process by tokens per text, one value per repeat."""
    encode = IN_PROCESS[options["only"]](options["model"], options["dtype"])
    figures: dict[str, list[float]] = {}
    for tokens in options["tokens"]:
        count = max(64, min(options["texts"], options["texts"] * 128 // tokens))
        words = words_for(options["model"], tokens)
        encode(take(64, words, seed=-1))
        figures[str(tokens)] = []
        for repeat in range(options["repeat"]):
            texts = take(count, words, seed=repeat)
            figures[str(tokens)].append(per_second(lambda: encode(texts), count))  # noqa: B023
    return figures


def server(options: Options) -> dict[str, Any]:
    """Measure single queries by number of clients, bulk, and both at the same time."""
    contender = THROUGH_SERVER[options["only"]](options["url"], options["model"])
    seconds, model = options["seconds"], options["checkpoint"]
    words = words_for(model, TOKENS) if model else WORDS
    contender.documents(take(256, words, seed=-1))
    # Otherwise a collection over the objects of transformers stops this process for 0.3 s.
    gc.freeze()
    figures: dict[str, Any] = {"words": words, "clients": {}}
    for clients in options["clients"]:
        figures["clients"][str(clients)] = closed_loop(contender.query, clients, seconds, words)
    if "bulk" in options["also"]:
        texts = take(options["texts"], words, seed=1)
        rates = [per_second(lambda: contender.documents(texts), len(texts)) for _ in range(2)]
        figures["bulk"] = {"texts_per_second": max(rates), "all": rates}
    if "mixed" in options["also"]:
        figures["idle"] = closed_loop(contender.query, 1, seconds, words)
        figures["mixed"] = mixed(contender, options["texts"], seconds, words)
    return figures


def mixed(contender: Contender, count: int, seconds: float, words: int) -> dict[str, float]:
    """Measure sequential queries while a corpus is embedded, and the rate of the corpus."""
    done = threading.Event()
    rates: list[float] = []

    def corpus() -> None:
        for seed in itertools.count(100):
            texts = take(count, words, seed)
            rates.append(per_second(lambda: contender.documents(texts), count))  # noqa: B023
            if done.is_set():
                return

    thread = threading.Thread(target=corpus)
    thread.start()
    time.sleep(1.0)
    figures = closed_loop(contender.query, 1, max(seconds, 8.0), words)
    done.set()
    thread.join()
    return figures | {"bulk_texts_per_second": max(rates)}


def client(options: Options) -> dict[str, Any]:
    """Measure the client alone: texts/s in bulk, and CPU time per text."""
    contender = THROUGH_SERVER[options["only"]](options["url"], "loopback")
    texts = take(options["texts"], WORDS, seed=1)
    contender.documents(texts[:512])
    walls, times = [], []
    for _ in range(options["repeat"]):
        before = processor_seconds()
        walls.append(per_second(lambda: contender.documents(texts), len(texts)))
        times.append((processor_seconds() - before) / len(texts))
    single = closed_loop(contender.query, 64, options["seconds"])
    return {
        "texts_per_second": max(walls),
        "all": walls,
        "processor_us_per_text": 1e6 * min(times),
        "single_64_clients": single,
    }


def scale(options: Options) -> dict[str, Any]:
    """Measure time per text and memory of the client by number of texts."""
    embedder = Embedder("loopback", base_url=options["url"])
    embedder.encode_document(take(4096, 20, seed=-1))
    figures: dict[str, Any] = {}
    calls: dict[str, Callable[[int], Any]] = {
        # Streamed first: the peak of memory never falls.
        "streamed": lambda count: deque(
            embedder.stream(itertools.islice(texts_of(20, seed=1), count)), maxlen=0
        ),
        "one call": lambda count: embedder.encode_document(take(count, 20, seed=1)),
    }
    for name, call in calls.items():
        figures[name] = {}
        for count in options["counts"]:
            started, before = time.perf_counter(), processor_seconds()
            call(count)
            figures[name][str(count)] = {
                "us_per_text": 1e6 * (time.perf_counter() - started) / count,
                "processor_us_per_text": 1e6 * (processor_seconds() - before) / count,
                "most_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
    return figures


def processor_seconds() -> float:
    """Return the user and system time of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def result_of(output: str) -> Any:
    """Return the last JSON object that a measurement printed, or None without one.

    It need not be the last line: engines print lines of their own while they stop.
    """
    found = [line for line in output.splitlines() if line.startswith("{")]
    return json.loads(found[-1]) if found else None


SECTIONS = {"bulk": bulk, "server": server, "client": client, "scale": scale}

if __name__ == "__main__":
    section, options = sys.argv[1:]
    try:
        result = SECTIONS[section](json.loads(options))
    except ImportError as error:
        result = {"not_installed": str(error)}
    print("\n" + json.dumps(result), flush=True)
