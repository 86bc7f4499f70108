"""Compare this package with other packages in one run, as ratios.

    python benchmarks bulk    [--model MODEL]   in the process: texts/s by length
    python benchmarks server  [--model MODEL]   through servers: latency by clients, bulk, both
    python benchmarks client                    the client alone, against a server without work
    python benchmarks scale                     the client with more and more texts; its memory
    python benchmarks charts                    draw the results
    python benchmarks all     [--model MODEL]
    python benchmarks/engines.py [--model MODEL]  the engines of this process side by side

Results are added to --json FILE, and a table is printed. Compare ratios: figures differ between
machines. Without --model a tiny random checkpoint is used, which measures overhead only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from contenders import IN_PROCESS, THROUGH_SERVER
from measure import result_of

from qwen3_embeddings import models
from qwen3_embeddings.testing import write_checkpoint

HERE = Path(__file__).parent
PYTHON = (sys.executable, "-W", "ignore")
SERVED = "model-under-test"
SERVERS = {
    "ours": ["ours", "ours, threads", "ours, LangChain", "ours, LlamaIndex"],
    "torch": ["ours"],
    "plain": ["langchain-openai", "llama-index openai-like", "openai", "ours"],
    "transformers": ["langchain-openai", "openai"],
}
"""The clients that measure each kind of server."""


def main(arguments: Sequence[str]) -> None:
    """Run the chosen measurements and print the results."""
    options = parse(arguments)
    results: dict[str, Any] = {}
    Path(options.json).parent.mkdir(parents=True, exist_ok=True)
    if Path(options.json).exists():
        results = json.loads(Path(options.json).read_text(encoding="utf-8"))
    results.setdefault("machine", machine())
    with tempfile.TemporaryDirectory() as folder:
        given = options.what == "server" and options.url
        if not (options.model or given) and options.what in {"bulk", "server", "all"}:
            options.model = str(write_checkpoint(folder))
            print("no --model: a tiny random checkpoint measures overhead only")
        for name in list(MEASURE) if options.what == "all" else [options.what]:
            if name in MEASURE:
                MEASURE[name](options, results.setdefault(name, {}))
                Path(options.json).write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(report(results))
    if options.what in {"charts", "all"}:
        import charts

        charts.draw(results, Path(options.charts))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    about, _, usage = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        "python benchmarks", description=about, epilog=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    option = parser.add_argument
    option("what", choices=[*MEASURE, "charts", "all"])
    option("--model", help="hub id or folder (a tiny random checkpoint)")
    option("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    option("--tokens", type=int, nargs="+", default=[32, 128, 512], help="bulk: lengths of texts")
    option("--texts", type=int, default=4096, help="texts of 128 tokens per measurement (4096)")
    option("--repeat", type=int, default=3, help="repeats; the best counts (3)")
    option(
        "--peak-tflops", type=float, help="bulk: matrix throughput of the card, to show the share"
    )
    option("--contenders", nargs="+", help="run only these")
    option("--servers", nargs="+", choices=SERVERS, default=list(SERVERS))
    option("--url", help="server: measure this server with our client, and start none")
    option("--serve-flags", default="", help="server: further flags of `serve`, in one string")
    option("--clients", type=int, nargs="+", default=[1, 16, 64, 256])
    option("--seconds", type=float, default=8.0, help="seconds per closed loop (8)")
    option("--also", nargs="*", default=["bulk", "mixed"], help="server: bulk, mixed (both)")
    option("--size", type=int, default=1024, help="client, scale: dimensions (1024)")
    option("--counts", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000],
           help="scale: numbers of texts (1000 to 1000000)")  # fmt: skip
    option("--json", default="build/benchmarks.json", metavar="FILE")
    option("--charts", default="build/charts", metavar="FOLDER")
    return parser.parse_args(arguments)


def machine() -> dict[str, Any]:
    """Describe the machine of the results."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    about: dict[str, Any] = {"cores": cores, "python": platform.python_version()}
    about["date"] = time.strftime("%Y-%m-%d")
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        about["gpu"] = subprocess.check_output(query, text=True).strip()
    return about


