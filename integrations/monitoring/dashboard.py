"""Build dashboard.json, the Grafana dashboard for vLLM servers of Qwen3-Embedding.

Run it with grafana-foundation-sdk for Grafana 11.6 (the dependency group `monitoring`)::

    python integrations/monitoring/dashboard.py > integrations/monitoring/dashboard.json

`tests/deploy_monitoring.py` holds that every expression returns data from a real Prometheus.
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders.dashboard import (
    Dashboard,
    DatasourceVariable,
    QueryVariable,
    Row,
)
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.builders.stat import Panel as Stat
from grafana_foundation_sdk.builders.timeseries import Panel as Timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common, dashboard

SERVERS = 'job="qwen3-embeddings",instance=~"$instance"'
EMBEDDINGS = f'{SERVERS},handler="/v1/embeddings"'
DATASOURCE = dashboard.DataSourceRef(type_val="prometheus", uid="${datasource}")


@dataclass(frozen=True)
class Panel:
    """One panel: a number (stat) or lines over time, eight columns wide unless it is a number.

    Attributes:
        title: Shown above the panel.
        unit: Grafana's name of the unit.
        queries: PromQL expressions by legend.
        description: Shown on hover.
        stat: True for a single number.
    """

    title: str
    unit: str
    queries: dict[str, str]
    description: str = ""
    stat: bool = False


def rate(metric: str, labels: str = SERVERS, by: str = "instance") -> str:
    """Return the expression for a counter's rate per second, summed by labels."""
    return f"sum by ({by}) (rate({metric}{{{labels}}}[$__rate_interval]))"


def quantile(q: float, histogram: str) -> str:
    """Return the expression for a quantile of a histogram, by server."""
    buckets = rate(f"{histogram}_bucket", by="instance, le")
    return f"histogram_quantile({q}, {buckets})"


def mean(histogram: str) -> str:
    """Return the expression for the mean of a histogram, by server."""
    return f"{rate(histogram + '_sum')} / {rate(histogram + '_count')}"


def share(status: str) -> str:
    """Return the expression for the share of requests with a status class, 0 if there are none."""
    requests = rate("http_requests_total", EMBEDDINGS)
    of_status = rate("http_requests_total", f'{EMBEDDINGS},status="{status}"')
    return f"({of_status} or 0 * {requests}) / {requests}"


def gauge(metric: str) -> str:
    """Return the expression for a gauge, summed by server."""
    return f"sum by (instance) ({metric}{{{SERVERS}}})"


UNAUTHORIZED = (
    "max by (instance) (sum by (instance, handler) (rate(caddy_http_request_duration_seconds_count{"
    'job="qwen3-embeddings-proxy",code="401"}[$__rate_interval])))'
)

