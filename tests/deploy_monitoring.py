"""Monitoring against real programs: `make test-monitoring`.

Prometheus scrapes a real vLLM server under load, and a real Caddy in front of it. Not a test_*.py
file: it needs Debian's prometheus and caddy packages, Node.js, and some minutes.

    QWEN3_LOAD_SECONDS  how long the server is under load (120)
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from conftest import RunningServer, free_port, running_server

ROOT = Path(__file__).parents[1]
MONITORING = ROOT / "integrations/monitoring"
BUILD = ROOT / "build/monitoring"
LOAD_SECONDS = int(os.environ.get("QWEN3_LOAD_SECONDS", "120"))
GRAFANA_SCHEMA = "@grafana/schema@13.2.3"
TYPESCRIPT = "typescript@7.0.2"


@dataclass(frozen=True)
class Monitored:
    """URLs of the running programs, and when the load began and ended (Unix time)."""

    server: RunningServer
    proxy: str
    prometheus: str
    began: float
    ended: float

    def query(self, expression: str) -> list[Any]:
        """The samples of an instant query at the end of the load."""
        return self._ask("query", query=expression, time=self.ended)

    def query_range(self, expression: str) -> list[Any]:
        """The series of a query over the load."""
        step = max(2.0, (self.ended - self.began) / 300)
        return self._ask(
            "query_range", query=expression, start=self.began, end=self.ended, step=step
        )

    def _ask(self, route: str, **parameters: Any) -> list[Any]:
        answer = httpx.get(f"{self.prometheus}/api/v1/{route}", params=parameters, timeout=30)
        assert answer.status_code == 200, answer.text
        result: list[Any] = answer.json()["data"]["result"]
        return result


@contextlib.contextmanager
def process(command: list[str], log: Path, ready: str, **environment: str) -> Iterator[None]:
    """A program until the end of the block, once its URL `ready` answers."""
    with log.open("wb") as file:
        started = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | environment
        )
    try:
        for _ in range(100):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(ready).status_code == 200:
                    break
            assert started.poll() is None, log.read_text()
            time.sleep(0.2)
        else:
            raise AssertionError(log.read_text())
        yield
    finally:
        started.terminate()
        started.wait(timeout=30)


def prometheus_config(folder: Path, server: RunningServer, admin: int) -> Path:
    """The committed configuration with this run's ports and a short scrape interval."""
    config = (MONITORING / "prometheus.yml").read_text()
    for old, new in [
        ("127.0.0.1:8000", server.base_url.removeprefix("http://").removesuffix("/v1")),
        ("127.0.0.1:2019", f"127.0.0.1:{admin}"),
        ("_interval: 15s", "_interval: 2s"),
    ]:
        assert old in config
        config = config.replace(old, new)
    (folder / "prometheus.yml").write_text(config)
    for rules in MONITORING.glob("*-rules.yml"):
        (folder / rules.name).write_text(rules.read_text())
    return folder / "prometheus.yml"


def send_load(server: RunningServer, proxy: str, seconds: float) -> None:
    """Documents and queries in turn, requests that are refused, and wrong keys."""
    bench = [sys.executable, "-m", "qwen3_embeddings", "bench", "--base-url", server.base_url]
    bench += ["--words", "20", "80", "--texts", "128", "--clients", "1", "8", "--seconds", "5"]
    environment = os.environ | {"QWEN3_EMBEDDINGS_API_KEY": server.api_key}
    stop = time.monotonic() + seconds

    def refused() -> None:
        bad_size = {"model": server.model, "input": "a", "dimensions": 99999}
        while time.monotonic() < stop:
            for key, status in [(server.api_key, 400), ("wrong", 401)]:
                headers = {"Authorization": f"Bearer {key}"}
                answer = httpx.post(
                    f"{proxy}/v1/embeddings", json=bad_size, headers=headers, timeout=60
                )
                assert answer.status_code == status, answer.text
            time.sleep(3)

    thread = threading.Thread(target=refused)
    thread.start()
    while time.monotonic() < stop:
        subprocess.run(bench, env=environment, check=True, capture_output=True)
    thread.join()


@pytest.fixture(scope="module")
def monitored(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitored]:
    folder = tmp_path_factory.mktemp("monitoring")
    admin, proxy_port, port = free_port(), free_port(), free_port()
    caddyfile = (MONITORING / "Caddyfile").read_text().replace(":2019", f":{admin}")
    (folder / "Caddyfile").write_text(caddyfile)
    proxy, prometheus = f"http://127.0.0.1:{proxy_port}", f"http://127.0.0.1:{port}"
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(running_server(checkpoint, folder / "server.log"))
        upstream = server.base_url.removeprefix("http://").removesuffix("/v1")
        caddy = ["caddy", "run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"]
        addresses = {"PROXY_ADDRESS": proxy, "VLLM_ADDRESS": upstream, "HOME": str(folder)}
        metrics = f"http://127.0.0.1:{admin}/metrics"
        stack.enter_context(process(caddy, folder / "caddy.log", metrics, **addresses))
        config = prometheus_config(folder, server, admin)
        command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder}/data"]
        command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
        stack.enter_context(process(command, folder / "prometheus.log", f"{prometheus}/-/ready"))
        began = time.time()
        send_load(server, proxy, LOAD_SECONDS)
        yield Monitored(server, proxy, prometheus, began, time.time())


