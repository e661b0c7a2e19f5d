"""Fixtures for tests that break brokers."""

from __future__ import annotations

from typing import Iterator

import pytest

from tests.conftest import Apps


@pytest.fixture
def make_app(amqp_url: str) -> Iterator[Apps]:
    """As for other tests; but a broker that is started again may take long to be there."""
    apps = Apps(amqp_url, {"retry_policy": {"max_retries": 300}})
    yield apps
    apps.close()
