"""What the doctor makes of numbers."""

from __future__ import annotations

import pytest

from celery_amqp_results.cli.doctor import growth_finding

DAY = 86_400.0


@pytest.mark.parametrize(
    ("results", "seconds", "expires"),
    [
        (10_000_000, 60.0, DAY),  # too early to tell
        (100_000, 3600.0, DAY),  # 9,400 in a shard at the end
        (20_000_000, DAY, DAY),  # as many as there will be
    ],
)
def test_nothing_is_said_of_growth_that_is_no_risk(
    results: float, seconds: float, expires: float
) -> None:
    assert growth_finding(results, seconds, expires, 256) is None


def test_results_that_come_too_fast_for_their_expiry_are_warned_of() -> None:
    finding = growth_finding(1_000_000, 3600.0, DAY, 256)
    assert finding is not None
    assert finding.severity == "warning"
    assert "278 results a second" in finding.text
    assert "93,750 in each shard" in finding.text
    assert "1024 shards" in finding.advice
