"""The measurements, each contender's in a process of its own.

python benchmarks/measure.py SECTION OPTIONS prints, as its last line, the figures; both in JSON.
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
"""Words of a text in the measurements through a server, and the tokens they are for the published
tokenizer: with a checkpoint that has another one, as many words are taken as make those tokens."""


def words_for(model: str, tokens: int) -> int:
    """How many words make about so many tokens."""
    from transformers import AutoTokenizer

    sample = take(50, WORDS, -1)
    encoded = AutoTokenizer.from_pretrained(model)(sample)["input_ids"]
    return max(1, round(tokens * 50 * WORDS / sum(map(len, encoded))))


RUNNER = asyncio.Runner()
"""One event loop for all: some peers' clients die with the first they were used in."""


def closed_loop(query: Query, clients: int, seconds: float, words: int = WORDS) -> dict[str, float]:
    """`bench.closed_loop` on the one event loop."""
    return RUNNER.run(bench.closed_loop(query, clients, seconds, words))


def bulk(options: Options) -> dict[str, Any]:
    """Texts a second from text in the process, by tokens a text; one figure a repeat."""
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
    """Through a server: single queries by number of clients, bulk, and both at once."""
    contender = THROUGH_SERVER[options["only"]](options["url"], options["model"])
    seconds, model = options["seconds"], options["checkpoint"]
    words = words_for(model, TOKENS) if model else WORDS
    contender.documents(take(256, words, seed=-1))
    gc.freeze()  # else a collection over transformers, here to count tokens, stops all for 0.3 s
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
    """One query after the other while a corpus is being embedded, and what it costs the corpus."""
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
    """What the client alone costs: texts a second in bulk, and the processor's time for a text."""
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
    """What a text costs the client and how much memory it takes, by number of texts."""
    embedder = Embedder("loopback", base_url=options["url"])
    embedder.encode_document(take(4096, 20, seed=-1))
    figures: dict[str, Any] = {}
    calls: dict[str, Callable[[int], Any]] = {
        # Streamed first: the highest mark of memory never falls.
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
    """User and system time of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


SECTIONS = {"bulk": bulk, "server": server, "client": client, "scale": scale}

if __name__ == "__main__":
    section, options = sys.argv[1:]
    try:
        result = SECTIONS[section](json.loads(options))
    except ImportError as error:
        result = {"not_installed": str(error)}
    print("\n" + json.dumps(result), flush=True)
