"""Fixtures for tests that break brokers."""

from __future__ import annotations

import os
from typing import Iterator

import pytest

from tests.conftest import Apps
from tests.faults.soak import CLUSTER_CONFIG
from tools import rabbitmq


@pytest.fixture
def make_app(amqp_url: str) -> Iterator[Apps]:
    """As for other tests, but with time for a broker that is being restarted."""
    apps = Apps(amqp_url, {"retry_policy": {"max_retries": 300}})
    yield apps
    apps.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[rabbitmq.Cluster]:
    """A private cluster of three nodes."""
    if os.environ.get("AMQP_URL"):
        pytest.skip("the broker of AMQP_URL is not ours to control")
    name = os.environ.get("RABBITMQ_DISTRIBUTION", "system")
    try:
        rabbitmq.ensure_installed(name)
        made = rabbitmq.Cluster(rabbitmq.distribution(name), 3, config=CLUSTER_CONFIG)
        made.start()
    except rabbitmq.NotAvailable as exc:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no RabbitMQ: {exc}")
    with made:
        yield made
