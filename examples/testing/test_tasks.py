"""Tests of tasks with a real worker in this process, by celery.contrib.pytest.

``pytest -p celery.contrib.pytest examples/testing``, with RabbitMQ at ``BROKER_URL``.
"""

from __future__ import annotations

import os
import uuid
from typing import Any, Dict

import pytest
from celery import chord, group


@pytest.fixture(scope="session")
def celery_config() -> Dict[str, Any]:
    return {
        "broker_url": os.environ.get("BROKER_URL", "amqp://guest:guest@localhost//"),
        "result_backend": "amqp://",
        # Names of their own, so that tests that run at the same time do not meet.
        "result_exchange": f"test-{uuid.uuid4().hex[:8]}",
        "task_default_queue": f"test-{uuid.uuid4().hex[:8]}",
        # Few queues to declare: each run of the tests begins with none.
        "result_backend_transport_options": {"shards": 2},
    }


@pytest.fixture(scope="session")
def celery_enable_logging() -> bool:
    return True


@pytest.fixture(scope="session")
def celery_worker_parameters() -> Dict[str, Any]:
    # With heartbeats the worker stops within 2 seconds, without them it may take 10.
    return {"without_heartbeat": False, "shutdown_timeout": 30}


@pytest.fixture
def add(celery_app: Any) -> Any:
    """A task of the app under test."""

    @celery_app.task(name="add")
    def add(x: int, y: int) -> int:
        return x + y

    return add


@pytest.fixture
def total(celery_app: Any) -> Any:
    """Another task."""

    @celery_app.task(name="total")
    def total(numbers: Any) -> int:
        return sum(numbers)

    return total


def test_a_result(add: Any, celery_worker: Any) -> None:
    celery_worker.reload()
    assert add.delay(2, 3).get(timeout=30) == 5


def test_a_group(add: Any, celery_worker: Any) -> None:
    celery_worker.reload()
    assert group(add.s(n, n) for n in range(5))().get(timeout=30) == [0, 2, 4, 6, 8]


def test_a_chord(add: Any, total: Any, celery_worker: Any) -> None:
    celery_worker.reload()
    assert chord([add.s(n, n) for n in range(5)])(total.s()).get(timeout=30) == 20