ROWS: dict[str, list[Panel]] = {
    "Overview": [
        Panel("Servers up", "short", {"up": f"sum(up{{{SERVERS}}})"}, stat=True),
        Panel("Texts waiting", "short",
              {"waiting": f"sum(vllm:num_requests_waiting{{{SERVERS}}})"}, stat=True),
        Panel("Texts per second", "short",
              {"texts": f"sum(rate(vllm:request_success_total{{{SERVERS}}}[$__rate_interval]))"},
              stat=True),
        Panel("Tokens per second", "short",
              {"tokens": f"sum(rate(vllm:prompt_tokens_total{{{SERVERS}}}[$__rate_interval]))"},
              stat=True),
    ],
    "Load": [
        Panel("Texts and requests per second", "short",
              {"texts {{instance}}": rate("vllm:request_success_total"),
               "requests {{instance}}": rate("http_requests_total", EMBEDDINGS)},
              "vllm:* metrics count texts, http_* metrics count requests."),
        Panel("Tokens per second", "short", {"{{instance}}": rate("vllm:prompt_tokens_total")}),
        Panel("Tokens per text", "short", {"{{instance}}": mean("vllm:request_prompt_tokens")}),
        Panel("Texts per request", "short",
              {"{{instance}}": f"{rate('vllm:request_success_total')} / "
               + rate("http_requests_total", EMBEDDINGS + ',status="2xx"')},
              "Near 1 under load: the client sends texts one by one. Raise its batch size."),
        Panel("Tokens per step", "short", {"{{instance}}": mean("vllm:iteration_tokens_total")},
              "How full the GPU's steps are. The limit is --max-num-batched-tokens."),
        Panel("Texts waiting and running", "short",
              {"waiting {{instance}}": gauge("vllm:num_requests_waiting"),
               "running {{instance}}": gauge("vllm:num_requests_running")},
              "Sampled between steps, so running is often 0."),
    ],
    "Latency": [
        Panel("Time in the queue, per text", "s",
              {f"p{q * 100:.0f} {{{{instance}}}}": quantile(q, "vllm:request_queue_time_seconds")
               for q in (0.5, 0.99)},
              "The smallest bucket is 0.3 s: values below it are interpolated."),
        Panel("Latency in the engine, per text", "s",
              {f"p{q * 100:.0f} {{{{instance}}}}": quantile(q, "vllm:time_to_first_token_seconds")
               for q in (0.5, 0.99)},
              "Queue and computation. For an embedding, the time to the first token is the whole "
              "latency; its buckets start at 1 ms, and are coarse over 20 s."),
        Panel("Latency of the HTTP server, per request", "s",
              {f"p{q * 100:.0f} {{{{instance}}}}":
               quantile(q, "http_request_duration_highr_seconds") for q in (0.5, 0.99)},
              "All routes: this metric has no label for the route."),
    ],
    "Errors": [
        Panel("Requests per second by status", "short",
              {"{{status}}": rate("http_requests_total", EMBEDDINGS, "status")},
              "A caller who gives up is counted as 2xx. 401 is not counted."),
        Panel("Share of failed requests", "percentunit",
              {"5xx {{instance}}": share("5xx"), "4xx {{instance}}": share("4xx")},
              "5xx: the server fails. 4xx: too long texts, unknown model name, size out of range."),
        Panel("Requests without a valid key, per second", "short", {"{{instance}}": UNAUTHORIZED},
              "Counted by the proxy (Caddyfile), since vLLM counts no 401."),
    ],
    "Process": [
        Panel("Memory of the API server", "bytes",
              {"{{instance}}": gauge("process_resident_memory_bytes")},
              "Host memory. No data with more than one API server process."),
        Panel("Processor time of the API server", "percentunit",
              {"{{instance}}": rate("process_cpu_seconds_total")},
              "1 is one core. Near 1: raise --api-server-count. No data with more than one API "
              "server process."),
        Panel("Preempted texts, per second", "short",
              {"{{instance}}": rate("vllm:num_preemptions_total")},
              "Above 0: the KV cache is smaller than two steps."),
    ],
}  # fmt: skip


def target(reference: str, legend: str, expression: str) -> Dataquery:
    """Return a query of a panel; `reference` is a letter, unique in the panel."""
    query = Dataquery().expr(expression).legend_format(legend).ref_id(reference)
    return query.datasource(DATASOURCE)


def build_panel(panel: Panel, number: int) -> Stat | Timeseries:
    """Return the SDK's builder of a panel; `number` is unique in the dashboard."""
    built: Stat | Timeseries
    if panel.stat:
        built = Stat().span(6).height(4)
    else:
        legend = common_builders.VizLegendOptions().show_legend(True)
        legend = legend.display_mode(common.LegendDisplayMode.LIST)
        legend = legend.placement(common.LegendPlacement.BOTTOM)
        built = Timeseries().span(8).height(8).min(0).fill_opacity(10).legend(legend)
    built = built.id(number).title(panel.title).unit(panel.unit).datasource(DATASOURCE)
    if panel.description:
        built = built.description(panel.description)
    queries = zip("ABCD", panel.queries.items(), strict=False)
    return built.targets([target(letter, *query) for letter, query in queries])


def build() -> dict[str, Any]:
    """Return the dashboard as Grafana's JSON."""
    board = (
        Dashboard("Qwen3-Embedding on vLLM")
        .uid("qwen3-embeddings")
        .tags(["vllm", "embeddings"])
        .refresh("30s")
        .time("now-1h", "now")
        .timezone(common.TimeZoneBrowser)
        .with_variable(DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(
            QueryVariable("instance")
            .label("Server")
            .datasource(DATASOURCE)
            .query('label_values(up{job="qwen3-embeddings"}, instance)')
            .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
            .all_value(".*")
        )
    )
    numbers = itertools.count(1)
    for title, panels in ROWS.items():
        board = board.with_row(Row(title).id(next(numbers)))
        for panel in panels:
            board = board.with_panel(build_panel(panel, next(numbers)))
    document: dict[str, Any] = json.loads(JSONEncoder(sort_keys=True).encode(board.build()))
    return clean(document)


def clean(value: Any) -> Any:
    """Drop nulls, and the interval settings that the SDK adds to every kind of variable.

    Grafana's own schema (@grafana/schema) refuses both.
    """
    if isinstance(value, dict):
        return {
            key: clean(item)
            for key, item in value.items()
            if item is not None and key not in ("auto", "auto_count", "auto_min")
        }
    return [clean(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    sys.stdout.write(json.dumps(build(), indent=2) + "\n")
