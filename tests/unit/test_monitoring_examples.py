"""The queries of the alert rules and of the dashboard name metrics that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Iterator, Set

import pytest
from celery import Celery

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples" / "monitoring"

#: A metric of ours in a query.
METRIC = re.compile(r"\bcelery_results_\w+")


def exported() -> Set[str]:
    """Return the names of all metrics as a scrape shows them."""
    pytest.importorskip("prometheus_client")
    from prometheus_client import CollectorRegistry, generate_latest

    from celery_amqp_results.exporters.prometheus import ResultsCollector

    app = Celery("metrics", broker="memory://localhost", backend="amqp://", set_as_current=False)
    registry = CollectorRegistry()
    registry.register(ResultsCollector(app))
    text = generate_latest(registry).decode()
    return set(re.findall(r"^(celery_results_\w+)[ {]", text, re.MULTILINE))


def queries_of(value: Any) -> Iterator[str]:
    """Yield all expressions in a dashboard or in rules."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key in ("expr", "query") and isinstance(item, str):
                yield item
            else:
                yield from queries_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from queries_of(item)


def test_the_dashboard_shows_metrics_that_exist() -> None:
    dashboard = json.loads((EXAMPLES / "grafana-dashboard.json").read_text())
    named = {name for query in queries_of(dashboard) for name in METRIC.findall(query)}
    assert named
    assert named <= exported()
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    # Panels lie side by side.
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]}
    assert len(places) == len(ids)


def test_the_alert_rules_use_metrics_that_exist() -> None:
    yaml = pytest.importorskip("yaml")
    rules = yaml.safe_load((EXAMPLES / "alerts.yml").read_text())
    alerts = [rule for group in rules["groups"] for rule in group["rules"]]
    assert alerts
    for alert in alerts:
        names = METRIC.findall(alert["expr"])
        assert names
        assert set(names) <= exported()
        assert alert["labels"]["severity"] in ("info", "warning", "critical")
        assert alert["annotations"]["summary"]
    assert len({alert["alert"] for alert in alerts}) == len(alerts)


def test_the_scrape_configuration_names_the_rules() -> None:
    yaml = pytest.importorskip("yaml")
    config = yaml.safe_load((EXAMPLES / "prometheus.yml").read_text())
    assert all((EXAMPLES / name).exists() for name in config["rule_files"])
    jobs = [each["job_name"] for each in config["scrape_configs"]]
    assert jobs == ["celery-results", "rabbitmq"]
