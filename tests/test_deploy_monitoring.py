"""The metrics that integrations/monitoring reads exist in the real server.

What needs Prometheus, Caddy and Grafana's schema is in deploy_monitoring.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import yaml

from conftest import RunningServer

MONITORING = Path(__file__).parents[1] / "integrations/monitoring"
METRIC = re.compile(r"\b(?:vllm:|http_|process_)\w+")


def expressions() -> list[str]:
    """Every PromQL expression of the rules and the dashboard."""
    found = []
    for path in MONITORING.glob("*-rules.yml"):
        for group in yaml.safe_load(path.read_text())["groups"]:
            found += [rule["expr"] for rule in group["rules"]]
    board = json.loads((MONITORING / "dashboard.json").read_text())
    found += [query["expr"] for panel in board["panels"] for query in panel.get("targets", [])]
    return found


def test_rules_and_dashboard_name_only_metrics_of_the_server(server: RunningServer) -> None:
    """One text is embedded first: a counter without events may have no series."""
    key = {"Authorization": f"Bearer {server.api_key}"}
    body = {"model": server.model, "input": "a"}
    httpx.post(f"{server.base_url}/embeddings", json=body, headers=key).raise_for_status()
    exposed = httpx.get(server.base_url.replace("/v1", "/metrics")).text
    named = {name for expression in expressions() for name in METRIC.findall(expression)}
    assert len(named) > 10
    missing = {name for name in named if not re.search(rf"^{name}[{{ ]", exposed, re.MULTILINE)}
    assert missing == set()
    assert 'http_requests_total{handler="/v1/embeddings",method="POST",status="2xx"}' in exposed


def test_alerts_use_recorded_series_that_exist() -> None:
    recorded = re.findall(r"record: (\S+)", (MONITORING / "recording-rules.yml").read_text())
    used = re.findall(r"instance:\w+(?::\w+)?", (MONITORING / "alert-rules.yml").read_text())
    assert used
    assert set(used) <= set(recorded)


def test_every_alert_says_what_to_do_and_has_a_test() -> None:
    groups = yaml.safe_load((MONITORING / "alert-rules.yml").read_text())["groups"]
    tests = (MONITORING / "alert-tests.yml").read_text()
    for rule in groups[0]["rules"]:
        assert rule["annotations"].keys() == {"summary", "action"}
        assert f"alertname: {rule['alert']}\n" in tests