def measured(section: str, name: str, **options: Any) -> Any:
    """Measure one contender in its own process. A failure is part of the result."""
    print(f"… {section}: {name}", file=sys.stderr, flush=True)
    command = [*PYTHON, str(HERE / "measure.py"), section, json.dumps(options | {"only": name})]
    # On a CPU `LLM` reserves nearly all memory by default, which may be more than is free.
    environment = {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_LOGGING_LEVEL": "ERROR"} | os.environ
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    result = result_of(done.stdout)
    return {"failed": done.returncode} if done.returncode or result is None else result


def chosen(options: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """Return the contenders to measure."""
    return [name for name in names if not options.contenders or name in options.contenders]


def bulk(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Measure engines in the process."""
    if options.peak_tflops:
        # Every weight of a matrix product needs one multiplication and one addition per token.
        # The embedding table is only looked up. Attention is not counted.
        model = models.describe(options.model)
        products = model.parameters - model.vocabulary * model.dimensions
        results["card"] = {
            "peak_tokens_per_second": options.peak_tflops * 1e12 / (2 * products),
            "peak_tflops": options.peak_tflops,
        }
    for name in chosen(options, list(IN_PROCESS)):
        results[name] = measured(
            "bulk", name, model=options.model, dtype=options.dtype, tokens=options.tokens,
            texts=options.texts, repeat=options.repeat,
        )  # fmt: skip


def server(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Start each kind of server, measure it, and stop it."""
    for kind in ["given"] if options.url else options.servers:
        figures = results.setdefault(kind, {})
        clients = chosen(options, SERVERS["ours"] if options.url else SERVERS[kind])
        with contextlib.ExitStack() as stack:
            url = options.url or stack.enter_context(running(kind, options))
            for name in clients:
                texts = options.texts if kind != "transformers" else min(options.texts, 1024)
                model = None if options.url else SERVED
                figures[name] = measured(
                    "server", name, model=model, checkpoint=options.model, url=url, texts=texts,
                    clients=options.clients, seconds=options.seconds, also=options.also,
                )  # fmt: skip


def client(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Measure the client alone."""
    port = free_port()
    command = [*PYTHON, str(HERE / "loopback.py"), str(port), str(options.size)]
    with started(command, f"http://127.0.0.1:{port}/v1/models"):
        for name in chosen(options, list(THROUGH_SERVER)):
            results[name] = measured(
                "client", name, url=f"http://127.0.0.1:{port}/v1", texts=options.texts,
                repeat=options.repeat, seconds=options.seconds,
            )  # fmt: skip


def scale(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Measure our client with more and more texts."""
    port = free_port()
    command = [*PYTHON, str(HERE / "loopback.py"), str(port), str(options.size)]
    with started(command, f"http://127.0.0.1:{port}/v1/models"):
        url = f"http://127.0.0.1:{port}/v1"
        results["ours"] = measured("scale", "ours", url=url, counts=options.counts)


MEASURE = {"bulk": bulk, "server": server, "client": client, "scale": scale}


@contextlib.contextmanager
def running(kind: str, options: argparse.Namespace) -> Iterator[str]:
    """Run one kind of server and yield its base URL."""
    port = free_port()
    model, dtype = options.model, options.dtype
    vllm = ["-m", "vllm.entrypoints.openai.api_server", "--model", model]
    serve = ["-m", "qwen3_embeddings", "serve", model, "--dtype", dtype]
    serve += ["--served-model-name", SERVED]
    command = {
        "ours": [*serve, *options.serve_flags.split()],
        "torch": [*serve, "--engine", "torch"],
        # As its documentation shows it.
        "plain": [*vllm, "--runner", "pooling", "--dtype", dtype, "--served-model-name", SERVED],
        "transformers": [str(HERE / "transformers_server.py"), model, str(port), dtype],
    }[kind]
    if kind != "transformers":
        command += ["--port", str(port)]
    print(f"… starting {kind}: {' '.join(command)}", file=sys.stderr, flush=True)
    with started([*PYTHON, *command], f"http://127.0.0.1:{port}/health"):
        yield f"http://127.0.0.1:{port}/v1"


@contextlib.contextmanager
def started(command: Sequence[str], url: str) -> Iterator[None]:
    """Run a process that answers at `url` until the block ends."""
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"} | os.environ
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        try:
            start = time.monotonic()
            while not answers(url):
                if process.poll() is not None or time.monotonic() > start + 600:
                    log.seek(0)
                    raise SystemExit(log.read()[-4000:].decode(errors="replace"))
                time.sleep(0.2)
            print(f"… up after {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
            yield
        finally:
            process.terminate()


def answers(url: str) -> bool:
    """Return whether a server answers."""
    key = os.environ.get("QWEN3_EMBEDDINGS_API_KEY")  # `serve` demands it on every route
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def free_port() -> int:
    """Return a free port."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# The report.


def report(results: dict[str, Any]) -> str:
    """Format all results as tables with ratios."""
    lines = [f"measured on {results['machine']}"]
    if figures := results.get("bulk"):
        lines += ["", "in the process: texts/s (ratio to LLM.embed), share of the card"]
        lines += bulk_table(figures)
    servers = results.get("server", {})
    base = servers.get("ours", {}).get("ours", {})
    for kind, contenders in servers.items():
        lines += ["", f"server: {kind} (our client and server: … ×)"]
        lines += server_table(contenders, base)
    if figures := results.get("client"):
        lines += ["", "client alone, loopback (ours: … ×)", *client_table(figures)]
    if figures := results.get("scale"):
        lines += ["", "our client by number of texts, loopback", *scale_table(figures["ours"])]
    return "\n".join(lines)


def bulk_table(figures: dict[str, Any]) -> list[str]:
    """Format one row per contender and one column per length."""
    figures = dict(figures)
    peak = figures.pop("card", {}).get("peak_tokens_per_second")
    lengths = next((list(f) for f in figures.values() if not missing(f)), [])
    base = figures.get("LLM.embed", {})
    rows = [f"{'':26}" + "".join(f"{n + ' tokens':>24}" for n in lengths)]
    for name, mine in figures.items():
        if problem := missing(mine):
            rows.append(f"{name:26}{problem}")
            continue
        cells = []
        for n in lengths:
            best = max(mine.get(n, [0]))
            ratio = f" ({best / max(base[n]):.2f})" if n in base else ""
            share = f" {best * int(n) / peak:.0%}" if peak else ""
            cells.append(f"{best:,.0f}{ratio}{share}")
        rows.append(f"{name:26}" + "".join(f"{cell:>24}" for cell in cells))
    return rows


def server_table(contenders: dict[str, Any], base: dict[str, Any]) -> list[str]:
    """Format single queries, bulk, and queries during bulk, with ratios to `base`."""
    rows = []
    singles, documents = base.get("clients", {}), base.get("bulk")
    for name, mine in contenders.items():
        if problem := missing(mine):
            rows.append(f"{name:26}{problem}")
            continue
        for clients, loop in mine["clients"].items():
            ratio = times(singles.get(clients), loop)
            rows.append(f"{name:26}{clients:>4} clients  {loop_cells(loop)}{ratio}")
        if bulk := mine.get("bulk"):
            rate = f"{bulk['texts_per_second']:>9,.0f} texts/s"
            rows.append(f"{name:26}bulk          {rate}{times(documents, bulk)}")
        if busy := mine.get("mixed"):
            idle = mine["idle"]
            alone = mine.get("bulk", {}).get("texts_per_second")
            share = f", bulk at {busy['bulk_texts_per_second'] / alone:.0%}" if alone else ""
            slower = busy["p99_ms"] / idle["p99_ms"]
            rows.append(f"{name:26}idle query    {loop_cells(idle)}")
            rows.append(
                f"{name:26}under bulk    {loop_cells(busy)}  p99 {slower:.1f} × idle{share}"
            )
    return rows


def times(base: dict[str, float] | None, mine: dict[str, float]) -> str:
    """Format the rate of `base` as a multiple of that of `mine`."""
    if not base or base is mine or "texts_per_second" not in base:
        return ""
    return f"  {base['texts_per_second'] / mine['texts_per_second']:.1f} ×"


def loop_cells(loop: dict[str, float]) -> str:
    """Format texts/s, p50 and p99."""
    return (
        f"{loop['texts_per_second']:>9,.0f} texts/s  p50 {loop['p50_ms']:8.1f} ms"
        f"  p99 {loop['p99_ms']:8.1f} ms"
    )


def client_table(figures: dict[str, Any]) -> list[str]:
    """Format bulk and single texts/s, and CPU time."""
    rows = []
    for name, mine in figures.items():
        if problem := missing(mine):
            rows.append(f"{name:26}{problem}")
            continue
        rows.append(
            f"{name:26}{mine['texts_per_second']:>9,.0f} texts/s"
            f"{times(figures.get('ours'), mine):7}  "
            f"{mine['processor_us_per_text']:6.0f} µs of CPU per text   single, 64 clients: "
            f"{loop_cells(mine['single_64_clients'])}"
        )
    return rows


def scale_table(figures: dict[str, Any]) -> list[str]:
    """Format one row per method and number of texts."""
    if problem := missing(figures):
        return [problem]
    return [
        f"{way:12}{int(count):>10,} texts  {cell['us_per_text']:7.1f} µs per text  "
        f"{cell['processor_us_per_text']:7.1f} µs of CPU  most {cell['most_mib']:,.0f} MiB"
        for way, counts in figures.items()
        for count, cell in counts.items()
    ]


def missing(figures: dict[str, Any]) -> str | None:
    """Say why a contender has no results."""
    if "not_installed" in figures:
        return f"not installed ({figures['not_installed']})"
    return f"failed with exit code {figures['failed']}" if "failed" in figures else None


if __name__ == "__main__":
    main(sys.argv[1:])
