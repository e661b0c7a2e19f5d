"""Limits of a broker compared with the needs of an app."""

from __future__ import annotations

from typing import Dict, List

import pytest

from celery_amqp_results.cli.findings import Finding
from celery_amqp_results.cli.limits import (
    Limits,
    Needs,
    advice_on_refusal,
    findings,
    limits_from,
    recommended_shards,
)


def found(limits: Limits, needs: Needs) -> Dict[str, List[Finding]]:
    """Return the findings by check."""
    by_check: Dict[str, List[Finding]] = {}
    for finding in findings(limits, needs):
        assert finding.severity == "ok" or finding.advice
        by_check.setdefault(finding.check, []).append(finding)
    return by_check


def test_no_limit_at_all() -> None:
    (finding,) = found(Limits(channel_max=2047), Needs(256))["limits"]
    assert finding.severity == "ok"


def test_a_hosted_plan_of_100_queues() -> None:
    (finding,) = found(Limits(max_queues=100, queues=12), Needs(256))["queue-limit"]
    assert finding.severity == "error"
    assert "100 queues and has 12" in finding.text
    assert "256 shards and 8 plan queues" in finding.text
    assert "amqp://?shards=16'" in finding.advice
    # With that number there is room for workers and large results
    (finding,) = found(Limits(max_queues=100, queues=12), Needs(16))["queue-limit"]
    assert finding.severity == "info"


@pytest.mark.parametrize(("free", "severity"), [(23, "error"), (24, "warning"), (30, "info")])
def test_the_last_queues_are_for_workers_and_for_processes_that_wait(
    free: int, severity: str
) -> None:
    limits = Limits(max_queues=100, queues=100 - free)
    (finding,) = found(limits, Needs(16))["queue-limit"]
    assert finding.severity == severity


def test_queues_that_are_there_are_needed_no_more() -> None:
    # Given all shards and plan queues on the broker
    needs = Needs(256, shards_present=256, plans_present=8, stored=True)
    assert "queue-limit" not in found(Limits(max_queues=300, queues=270), needs)
    # When nothing more fits in, then workers and processes that wait cannot start
    (finding,) = found(Limits(max_queues=270, queues=270), needs)["queue-limit"]
    assert finding.severity == "warning"
    assert "under another result_exchange" in finding.advice


def test_nothing_is_needed_where_nothing_is_declared() -> None:
    assert "queue-limit" not in found(Limits(max_queues=100, queues=20), Needs(256, declare=False))


@pytest.mark.parametrize(
    ("free", "shards"), [(0, 1), (12, 1), (50, 8), (88, 16), (150, 32), (10_000, 256)]
)
def test_the_recommended_number_of_shards_leaves_most_to_others(free: int, shards: int) -> None:
    assert recommended_shards(free) == shards


def test_connections_of_a_worker_and_a_client() -> None:
    # 2 to store in the main process, 1 to lead chords, 2 of Celery; in each child 2 and 1
    needs = Needs(16, concurrency=4)
    assert (needs.worker_connections, needs.client_connections) == (17, 4)
    (finding,) = found(Limits(max_connections=20, connections=3), needs)["connection-limit"]
    assert finding.severity == "warning"
    assert "20 connections and has 3" in finding.text
    assert "--pool=threads" in finding.advice
    (finding,) = found(Limits(user_max_connections=21), needs)["connection-limit"]
    assert finding.severity == "info"
    assert "the user" in finding.text


def test_channels() -> None:
    (finding,) = found(Limits(channel_max=8), Needs(16))["channel-limit"]
    assert (finding.severity, "8 channels" in finding.text) == ("info", True)
    (finding,) = found(Limits(channel_max=1), Needs(16))["channel-limit"]
    assert (finding.severity, "1 channel" in finding.text) == ("error", True)
    (finding,) = found(Limits(user_max_channels=10), Needs(16))["channel-limit"]
    assert finding.severity == "warning"
    # 0 is no limit
    assert "channel-limit" not in found(Limits(channel_max=0), Needs(16))


def test_negative_and_missing_limits_are_none() -> None:
    limits = limits_from([{"value": {"max-queues": -1}}], [])
    assert (limits.max_queues, limits.max_connections, limits.user_max_channels) == (None,) * 3
    limits = limits_from(
        [{"value": {"max-queues": 5}}], [{"value": {"max-channels": 7, "max-connections": 6}}]
    )
    assert (limits.max_queues, limits.user_max_connections, limits.user_max_channels) == (5, 6, 7)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cannot declare queue 'x' in vhost '/': vhost queue limit (100) is reached", "shards=16"),
        ("530 NOT_ALLOWED - connection limit (6) is reached", "fewer processes"),
        ("number of channels: maximum allowed user limit: 8", "connections or channels"),
    ],
)
def test_refusals_that_name_a_limit(text: str, words: str) -> None:
    assert words in str(advice_on_refusal(text, 256))


def test_other_refusals() -> None:
    assert advice_on_refusal("ACCESS_REFUSED - access to queue", 256) is None


def test_a_pool_limit_of_one_is_too_low_to_wait() -> None:
    assert "pool-limit" not in found(Limits(), Needs(16, pool_limit=10))
    (finding,) = found(Limits(), Needs(16, pool_limit=1))["pool-limit"]
    assert finding.severity == "warning"
    assert "cannot wait" in finding.text


def test_the_pool_limit_bounds_the_connections_that_are_counted() -> None:
    unlimited, limited = Needs(16, concurrency=4), Needs(16, concurrency=4, pool_limit=2)
    assert (unlimited.worker_connections, limited.worker_connections) == (17, 16)
    assert (unlimited.client_connections, limited.client_connections) == (4, 3)