def dashboard_expressions() -> list[tuple[str, str, str]]:
    """Panel, legend and expression of every query, with Grafana's variables filled in."""
    board = json.loads((MONITORING / "dashboard.json").read_text())
    found = []
    for panel in board["panels"]:
        for query in panel.get("targets", []):
            expression = query["expr"].replace("$__rate_interval", "1m").replace("$instance", ".*")
            assert "$" not in expression
            found.append((panel["title"], query["legendFormat"], expression))
    assert len(found) > 20
    return found


def test_dashboard_json_is_what_dashboard_py_builds() -> None:
    built = subprocess.run(
        [sys.executable, str(MONITORING / "dashboard.py")], check=True, capture_output=True
    )
    assert built.stdout.decode() == (MONITORING / "dashboard.json").read_text()


def test_dashboard_json_matches_grafanas_schema() -> None:
    """TypeScript's compiler is the validator: Grafana publishes its schema as types."""
    BUILD.mkdir(parents=True, exist_ok=True)
    install = ["npm", "install", "--prefix", str(BUILD), "--no-save", GRAFANA_SCHEMA, TYPESCRIPT]
    subprocess.run(install, check=True, capture_output=True)
    board = (MONITORING / "dashboard.json").read_text()
    typed = 'import {{ Dashboard }} from "@grafana/schema";\nexport const d: Dashboard = {};\n'
    check = ["npx", "tsc", "--noEmit", "--skipLibCheck", "--module", "esnext"]
    check += ["--moduleResolution", "bundler", "--target", "es2022", "dashboard.ts"]
    for document, right in [(board, True), (board.replace('"schemaVersion": 41', '"x": 1'), False)]:
        (BUILD / "dashboard.ts").write_text(typed.format(document))
        done = subprocess.run(check, cwd=BUILD, capture_output=True, text=True, check=False)
        assert (done.returncode == 0) == right, done.stdout


def test_prometheus_accepts_config_and_rules() -> None:
    subprocess.run(["promtool", "check", "config", str(MONITORING / "prometheus.yml")], check=True)


def test_alerts_fire_when_they_should_and_not_before() -> None:
    tests = str(MONITORING / "alert-tests.yml")
    subprocess.run(["promtool", "test", "rules", tests], check=True)


def test_dashboard_every_expression_returns_data_under_load(monitored: Monitored) -> None:
    panels: dict[str, dict[str, Any]] = {}
    for panel, legend, expression in dashboard_expressions():
        series = monitored.query_range(expression)
        assert series, f"{panel}: {expression}"
        values = [float(value) for line in series for _, value in line["values"]]
        assert any(value == value for value in values), f"{panel}, only NaN: {expression}"
        panels.setdefault(panel, {})[legend] = series
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "panels.json").write_text(json.dumps(panels))


def test_recording_rules_return_data_under_load(monitored: Monitored) -> None:
    groups = yaml.safe_load((MONITORING / "recording-rules.yml").read_text())["groups"]
    names = [rule["record"] for group in groups for rule in group["rules"]]
    assert len(names) == 8
    for name in names:
        values = [float(sample["value"][1]) for sample in monitored.query(name)]
        assert values, name
        assert all(value == value for value in values), name


def test_alert_of_rejected_keys_fires_after_real_401s(monitored: Monitored) -> None:
    """The only alert that a healthy server under load may raise, and it does."""
    answer = httpx.get(f"{monitored.prometheus}/api/v1/rules").json()
    rules = [rule for group in answer["data"]["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}
    critical = 'ALERTS{alertstate="firing",severity="critical"}'
    assert monitored.query(critical) == []
    firing = monitored.query('ALERTS{alertname="Qwen3EmbeddingsUnauthorized",alertstate="firing"}')
    assert len(firing) == 1


def test_proxy_passes_v1_alone(monitored: Monitored) -> None:
    key = {"Authorization": f"Bearer {monitored.server.api_key}"}
    assert httpx.get(f"{monitored.proxy}/v1/models", headers=key).status_code == 200
    for route in ("/metrics", "/invocations", "/tokenize", "/pooling", "/health", "/"):
        assert httpx.get(monitored.proxy + route, headers=key).status_code == 404
    assert httpx.get(f"{monitored.proxy}/v1/models").status_code == 401


def test_vllm_counts_no_401(monitored: Monitored) -> None:
    """Why rejected keys are counted at the proxy."""
    metrics = httpx.get(monitored.server.base_url.replace("/v1", "/metrics")).text
    handlers = re.findall(r'http_requests_total\{handler="/v1/embeddings".*status="(\w+)"', metrics)
    assert sorted(handlers) == ["2xx", "4xx"]
    refused = re.search(r'handler="/v1/embeddings".*status="4xx"\} (\S+)', metrics)
    rejected = monitored.query("sum(instance:qwen3_embeddings_unauthorized:increase10m)")
    assert refused is not None
    assert float(rejected[0]["value"][1]) > 0
    key = {"Authorization": "Bearer wrong"}
    body = {"model": monitored.server.model, "input": "a"}
    url = f"{monitored.server.base_url}/embeddings"
    assert httpx.post(url, json=body, headers=key).status_code == 401
    after = httpx.get(monitored.server.base_url.replace("/v1", "/metrics")).text
    assert f'status="4xx"}} {refused[1]}' in after
