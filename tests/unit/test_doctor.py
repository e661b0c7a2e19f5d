"""The doctor's conclusions from numbers."""

from __future__ import annotations

from typing import Any, Dict

import pytest

from celery_amqp_results.cli.amqp_checks import broker_findings, growth_finding
from celery_amqp_results.cli.management_checks import clock_findings, node_findings

DAY = 86_400.0


@pytest.mark.parametrize(
    ("results", "seconds", "expires"),
    [
        (10_000_000, 60.0, DAY),  # too early to tell
        (100_000, 3600.0, DAY),  # 9,400 in a shard at the end
        (20_000_000, DAY, DAY),  # as many as there will be
    ],
)
def test_harmless_growth_is_not_reported(results: float, seconds: float, expires: float) -> None:
    assert growth_finding(results, seconds, expires, 256) is None


def test_a_rate_too_high_for_the_expiry_is_a_warning() -> None:
    finding = growth_finding(1_000_000, 3600.0, DAY, 256)
    assert finding is not None
    assert finding.severity == "warning"
    assert "278 results a second" in finding.text
    assert "93,750 in each shard" in finding.text
    assert "1024 shards" in finding.advice


#: The management API's answer of a healthy RabbitMQ.
PROPERTIES: Dict[str, Any] = {
    "product": "RabbitMQ",
    "version": "3.10.8",
    "cluster_name": "rabbit@host",
    "capabilities": {
        "publisher_confirms": True,
        "basic.nack": True,
        "consumer_cancel_notify": True,
        "exchange_exchange_bindings": True,
        "connection.blocked": True,
    },
}


@pytest.mark.parametrize(
    ("properties", "check", "severity", "text", "advice"),
    [
        ({}, "broker", "ok", "RabbitMQ 3.10.8", ""),
        ({"version": "3.9.29"}, "broker", "warning", "3.9.29 is older than", "upgrade"),
        ({"version": "?"}, "broker", "warning", "? is older than", "upgrade"),
        ({"product": "LavinMQ"}, "broker", "warning", "LavinMQ 3.10.8, not", "per-task"),
        ({"capabilities": {}}, "features", "error", "publisher_confirms", "3.10 or later"),
        ({}, "message-size", "info", "128.0 MiB", "elsewhere"),
        ({"version": "4.0.1"}, "message-size", "info", "16.0 MiB", "elsewhere"),
    ],
)
def test_the_state_of_the_broker_is_reported(
    properties: Dict[str, Any], check: str, severity: str, text: str, advice: str
) -> None:
    found = {f.check: f for f in broker_findings({**PROPERTIES, **properties})}
    assert found[check].severity == severity
    assert text in found[check].text
    assert advice in found[check].advice
    assert ("features" in found) == (check == "features")


def test_alarms_and_unreplicated_queues_in_a_cluster_are_reported() -> None:
    node = {"name": "a@host", "mem_alarm": False, "disk_free_alarm": False}
    assert list(node_findings([node], "classic")) == []
    assert list(node_findings([node, node], "quorum")) == []
    (finding,) = node_findings([node, node], "classic")
    assert (finding.check, finding.severity) == ("cluster", "warning")
    assert "2 nodes" in finding.text
    assert "'quorum'" in finding.advice
    alarms = list(node_findings([{**node, "mem_alarm": True, "disk_free_alarm": True}], "classic"))
    assert [(f.check, f.severity) for f in alarms] == [("alarm", "error")] * 2
    assert "memory alarm" in alarms[0].text
    assert "disk space" in alarms[1].advice


@pytest.mark.parametrize(
    ("skew", "warned"), [(None, False), (-5.0, False), (5.1, True), (-90, True)]
)
def test_a_different_clock_of_the_broker_is_reported(skew: float, warned: bool) -> None:
    found = list(clock_findings(skew))
    assert len(found) == warned
    for finding in found:
        assert finding.check == "clock"
        assert "NTP" in finding.advice
