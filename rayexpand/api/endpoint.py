"""An endpoint for Prometheus in this process, on 127.0.0.1: for commands without Ray, or on a Ray of their own."""

from __future__ import annotations

from typing import Any

from rayexpand.contract.errors import UsageError
from rayexpand.contract.metrics import METRICS, PREFIX, Metric, publish_to


def serve_metrics(port: int) -> int:
    """Serves http://127.0.0.1:<port>/metrics until the process ends, with the memory and CPU seconds of the process; 0
    chooses a port. Returns it. Raises UsageError for a port that is taken."""
    from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector, start_http_server

    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    kinds = {"counter": Counter, "gauge": Gauge}
    made: dict[str, Any] = {one.name: kinds[one.kind](PREFIX + one.name, one.text, one.labels, registry=registry)
                            for one in METRICS}

    def sink(metric: Metric, value: float, labels: dict[str, str]) -> None:
        one = made[metric.name].labels(**labels) if labels else made[metric.name]
        one.set(value) if metric.kind == "gauge" else one.inc(value)

    try:
        server, _ = start_http_server(port, addr="127.0.0.1", registry=registry)
    except (OSError, OverflowError) as error:
        raise UsageError(f"--metrics {port}: cannot be served on 127.0.0.1 ({error}); another command may use it, so "
                         "choose another port") from error
    publish_to("endpoint", sink)
    return int(server.server_address[1])
