"""The counters of the backend, and their exporters."""

from __future__ import annotations

import dataclasses
import os
import threading
from typing import Any, Dict

import pytest
from celery import Celery, states

from celery_amqp_results import errors
from celery_amqp_results.metrics import COUNTER, Metrics
from tests.broker.helpers import LONG, Waiting, new_id, until_stored, until_watched
from tests.conftest import Apps, eventually
from tools import rabbitmq

#: Enough loose messages for a reader to pack them.
WORTH_PACKING = 40


def difference(app: Celery, before: Metrics) -> Dict[str, int]:
    """Return the counters that have changed since *before*."""
    after, then = app.backend.metrics().as_dict(), before.as_dict()
    return {name: after[name] - then[name] for name in after if after[name] != then[name]}


def test_counters_start_at_zero_and_reading_them_has_no_effect(app: Celery) -> None:
    assert app.backend.metrics() == Metrics()
    assert not app.backend._layout._registry._layouts


def test_stores_look_ups_and_packing_are_counted(make_app: Apps) -> None:
    app = make_app(
        result_backend_transport_options={"shards": 1, "inline_limit": 4096, "track_sent": True}
    )
    backend = app.backend
    # Storing
    backend.store_result(new_id(), None, states.STARTED)
    backend.store_result(new_id(), 1, states.SUCCESS)
    large = new_id()
    backend.store_result(large, "x" * 10_000, states.SUCCESS)
    after_storing = backend.metrics()
    assert 10_000 < after_storing.published_bytes < 12_000
    assert dataclasses.replace(after_storing, published_bytes=0) == Metrics(
        stored=3, confirmed=2, large=1
    )
    # Looking up, of which the second one packs
    assert backend.get_task_meta(new_id())["status"] == states.PENDING
    assert dataclasses.replace(backend.metrics(), messages_read=0) == dataclasses.replace(
        after_storing, looked_up=1, shards_read=1
    )
    for _ in range(WORTH_PACKING):
        backend.store_result(new_id(), None, states.SUCCESS)
    before = backend.metrics()
    assert backend.get_task_meta(large)["status"] == states.SUCCESS
    changed = difference(app, before)
    assert changed["packed"] >= WORTH_PACKING
    assert changed["messages_read"] >= WORTH_PACKING
    # Closing does not reset the counters
    total = backend.metrics()
    backend.close()
    assert backend.metrics() == total


def test_waits_and_pushed_states_are_counted(make_app: Apps) -> None:
    app, worker = make_app(shards=1), make_app(shards=1)
    # The first copy of a shard's first state is published once more with its queue.
    worker.backend.store_result(new_id(), 1, states.SUCCESS)
    task_id = new_id()
    waiting = Waiting(lambda: app.AsyncResult(task_id).get(timeout=LONG))
    until_watched(app, task_id, eventually)
    assert app.backend.metrics().waiting == 1
    assert app.backend.metrics().pushed == 0
    worker.backend.store_result(task_id, 1, states.SUCCESS)
    assert waiting.result() == 1
    metrics = app.backend.metrics()
    assert (metrics.waiting, metrics.pushed) == (0, 1)


def test_no_count_is_lost_between_threads(app: Celery) -> None:
    def store() -> None:
        for _ in range(50):
            app.backend.store_result(new_id(), None, "PROGRESS")

    threads = [threading.Thread(target=store) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    until_stored(app)
    assert app.backend.metrics().stored == 401


# Python 3.12 and later warn of a fork in a process with threads.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_its_own_counters(app: Celery) -> None:
    app.backend.store_result(new_id(), 1, states.SUCCESS)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        counts = b"?"
        try:
            first = app.backend.metrics().stored
            app.backend.store_result(new_id(), 1, states.SUCCESS)
            counts = f"{first} {app.backend.metrics().stored}".encode()
        finally:
            os.write(writing, counts)
            os._exit(0)
    os.close(writing)
    assert os.read(reading, 100) == b"0 1"
    os.close(reading)
    os.waitpid(child, 0)
    assert app.backend.metrics().stored == 1


def test_retries_failures_and_refusals_are_counted(make_app: Apps, node: rabbitmq.Node) -> None:
    app = make_app()
    app.backend.store_result(new_id(), 1, states.SUCCESS)
    node.ctl("close_all_connections", "for a test")
    app.backend.store_result(new_id(), 1, states.SUCCESS)
    metrics = app.backend.metrics()
    # The publisher may have noticed the closed connection before it published.
    assert metrics.retried <= 1
    assert (metrics.failed, metrics.refused) == (0, 0)

    away = make_app("amqp://guest:guest@127.0.0.1:1//?")
    away.conf.result_backend_transport_options = {"retry_policy": {"max_retries": 0}}
    with pytest.raises(errors.BackendUnavailable):
        away.backend.store_result(new_id(), 1, states.SUCCESS)
    assert (away.backend.metrics().failed, away.backend.metrics().refused) == (1, 0)

    stranger = make_app(node.url().replace("guest:guest", "guest:wrong"))
    with pytest.raises(errors.BackendUnavailable):
        stranger.backend.store_result(new_id(), 1, states.SUCCESS)
    assert (stranger.backend.metrics().failed, stranger.backend.metrics().refused) == (0, 1)


def test_prometheus(app: Celery) -> None:
    prometheus_client = pytest.importorskip("prometheus_client")
    from celery_amqp_results.exporters.prometheus import ResultsCollector

    registry = prometheus_client.CollectorRegistry()
    registry.register(ResultsCollector(app, labels={"app": "mine"}))
    assert app._backend_cache is None
    app.backend.store_result(new_id(), 1, states.SUCCESS)
    text = prometheus_client.generate_latest(registry).decode()
    assert 'celery_results_stored_total{app="mine"} 1.0' in text
    assert "# TYPE celery_results_waiting gauge" in text
    for field in dataclasses.fields(Metrics):
        suffix = "_total" if field.metadata["kind"] == COUNTER else ""
        name = f"celery_results_{field.name}{suffix}"
        assert registry.get_sample_value(name, {"app": "mine"}) == getattr(
            app.backend.metrics(), field.name
        )


def test_opentelemetry(app: Celery) -> None:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    from celery_amqp_results.exporters.opentelemetry import instrument

    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    instrument(app, provider, {"app": "mine"})
    app.backend.store_result(new_id(), 1, states.SUCCESS)
    data: Any = reader.get_metrics_data()
    (scope,) = data.resource_metrics[0].scope_metrics
    found = {}
    for metric in scope.metrics:
        (point,) = metric.data.data_points
        assert dict(point.attributes) == {"app": "mine"}
        found[metric.name] = point.value
    assert found == {
        f"celery.results.{name}": value for name, value in app.backend.metrics().as_dict().items()
    }
    provider.shutdown()
