"""Looking states up: what can be said without a broker."""

from __future__ import annotations

import pytest

from celery_amqp_results import store


@pytest.mark.parametrize(
    ("shards", "seconds"),
    [(1, 10.0), (store.PARALLEL, 10.0), (store.PARALLEL + 1, 20.0), (16 * store.PARALLEL, 160.0)],
)
def test_each_shard_has_its_time_and_no_more(shards: int, seconds: float) -> None:
    assert store.lookup_seconds(shards, 10.0) == seconds
