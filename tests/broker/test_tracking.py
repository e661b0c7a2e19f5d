"""The fate of a task that has no stored state."""

from __future__ import annotations

import asyncio
import datetime
from typing import Any, List

import amqp
import kombu.pools
import pytest
from celery import Celery, states
from celery.result import GroupResult

from celery_amqp_results import aio, errors
from celery_amqp_results.store.marks import Fate
from tests.broker.helpers import LONG, Waiting, new_id, until_watched
from tests.conftest import Apps, eventually

#: Enough loose messages for a reader to pack them.
WORTH_PACKING = 40


@pytest.fixture(autouse=True)
def fresh_connections() -> None:
    """Make tasks use connections that no earlier test has broken, which would lose the mark."""
    kombu.pools.reset()


def make(make_app: Apps, **conf: Any) -> Celery:
    return make_app(result_backend_transport_options={"shards": 1, "track_sent": True}, **conf)


def until(app: Celery, task_id: str, status: str) -> Fate:
    """Wait until the task has that fate: publishers do not wait for their marks."""

    def fate() -> Any:
        found = app.backend.fate(task_id)
        return found if found.status == status else None

    found: Fate = eventually(fate)
    return found


def test_the_fate_of_a_task_is_never_sent_waiting_stored_or_forgotten(make_app: Apps) -> None:
    sender, worker, other = make(make_app), make(make_app), make(make_app)
    before = datetime.datetime.now(datetime.timezone.utc)
    # It was never sent
    assert other.backend.fate(new_id()) == Fate("unknown")
    # It was sent, and no process has stored anything so far: not even the exchange exists
    result = sender.send_task("task")
    assert sender.backend.layout.publisher._channel._channel is None
    for app in (sender, other):
        fate = until(app, result.id, "sent")
        assert fate.since is not None
        assert before - datetime.timedelta(seconds=1) <= fate.since
        assert app.backend.task_result_exists(result.id)
        assert app.AsyncResult(result.id).state == states.PENDING
    # It finishes
    worker.backend.store_result(result.id, 3, states.SUCCESS)
    for app in (sender, other):
        assert app.backend.fate(result.id).status == "stored"
        assert app.AsyncResult(result.id).get(timeout=LONG) == 3
    # It is forgotten
    other.AsyncResult(result.id).forget()
    for app in (sender, other):
        assert until(app, result.id, "forgotten")
        assert not app.backend.task_result_exists(result.id)
        assert app.AsyncResult(result.id).state == states.PENDING


def test_a_coroutine_that_forgets_tasks_gives_them_the_fate_forgotten(make_app: Apps) -> None:
    app = make(make_app)
    results = [app.send_task("task") for _ in range(2)]
    for result in results:
        app.backend.store_result(result.id, ValueError("no"), states.FAILURE)
        app.backend.get_task_meta(result.id)
        assert app.backend.is_cached(result.id)
    asyncio.run(aio.forget(GroupResult(new_id(), results, app=app), app=app))
    for result in results:
        until(app, result.id, "forgotten")
        assert not app.backend.is_cached(result.id)


@pytest.mark.parametrize("packed", [False, True])
def test_the_fate_of_an_expired_result_is_expired(make_app: Apps, packed: bool) -> None:
    app, worker = make(make_app), make(make_app, result_expires=3)
    result = app.send_task("task")
    worker.backend.store_result(result.id, 3, states.SUCCESS)
    if packed:
        for _ in range(WORTH_PACKING):
            task_id = new_id()
            app.backend.store_result(task_id, None, states.SUCCESS)
        app.backend.close()
        assert app.backend.fate(task_id).status == "stored"
        assert app.backend.layout.store.packed >= WORTH_PACKING
    until(app, result.id, "expired")
    assert not app.backend.task_result_exists(result.id)


def test_marks_are_not_pushed(make_app: Apps) -> None:
    app, worker = make(make_app), make(make_app)
    seen: List[Any] = []
    task_id = new_id()
    waiting = Waiting(lambda: app.AsyncResult(task_id).get(timeout=LONG, on_message=seen.append))
    until_watched(app, task_id, eventually)
    app.send_task("task", task_id=task_id)
    worker.backend.store_result(task_id, 1, states.SUCCESS)
    assert waiting.result() == 1
    assert [meta["status"] for meta in seen] == [states.SUCCESS]


def test_a_broker_that_refuses_marks_does_not_refuse_tasks(
    make_app: Apps, raw: Any, caplog: pytest.LogCaptureFixture
) -> None:
    # Given an exchange that was declared for another number of shards
    make_app(shards=4).backend.store_result(new_id(), 1, states.SUCCESS)
    app = make(make_app)
    # When tasks are sent on a connection that is read
    with app.connection_for_write(transport_options={"confirm_publish": True}) as connection:
        for _ in range(5):
            app.send_task("task", connection=connection)
    # Then they arrive, and the log says what is wrong
    channel = raw.channel()
    count = channel.queue_declare(app.conf.task_default_queue, passive=True).message_count
    assert count == 5
    assert "not tracked any more" in caplog.text


def test_an_app_with_many_shards_tracks_the_first_task_of_an_installation(make_app: Apps) -> None:
    app = make_app(result_backend_transport_options={"shards": 64, "track_sent": True})
    task_id = new_id()
    app.send_task("task", task_id=task_id)
    until(app, task_id, "sent")


def test_marks_declare_nothing_if_declaring_is_turned_off(make_app: Apps, raw: Any) -> None:
    app = make_app(
        result_backend_transport_options={"shards": 1, "track_sent": True, "declare": False}
    )
    topology = app.backend.config.topology
    # Given the shard, but no exchange
    spec = topology.shard_queue(0)
    channel = raw.channel()
    channel.queue_declare(spec.name, durable=True, auto_delete=False, arguments=spec.arguments)
    # When a task is sent, and its mark has arrived
    until(app, app.send_task("task").id, "sent")
    # Then the exchange was not declared, since the user may lack the permission
    with pytest.raises(amqp.NotFound):
        channel.exchange_declare(topology.exchange, "topic", passive=True)


def test_tracking_needs_the_broker_of_the_tasks_and_the_shared_layout(make_app: Apps) -> None:
    elsewhere = make_app(
        "amqp://example.com/other", result_backend_transport_options={"track_sent": True}
    )
    with pytest.raises(errors.InvalidOption, match=r"example\.com"):
        _ = elsewhere.backend
    per_task = make_app(result_backend_transport_options={"track_sent": True, "layout": "per-task"})
    with pytest.raises(errors.InvalidOption, match="per-task"):
        _ = per_task.backend


def test_a_task_that_is_sent_to_another_broker_is_not_marked_there(make_app: Apps) -> None:
    app = make(make_app)
    with app.connection_for_write("amqp://guest:guest@127.0.0.1:1/other") as connection:
        producer = app.amqp.Producer(connection, auto_declare=False)
        assert not app.backend.config.broker.is_that_of(producer.connection)
        # This connects to nothing
        app.backend.on_task_call(producer, new_id())
        assert not connection.connected


def test_without_the_option_nothing_is_marked(app: Celery) -> None:
    result = app.send_task("task")
    app.backend.store_result(new_id(), 1, states.SUCCESS)
    assert app.backend.fate(result.id) == Fate("unknown")
    assert not app.backend.task_result_exists(result.id)
